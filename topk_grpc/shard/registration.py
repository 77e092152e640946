"""How a shard takes its place in the topology: the address it is reached at, and the directory that holds its plays.

The topology remembers the identity of a shard's data directory from its first start. A shard that comes up with another
one has lost its plays, or was given a wrong directory: serving from it would answer too little without a word, so it is
refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from topk_grpc.engine.ownership import Ownership
from topk_grpc.errors import ForeignDirectoryError, TopologyConflictError, TopologyError
from topk_grpc.model import ShardInfo, Topology
from topk_grpc.topology.store import TopologyStore

_TRIES: Final = 100


def find_shard(topology: Topology, shard_id: str) -> ShardInfo:
    """The shard's place.

    Raises:
        TopologyError: the topology knows no shard of that name.
    """
    info = topology.shard(shard_id)
    if info is None:
        known = ", ".join(shard.shard_id for shard in topology.shards)
        raise TopologyError(f"the topology knows no shard {shard_id!r}, only {known}: check --shard-id and --topology")
    return info


def check_directory(info: ShardInfo, directory_id: str, data_dir: str) -> None:
    """Refuses a data directory that is not the one the shard began with.

    Raises:
        ForeignDirectoryError: it is another one.
    """
    if info.directory_id and info.directory_id != directory_id:
        raise ForeignDirectoryError(
            f"{data_dir} (identity {directory_id}) is not the directory that {info.shard_id} began with (identity"
            f" {info.directory_id}): its plays are elsewhere or lost. Start the shard with its own"
            " --data-dir, or bring that back from a backup"
        )


def check_slots(topology: Topology, shard_id: str, ownership: Ownership, data_dir: str) -> None:
    """Refuses a data directory that owns other slots than the topology says: it is an older copy of the right one.

    Slots that move are left aside: what becomes of them is found out when the shard runs.

    Raises:
        ForeignDirectoryError: the two differ.
    """
    moving = {slot for held in ownership.held.values() for slot in held.slots}
    owned = set(np.flatnonzero(ownership.owned).tolist()) - moving
    said = set(topology.slots_of(shard_id)) - moving
    if owned != said:
        more, less = len(owned - said), len(said - owned)
        raise ForeignDirectoryError(
            f"{data_dir} owns {more} slots that the topology has given to other shards, and lacks {less} that it says"
            f" are {shard_id}'s: it is a copy from before slots moved. Start the shard with its newest data; a backup"
            " from before is restored only together with all the others of that time"
        )


async def register(store: TopologyStore, shard_id: str, address: str, directory_id: str, data_dir: str) -> Topology:
    """Writes address and directory into the topology, unless they stand there.

    Returns:
        The topology with them.

    Raises:
        TopologyError, ForeignDirectoryError: see above; TopologyConflictError: others changed it all the time.
    """
    for _ in range(_TRIES):
        topology = await store.read()
        info = find_shard(topology, shard_id)
        check_directory(info, directory_id, data_dir)
        wanted = replace(info, address=address, directory_id=directory_id)
        if wanted == info:
            return topology
        shards = tuple(wanted if shard.shard_id == shard_id else shard for shard in topology.shards)
        changed = replace(topology, epoch=topology.epoch + 1, shards=shards)
        try:
            await store.compare_and_set(changed)
        except TopologyConflictError:
            continue
        return changed
    raise TopologyConflictError(
        f"{shard_id} could not register its address: others changed the topology {_TRIES} times meanwhile"
    )
