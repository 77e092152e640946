"""Asking all shards, and making sure that their answers together are the whole.

Each answer says which slots it covers. Only disjoint answers that cover every slot are merged; while slots move two
shards may both answer for one, or neither, and then all are asked again under a fresh topology. Where slots stay
uncovered every shard is asked, also those that should own none: a slot may have gone there while the store is away.

A partial answer may lack the slots of the shards that it names as missing, and no others. So where slots move beside a
shard that is down, all are asked again as well; when the time is up, their owner is named too, if it has said nothing
about others. An answer that covers nothing is left out in any case: its shard may be giving slots away, whose plays
stand among all others until it has read that they are gone.

Where songs live in slots, the shards that own slots have all plays. Where they do not (ring/partitioners.py), every
shard that has ever started may have some, and is asked. Whoever knows the owners of all slots knows these too: a shard
gets its first plays with its first slots, and is not let go with plays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import (
    DeadlineError,
    InvalidArgumentError,
    NotReadyError,
    OutOfRangeError,
    ResourceExhaustedError,
    TopKError,
    UnavailableError,
)
from topk_grpc.gateway.routing import Routing, RoutingWatch
from topk_grpc.model import ShardInfo, Topology
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.pb.topk.v1 import shard_service_pb2_grpc as pb_grpc
from topk_grpc.ring.partitioners import Partitioner, partitioner_of
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error

_AGAIN_SECONDS: Final = (0.05, 1.0)


class Covered(Protocol):
    """An answer that says what it covers."""

    @property
    def coverage(self) -> pb.Coverage:
        """The slots, and the state they were answered from."""


AnswerT = TypeVar("AnswerT", bound=Covered)


@dataclass(frozen=True, slots=True)
class Gathered(Generic[AnswerT]):
    """What the shards answered.

    Attributes:
        topology: that they were asked under.
        answers: by shard_id.
        missing: the shards that did not answer.
    """

    topology: Topology
    answers: Mapping[str, AnswerT]
    missing: tuple[str, ...]

    @property
    def newest_event_ms(self) -> int:
        """The time of the newest play; 0 without any."""
        known = [answer.coverage.newest_event_ms for answer in self.answers.values() if answer.coverage.newest_event_ms]
        return max(known, default=0)


@dataclass(frozen=True, slots=True)
class _Line:
    """A connection to a shard: what it was opened for, an address and certificates, and the calls on it."""

    opened_for: tuple[str, int]
    channel: grpc.aio.Channel
    stub: pb_grpc.ShardServiceStub


class ShardQueries:
    """Query stubs to the shards, on connections of their own: a query must not wait behind megabytes of plays."""

    def __init__(self, settings: GatewaySettings, channels: ShardChannels) -> None:
        self._settings = settings
        self._shards = channels
        self._lines: dict[str, _Line] = {}
        self._closing: set[asyncio.Task[None]] = set()  # channels being closed

    def _drop(self, shard_id: str, line: _Line) -> None:
        """Lets the calls on a channel come to their end; the next call opens another one."""
        if self._lines.get(shard_id) is line:
            del self._lines[shard_id]
            task = asyncio.create_task(line.channel.close(self._settings.query_seconds))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _line(self, shard: ShardInfo) -> _Line:
        line = self._lines.get(shard.shard_id)
        wanted = (shard.address, self._shards.generation)
        if line is None or line.opened_for != wanted:
            if line is not None:
                self._drop(shard.shard_id, line)
            # Asking again is the caller's: gRPC's own retries hide why, and hold up those that go without the shard.
            channel = self._shards.open(shard.address, options=[("grpc.enable_retries", 0)])
            line = self._lines[shard.shard_id] = _Line(wanted, channel, pb_grpc.ShardServiceStub(channel))
        return line

    async def ask(self, shard: ShardInfo, method: str, request: Any, seconds: float) -> Any:
        """Asks one shard; an answer in pages is put together.

        Raises:
            TopKError: as the shard said, or UnavailableError.
        """
        if not shard.address:
            raise UnavailableError(f"{shard.shard_id} has not started yet")
        metadata = self._shards.metadata(shard.shard_id)
        line = self._line(shard)
        try:
            call = getattr(line.stub, method)
            messages = await _messages(call(request, timeout=max(seconds, 0.001), metadata=metadata))
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if isinstance(failure, UnavailableError | DeadlineError | NotReadyError):
                metrics.SHARD_UNANSWERED.labels(shard.shard_id).inc()
            if isinstance(failure, DeadlineError) and seconds >= self._settings.query_seconds / 2:
                # The shard may be slow, or the connection dead without a word, which keepalive takes long to find out:
                # a new connection is cheap.
                self._drop(shard.shard_id, line)
            raise failure from error
        metrics.SHARD_QUERY_MESSAGES.labels(method).inc(1 + len(messages))
        metrics.SHARD_QUERY_BYTES.labels(method).inc(sum(message.ByteSize() for message in (request, *messages)))
        for page in messages[1:]:
            messages[0].MergeFrom(page)
        return messages[0]

    def keep_only(self, topology: Topology) -> None:
        """Lets go of shards that are not in the cluster any more."""
        for gone in self._lines.keys() - {shard.shard_id for shard in topology.shards}:
            self._drop(gone, self._lines[gone])

    async def close(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(line.channel.close() for line in self._lines.values()), *self._closing)


class Scatter:
    """Asks all shards of the current topology.

    Args:
        settings: the gateway's.
        watch: follows the topology.
        queries: the way to the shards.
    """

    def __init__(self, settings: GatewaySettings, watch: RoutingWatch, queries: ShardQueries) -> None:
        self._settings = settings
        self._watch = watch
        self._queries = queries

    @property
    def partitioner(self) -> Partitioner:
        """The cluster's."""
        return partitioner_of(self._watch.current.topology.settings.partitioner)

    async def gather(
        self, method: str, request: Any, *, allow_partial: bool, deadline: float | None = None
    ) -> Gathered[Any]:
        """Asks until the answers are disjoint and whole, or the time is up.

        Args:
            method: of ShardService.
            request: its message.
            allow_partial: leave out shards that do not answer, or do not answer for their slots in time, and name them.
            deadline: of the event loop's clock; None: `query_seconds` from now.

        Raises:
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
            ResourceExhaustedError, InvalidArgumentError: as a shard said.
        """
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + self._settings.query_seconds
        routing = self._watch.current
        everybody = False
        told = ""
        partial: Gathered[Any] | None = None
        again, again_max = _AGAIN_SECONDS
        while True:
            gathered, failures = await self._ask_all(routing, method, request, deadline, everybody=everybody)
            _raise_out_of_range(failures.values())
            for failure in failures.values():
                if isinstance(failure, InvalidArgumentError | ResourceExhaustedError):
                    raise failure
            problem = self._problem(gathered, failures)
            if problem is None:
                return gathered
            lacking = _owners_of_uncovered(gathered)
            if allow_partial and failures and lacking <= failures.keys() and not self._overlap(gathered):
                return replace(gathered, missing=tuple(sorted(failures)))
            # A shard that restarts, or a slot that moves, is back within moments: ask again as long as there is time.
            # The last time is too short for an answer: what was wrong before that says more.
            late = failures and all(isinstance(failure, DeadlineError) for failure in failures.values())
            if not (told and late):
                told = problem
                whole = not self._overlap(gathered) and lacking.isdisjoint(gathered.answers)
                partial = replace(gathered, missing=tuple(sorted(failures.keys() | lacking))) if whole else None
            if loop.time() + again >= deadline:
                if allow_partial and partial is not None:
                    return partial
                raise UnavailableError(told)
            await asyncio.sleep(again)
            again = min(again_max, 2 * again)  # the others scan for nothing each time
            everybody = not failures and not self._overlap(gathered)  # slots are covered by nobody who was asked
            routing = await self._watch.refresh()

    async def _ask_all(
        self, routing: Routing, method: str, request: Any, deadline: float, *, everybody: bool
    ) -> tuple[Gathered[Any], dict[str, TopKError]]:
        seconds = deadline - asyncio.get_running_loop().time()
        owning = self._shards_with_plays(routing)
        asked = routing.topology.shards if everybody else owning
        results = await asyncio.gather(
            *(self._queries.ask(shard, method, request, seconds) for shard in asked), return_exceptions=True
        )
        answers: dict[str, Any] = {}
        failures: dict[str, TopKError] = {}
        for shard, result in zip(asked, results, strict=True):
            if isinstance(result, TopKError):
                if shard in owning:
                    failures[shard.shard_id] = result
            elif isinstance(result, BaseException):
                raise result
            elif _slots(result) or not self.partitioner.whole_songs:
                answers[shard.shard_id] = result
        return Gathered(routing.topology, answers, tuple(failures)), failures

    def _shards_with_plays(self, routing: Routing) -> list[ShardInfo]:
        """The shards that own slots and, where songs are spread, all that have ever started."""
        owning = routing.owning
        if self.partitioner.whole_songs:
            return owning
        return [shard for shard in routing.topology.shards if shard in owning or shard.directory_id]

    def _problem(self, gathered: Gathered[Any], failures: Mapping[str, TopKError]) -> str | None:
        if failures:
            shard_id, failure = next(iter(failures.items()))
            return f"{shard_id} does not answer ({failure}): ask again, or set allow_partial to go without it"
        if self._overlap(gathered):
            return "two shards answer for the same slot: a slot is moving, ask again"
        covered = sum(_slots(answer).bit_count() for answer in gathered.answers.values())
        if covered != gathered.topology.settings.slots:
            left = gathered.topology.settings.slots - covered
            return f"{left} slots are answered by no shard: a slot is moving, ask again"
        return None

    @staticmethod
    def _overlap(gathered: Gathered[Any]) -> bool:
        seen = 0
        for answer in gathered.answers.values():
            slots = _slots(answer)
            if seen & slots:
                return True
            seen |= slots
        return False


def _raise_out_of_range(failures: Iterable[TopKError]) -> None:
    """Joins the bounds that the shards name: those of the coarsest grain can be cut by all."""
    refused = [failure for failure in failures if isinstance(failure, OutOfRangeError)]
    if refused:
        start_ms, end_ms = min(one.start_ms for one in refused), max(one.end_ms for one in refused)
        widest = max(refused, key=lambda one: one.end_ms - one.start_ms)
        raise OutOfRangeError(str(widest), start_ms, end_ms)


def _owners_of_uncovered(gathered: Gathered[Any]) -> set[str]:
    """The shards that ought to have answered for slots that no answer covers."""
    covered = 0
    for answer in gathered.answers.values():
        covered |= _slots(answer)
    topology = gathered.topology
    owners = {owner for slot, owner in enumerate(topology.owners) if not covered >> slot & 1}
    return {topology.shards[owner].shard_id for owner in owners}


async def _messages(call: Any) -> list[Any]:
    """The answer of a call, in its messages; there is one at least."""
    return [page async for page in call] if isinstance(call, grpc.aio.UnaryStreamCall) else [await call]


def _slots(answer: Covered) -> int:
    """The slots an answer covers: slot s at bit s."""
    return int.from_bytes(answer.coverage.slots, "little")
