"""`topk backup` and `topk restore`: a cluster's, or one shard's, data directory into an archive and back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from topk_grpc.cli.progress import Progress
from topk_grpc.cli.shard_directories import TOPOLOGY, find
from topk_grpc.errors import DirectoryInUseError, DiskFullError, InvalidArgumentError, StorageError
from topk_grpc.storage import DataDirectory, OsFiles
from topk_grpc.storage.archive import Archive, Stored
from topk_grpc.storage.backup import copy_shard
from topk_grpc.storage.files import Files, is_no_space
from topk_grpc.storage.restore import Plan, check, finish, plan_shard, prepare, put, restore_shard
from topk_grpc.topology.codec import decode

SETTLED: Final = TOPOLOGY
"""The file of a cluster that is written last: with it, what is there is whole."""


# --- Backup -----------------------------------------------------------------------------------------------------------


def run_backup(data_dir: Path, target: Path, shard_ids: Sequence[str], keep: int, *, as_json: bool) -> None:
    """Backs up all shards, or those named, and prints what was copied.

    Raises:
        StorageError: something cannot be read or written; there is no new backup then.
    """
    started = time.monotonic()
    with Progress() as progress:
        bar = progress.bar("backup", None)
        number, archive, shards = back_up(
            OsFiles(),
            data_dir,
            target,
            shard_ids,
            keep,
            time.time_ns() // 1_000_000,
            lambda name: bar.update(0, 0, name),
        )
    told = {
        "backup": number,
        "target": str(target),
        "copied_bytes": archive.copied_bytes,
        "seconds": round(time.monotonic() - started, 3),
        "shards": {name: {"end": one["end"], "notes": one["notes"]} for name, one in shards.items()},
    }
    if as_json:
        print(json.dumps(told, ensure_ascii=False))  # noqa: T201
        return
    for name, one in shards.items():
        for note in one["notes"]:
            print(f"{name}: note: {note}")  # noqa: T201
    print(  # noqa: T201
        f"backup {number} of {', '.join(shards)} in {target}: {archive.copied_bytes / 1e6:,.1f} MB copied in"
        f" {told['seconds']:.1f} s"
    )


def back_up(  # noqa: PLR0917
    files: Files, data_dir: Path, target: Path, shard_ids: Sequence[str], keep: int, now_ms: int, on_shard: Any = None
) -> tuple[int, Archive, dict[str, Any]]:
    """Makes one backup; returns its number, the archive, and what the manifest says of each shard."""
    found = find(data_dir, shard_ids)
    topology = data_dir / TOPOLOGY
    try:
        before = topology.read_bytes() if topology.exists() else None
        if before is not None:
            _check_unmoved(before, before, str(topology))
        archive = Archive.open(target, files, make=True)
        with archive.held():
            shards = {}
            for name, path in found.shards.items():
                if on_shard is not None:
                    on_shard(name)
                shards[name] = _copy(files, path, name, archive)
            others = {}
            if before is not None:  # it holds the cluster's secret
                _check_unmoved(before, topology.read_bytes(), str(topology))
                others[TOPOLOGY] = archive.put(TOPOLOGY, before, private=True).to_json()
            number = archive.commit({"created_ms": now_ms, "shards": shards, "files": others})
            if keep:
                archive.prune(keep)
    except OSError as error:
        kind = DiskFullError if is_no_space(error) else StorageError
        raise kind(f"no backup was made in {target}: {error}. The earlier ones are as they were") from error
    return number, archive, shards


def _check_unmoved(before: bytes, after: bytes, where: str) -> None:
    """Shards are copied one after the other: a slot that moved meanwhile might be in both copies, or in none."""
    first, last = decode(before, where), decode(after, where)
    if first.migrations or last.migrations or first.owners != last.owners:
        raise StorageError(
            f"no backup was made: slots are moving between shards ({where}). `topk cluster pause`, wait until"
            " `topk cluster status` shows no migration, back up, `topk cluster resume`"
        )


def _copy(files: Files, path: Path, name: str, archive: Archive) -> dict[str, Any]:
    look = DataDirectory.look(path, files)
    try:
        held = DataDirectory.open(path, files)
    except DirectoryInUseError:
        return copy_shard(look, name, archive, live=True)
    try:
        return copy_shard(held, name, archive, live=False)
    finally:
        held.close()


# --- Restore ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What the command line said."""

    target: Path
    data_dir: Path | None
    backup: int | None
    shard_ids: Sequence[str]
    snapshot: int | None
    json: bool


def run_restore(request: RestoreRequest) -> None:
    """Restores a backup, and prints what was restored.

    Raises:
        InvalidArgumentError: options that make no sense together.
        StorageError: the backup is damaged, or the directory not empty.
    """
    if request.data_dir is None:
        raise InvalidArgumentError("say where to: --data-dir DIR, a new directory or an empty one")
    with Progress() as progress:
        bar = progress.bar("restore", None)
        plans = restore(OsFiles(), request, lambda name: bar.update(0, 0, name))
    if request.json:
        shards = {name: {"end": plan.end} for name, plan in plans.items()}
        print(json.dumps({"data_dir": str(request.data_dir), "shards": shards}))  # noqa: T201
        return
    for name, plan in plans.items():
        print(f"{name}: restored up to position {plan.end} of its log")  # noqa: T201
    print(  # noqa: T201
        f"{request.data_dir} is ready. Producers that send again what they sent after the backup count it once."
    )


def restore(files: Files, request: RestoreRequest, on_shard: Any = None) -> dict[str, Plan]:
    """Restores; returns what each shard was restored from."""
    data_dir = request.data_dir
    if data_dir is None:
        raise InvalidArgumentError("restoring needs a data directory")
    archive, number, plans = _plans(files, request)
    content = archive.read(number)
    topology = content["files"].get(TOPOLOGY)
    for plan in plans.values():
        check(archive, plan.objects())
    if len(plans) == 1 and (request.shard_ids or topology is None):
        (plan,) = plans.values()
        restore_shard(archive, plan, files, data_dir)
        return plans
    if topology is None or len(plans) < len(content["shards"]):
        raise InvalidArgumentError("restore a whole cluster (no --shard-id), or one shard into its own directory")
    try:
        prepare(files, data_dir, SETTLED)
        for name, plan in plans.items():
            if on_shard is not None:
                on_shard(name)
            restore_shard(archive, plan, files, data_dir / name)
        put(files, data_dir / TOPOLOGY, archive.get(Stored.from_json(topology)), private=True)
        finish(files, data_dir)
    except OSError as error:
        kind = DiskFullError if is_no_space(error) else StorageError
        raise kind(f"{data_dir} could not be restored: {error}. Restore again, there or elsewhere") from error
    return plans


def _plans(files: Files, request: RestoreRequest) -> tuple[Archive, int, dict[str, Plan]]:
    archive = Archive.open(request.target, files, make=False)
    numbers = archive.numbers()
    if not numbers:
        raise StorageError(f"{request.target} holds no finished backup")
    number = request.backup or numbers[-1]
    content = archive.read(number)
    names = list(request.shard_ids) or list(content["shards"])
    if request.snapshot is not None and len(names) != 1:
        raise InvalidArgumentError("--snapshot is a number of one shard's: name it with --shard-id")
    return archive, number, {name: plan_shard(archive, number, name, request.snapshot) for name in names}


def run_list(request: RestoreRequest) -> None:
    """Prints what backups there are.

    Raises:
        StorageError: there are none.
    """
    archive = Archive.open(request.target, make=False)
    contents = [archive.read(number) for number in archive.numbers()]
    if request.json:
        print(json.dumps({"backups": contents}, ensure_ascii=False))  # noqa: T201
        return
    for content in contents:
        made = datetime.fromtimestamp(content["created_ms"] / 1000, UTC)
        print(f"backup {content['number']}, made {made:%Y-%m-%dT%H:%M:%SZ}")  # noqa: T201
        for name, one in content["shards"].items():
            snapshots = ", ".join(f"{each['number']} at {each['position']}" for each in one["snapshots"]) or "none"
            print(f"  {name}: up to position {one['end']}; snapshots {snapshots}")  # noqa: T201


def run_check(request: RestoreRequest) -> None:
    """Reads every byte of a backup.

    Raises:
        CorruptError: one is not as it was written.
    """
    archive, number, plans = _plans(OsFiles(), request)
    objects = [one for plan in plans.values() for one in plan.objects()]
    check(archive, objects)
    size = sum(one.seal.size for one in dict.fromkeys(objects))
    told = {"backup": number, "ok": True, "objects": len(set(objects)), "bytes": size}
    print(json.dumps(told) if request.json else f"backup {number} is whole: {size / 1e6:,.1f} MB")  # noqa: T201
