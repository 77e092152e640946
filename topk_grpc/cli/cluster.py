"""`topk cluster add`, `drain`, `remove`, `rebalance`, `pause` and `resume`: change the cluster, and see it through.

The change itself is one call. What follows is the controller's work, which these commands only watch: they may be
interrupted, and the moves go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, Self

from rich.console import Console
from rich.table import Table

from topk_grpc.cli.admin import call, call_async
from topk_grpc.cli.progress import Bar, Progress
from topk_grpc.cli.queries import ask, print_json
from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.cli.status import as_json_value, enum_word, status_of
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.pb.topk.v1 import admin_service_pb2 as pb
from topk_grpc.pb.topk.v1.topk_service_pb2 import DescribeClusterResponse, ShardDescription

_POLL_SECONDS: Final = 0.2
_PATIENCE_SECONDS: Final = 60.0
"""For how long the gateway may not answer while a command watches."""


@dataclass(slots=True)
class Moved:
    """What a command has seen.

    Attributes:
        epoch: of the topology at the end.
        slots: how many have moved.
        seconds: how long it took.
        longest_stall_ms: the longest that plays of one of them had to wait.
    """

    epoch: int
    slots: int
    seconds: float
    longest_stall_ms: int

    def text(self) -> str:
        """For people."""
        stall = f", longest wait of a slot's plays {self.longest_stall_ms:,} ms" if self.slots else ""
        return f"{self.slots:,} slots moved in {self.seconds:.1f} s{stall}"

    def value(self) -> dict[str, Any]:
        """For programs."""
        return {
            "epoch": self.epoch,
            "slots_moved": self.slots,
            "seconds": round(self.seconds, 3),
            "longest_stall_ms": self.longest_stall_ms,
        }


def run_add(names: Sequence[str], count: int, gateway: Reach, *, wait: bool, as_json: bool) -> None:
    """Adds shards; waits until they have started and have their slots.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    before = _moved_before(gateway)
    added = call(gateway, "AddShards", pb.AddShardsRequest(shard_ids=names, count=count))
    shards = list(added.shard_ids)
    listed = ", ".join(shards)
    if not wait:
        _say(as_json, {"shards": shards, "epoch": added.epoch}, f"{listed} added: slots follow once started")
        return
    moved = asyncio.run(watch_joining(gateway, shards, before))
    _say(as_json, {"shards": shards} | moved.value(), f"{listed} joined: {moved.text()}")


def run_drain(names: Sequence[str], gateway: Reach, *, wait: bool, as_json: bool) -> None:
    """Drains shards; waits until they own nothing.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    before = _moved_before(gateway)
    begun = call(gateway, "DrainShards", pb.DrainShardsRequest(shard_ids=names))
    listed = ", ".join(names)

    async def drained(cluster: DescribeClusterResponse) -> bool:
        states = {enum_word(shard, "state") for shard in _named(cluster, names)}
        if cluster.epoch >= begun.epoch and "active" in states:
            raise TopKError(f"{listed} drains no more: somebody has added it again meanwhile")
        return states <= {"drained"}

    if not wait:
        _say(as_json, {"shards": list(names), "epoch": begun.epoch}, f"{listed} drains: {begun.slots:,} slots to move")
        return
    moved = asyncio.run(_watch(gateway, f"{listed} drains", drained, before))
    hint = f"Take it out with: topk cluster remove {names[0]}"
    _say(as_json, {"shards": list(names)} | moved.value(), f"{listed} drained: {moved.text()}. {hint}")


def run_remove(name: str, gateway: Reach, *, as_json: bool) -> None:
    """Removes a shard.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    removed = call(gateway, "RemoveShard", pb.RemoveShardRequest(shard_id=name))
    _say(
        as_json,
        {"shard": name, "epoch": removed.epoch},
        f"{name} removed. Its process is needed no more; `topk up` stops it",
    )


def run_rebalance(gateway: Reach, *, dry_run: bool, wait: bool, as_json: bool) -> None:
    """Plans anew, and waits until everything is where the plan wants it; or says what that would move.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    before = _moved_before(gateway)
    plan = call(gateway, "Rebalance", pb.RebalanceRequest(dry_run=dry_run))
    slots = sum(move.slots for move in plan.moves)
    if dry_run or not wait:
        _say(as_json, as_json_value(plan) | {"slots": slots}, _plan_text(plan, slots, dry_run))
        return

    async def quiet(cluster: DescribeClusterResponse) -> bool:
        return cluster.epoch >= plan.epoch and _is_quiet(cluster)

    moved = asyncio.run(_watch(gateway, "rebalancing", quiet, before))
    _say(as_json, moved.value() | {"slots_min": plan.slots_min}, moved.text())


def run_pause(gateway: Reach, *, pause: bool, as_json: bool) -> None:
    """Lets no further move begin, or lets them begin again.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    if pause:
        answer = call(gateway, "PauseMoves", pb.PauseMovesRequest())
        text = "no further move begins until `topk cluster resume`"
    else:
        answer = call(gateway, "ResumeMoves", pb.ResumeMovesRequest())
        text = "moves go on"
    _say(as_json, {"paused": pause, "epoch": answer.epoch}, text)


def _say(as_json: bool, value: dict[str, Any], text: str | Table) -> None:
    if as_json:
        print_json(value)
    else:
        Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _plan_text(plan: pb.RebalanceResponse, slots: int, dry_run: bool) -> Table | str:
    if not slots:
        return "every shard has what it is to have: nothing moves"
    table = Table(title_justify="left", caption_justify="left")
    for name in ("from", "to"):
        table.add_column(name)
    for name in ("slots", "plays, about", "memory, about"):
        table.add_column(name, justify="right")
    for move in plan.moves:
        size = f"{move.bytes_estimated / (1 << 20):,.1f} MiB"
        table.add_row(move.source, move.target, f"{move.slots:,}", f"{move.plays_estimated:,}", size)
    verb = "would move" if dry_run else "are to move"
    plays = sum(one.plays_estimated for one in plan.moves)
    table.caption = f"{slots:,} slots {verb} ({plan.slots_min:,} at the least) with about {plays:,} plays"
    return table


# --- Watching ---------------------------------------------------------------------------------------------------------


def _is_quiet(cluster: DescribeClusterResponse) -> bool:
    return not cluster.slots_left and not cluster.migrations


def _named(cluster: DescribeClusterResponse, names: Sequence[str]) -> list[ShardDescription]:
    """The shards of these names; one that somebody has removed meanwhile is left out."""
    return [shard for shard in cluster.shards if shard.shard_id in names]


def _moved_before(gateway: Reach) -> int:
    """How many slots had moved before a command changes anything."""
    return ask(gateway, lambda client: client.describe()).slots_moved


async def watch_joining(gateway: Reach, shards: Sequence[str], before: int, progress: Progress | None = None) -> Moved:
    """Watches until new shards have started and have their slots.

    Args:
        gateway: whom to ask.
        shards: their names.
        before: how many slots had moved before they were added.
        progress: where to show it; None: on stderr.

    Raises:
        TopKError: as `_watch`.
    """
    planned_epoch = 0

    async def joined(cluster: DescribeClusterResponse) -> bool:
        nonlocal planned_epoch
        if any(enum_word(shard, "state") == "new" for shard in _named(cluster, shards)):
            return False
        if not planned_epoch:  # a controller may plan nothing by itself, and may just have done so
            planned_epoch = (await call_async(gateway, "Rebalance", pb.RebalanceRequest())).epoch
        return cluster.epoch >= planned_epoch and _is_quiet(cluster)

    return await _watch(gateway, f"{', '.join(shards)} joins", joined, before, shards, progress)


async def _watch(  # noqa: PLR0917
    gateway: Reach,
    title: str,
    done: Callable[[DescribeClusterResponse], Awaitable[bool]],
    before: int,
    starting: Sequence[str] = (),
    progress: Progress | None = None,
) -> Moved:
    """Looks at the cluster until it is as it is to be, and shows how far that is.

    Args:
        gateway: whom to ask.
        title: of the bar.
        done: whether the cluster is as it is to be.
        before: how many slots had moved before.
        starting: shards that have to start first.
        progress: where to show it; None: on stderr.

    Raises:
        TopKError: as `done`, or the gateway has not answered for too long.
    """
    began = heard = time.monotonic()
    stall_ms = 0
    async with gateway.client(deadline_seconds=_PATIENCE_SECONDS / 2) as client:
        with Progress() if progress is None else nullcontext(progress) as shown, _Showing(shown, title) as showing:
            while True:
                try:
                    cluster = await client.describe()
                    moved = cluster.slots_moved - before
                    if moved:  # else it is of moves before these
                        stall_ms = max(stall_ms, cluster.longest_stall_ms)
                    if await done(cluster):
                        return Moved(cluster.epoch, moved, time.monotonic() - began, stall_ms)
                    heard = time.monotonic()
                    showing.show(moved, cluster.slots_left, _waits_for(cluster, starting))
                except UnavailableError as error:
                    if time.monotonic() - heard > _PATIENCE_SECONDS:
                        raise unreachable(gateway, error) from error
                await asyncio.sleep(_POLL_SECONDS)


class _Showing:
    """A bar of the slots; where there is no terminal, a line whenever there is something else to wait for."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._title = title
        self._bar: Bar | None = None
        self._total = 0
        self._state = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, moved: int, left: int, state: str) -> None:
        """Shows how many slots have moved, how many have not, and what they wait for."""
        total = moved + left
        if self._bar is None or total != self._total:  # another plan
            self.__exit__()
            self._bar, self._total = self._progress.bar(self._title, total or None), total
        self._bar.update(moved, moved, state=state)
        if state != self._state and not self._progress.shown:
            self._progress.note(f"{self._title}: {state or 'goes on'}")
        self._state = state


def _waits_for(cluster: DescribeClusterResponse, starting: Sequence[str]) -> str:
    """What holds moves up; empty: nothing that can be seen."""
    new = [shard.shard_id for shard in _named(cluster, starting) if enum_word(shard, "state") == "new"]
    if new:
        return f"waits for {', '.join(new)} to start"
    if cluster.paused:
        return "paused: topk cluster resume"
    if not cluster.controller:
        return "waits for a controller: topk controller"
    down = [shard.shard_id for shard in cluster.shards if status_of(shard) == "down"]
    return f"waits for {', '.join(down)}, which does not answer" if down else ""
