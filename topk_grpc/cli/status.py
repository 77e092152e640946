"""`topk cluster status`: the shards, what they own and hold, and what moves between them."""

from __future__ import annotations

import sys
from typing import Any, Final

from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from topk_grpc.cli.queries import ask, print_json
from topk_grpc.cli.reach import Reach
from topk_grpc.model import format_time
from topk_grpc.pb.topk.v1.topk_service_pb2 import DescribeClusterResponse, ShardDescription

_WIDTH: Final = 160  # where it goes to a file or a program
_STYLES: Final = {"down": "red", "draining": "yellow", "drained": "dim", "new": "dim"}


def run_status(gateway: Reach, as_json: bool) -> None:
    """Prints the shards."""
    cluster = ask(gateway, lambda client: client.describe())
    if as_json:
        print_json(as_json_value(cluster))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    title = f"cluster {cluster.cluster_id}, epoch {cluster.epoch}, {cluster.slots:,} slots by {cluster.partitioner}"
    console.print(title, highlight=False, soft_wrap=True)
    console.print(_table(cluster))
    for line in moving_lines(cluster):
        console.print(line, highlight=False, soft_wrap=True)


def status_of(shard: ShardDescription) -> str:
    """What a shard is and does, in a word."""
    state = enum_word(shard, "state")
    return "down" if shard.address and not shard.reachable else state


def moving_lines(cluster: DescribeClusterResponse) -> list[str]:
    """What there is to say of loads and moves, a line each."""
    plays = f", and {cluster.skew.plays:.2f} × that of plays" if cluster.skew.plays else ""
    lines = [f"the fullest shard has {cluster.skew.slots:.2f} × the mean of slots{plays}"]
    if cluster.slots_left or cluster.migrations:
        paused = ", paused (topk cluster resume)" if cluster.paused else ""
        lines.append(f"{cluster.slots_left:,} slots have yet to move{paused}")
    elif cluster.paused:
        lines.append("moves are paused (topk cluster resume)")
    if cluster.longest_stall_ms:
        lines.append(f"longest wait of a slot's plays in the last moves: {cluster.longest_stall_ms:,} ms")
    for one in cluster.migrations:
        way = f"{one.slots:,} slots from {one.source} to {one.target}"
        lines.append(f"migration {one.migration_id}: {way}, {enum_word(one, 'state')}")
    if not cluster.controller:
        lines.append("no controller is seen: nothing is planned or moved until one runs (topk controller)")
    return lines


def _table(cluster: DescribeClusterResponse) -> Table:
    table = Table()
    table.add_column("shard", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("address", no_wrap=True)
    for name in ("slots", "plays", "songs", "entries", "memory", "newest play"):
        table.add_column(name, justify="right", overflow="fold")
    for shard in cluster.shards:
        status = status_of(shard)
        held = (
            f"{shard.total_plays:,}",
            f"{shard.songs:,}",
            f"{shard.entries:,}",
            f"{shard.memory_bytes / (1 << 20):,.1f} MiB",
            format_time(shard.newest_event_ms) if shard.newest_event_ms else "–",
        )
        slots = f"{shard.slots:,}"
        if shard.slots_wanted != shard.slots:
            slots += f" → {shard.slots_wanted:,}"
        table.add_row(
            shard.shard_id,
            status,
            shard.address or "–",
            slots,
            *(held if shard.reachable else ("",) * len(held)),
            style=_STYLES.get(status),
        )
    return table


def enum_word(message: Message, name: str) -> str:
    """An enum's value as a word: `drained` of SHARD_STATE_DRAINED."""
    return str(_json_value(message.DESCRIPTOR.fields_by_name[name], getattr(message, name)))


def as_json_value(message: Message) -> dict[str, Any]:
    """A message's fields by their names; integers are numbers, whatever their width, and enums words."""
    value = {}
    for field in message.DESCRIPTOR.fields:
        found = getattr(message, field.name)
        value[field.name] = (
            [_json_value(field, one) for one in found] if field.is_repeated else _json_value(field, found)
        )
    return value


def _json_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json_value(value)
    if field.enum_type is not None:
        first = field.enum_type.values[0].name  # …_UNSPECIFIED
        return field.enum_type.values_by_number[value].name.removeprefix(first.removesuffix("UNSPECIFIED")).lower()
    return value
