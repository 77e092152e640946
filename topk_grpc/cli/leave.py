"""`topk leave`: what a shard's pod does before it is stopped, as its preStop hook.

A pod is stopped alike when it is to be back in a moment and when its StatefulSet has been scaled down. What tells them
apart is the set's number of replicas: a pod whose ordinal they do not reach is not made again. Its shard, which serves
on while the hook runs, is drained and then taken out of the topology; any other one is left alone. So is one whose set
is scaled to 0, or deleted as a whole: all stop, nobody could take their slots, and the volumes stay.

All shards that are going are drained by one plan, so that no slot moves to one of them. If the set is scaled up again
meanwhile, they are kept after all. Nothing is lost where the hook fails or runs out of time: the shard's plays wait on
its volume, queries say that it is missing, and scaling up brings it back.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import Final

from topk_grpc.cli.stateful_set import StatefulSet
from topk_grpc.config import LeaveSettings
from topk_grpc.errors import SettingError, TopologyConflictError, UnavailableError
from topk_grpc.migration.members import ShardState, draining, state_of, with_new_shards, without_shard
from topk_grpc.model import Topology
from topk_grpc.topology import StoreAccess, TopologyStore, open_store
from topk_grpc.topology.change import change

_AGAIN_SECONDS: Final = 1.0


def run_leave(settings: LeaveSettings) -> None:
    """Returns when the pod may be stopped.

    Raises:
        SettingError: the Kubernetes API does not let this pod ask, or the shard is none of the set's.
        UnavailableError: the API or the topology store does not answer.
        InvalidArgumentError: no other shard can take the slots.
        UnsupportedError: the partitioner lets none be moved.
    """
    asyncio.run(_leave(settings))


async def _leave(settings: LeaveSettings) -> None:
    pods = StatefulSet(settings.statefulset, settings.kubernetes_credentials)
    ordinal = pods.ordinal_of(settings.shard_id)
    if ordinal is None:
        raise SettingError(
            f"{settings.shard_id} is no pod of the StatefulSet {pods.name}, whose pods are {pods.name}-0 and on"
            " (--shard-id, --statefulset)"
        )
    ordinals = await _ordinals(pods, settings.kubernetes_wait_seconds)
    if ordinal in ordinals or not ordinals:
        why = "is to be back" if ordinals else "stops with all others"
        _say(f"{settings.shard_id} {why}: it keeps its slots")
        return
    store = open_store(settings.topology, StoreAccess.of(settings))
    try:
        await _Departure(settings.shard_id, ordinal, store, pods).run()
    finally:
        await store.close()


async def _ordinals(pods: StatefulSet, seconds: float) -> range:
    """Asks until the API answers, or the time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        try:
            return await asyncio.to_thread(pods.ordinals)
        except UnavailableError as error:
            if loop.time() + _AGAIN_SECONDS > deadline:
                raise
            _say(f"{error}; asking again")
        await asyncio.sleep(_AGAIN_SECONDS)


class _Departure:
    """A shard that is going for good."""

    def __init__(self, shard_id: str, ordinal: int, store: TopologyStore, pods: StatefulSet) -> None:
        self._shard_id = shard_id
        self._ordinal = ordinal
        self._store = store
        self._pods = pods

    async def run(self) -> None:
        """Returns when the shard is out of the cluster, or is to stay in it after all."""
        said = ""
        while True:
            try:
                ordinals = await asyncio.to_thread(self._pods.ordinals)
                topology = await change(self._store, partial(self._next, ordinals), self._shard_id)
                state = self._tell(topology, ordinals)
                if state != said:
                    said = state
                    _say(state)
                if topology.shard(self._shard_id) is None or self._ordinal in ordinals:
                    return
            except (UnavailableError, TopologyConflictError) as error:
                _say(f"{error}; trying again")
            await asyncio.sleep(_AGAIN_SECONDS)

    def _next(self, ordinals: range, topology: Topology) -> Topology | None:
        """The next step: all that are going drain; one that is drained is out; one that is wanted again stays."""
        shard = topology.shard(self._shard_id)
        if shard is None:
            return None
        if self._ordinal in ordinals:
            return with_new_shards(topology, [self._shard_id]) if shard.draining else None
        if state_of(topology, self._shard_id) is ShardState.DRAINED:
            return without_shard(topology, self._shard_id)
        going = [one.shard_id for one in topology.shards if not one.draining and self._goes(one.shard_id, ordinals)]
        return draining(topology, going) if going else None

    def _goes(self, shard_id: str, ordinals: range) -> bool:
        ordinal = self._pods.ordinal_of(shard_id)
        return ordinal is not None and ordinal not in ordinals

    def _tell(self, topology: Topology, ordinals: range) -> str:
        shard = topology.shard(self._shard_id)
        if shard is None:
            return f"{self._shard_id} is out of the cluster"
        if self._ordinal in ordinals:
            return f"{self._shard_id} is to stay after all: it is kept"
        return f"{self._shard_id} drains: {len(topology.slots_of(self._shard_id)):,} slots to go"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # Kubernetes shows what a hook that failed has printed
