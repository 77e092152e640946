"""A stream of generated plays with its own count, and the check of a cluster's answers against that count.
 Songs are numbered; song n is in chart n mod charts, and there are so many charts that none has more songs than one
answer may list. So the answers for all charts together name every song of the stream, and every count is compared,
not a sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from topk_grpc.cli.load import Int64s, Zipf, song_columns, song_name
from topk_grpc.client import TopKClient
from topk_grpc.model import Entry

CHART_SONGS_MAX: Final = 10_000
"""The most songs of a chart here: the largest k of a query."""

PANE_MS: Final = 600_000
"""The tumbling windows that the plays are spread over."""

PANES: Final = 3
_SAMPLE: Final = 100
_AT_ONCE: Final = 4  # queries
_MISTAKES_SHOWN: Final = 10

Step = Callable[[int, int], None]
"""Is told how many of how many charts are compared."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch's columns, as `TopKClient.record_columns` takes them."""

    songs: Int64s
    song_data: npt.NDArray[np.uint8]
    song_offsets: Int64s
    played_at_ms: Int64s
    chart_data: npt.NDArray[np.uint8]
    chart_offsets: Int64s


class Stream:
    """Batches that are sent round and round; counts what was sent.

    Every song is in it at least once, all else is drawn by Zipf's law.
    """

    def __init__(self, songs: int, plays: int, batch_plays: int, now_ms: int, seed: int) -> None:
        """Draws the batches.

        Args:
            songs: how many different ones.
            plays: in one round, at least `songs`.
            batch_plays: in each batch.
            now_ms: the clock; no play is later.
            seed: the same one draws the same.
        """
        self.songs = songs
        self.charts = -(-songs // CHART_SONGS_MAX)
        drawn = Zipf(songs, 1.0, seed).draw(max(plays - songs, 0))
        order = np.random.default_rng(seed).permutation(songs + len(drawn))
        self._drawn = np.concatenate([np.arange(songs, dtype=np.int64), drawn])[order]
        self.pane_starts = [now_ms // PANE_MS * PANE_MS - (PANES - 1 - pane) * PANE_MS for pane in range(PANES)]
        self._batch_plays = batch_plays
        self._pieces = [self._drawn[at : at + batch_plays] for at in range(0, len(self._drawn), batch_plays)]
        self.sent = np.zeros(len(self._pieces), np.int64)
        self._turn = 0

    def next_batch(self) -> Batch:
        """The next batch; it counts as sent."""
        index = self._turn % len(self._pieces)
        self._turn += 1
        self.sent[index] += 1
        songs = self._pieces[index]
        when = np.full(len(songs), self.pane_starts[index % PANES], np.int64)
        return Batch(songs, *song_columns(songs), when, *self._chart_columns(songs))

    def counts(self, pane: int | None = None) -> Int64s:
        """Plays sent of each song; of one pane or of all."""
        weights = self.sent.copy()
        if pane is not None:
            weights[np.arange(len(weights)) % PANES != pane] = 0
        per_play = np.repeat(weights, [len(piece) for piece in self._pieces])
        # Exact: the sums stay far below 2^53.
        return np.bincount(self._drawn, weights=per_play, minlength=self.songs).astype(np.int64)

    def chart_name(self, chart: int) -> str:
        """The name of a chart's number."""
        return f"genre-{chart:04d}"

    def _chart_columns(self, songs: Int64s) -> tuple[npt.NDArray[np.uint8], Int64s]:
        digits = np.empty((len(songs), 10), np.uint8)
        digits[:, :6] = np.frombuffer(b"genre-", np.uint8)
        rest = songs % self.charts
        for place in range(9, 5, -1):
            rest, digit = np.divmod(rest, 10)
            digits[:, place] = digit + ord("0")
        return digits.reshape(-1), np.arange(len(songs) + 1, dtype=np.int64) * 10


@dataclass(slots=True)
class Verdict:
    """What the comparison found.

    Attributes:
        counts: how many songs' counts were compared.
        compared: what, in words.
        mistakes: the first differences; none means that the cluster is exact.
        mistake_count: how many there were.
    """

    counts: int = 0
    compared: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    mistake_count: int = 0

    def check(self, what: str, found: object, expected: object) -> None:
        """Notes a difference."""
        if found != expected:
            self.mistake_count += 1
            if len(self.mistakes) < _MISTAKES_SHOWN:
                self.mistakes.append(f"{what}: the cluster says {found}, the generator {expected}")


async def compare(client: TopKClient, stream: Stream, seed: int, step: Step) -> Verdict:
    """Compares a cluster that counted nothing but the stream with it: all counts, orders and totals.

    Raises:
        TopKError: the cluster does not answer.
    """
    verdict = Verdict()
    counts = stream.counts()
    await _compare_charts(client, stream, counts, verdict, step)
    order = ranking(counts)
    await _compare_top(client, "global", None, counts, order, verdict)
    await _compare_sample(client, counts, order, seed, verdict)
    for pane, start_ms in enumerate(stream.pane_starts):
        pane_counts = stream.counts(pane)
        await _compare_top(
            client, f"tumbling:{PANE_MS // 60_000}m", start_ms, pane_counts, ranking(pane_counts), verdict
        )
    return verdict


def ranking(counts: Int64s) -> Int64s:
    """The songs that were played, best first: by count, then by name, which goes by number here."""
    order = np.argsort(-counts, kind="stable")
    return order[: int(np.count_nonzero(counts))]


async def _compare_charts(client: TopKClient, stream: Stream, counts: Int64s, verdict: Verdict, step: Step) -> None:
    summaries = {chart.chart: (chart.total_plays, chart.distinct_songs) for chart in await client.charts()}
    songs = np.arange(stream.songs)
    asked = [asyncio.create_task(_best_of(client, stream, chart)) for chart in range(min(_AT_ONCE, stream.charts))]
    for chart in range(stream.charts):
        name = stream.chart_name(chart)
        entries = await asked[chart]
        if len(asked) < stream.charts:
            asked.append(asyncio.create_task(_best_of(client, stream, len(asked))))
        members = songs[songs % stream.charts == chart]
        order = members[ranking(counts[members])]
        await asyncio.to_thread(_compare_entries, f"chart {name}", entries, counts, order, verdict)
        expected = (int(counts[members].sum()), len(order))
        verdict.check(f"chart {name}, plays and songs", summaries.get(name, (0, 0)), expected)
        verdict.counts += len(order)
        step(chart + 1, stream.charts)
    verdict.compared.append(
        f"the count of each of {verdict.counts:,} songs, in {stream.charts:,} chart(s), and their order"
    )


async def _best_of(client: TopKClient, stream: Stream, chart: int) -> tuple[Entry, ...]:
    return (await client.top_k("global", CHART_SONGS_MAX, chart=stream.chart_name(chart))).entries


async def _compare_top(  # noqa: PLR0917
    client: TopKClient, window: str, as_of: int | None, counts: Int64s, order: Int64s, verdict: Verdict
) -> None:
    answer = await client.top_k(window, CHART_SONGS_MAX, as_of=as_of)
    best = order[:CHART_SONGS_MAX]
    _compare_entries(window, answer.entries, counts, best, verdict)
    verdict.check(f"{window}, plays", answer.certificate.total_plays, int(counts.sum()))
    verdict.check(f"{window}, songs", answer.certificate.distinct_songs, len(order))
    verdict.check(f"{window}, complete", answer.certificate.complete, True)
    verdict.compared.append(f"{window}: the top {len(best):,}, all plays, all songs")


async def _compare_sample(client: TopKClient, counts: Int64s, order: Int64s, seed: int, verdict: Verdict) -> None:
    places = np.sort(np.random.default_rng(seed).choice(len(order), min(_SAMPLE, len(order)), replace=False)).tolist()
    answer = await client.songs([song_name(int(order[place])) for place in places])
    for place, song in zip(places, answer.songs, strict=True):
        verdict.check(
            f"{song.song_id}, count and rank", (song.count, song.rank), (int(counts[order[place]]), place + 1)
        )
    verdict.compared.append(f"the exact rank of {len(places)} songs drawn at random")


def _compare_entries(what: str, entries: tuple[Entry, ...], counts: Int64s, order: Int64s, verdict: Verdict) -> None:
    verdict.check(f"{what}, entries", len(entries), len(order))
    expected = zip(order.tolist(), counts[order].tolist(), strict=True)
    for place, (entry, (song, count)) in enumerate(zip(entries, expected, strict=False), start=1):
        if entry.count != count or entry.rank != place or entry.song_id != song_name(song):
            verdict.check(
                f"{what}, place {place}", (entry.rank, entry.song_id, entry.count), (place, song_name(song), count)
            )
