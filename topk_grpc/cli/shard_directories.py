"""Which shards' data directories a command means: those of a cluster of `topk up`, or one shard's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from topk_grpc.errors import InvalidArgumentError, StorageError, TopologyError
from topk_grpc.model import Topology
from topk_grpc.storage import OsFiles
from topk_grpc.topology import StoreAccess, open_store

TOPOLOGY: Final = "topology.json"
FORMAT: Final = "FORMAT"


@dataclass(frozen=True, slots=True)
class ShardDirectories:
    """What was found.

    Attributes:
        topology: of the cluster; None: a shard's directory was named, and no topology.
        shards: the directories by shard.
    """

    topology: Topology | None
    shards: dict[str, Path]


def find(
    data_dir: Path, shard_ids: Sequence[str], topology_url: str = "", access: StoreAccess | None = None
) -> ShardDirectories:
    """Finds them.

    Args:
        data_dir: of a cluster, or of one shard.
        shard_ids: only these; none: all.
        topology_url: where the topology is, if not in the directory of the cluster.
        access: what the store there asks for.

    Raises:
        InvalidArgumentError: there is no such shard.
        StorageError: the directory is neither.
    """
    inside = data_dir / TOPOLOGY
    url = topology_url or (f"file:{inside}" if inside.exists() else "")
    topology = read_topology(url, access) if url else None
    if (data_dir / FORMAT).exists():
        if len(shard_ids) > 1:
            raise InvalidArgumentError(f"{data_dir} is the directory of one shard: name one --shard-id, or none")
        return ShardDirectories(topology, {shard_ids[0] if shard_ids else data_dir.resolve().name: data_dir})
    if topology is None:
        raise StorageError(
            f"{data_dir} is no data directory: it has neither {TOPOLOGY}, as one of `topk up`, nor {FORMAT}, as one of"
            " a shard"
        )
    known = [shard.shard_id for shard in topology.shards]
    if unknown := set(shard_ids) - set(known):
        raise InvalidArgumentError(f"there is no shard {sorted(unknown)[0]!r}, only {', '.join(known)}: see --shard-id")
    return ShardDirectories(topology, {one: data_dir / one for one in shard_ids or known})


def read_topology(url: str, access: StoreAccess | None = None) -> Topology:
    """Reads a topology.

    Raises:
        TopologyError: there is none.
        UnavailableError: the store does not answer.
    """

    async def read() -> Topology:
        store = open_store(url, access)
        try:
            return await store.read()
        finally:
            await store.close()

    return asyncio.run(read())


def is_in_use(path: Path) -> bool:
    """Whether a process has a shard's directory."""
    try:
        OsFiles().lock(path / "LOCK").close()
    except BlockingIOError:
        return True
    except OSError as error:
        raise StorageError(f"{path} cannot be used: {error}") from error
    return False


def address_of(topology: Topology, shard_id: str) -> str:
    """Where a shard that runs is reached.

    Raises:
        TopologyError: nobody says where.
    """
    info = topology.shard(shard_id)
    if info is None or not info.address:
        known = ", ".join(shard.shard_id for shard in topology.shards)
        raise TopologyError(
            f"where {shard_id} is reached does not stand in the topology, which knows {known}: --shard-id"
        )
    return info.address
