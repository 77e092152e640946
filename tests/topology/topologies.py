"""The topologies that the tests of the stores keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from topk_grpc.model import ClusterSettings, ShardInfo, Topology

FIRST: Final = Topology(
    "cluster", 1, ClusterSettings(slots=4), (ShardInfo("a"), ShardInfo("b", "127.0.0.1:1", "d")), (0, 1, 1, 0)
)


def at(epoch: int, address: str = "") -> Topology:
    """FIRST, some epochs later."""
    return replace(FIRST, epoch=epoch, shards=(ShardInfo("a", address), ShardInfo("b")))
