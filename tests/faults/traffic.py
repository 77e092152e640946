"""Those who send: two through `TopKClient`, two that write the protocol by hand and change gateways in mid-batch.

Each is one producer. It notes its plays in the ledger before they leave, and again when they are acknowledged. Nothing
that a producer meets is a reason to stop but a finding: a play rejected, an acknowledgement that does not fit, a status
that would come again, a DuplicateBatchError.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.faults.ledger import NAMES, NOW_SONGS, PAST_HOURS, SECOND, SETS, SONGS, Ledger, Plays
from topk_grpc import TopKClient
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.model import Rejected
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch

Finding = Callable[[str], None]

CLIENT_DEADLINE_SECONDS: Final = 8.0
_SPAN: Final = 40
_REMEMBERED: Final = 600


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def reason_of(error: grpc.RpcError) -> tuple[str, bool]:
    """ErrorInfo.reason of a status, or its code where gRPC itself has made it; and whether it says to come again."""
    reason, retry = "", False
    with suppress(ValueError):
        status = rpc_status.from_call(error)
        for detail in () if status is None else status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
                reason = str(info.reason)
            retry |= detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return reason or f"grpc {error.code().name}", retry


# What a broken network, or a server that is away, may be answered with. All that our servers say comes with RetryInfo.
_OF_GRPC: Final = frozenset(
    {"grpc UNAVAILABLE", "grpc DEADLINE_EXCEEDED", "grpc CANCELLED", "grpc UNKNOWN", "grpc INTERNAL"}
)
_OF_OURS: Final = frozenset(
    {"UNAVAILABLE", "NOT_READY", "DEADLINE_EXCEEDED", "TIMEOUT", "DISK_FULL", "WRITE_FAILED", "RESOURCE_EXHAUSTED"}
)


class Producer(ABC):
    """One ordered source of batches.

    Attributes:
        name: its producer_id.
        progress_at: the time (monotonic) of its last acknowledgement.
        answers: statuses met, by reason.
    """

    def __init__(self, name: str, ledger: Ledger, finding: Finding, seed: int) -> None:
        self.name = name
        self.ledger = ledger
        self.answers: Counter[str] = Counter()
        self.progress_at = time.monotonic()
        self.chance = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._finding = finding
        self._taken_from: deque[Plays] = deque(maxlen=_REMEMBERED)

    def finding(self, what: str) -> None:
        self._finding(f"{self.name}: {what}")

    def acknowledged(self, plays: Plays) -> None:
        self.ledger.add_acknowledged(plays)
        self.progress_at = time.monotonic()

    # --- What is played -----------------------------------------------------------------------------------------------

    def past(self, rows: int) -> Plays:
        """Long ago: many, spread over a day; one chart at the most, as columns have it."""
        songs = np.minimum(self._numbers.zipf(1.3, rows) - 1, SONGS - 1) * 7919 % SONGS
        draw = self._numbers.integers
        return Plays(
            "past",
            draw(0, 3, rows),
            draw(0, PAST_HOURS, rows),
            songs,
            draw(0, 3_600_000, rows),
            np.ones(rows, np.int64),
        )

    def now(self, rows: int) -> Plays:
        """Now, or up to some minutes late, with any charts."""
        grid = self.ledger.grids["now"]
        draw = self._numbers.integers
        songs = np.minimum(draw(0, NOW_SONGS, rows), draw(0, NOW_SONGS, rows))
        late = np.where(draw(0, 5, rows) == 0, draw(0, 500, rows), 0)
        buckets = (now_ms() - grid.first_ms) // SECOND - late
        return Plays("now", draw(0, len(SETS), rows), buckets, songs, draw(0, SECOND, rows), draw(1, 4, rows))

    def remember(self, plays: Plays) -> None:
        """They are acknowledged, and may be taken back some time."""
        if plays.grid == "now" and plays.counts.min() > 0:
            self._taken_from.append(plays)

    def correction(self) -> Plays | None:
        """Takes one of the acknowledged plays of some batch back, or a part of it; each batch serves once."""
        if len(self._taken_from) < 5:
            return None
        index = self.chance.randrange(len(self._taken_from))
        plays = self._taken_from[index]
        del self._taken_from[index]
        row = slice(at := self.chance.randrange(len(plays)), at + 1)
        count = -self.chance.randint(1, int(plays.counts[row][0]))
        one = (plays.sets[row], plays.buckets[row], plays.songs[row], plays.offsets_ms[row])
        return Plays(plays.grid, *one, np.array([count]))

    @abstractmethod
    async def run(self, until: asyncio.Event) -> None:
        """Sends until told to stop, then until everything is acknowledged."""


# --- Through the library ----------------------------------------------------------------------------------------------


class ClientProducer(Producer):
    """`TopKClient`, which is to hide everything that happens."""

    def __init__(self, name: str, ledger: Ledger, finding: Finding, seed: int, target: list[str]) -> None:
        super().__init__(name, ledger, finding, seed)
        self._target = target

    def open(self, **options: Any) -> TopKClient:
        return TopKClient(
            self._target, deadline_seconds=CLIENT_DEADLINE_SECONDS, on_rejected=self._on_rejected, **options
        )

    def _on_rejected(self, rejected: Rejected) -> None:
        self.finding(f"a play was rejected: {rejected}")

    async def patiently(self, call: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> None:
        """Repeats what may fail by a deadline, as programs do."""
        while True:
            try:
                await call(*arguments, **options)
                return
            except UnavailableError:
                self.answers["gave up waiting"] += 1
            except TopKError as error:
                self.finding(f"the client stopped: {error!r}")
                raise


class ColumnsProducer(ClientProducer):
    """Many plays of the past, in columns.

    Args:
        plays_per_second: about how many it sends.
    """

    def __init__(self, *args: Any, plays_per_second: float) -> None:
        super().__init__(*args)
        self._rate = plays_per_second

    async def run(self, until: asyncio.Event) -> None:
        pending: deque[Plays] = deque()
        seen = 0

        def take_acknowledged() -> None:
            nonlocal seen
            while seen < client.stats.batches_acknowledged:  # they are acknowledged in order
                self.acknowledged(pending.popleft())
                seen += 1

        async with self.open(batch_plays=8192) as client:
            due = time.monotonic()
            while not until.is_set():
                plays = self.past(self.chance.randrange(20, max(21, min(8000, int(self._rate)))))
                due = max(due + len(plays) / self._rate, time.monotonic() - 1)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.ledger.add_sent(plays)
                pending.append(plays)
                columns = self._columns(plays)
                await self.patiently(client.record_columns, *columns)
                take_acknowledged()
            await self.patiently(client.flush)
            take_acknowledged()
            if pending:
                self.finding(f"flush returned with {len(pending)} batches unacknowledged")

    def _columns(self, plays: Plays) -> tuple[Any, ...]:
        songs = [NAMES[song].encode() for song in plays.songs.tolist()]
        charts = [",".join(SETS[each]).encode() for each in plays.sets.tolist()]
        assert not any(b"," in chart for chart in charts)

        def offsets(values: list[bytes]) -> Any:
            return np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int64)

        times = self.ledger.times_ms(plays)
        return b"".join(songs), offsets(songs), times, plays.counts, b"".join(charts), offsets(charts)


class SingleProducer(ClientProducer):
    """Plays of now, one by one, flushed now and then; some are taken back when they are known to count."""

    async def run(self, until: asyncio.Event) -> None:
        async with self.open(batch_plays=64, linger_ms=20) as client:
            while not until.is_set():
                batch = [self.now(self.chance.randrange(1, 60))]
                if self.chance.random() < 0.5 and (correction := self.correction()) is not None:
                    batch.append(correction)
                for plays in batch:
                    self.ledger.add_sent(plays)
                    await self._record(client, plays)
                await self.patiently(client.flush)
                for plays in batch:
                    self.acknowledged(plays)
                self.remember(batch[0])
                await asyncio.sleep(self.chance.uniform(0, 0.1))

    async def _record(self, client: TopKClient, plays: Plays) -> None:
        times = self.ledger.times_ms(plays)
        for row in range(len(plays)):
            song, charts = NAMES[plays.songs[row]], SETS[plays.sets[row]]
            at_ms, count = int(times[row]), int(plays.counts[row])
            await self.patiently(client.record, song, at_ms, count=count, charts=charts)


# --- By hand ----------------------------------------------------------------------------------------------------------


class RawProducer(Producer):
    """The protocol by hand: a batch goes to any gateway, again and again, until it is acknowledged."""

    def __init__(
        self, name: str, ledger: Ledger, finding: Finding, seed: int, channels: list[grpc.aio.Channel]
    ) -> None:
        super().__init__(name, ledger, finding, seed)
        self._record: list[Any] = [channel.unary_unary("/topk.v1.TopKService/RecordPlays") for channel in channels]
        self._stream: list[Any] = [channel.stream_stream("/topk.v1.TopKService/StreamPlays") for channel in channels]
        self.sequence = 0
        self.resends = 0

    def batch(self) -> tuple[bytes, Plays]:
        """The next one."""
        correction = self.correction() if self.chance.random() < 0.2 else None
        plays = correction or (self.now if self.chance.random() < 0.7 else self.past)(self.chance.randrange(1, 80))
        return self.request(plays), plays

    def request(self, plays: Plays) -> bytes:
        """A RecordPlaysRequest with the next batch."""
        self.sequence += 1
        batch = PlayBatch(producer_id=self.name, sequence=self.sequence, first_sent_ms=now_ms())
        times = self.ledger.times_ms(plays)
        for row in range(len(plays)):
            batch.plays.add(
                song_id=NAMES[plays.songs[row]],
                played_at_ms=int(times[row]),
                count=int(plays.counts[row]),
                charts=SETS[plays.sets[row]],
            )
        return pb.RecordPlaysRequest(batch=batch).SerializeToString()

    def check(self, raw: bytes, sequence: int, rows: int) -> None:
        response = pb.RecordPlaysResponse.FromString(raw)
        if (response.sequence, response.accepted, len(response.rejected)) != (sequence, rows, 0):
            self.finding(f"batch {sequence} of {rows} plays was answered {response}")

    def met(self, error: grpc.RpcError) -> None:
        """Notes a status; one that says not to come again is a finding."""
        reason, retry = reason_of(error)
        self.answers[reason] += 1
        if reason not in _OF_GRPC and not (reason in _OF_OURS and retry):
            self.finding(f"was told {reason}{'' if retry else ' without RetryInfo'}: {error.details()}")


class UnaryProducer(RawProducer):
    """RecordPlays, one batch at a time, with deadlines so short that many are missed."""

    async def run(self, until: asyncio.Event) -> None:
        kept: deque[tuple[int, bytes, int]] = deque(maxlen=_SPAN)
        while not until.is_set():
            raw, plays = self.batch()
            self.ledger.add_sent(plays)
            await self._deliver(self.sequence, raw, len(plays))
            self.acknowledged(plays)
            self.remember(plays)
            kept.append((self.sequence, raw, len(plays)))
            if self.chance.random() < 0.2:  # once more, by whatever way
                self.resends += 1
                await self._deliver(*self.chance.choice(kept))
            await asyncio.sleep(self.chance.uniform(0, 0.02))

    async def _deliver(self, sequence: int, raw: bytes, rows: int) -> None:
        while True:
            try:
                call = self.chance.choice(self._record)
                answer = await call(raw, timeout=self.chance.choice((0.05, 0.5, 5, 10)))
            except grpc.RpcError as error:
                self.met(error)
                await asyncio.sleep(self.chance.uniform(0.01, 0.2))
                continue
            self.check(answer, sequence, rows)
            return


class StreamProducer(RawProducer):
    """StreamPlays, left in the middle now and then, and gone on with at any gateway."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._unacknowledged: deque[tuple[int, bytes, Plays]] = deque()

    async def run(self, until: asyncio.Event) -> None:
        while not until.is_set() or self._unacknowledged:
            call = self.chance.choice(self._stream)()
            leave_after = self.chance.choice((1, 5, 30, 300))
            try:
                await self._run_stream(call, leave_after, until)
            except grpc.RpcError as error:
                self.met(error)
            except (TimeoutError, asyncio.InvalidStateError):
                self.answers["silence"] += 1
            finally:
                call.cancel()
            await asyncio.sleep(self.chance.uniform(0.01, 0.3))

    async def _run_stream(self, call: Any, leave_after: int, until: asyncio.Event) -> None:
        sent: deque[tuple[int, int]] = deque()

        async def send(sequence: int, raw: bytes, plays: Plays) -> None:
            async with asyncio.timeout(10):
                await call.write(raw)
            sent.append((sequence, len(plays)))

        for one in list(self._unacknowledged):
            self.resends += 1
            await send(*one)
        for _ in range(leave_after):
            # Never a sequence that lies `_SPAN` beyond one that is unacknowledged.
            while not until.is_set() and len(self._unacknowledged) < _SPAN and len(sent) < 8:
                raw, plays = self.batch()
                self.ledger.add_sent(plays)
                self._unacknowledged.append((self.sequence, raw, plays))
                await send(*self._unacknowledged[-1])
            if not sent:
                return
            async with asyncio.timeout(10):
                answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            sequence, rows = sent.popleft()
            self.check(answer, sequence, rows)
            first, _, plays = self._unacknowledged.popleft()
            if first != sequence:
                self.finding(f"batch {sequence} was acknowledged where {first} was due")
            self.acknowledged(plays)
            self.remember(plays)
