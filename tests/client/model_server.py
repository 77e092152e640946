"""A gateway in memory, exact and obedient: a grpc.aio server that counts by the rules and fails where it is told to.

It checks the client while it serves: sequences rise without gaps on a stream, a resend carries the same bytes, and none
is 64 or more above the lowest one that the client can hold for unacknowledged. Violations gather in `violations`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from topk_grpc.errors import TopKError
from topk_grpc.pb.topk.v1 import play_pb2, query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceServicer, add_TopKServiceServicer_to_server
from topk_grpc.rpc.status import status_of


@dataclass(frozen=True)
class Script:
    """What one stream does.

    Attributes:
        batches: it ends after this many, or earlier when it owes answers and no more come; None: it goes on.
        unacknowledged: so many of the last ones are counted, but never acknowledged.
        lost: so many batches before those are read and thrown away, as if a server had died with them.
        hold: acknowledgements are held back until so many wait, or the client pauses.
        ending: the status it ends with, an error for the status table, "restart" (the server dies and comes up at its
            other address) or "hang" (it reads, but never answers again).
    """

    batches: int | None = None
    unacknowledged: int = 0
    lost: int = 0
    hold: int = 0
    ending: grpc.StatusCode | TopKError | str = grpc.StatusCode.OK


@dataclass
class Marks:
    """A producer's marks as a shard keeps them: the highest sequence and the 64 below."""

    highest: int = 0
    bits: set[int] = field(default_factory=set)

    def count(self, sequence: int) -> bool:
        """Whether the batch counts now; remembers it."""
        if sequence <= self.highest - 64 or sequence in self.bits:
            return False
        self.bits.add(sequence)
        self.highest = max(self.highest, sequence)
        self.bits = {bit for bit in self.bits if bit > self.highest - 64}
        return True


@dataclass(frozen=True)
class WatchScript:
    """What one watch does: so many steps (None: it goes on), then OK, an error, or nothing more ("hang")."""

    steps: int | None = None
    ending: TopKError | grpc.StatusCode | str | None = None


class Cluster:
    """What survives a restart: plays, marks, and what was acknowledged to whom."""

    def __init__(self) -> None:
        self.plays: list[tuple[str, int, int, tuple[str, ...]]] = []
        self.marks: dict[str, Marks] = defaultdict(Marks)
        self.payloads: dict[tuple[str, int], bytes] = {}
        self.acknowledged: dict[str, set[int]] = defaultdict(set)
        self.first_sequence: dict[str, int] = {}
        self.batch_sizes: list[int] = []
        self.first_sent_ms: list[int] = []

    def lowest_unacknowledged(self, producer: str) -> int:
        """The lowest sequence whose acknowledgement was never written."""
        sequence = self.first_sequence[producer]
        while sequence in self.acknowledged[producer]:
            sequence += 1
        return sequence

    def apply(self, batch: play_pb2.PlayBatch) -> pb.StreamPlaysResponse:
        """Counts a batch unless it counted before."""
        rejected = [
            play_pb2.RejectedPlay(index=index, reason="EMPTY_SONG_ID", message="song_id is empty: name the song")
            for index, play in enumerate(batch.plays)
            if not play.song_id
        ]
        fresh = self.marks[batch.producer_id].count(batch.sequence)
        if fresh:
            self.batch_sizes.append(len(batch.plays))
            self.first_sent_ms.append(batch.first_sent_ms)
            self.plays += [
                (play.song_id, play.played_at_ms, play.count if play.HasField("count") else 1, tuple(play.charts))
                for play in batch.plays
                if play.song_id
            ]
        return pb.StreamPlaysResponse(
            sequence=batch.sequence, accepted=len(batch.plays) - len(rejected), duplicate=not fresh, rejected=rejected
        )

    def counts(self, chart: str = "", start_ms: int | None = None, end_ms: int | None = None) -> Counter[str]:
        """The exact counts of a window."""
        counts: Counter[str] = Counter()
        for song, when, count, charts in self.plays:
            if (not chart or chart in charts) and (start_ms is None or end_ms is None or start_ms <= when < end_ms):
                counts[song] += count
        return counts


class ModelServer(TopKServiceServicer):
    """The server: `async with ModelServer(scripts) as server: TopKClient(server.targets)`."""

    def __init__(self, scripts: Iterable[Script] = (), cluster: Cluster | None = None) -> None:
        self.scripts = list(scripts)
        self.cluster = cluster if cluster is not None else Cluster()
        self.ports = _free_ports(2)
        self.violations: list[str] = []
        self.streams = 0
        self.calls: Counter[str] = Counter()
        self.reading = asyncio.Event()
        self.reading.set()
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: list[TopKError] = []
        self.watch_scripts: list[WatchScript] = []
        self.watch_tokens: list[str] = []
        self.watching = 0
        self.watched: list[list[query_pb2.Entry]] = []

    @property
    def targets(self) -> list[str]:
        """All addresses it can be reached at, now or after a restart."""
        return [f"127.0.0.1:{port}" for port in self.ports]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        assert not self.violations, self.violations

    async def start(self) -> None:
        """Serves at the first of its addresses."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_TopKServiceServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(f"127.0.0.1:{self.ports[0]}") == self.ports[0]
        await self._server.start()

    async def stop(self) -> None:
        """Dies: streams are cut."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        for task in self._tasks - {asyncio.current_task()}:
            await task

    async def restart(self) -> None:
        """Dies and comes up at the other address."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            self.ports.reverse()
            await self.start()

    def refuse_next_query(self, error: TopKError) -> None:
        """The next query gets this error."""
        self._refusals.append(error)

    # --- Recording ----------------------------------------------------------------------------------------------------

    async def RecordPlays(self, request: pb.RecordPlaysRequest, context: Any) -> pb.RecordPlaysResponse:
        await self._query("RecordPlays", context)
        return pb.RecordPlaysResponse.FromString(self.cluster.apply(request.batch).SerializeToString())

    # The stub wants an iterator; grpc.aio serves a coroutine that reads and writes by itself as well.
    async def StreamPlays(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self.streams += 1
        script = self.scripts.pop(0) if self.scripts else Script()
        requests: asyncio.Queue[pb.StreamPlaysRequest | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(context, requests))
        try:
            await self._serve(script, requests, context)
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, context: Any, requests: asyncio.Queue[pb.StreamPlaysRequest | None]) -> None:
        while True:
            await self.reading.wait()
            request = await context.read()
            if request is grpc.aio.EOF:
                requests.put_nowait(None)
                return
            requests.put_nowait(request)

    async def _serve(self, script: Script, requests: asyncio.Queue[pb.StreamPlaysRequest | None], context: Any) -> None:
        held: list[tuple[str, pb.StreamPlaysResponse]] = []
        expected: int | None = None
        handled = owed = 0
        while script.batches is None or handled < script.batches:
            try:
                request = await asyncio.wait_for(requests.get(), 0.01 if held or owed else None)
            except TimeoutError:
                await self._acknowledge(held, context)
                if owed:  # the client waits for what it will not get here: it has no more to send
                    break
                continue
            if request is None:
                await self._acknowledge(held, context)
                return
            expected = self._check(request, expected)
            handled += 1
            left = script.batches - handled if script.batches is not None else 1 << 30
            owed += left < script.unacknowledged + script.lost
            if script.unacknowledged <= left < script.unacknowledged + script.lost:
                continue
            response = self.cluster.apply(request.batch)
            if left >= script.unacknowledged + script.lost:
                held.append((request.batch.producer_id, response))
            if len(held) > script.hold:
                await self._acknowledge(held, context)
        await self._acknowledge(held, context)
        await self._end(script, context)

    async def _acknowledge(self, held: list[tuple[str, pb.StreamPlaysResponse]], context: Any) -> None:
        for producer, response in held:
            self.cluster.acknowledged[producer].add(response.sequence)
            await context.write(response)
        held.clear()

    def _check(self, request: pb.StreamPlaysRequest, expected: int | None) -> int:
        """Notes what the client does against the rules; returns the next sequence to expect."""
        batch = request.batch
        key = batch.producer_id, batch.sequence
        self.cluster.first_sequence.setdefault(batch.producer_id, batch.sequence)
        payload = request.SerializeToString(deterministic=True)
        if self.cluster.payloads.setdefault(key, payload) != payload:
            self.violations.append(f"{key} was sent with other bytes than before")
        acknowledged = self.cluster.acknowledged[batch.producer_id]
        lowest = self.cluster.lowest_unacknowledged(batch.producer_id)
        if batch.sequence >= lowest + 64:
            self.violations.append(f"{key} is 64 or more above {lowest}, the lowest unacknowledged")
        # A stream may begin below the lowest, where an acknowledgement was written but never arrived.
        skipped = range(
            self.cluster.first_sequence[batch.producer_id] if expected is None else expected, batch.sequence
        )
        if not acknowledged.issuperset(skipped):
            self.violations.append(f"{key} came before {min(set(skipped) - acknowledged)}, which is unacknowledged")
        if expected is not None and batch.sequence < expected:
            self.violations.append(f"{key} came when {expected} was due")
        return batch.sequence + 1

    async def _end(self, script: Script, context: Any) -> None:
        match script.ending:
            case "restart":
                task = asyncio.create_task(self.restart())
                self._tasks.add(task)
                await asyncio.Event().wait()
            case "hang":
                await asyncio.Event().wait()
            case TopKError():
                status = status_of(script.ending).to_grpc()
                context.set_code(status.code)
                context.set_details(status.details)
                context.set_trailing_metadata(status.trailing_metadata)
            case grpc.StatusCode() as code:
                context.set_code(code)
                context.set_details("as the script says")

    # --- Queries ------------------------------------------------------------------------------------------------------

    async def _query(self, name: str, context: Any) -> None:
        self.calls[name] += 1
        if self._refusals:
            await context.abort_with_status(status_of(self._refusals.pop(0)).to_grpc())

    def _window(self, request: Any) -> tuple[query_pb2.WindowBounds | None, Counter[str], query_pb2.Certificate]:
        bounds = None
        if request.window.WhichOneof("kind") == "tumbling":
            size, offset = request.window.tumbling.size_ms, request.window.tumbling.offset_ms
            newest = max((play[1] for play in self.cluster.plays), default=0)
            at = newest if request.as_of.HasField("latest") else request.as_of.time_ms
            start = (at - offset) // size * size + offset
            bounds = query_pb2.WindowBounds(start_ms=start, end_ms=start + size)
        counts = self.cluster.counts(request.chart, bounds and bounds.start_ms, bounds and bounds.end_ms)
        certificate = query_pb2.Certificate(
            complete=True,
            epoch=7,
            finality=query_pb2.FINALITY_PRELIMINARY,
            total_plays=counts.total(),
            distinct_songs=len(counts),
        )
        return bounds, counts, certificate

    @staticmethod
    def _ranked(counts: Counter[str]) -> list[query_pb2.Entry]:
        order = sorted(counts.items(), key=lambda item: (-item[1], item[0].encode()))
        return [query_pb2.Entry(rank=rank, song_id=song, count=n) for rank, (song, n) in enumerate(order, 1)]

    async def GetTopK(self, request: pb.GetTopKRequest, context: Any) -> pb.GetTopKResponse:
        await self._query("GetTopK", context)
        bounds, counts, certificate = self._window(request)
        return pb.GetTopKResponse(bounds=bounds, certificate=certificate, entries=self._ranked(counts)[: request.k])

    async def WatchTopK(self, request: pb.WatchTopKRequest, context: Any) -> AsyncIterator[pb.WatchTopKResponse]:
        """All watches are of one query; a list's number is its place in `watched`, which a test may clear."""
        self.watch_tokens.append(request.resume_token)
        await self._query("WatchTopK", context)
        self.watching += 1
        try:
            async for step in self._watch(request, context):
                yield step
        finally:
            self.watching -= 1

    async def _watch(self, request: pb.WatchTopKRequest, context: Any) -> AsyncIterator[pb.WatchTopKResponse]:
        script = self.watch_scripts.pop(0) if self.watch_scripts else WatchScript()
        token = request.resume_token
        known = int(token) if token and int(token) < len(self.watched) else None
        told = 0
        while script.steps is None or told < script.steps:
            counts = self.cluster.counts(request.chart)
            entries = self._ranked(counts)[: request.k]
            if not self.watched or self.watched[-1] != entries:
                self.watched.append(entries)
            newest = len(self.watched) - 1
            if told and known == newest:
                await asyncio.sleep(0.005)
                continue
            step = pb.WatchTopKResponse(number=newest, resume_token=str(newest))
            step.certificate.complete = True
            step.certificate.total_plays = counts.total()
            if known is None:
                step.snapshot.reset = bool(token)
                step.snapshot.entries.extend(entries)
                for entry in step.snapshot.entries:
                    entry.share = entry.count / counts.total()
            else:
                step.changes.previous_number = known
                step.changes.changes.extend(self._changes(self.watched[known], entries))
            known, told = newest, told + 1
            yield step
        match script.ending:
            case "hang":
                await asyncio.Event().wait()
            case TopKError():
                await context.abort_with_status(status_of(script.ending).to_grpc())
            case grpc.StatusCode() as code:
                await context.abort(code, "as the script says")

    @staticmethod
    def _changes(old: list[query_pb2.Entry], new: list[query_pb2.Entry]) -> Iterator[pb.EntryChange]:
        before, now = ({entry.song_id: entry for entry in entries} for entries in (old, new))
        for song in before.keys() - now.keys():
            yield pb.EntryChange(kind=pb.CHANGE_KIND_LEFT, entry=before[song], previous_rank=before[song].rank)
        for song, entry in now.items():
            if song not in before:
                yield pb.EntryChange(kind=pb.CHANGE_KIND_ENTERED, entry=entry)
            elif entry != before[song]:
                kind = pb.CHANGE_KIND_COUNT if entry.rank == before[song].rank else pb.CHANGE_KIND_MOVED
                yield pb.EntryChange(kind=kind, entry=entry, previous_rank=before[song].rank)

    async def GetSongs(self, request: pb.GetSongsRequest, context: Any) -> pb.GetSongsResponse:
        await self._query("GetSongs", context)
        bounds, counts, certificate = self._window(request)
        ranked = self._ranked(counts)
        ranks = {entry.song_id: entry.rank for entry in ranked}
        songs = []
        for song in request.song_ids:
            rank = ranks.get(song)
            place = len(ranked) if rank is None else rank - 1
            above = ranked[max(0, place - request.neighbours) : place]
            below = ranked[place + 1 : place + 1 + request.neighbours]
            songs.append(pb.SongStanding(song_id=song, count=counts[song], rank=rank, above=above, below=below))
        return pb.GetSongsResponse(bounds=bounds, certificate=certificate, songs=songs)

    async def ListCharts(self, request: pb.ListChartsRequest, context: Any) -> pb.ListChartsResponse:
        await self._query("ListCharts", context)
        names = {chart for play in self.cluster.plays for chart in play[3]}
        charts = []
        for name in sorted(names, key=lambda name: (-self.cluster.counts(name).total(), name)):
            counts = self.cluster.counts(name)
            charts.append(pb.ChartSummary(chart=name, total_plays=counts.total(), distinct_songs=len(counts)))
        return pb.ListChartsResponse(charts=charts)

    async def DescribeCluster(self, request: pb.DescribeClusterRequest, context: Any) -> pb.DescribeClusterResponse:
        await self._query("DescribeCluster", context)
        return pb.DescribeClusterResponse(cluster_id="model", epoch=7, k_max=10_000)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
