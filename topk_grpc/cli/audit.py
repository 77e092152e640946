"""`topk audit`: recounts from disk what the shards serve; and cuts a damaged log, if asked to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import typer

from topk_grpc.cli.progress import Progress
from topk_grpc.cli.shard_directories import ShardDirectories, address_of, find, is_in_use
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import TopKError, TopologyError
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error
from topk_grpc.shard.audit import OnBytes, Report, Served, audit_live, audit_request, audit_stopped, served_of
from topk_grpc.shard.losses import losses
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.repair import Cut, repair_tail
from topk_grpc.topology import StoreAccess

_SECONDS: Final = 300.0
_LINES_MAX: Final = 50


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line said.

    Attributes:
        data_dir: of a cluster, or of one shard.
        shard_ids: only these; none: all.
        reach: the way to topology and shards, which is a gateway's. Its topology is empty where none was named.
        json: print JSON.
    """

    data_dir: Path
    shard_ids: Sequence[str]
    reach: GatewaySettings
    json: bool

    def find(self) -> ShardDirectories:
        """The directories that are meant.

        Raises:
            TopKError: there are none.
        """
        return find(self.data_dir, self.shard_ids, self.reach.topology, StoreAccess.of(self.reach))


def run(request: Request) -> None:
    """Audits all shards, and prints what was found.

    Raises:
        typer.Exit: with 1, where counts differ or a shard could not be audited.
        TopKError: there is nothing to audit.
    """
    found = request.find()
    told: list[dict[str, Any]] = []
    failed = False
    with Progress() as progress:
        for shard_id, path in found.shards.items():
            bar = progress.bar(shard_id, None)

            def on_bytes(done: int, total: int, shard_id: str = shard_id) -> None:
                bar.update(done, done, f"{done / max(total, 1):.0%} of the log")  # noqa: B023

            try:
                report = _audit(request, found, shard_id, path, on_bytes)
            except TopKError as error:
                failed = True
                told.append({"shard_id": shard_id, "ok": False, "error": str(error)})
                _say(request, f"{shard_id}: could not be audited: {error}")
            else:
                failed |= bool(report.differences)
                told.append({"shard_id": shard_id, "ok": not report.differences, **asdict(report)})
                _print(request, shard_id, report)
            finally:
                bar.close()
    if request.json:
        print(json.dumps({"ok": not failed, "shards": told}, ensure_ascii=False))  # noqa: T201
    if failed:
        raise typer.Exit(1)


def _audit(request: Request, found: ShardDirectories, shard_id: str, path: Path, on_bytes: OnBytes) -> Report:
    topology = found.topology
    if not is_in_use(path):
        return audit_stopped(path, topology.settings if topology else None, on_bytes)
    if topology is None:
        raise TopologyError(
            f"a process has {path}, but where {shard_id} is reached stands in no topology: name --topology, and"
            " --shard-id as it is called there"
        )
    address = address_of(topology, shard_id)
    channels = ShardChannels(request.reach, topology.cluster_id, topology.secret)

    def ask(slots: Sequence[int]) -> Served:
        return asyncio.run(_ask(channels, address, shard_id, slots))

    return audit_live(path, ask, on_bytes)


async def _ask(channels: ShardChannels, address: str, shard_id: str, slots: Sequence[int]) -> Served:
    async with channels.open(address) as channel:
        metadata = channels.metadata(shard_id)
        try:
            answer = await ShardServiceStub(channel).Audit(audit_request(slots), timeout=_SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return served_of(answer)


def _print(request: Request, shard_id: str, report: Report) -> None:
    for note in report.notes:
        _say(request, f"{shard_id}: note: {note}")
    whom = "what it serves" if report.live else "what a start would serve"
    if not report.differences:
        ways = " and from ".join(report.counts)
        _say(
            request,
            f"{shard_id}: ok: {report.plays:,} plays at position {report.position}, counted from {ways}, are {whom}",
        )
        return
    _say(request, f"{shard_id}: {len(report.differences)} differences from {whom} at position {report.position}:")
    for difference in report.differences:
        _say(request, f"  {difference}")


def _say(request: Request, line: str) -> None:
    if not request.json:
        print(line)  # noqa: T201


# --- Repair -----------------------------------------------------------------------------------------------------------


def run_repair(request: Request) -> None:
    """Cuts the log of each shard whose last segment is damaged, and prints what is lost.

    Raises:
        TopKError: a process has a directory, or the damage cannot be cut off.
    """
    found = request.find()
    told = []
    for shard_id, path in found.shards.items():
        DataDirectory.look(path)  # never make one here
        directory = DataDirectory.open(path)
        try:
            cut = repair_tail(directory)
        finally:
            directory.close()
        told.append({"shard_id": shard_id, "cut": None if cut is None else _print_cut(request, shard_id, cut)})
        if cut is None:
            _say(request, f"{shard_id}: the log's tail is sound: nothing was cut")
    if request.json:
        print(json.dumps({"shards": told}, ensure_ascii=False))  # noqa: T201


def _print_cut(request: Request, shard_id: str, cut: Cut) -> dict[str, Any]:
    batches, others = losses(cut.records)
    plays = sum(one.plays for one in batches)
    _say(request, f"{shard_id}: {cut.segment} was damaged, and was cut at position {cut.position}")
    _say(request, f"  cut off: {cut.cut_bytes:,} bytes, kept in {cut.kept}")
    _say(
        request,
        f"  lost: {cut.groups} groups; of them {len(cut.records)} records can still be read, with {len(batches)}"
        f" batches of {plays:,} plays",
    )
    for one in batches[:_LINES_MAX]:
        _say(request, f"    producer {one.producer_id}, sequence {one.sequence}: {one.plays:,} plays")
    if len(batches) > _LINES_MAX:
        _say(request, f"    and {len(batches) - _LINES_MAX} more (--json lists all)")
    for other in others[:_LINES_MAX]:
        _say(request, f"    {other}")
    _say(request, "  Producers that send these batches again, with the same sequences, count them once.")
    return {
        "damage": cut.damage,
        "segment": str(cut.segment),
        "kept": str(cut.kept),
        "position": cut.position,
        "cut_bytes": cut.cut_bytes,
        "groups": cut.groups,
        "records": len(cut.records),
        "batches": [one.to_json() for one in batches],
        "plays": plays,
        "others": others,
    }
