"""How a shard takes its place in the topology: the address it is reached at, and the directory that holds its plays.

A shard that has no place is refused, unless it was told to join: it then takes one that owns nothing, at the moment at
which it could serve. Its directory must own nothing either (`check_slots`): it is new, or that of a shard which was
drained before it left.

The topology remembers the identity of a shard's data directory from its first start. A shard that comes up with another
one has lost its plays, or was given a wrong directory: serving from it would answer too little without a word, so it is
refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from topk_grpc.engine.ownership import Ownership
from topk_grpc.errors import ForeignDirectoryError, TopologyError
from topk_grpc.migration.members import with_shard
from topk_grpc.model import ShardInfo, Topology
from topk_grpc.topology.change import change
from topk_grpc.topology.store import TopologyStore


def find_shard(topology: Topology, shard_id: str) -> ShardInfo:
    """The shard's place.

    Raises:
        TopologyError: the topology knows no shard of that name.
    """
    info = topology.shard(shard_id)
    if info is None:
        known = ", ".join(shard.shard_id for shard in topology.shards)
        raise TopologyError(
            f"the topology knows no shard {shard_id!r}, only {known}: check --shard-id and --topology, or have it join"
            f" the cluster (--join, or `topk cluster add {shard_id}`)"
        )
    return info


def check_directory(info: ShardInfo | None, directory_id: str, data_dir: str) -> None:
    """Refuses a data directory that is not the one the shard began with; one that has no place yet began with none.

    Raises:
        ForeignDirectoryError: it is another one.
    """
    if info is not None and info.directory_id and info.directory_id != directory_id:
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


async def register(
    store: TopologyStore, shard_id: str, address: str, directory_id: str, data_dir: str, *, join: bool = False
) -> Topology:
    """Writes address and directory into the topology, unless they stand there.

    Args:
        store: of the topology.
        shard_id, address, directory_id: what is written.
        data_dir: for messages.
        join: take a place if there is none.

    Returns:
        The topology with them.

    Raises:
        TopologyError, ForeignDirectoryError: see above; TopologyConflictError: others changed it all the time.
        InvalidArgumentError: the cluster can have no such shard.
    """

    def decide(topology: Topology) -> Topology | None:
        if join and topology.shard(shard_id) is None:
            return with_shard(topology, ShardInfo(shard_id, address, directory_id))
        info = find_shard(topology, shard_id)
        check_directory(info, directory_id, data_dir)
        wanted = replace(info, address=address, directory_id=directory_id)
        return None if wanted == info else with_shard(topology, wanted)

    return await change(store, decide, f"the address of {shard_id}")
