"""The end of a storm: nothing is on its way any more, so every count, total and window is known exactly."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.answers import check_songs, check_top_k
from tests.faults.ledger import CHARTS, HOUR, IDS, NAMES, NOW_SONGS, SECOND, Ledger
from tests.faults.traffic import now_ms
from tests.oracle import Truth
from topk_grpc import TopKClient
from topk_grpc.errors import UnavailableError
from topk_grpc.model import Answer, Window, parse_window


@dataclass(frozen=True)
class _Question:
    """What is asked, and what the oracle says."""

    window: Window
    chart: str
    as_of: int | None
    truth: Truth
    songs: list[str]


class Comparison:
    """Asks both gateways for everything. Made when all that was sent is acknowledged; that takes the oracle a while.

    Args:
        ledger: what was.
        addresses: of the gateways.
        wrong: is told of each answer that is wrong.
        seed: of the songs that are asked for.
        patience_seconds: how long a gateway may not be able to answer.
    """

    def __init__(
        self,
        ledger: Ledger,
        addresses: Mapping[str, str],
        wrong: Callable[[str], None],
        seed: int,
        patience_seconds: float,
    ) -> None:
        self._ledger, self._addresses, self._wrong = ledger, addresses, wrong
        self._patience_seconds = patience_seconds
        at_ms = now_ms()
        self._watermark_ms = ledger.newest_ms  # once the clock has passed it, see `windows`
        chance, tally = random.Random(seed), ledger.tally()
        self._questions = [
            _Question(
                window, chart, as_of, tally.truth(window, as_of or at_ms, chart), chance.sample(NAMES[:NOW_SONGS], 4)
            )
            for window, as_of in self._windows(at_ms)
            for chart in CHARTS
        ]
        self.compared = 0

    async def _patiently(self, call: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        until = time.monotonic() + self._patience_seconds
        while True:
            try:
                return await call(*arguments, **options)
            except UnavailableError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)

    async def counts(self) -> tuple[int, int]:
        """Plays lost and plays counted twice, song by song; those of the global chart are returned."""
        all_lost = all_double = 0
        for (name, address), chart in itertools.product(self._addresses.items(), CHARTS):
            moment = self._ledger.moment(chart, None)
            async with TopKClient([address], deadline_seconds=20) as client:
                answer: Answer = await self._patiently(client.top_k, "global", 10_000, chart=chart)
            got = np.zeros(len(NAMES), np.int64)
            for entry in answer.entries:
                got[IDS[entry.song_id]] += entry.count
            # What could not be brought home may count or not; with everything home the two are one.
            low = moment.acknowledged + moment.taken_sent
            high = moment.sent + moment.taken_acknowledged
            lost, double = np.maximum(low - got, 0), np.maximum(got - high, 0)
            for what, by in (("lost", lost), ("double", double)):
                if by.any():
                    song = int(np.argmax(by))
                    self._wrong(
                        f"{name}, chart {chart!r}: {by.sum()} plays {what}, of {NAMES[song]} {by[song]}:"
                        f" {got[song]} counted, {low[song]} to {high[song]} recorded"
                    )
            if not chart:
                all_lost, all_double = max(all_lost, int(lost.sum())), max(all_double, int(double.sum()))
        return all_lost, all_double

    def _windows(self, at_ms: int) -> Iterator[tuple[Window, int | None]]:
        yield parse_window("global"), None
        past_ms = self._ledger.grids["past"].first_ms
        for text in (
            "tumbling:10s", "tumbling:1m", "tumbling:10m@3m", "tumbling:1h", "sliding:60s/20s", "sliding:5m/1m",
            "sliding:90s", "sliding:10m", "session:1s", "session:3s", "session:10s",
        ):  # fmt: skip
            yield parse_window(text), at_ms
        start = at_ms // SECOND * SECOND
        for back, size in ((30, 20), (300, 120), (590, 600)):
            yield parse_window(f"range:{start - back * SECOND}..{start - (back - size) * SECOND}"), at_ms
        for text in ("tumbling:1h", "tumbling:1d", "sliding:6h/1h"):
            yield parse_window(text), past_ms + 10 * HOUR
        yield parse_window(f"range:{past_ms + 3 * HOUR}..{past_ms + 9 * HOUR}"), past_ms

    async def windows(self) -> None:
        """Each window of each chart from each gateway, exactly as the oracle says, certificates included."""
        while now_ms() <= self._watermark_ms:
            await asyncio.sleep(0.01)
        for name, address in self._addresses.items():
            async with TopKClient([address], deadline_seconds=20) as client:
                for one in self._questions:
                    what = f"{name}: {one.window} of {one.chart!r} as of {one.as_of}"
                    at: dict[str, Any] = {"chart": one.chart, "as_of": one.as_of}
                    for k in (7, 10_000):
                        answer = await self._patiently(client.top_k, one.window, k, **at)
                        self._same(f"{what}, k {k}", check_top_k, answer, one.truth, k, self._watermark_ms)
                    songs = await self._patiently(client.songs, one.songs, one.window, neighbours=2, **at)
                    self._same(f"{what}, songs", check_songs, songs, one.songs, one.truth, 2, self._watermark_ms)

    def _same(self, what: str, check: Callable[..., None], answer: Any, *arguments: Any) -> None:
        self.compared += 1
        try:
            check(answer, *arguments)
        except AssertionError:
            truth = next(one for one in arguments if isinstance(one, Truth))
            self._wrong(
                f"{what} is not as the oracle has it: {str(answer)[:900]}; it has {truth.total} of"
                f" {len(truth.ranked)} songs in {truth.bounds}: {truth.ranked[:9]}, watermark {self._watermark_ms}"
            )

    async def watch(self, watched: Mapping[str, Answer]) -> None:
        """What watches have made of all changes is what is answered to whoever asks."""
        async with TopKClient(list(self._addresses.values()), deadline_seconds=20) as client:
            answer: Answer = await self._patiently(client.top_k, "global", 50)
            until = time.monotonic() + self._patience_seconds
            while (last := watched.get("global")) is None or last.entries != answer.entries:
                if time.monotonic() > until:
                    self._wrong("a watch of the global chart ends with another list than GetTopK gives")
                    break
                await asyncio.sleep(0.1)
            self.compared += 1
            async with aclosing(client.watch("global", 50)) as updates:
                first = await anext(updates)
            if first.answer.entries != answer.entries:
                self._wrong("a new watch begins with another list than GetTopK gives")
