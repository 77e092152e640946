"""Queries over the whole cluster: bounds, scatter, merge, certificate.

Where a song lives on one shard, the k best of the shards' k best are exact, and a song's rank is 1 plus how many
entries stand before it on each shard. Where its plays are spread, the k best are found by thresholds (spread.py),
and what only a shard with a song's whole count could say is refused.

Python orders strings by code point, which is the order of their UTF-8 bytes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final, Literal, TypeVar

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.engine.windows import bounds_of, is_final
from topk_grpc.errors import InvalidArgumentError, WindowError
from topk_grpc.gateway.scatter import Gathered, Scatter
from topk_grpc.gateway.spread import best_spread
from topk_grpc.model import (
    Answer,
    Bounds,
    Certificate,
    ChartSummary,
    Entry,
    Finality,
    GlobalWindow,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    SongsAnswer,
    SongStanding,
    TumblingWindow,
    Window,
)
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.rpc import convert

T = TypeVar("T")

SONGS_MAX: Final = 100
NEIGHBOURS_MAX: Final = 100
_KINDS: Final[Mapping[type[Window], str]] = {
    GlobalWindow: "global",
    TumblingWindow: "tumbling",
    SlidingWindow: "sliding",
    SessionWindow: "session",
    RangeWindow: "range",
}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _ordered(places: Iterable[tuple[str, int]], k: int | None = None) -> list[tuple[str, int]]:
    """Best first; the k best alone, if that is said."""
    ranked = sorted([(-count, song_id) for song_id, count in places])
    return [(song_id, -count) for count, song_id in ranked[:k]]


class Queries:
    """Answers clients' queries.

    Args:
        settings: the gateway's.
        resolution_ms: the cluster's.
        scatter: asks the shards.
        clock: epoch milliseconds.
    """

    def __init__(
        self, settings: GatewaySettings, resolution_ms: int, scatter: Scatter, clock: Callable[[], int] = _now_ms
    ) -> None:
        self._settings = settings
        self._resolution_ms = resolution_ms
        self._scatter = scatter
        self._clock = clock
        for kind in _KINDS.values():
            metrics.QUERY_SECONDS.labels(kind)

    async def _bounds(
        self, window: Window, as_of: int | Literal["latest"] | None, *, allow_partial: bool
    ) -> Bounds | None:
        if isinstance(window, GlobalWindow):
            if as_of is not None:
                raise WindowError(
                    "as_of has no meaning for the global window, which holds all plays: leave it out, or ask for"
                    " another window"
                )
            return None
        if as_of == "latest":
            gathered = await self._scatter.gather(
                "DescribeShard", pb.DescribeShardRequest(), allow_partial=allow_partial
            )
            as_of = gathered.newest_event_ms or None
        return bounds_of(window, self._clock() if as_of is None else as_of, self._resolution_ms)

    def _distinct_songs(self, each: Iterable[int]) -> int | None:
        """The songs of all shards, from each one's; None where a song may be on several."""
        return sum(each) if self._scatter.partitioner.whole_songs else None

    def _certificate(self, gathered: Gathered[Any], bounds: Bounds | None, listed_plays: int = 0) -> Certificate:
        watermark_ms = min(gathered.newest_event_ms, self._clock())
        complete = not gathered.missing
        final = is_final(
            bounds,
            complete=complete,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=int(self._settings.allowed_lateness_seconds * 1000),
        )
        coverages = [answer.coverage for answer in gathered.answers.values()]
        total_plays = sum(coverage.total_plays for coverage in coverages)
        return Certificate(
            complete=complete,
            missing_shards=gathered.missing,
            epoch=gathered.topology.epoch,
            watermark_ms=watermark_ms,
            finality=Finality.FINAL if final else Finality.PRELIMINARY,
            total_plays=total_plays,
            distinct_songs=self._distinct_songs(coverage.distinct_songs for coverage in coverages),
            other_plays=total_plays - listed_plays,
        )

    async def top_k(
        self, window: Window, k: int, chart: str, as_of: int | Literal["latest"] | None, *, allow_partial: bool
    ) -> Answer:
        """The k best.

        Raises:
            InvalidArgumentError: k or the window is out of range.
            UnsupportedError: a session window, where songs are spread over shards.
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
        """
        began = time.perf_counter()
        if not 1 <= k <= self._settings.k_max:
            raise InvalidArgumentError(f"k is {k}: ask for 1 to {self._settings.k_max} entries")
        if isinstance(window, SessionWindow):
            self._scatter.partitioner.require_whole_songs("a session window")
        bounds = await self._bounds(window, as_of, allow_partial=allow_partial)
        scope = _scope(window, chart, bounds, live=as_of is None)
        answer = await self._best(scope, k, bounds, allow_partial=allow_partial)
        _count(answer.certificate, window, began)
        return answer

    async def top_k_between(self, bounds: Bounds, k: int, chart: str, *, allow_partial: bool) -> Answer:
        """The k best of a span of history; `k` is the caller's to check.

        Raises:
            OutOfRangeError: no tier cuts the span exactly.
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
        """
        scope = _scope(RangeWindow(bounds.start_ms, bounds.end_ms), chart, bounds, live=False)
        return await self._best(scope, k, bounds, allow_partial=allow_partial)

    async def _best(self, scope: pb.Scope, k: int, bounds: Bounds | None, *, allow_partial: bool) -> Answer:
        if not self._scatter.partitioner.whole_songs:
            gathered, places = await best_spread(self._scatter, self._settings, scope, k, allow_partial=allow_partial)
            sessions: dict[str, Bounds] = {}
        else:
            gathered = await self._scatter.gather(
                "QueryTopK", pb.QueryTopKRequest(scope=scope, k=k), allow_partial=allow_partial
            )
            answers = gathered.answers.values()
            each = (zip(answer.song_ids, answer.counts, strict=True) for answer in answers)
            places = _ordered(chain.from_iterable(each), k)
            sessions = _sessions(answers)
        certificate = self._certificate(gathered, bounds, sum(count for _, count in places))
        total = certificate.total_plays
        entries = tuple(
            Entry(rank, song_id, count, count / total, sessions.get(song_id))
            for rank, (song_id, count) in enumerate(places, 1)
        )
        return Answer(bounds, certificate, entries)

    async def songs(
        self,
        window: Window,
        song_ids: Sequence[str],
        chart: str,
        as_of: int | Literal["latest"] | None,
        neighbours: int,
        *,
        allow_partial: bool,
    ) -> SongsAnswer:
        """Count, rank and neighbours of songs. Count and rank are read one after the other: plays in between may show.

        Raises:
            InvalidArgumentError: songs, neighbours or the window are out of range.
            UnsupportedError: songs are spread over shards.
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
        """
        began = time.perf_counter()
        if not 1 <= len(song_ids) <= SONGS_MAX:
            raise InvalidArgumentError(f"{len(song_ids)} songs are asked for: ask for 1 to {SONGS_MAX} at once")
        if neighbours > NEIGHBOURS_MAX:
            raise InvalidArgumentError(f"{neighbours} neighbours are asked for: ask for 0 to {NEIGHBOURS_MAX}")
        self._scatter.partitioner.require_whole_songs("a song's rank")
        bounds = await self._bounds(window, as_of, allow_partial=allow_partial)
        scope = _scope(window, chart, bounds, live=as_of is None)
        request = pb.QueryCountsRequest(scope=scope, song_ids=song_ids)
        counted: Gathered[pb.QueryCountsResponse] = await self._scatter.gather(
            "QueryCounts", request, allow_partial=allow_partial
        )
        places = _places(song_ids, counted)
        if not places:
            nothing = tuple(SongStanding(song_id, 0, None) for song_id in song_ids)
            certificate = self._certificate(counted, bounds)
            _count(certificate, window, began)
            return SongsAnswer(bounds, certificate, nothing)
        ranks = pb.QueryRanksRequest(
            scope=scope,
            places=[pb.Place(song_id=song_id, count=count) for song_id, count in places],
            neighbours=neighbours,
        )
        ranked: Gathered[pb.QueryRanksResponse] = await self._scatter.gather(
            "QueryRanks", ranks, allow_partial=allow_partial
        )
        counted, ranked = _in_both(counted, ranked)
        present = _places(song_ids, counted)
        certificate = self._certificate(ranked, bounds, sum(count for _, count in present))
        standings = {
            place: _standing(place, index, ranked, neighbours, certificate.total_plays)
            for index, place in enumerate(places)
            if place in present
        }
        sessions = {
            song_id: Bounds(answer.sessions.starts_ms[index], answer.sessions.ends_ms[index])
            for answer in counted.answers.values()
            if answer.HasField("sessions")
            for index, song_id in enumerate(song_ids)
            if answer.counts[index]
        }
        known = dict(present)
        songs = tuple(
            dataclasses.replace(standings[song_id, known[song_id]], session=sessions.get(song_id))
            if song_id in known
            else SongStanding(song_id, 0, None)
            for song_id in song_ids
        )
        _count(certificate, window, began)
        return SongsAnswer(bounds, certificate, songs)

    async def charts(self, *, allow_partial: bool) -> tuple[Certificate, tuple[ChartSummary, ...]]:
        """All charts with their totals, largest first.

        Raises:
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
        """
        gathered: Gathered[pb.QueryChartsResponse] = await self._scatter.gather(
            "QueryCharts", pb.QueryChartsRequest(), allow_partial=allow_partial
        )
        plays: dict[str, int] = {}
        songs: dict[str, list[int]] = {}
        for answer in gathered.answers.values():
            for chart, total, distinct in zip(answer.charts, answer.total_plays, answer.distinct_songs, strict=True):
                plays[chart] = plays.get(chart, 0) + total
                songs.setdefault(chart, []).append(distinct)
        summaries = tuple(
            ChartSummary(chart, total, self._distinct_songs(songs[chart])) for chart, total in _ordered(plays.items())
        )
        certificate = self._certificate(gathered, None)
        _count_partial(certificate)
        return certificate, summaries


def _count(certificate: Certificate, window: Window, began: float) -> None:
    metrics.QUERY_SECONDS.labels(_KINDS[type(window)]).observe(time.perf_counter() - began)
    _count_partial(certificate)


def _count_partial(certificate: Certificate) -> None:
    if not certificate.complete:
        metrics.QUERIES_PARTIAL.inc()


def _scope(window: Window, chart: str, bounds: Bounds | None, *, live: bool) -> pb.Scope:
    scope = pb.Scope(chart=chart)
    if bounds is not None:
        scope.bounds.CopyFrom(query_pb2.WindowBounds(start_ms=bounds.start_ms, end_ms=bounds.end_ms))
        if isinstance(window, SessionWindow):
            scope.session_gap_ms = window.gap_ms
        if live and not isinstance(window, RangeWindow):
            scope.standing.CopyFrom(convert.window_to_pb(window))
    return scope


def _sessions(answers: Iterable[pb.QueryTopKResponse]) -> dict[str, Bounds]:
    """How far the songs' sessions reach; empty for other windows."""
    return {
        song_id: Bounds(start, end)
        for answer in answers
        if answer.HasField("sessions")
        for song_id, start, end in zip(answer.song_ids, answer.sessions.starts_ms, answer.sessions.ends_ms, strict=True)
    }


def _places(song_ids: Sequence[str], counted: Gathered[pb.QueryCountsResponse]) -> list[tuple[str, int]]:
    """The songs that have plays, each once, with their counts."""
    counts = {
        song_id: sum(answer.counts[index] for answer in counted.answers.values())
        for index, song_id in enumerate(song_ids)
    }
    return [place for place in counts.items() if place[1]]


def _in_both(
    counted: Gathered[pb.QueryCountsResponse], ranked: Gathered[pb.QueryRanksResponse]
) -> tuple[Gathered[pb.QueryCountsResponse], Gathered[pb.QueryRanksResponse]]:
    """Leaves the shards out that answered only once: a song's count without its rank would not fit the totals."""
    missing = tuple(dict.fromkeys((*counted.missing, *ranked.missing)))
    counted = dataclasses.replace(counted, answers=_without(counted.answers, missing), missing=missing)
    return counted, dataclasses.replace(ranked, answers=_without(ranked.answers, missing), missing=missing)


def _without(answers: Mapping[str, T], shard_ids: Sequence[str]) -> dict[str, T]:
    return {shard_id: answer for shard_id, answer in answers.items() if shard_id not in shard_ids}


def _standing(
    place: tuple[str, int], index: int, ranked: Gathered[pb.QueryRanksResponse], neighbours: int, total_plays: int
) -> SongStanding:
    """Joins what the shards say about one place."""
    standings = [answer.standings[index] for answer in ranked.answers.values()]
    rank = 1 + sum(standing.above_count for standing in standings)
    near = {one.song_id: one for standing in standings for one in (*standing.above, *standing.below)}
    above = _ordered((one.song_id, one.count) for standing in standings for one in standing.above)
    below = _ordered((one.song_id, one.count) for standing in standings for one in standing.below)
    above = above[-neighbours:] if neighbours else []

    def entries(first: int, places: list[tuple[str, int]]) -> tuple[Entry, ...]:
        return tuple(
            Entry(rank, song_id, count, count / total_plays, convert.session_from_pb(near[song_id]))
            for rank, (song_id, count) in enumerate(places, first)
        )

    return SongStanding(
        place[0],
        place[1],
        rank,
        entries(rank - len(above), above),
        entries(rank + 1, below[:neighbours]),
        place[1] / total_plays if total_plays else 0.0,
    )
