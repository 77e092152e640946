"""Who is to own which slot: a partitioner's plan, with shards as indexes and what it needs checked."""

from __future__ import annotations

from collections.abc import Sequence

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.ring.bounded_load import load_max
from topk_grpc.ring.partitioners import partitioner_of

__all__ = ["load_max", "plan_owners"]


def plan_owners(
    partitioner: str, shard_ids: Sequence[str], slots: int, current: Sequence[str | None] | None = None
) -> tuple[int, ...]:
    """Plans who owns what. The same arguments give the same plan in every process.

    Args:
        partitioner: its name: ring/partitioners.py.
        shard_ids: those to share the slots, distinct. Their order plays no part in who gets what.
        slots: the cluster's number of slots, at least as many as shards.
        current: the present owner of each slot, who need not be among shard_ids; None for nobody, or altogether for a
            new cluster.

    Returns:
        For each slot the owner's index in shard_ids.

    Raises:
        SettingError: no such partitioner.
        InvalidArgumentError: no shards, one twice, more shards than slots, or `current` of another length.
    """
    plan = partitioner_of(partitioner).plan
    if not 0 < len(shard_ids) <= slots:
        raise InvalidArgumentError(f"{len(shard_ids)} shards cannot share {slots} slots: there must be 1 to {slots}")
    if len(set(shard_ids)) != len(shard_ids):
        raise InvalidArgumentError("a shard is named twice: shard ids have to be distinct")
    if current is not None and len(current) != slots:
        raise InvalidArgumentError(f"{len(current)} present owners were given for {slots} slots")
    index_of = {name: index for index, name in enumerate(shard_ids)}
    return tuple(index_of[name] for name in plan(shard_ids, slots, current))
