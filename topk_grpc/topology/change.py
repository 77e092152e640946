"""Changing a topology that others change too: read, decide, replace, and again where somebody was quicker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from topk_grpc.errors import TopologyConflictError
from topk_grpc.model import Topology
from topk_grpc.topology.store import TopologyStore

TRIES: Final = 100
"""How often a change is tried: of all who race for an epoch one gets on each time."""


async def change(store: TopologyStore, decide: Callable[[Topology], Topology | None], what: str) -> Topology:
    """Changes the topology, whatever others do meanwhile.

    Args:
        store: of the topology.
        decide: makes the next topology of the present one, or None: it is to stay as it is. Asked anew each time, so
            what it raises is true of the topology as it is.
        what: is being written, for the message: `shard-0's address`.

    Returns:
        The topology that holds then, durably.

    Raises:
        TopologyConflictError: others changed it all the time.
        TopKError: it cannot be read or written. A change that failed otherwise than by a conflict may have happened.
    """
    for _ in range(TRIES):
        topology = await store.read()
        changed = decide(topology)
        if changed is None:
            return topology
        try:
            await store.compare_and_set(changed)
        except TopologyConflictError:
            continue
        return changed
    raise TopologyConflictError(
        f"{what} could not be written: others changed the topology {TRIES} times meanwhile. Try again"
    )
