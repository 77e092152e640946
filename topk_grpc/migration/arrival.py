"""Waiting for a topology, or making the first one: the parts of a cluster start in any order."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

from topk_grpc.errors import TopologyConflictError, TopologyError, UnavailableError
from topk_grpc.model import Topology
from topk_grpc.rpc import log
from topk_grpc.topology.store import TopologyStore

_LOOK_SECONDS: Final = 0.2
_SAY_SECONDS: Final = 10.0


async def first_topology(
    store: TopologyStore, url: str, stop: asyncio.Event, new: Topology | None = None
) -> Topology | None:
    """The topology, waiting for it as long as it takes.

    Args:
        store: where it will be.
        url: of the store, for the log.
        stop: set when there is no need to wait any longer.
        new: is written where the store says that there is none; None: somebody else makes one.

    Returns:
        It, or None where there was none before the stop.

    Raises:
        StorageError: what is there is damaged, or cannot be read.
    """
    say_at = time.monotonic()
    while not stop.is_set():
        try:
            return await _read_or_make(store, new)
        except (TopologyError, UnavailableError) as error:
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + _SAY_SECONDS
                log.event("topology_awaited", topology=url, reason=str(error))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOOK_SECONDS)
    return None


async def _read_or_make(store: TopologyStore, new: Topology | None) -> Topology:
    try:
        return await store.read()
    except TopologyError:
        if new is None:
            raise
    with suppress(TopologyConflictError):  # somebody else was quicker
        await store.compare_and_set(new)
        log.event("topology_created", cluster=new.cluster_id, shards=len(new.shards), slots=new.settings.slots)
    return await store.read()
