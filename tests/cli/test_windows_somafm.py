"""Three days of real plays of 37 channels, every window at 200 instants, against the naive tally.

In the long form (`make soak`) each channel is asked at 200 instants too, else at 40.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import os
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest

from tests.answers import check_top_k
from tests.oracle import Tally, Tiers, is_within
from topk_grpc import TopKClient
from topk_grpc.errors import OutOfRangeError
from topk_grpc.kernels import compiled
from topk_grpc.model import Bounds, Play, RangeWindow, Window, parse_window, to_epoch_ms

FILE: Final = Path(__file__).parents[3] / "shared" / "data" / "somafm" / "plays.csv.gz"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FILE.exists(), reason=f"no real plays at {FILE}"),
]

WINDOWS: Final = ("tumbling:1h", "sliding:10m/1m", "sliding:10m", "session:15m")
SOAK: Final = "TOPK_SOAK_SECONDS" in os.environ
GLOBAL_INSTANTS: Final = 200 if compiled() else 5
CHANNEL_INSTANTS: Final = GLOBAL_INSTANTS if SOAK else GLOBAL_INSTANTS // 5
ANSWERS: Final = (len(WINDOWS) + 1) * (GLOBAL_INSTANTS + 37 * CHANNEL_INSTANTS)
SECOND: Final = 1000
HOUR: Final = 3600 * SECOND
FINE: Final = "1s:7d,1m:30d,1h:90d,1d:*"
DEFAULT: Final = Tiers(((SECOND, HOUR), (60 * SECOND, 24 * HOUR), (HOUR, 90 * 24 * HOUR), (24 * HOUR, None)))
ASKED_AT_ONCE: Final = 8


def real_plays() -> list[Play]:
    with gzip.open(FILE, "rt", encoding="utf-8", newline="") as lines:
        return [
            Play(f"{row['artist']} - {row['track']}", to_epoch_ms(when), 1, (row["channel"],))
            for row in csv.DictReader(lines)
            for when in [datetime.fromisoformat(row["played_at"])]
        ]


def questions(plays: list[Play], seed: int, instants: int) -> Iterator[tuple[Window, int]]:
    """Each kind of window, and a range, at instants of chance over the time of the plays."""
    chance = random.Random(seed)
    first, last = (edge(play.played_at_ms for play in plays) for edge in (min, max))
    for _ in range(instants):
        at_ms = chance.randrange(first, last + HOUR)
        for text in WINDOWS:
            yield parse_window(text), at_ms
        start = chance.randrange(first, last) // SECOND * SECOND
        yield RangeWindow(start, start + chance.randrange(1, 12 * 3600) * SECOND), at_ms


class Comparison:
    """Asks a cluster and the tally the same, several questions at once."""

    def __init__(self, client: TopKClient, plays: list[Play], tiers: Tiers | None) -> None:
        self.client, self.tiers = client, tiers
        by_time = sorted(plays, key=lambda play: play.played_at_ms)
        self.ends = Tally([by_time[0], by_time[-1]])
        self.watermark_ms = self.ends.newest_ms()
        charts = sorted({play.charts[0] for play in plays})
        assert len(charts) == 37
        self.tallies = {chart: Tally([play for play in plays if chart in play.charts]) for chart in charts}
        self.tallies[""] = Tally(plays)
        self.equal = self.refused = 0

    async def ask_everything(self, seed: int) -> None:
        waiting = (
            (chart, window, at_ms)
            for chart, tally in self.tallies.items()
            for window, at_ms in questions(tally.plays, seed, CHANNEL_INSTANTS if chart else GLOBAL_INSTANTS)
        )

        async def ask_on() -> None:
            for chart, window, at_ms in waiting:
                await self.ask(chart, window, at_ms)

        async with asyncio.TaskGroup() as group:
            for _ in range(ASKED_AT_ONCE):
                group.create_task(ask_on())

    async def ask(self, chart: str, window: Window, at_ms: int) -> None:
        truth = self.tallies[chart].truth(window, at_ms, chart)
        try:
            answer = await self.client.top_k(window, 10_000, chart=chart, as_of=at_ms)
        except OutOfRangeError as refusal:
            assert self.tiers is not None, f"{window} at {at_ms} in {chart!r}: {refusal}"
            self.refused += 1
            assert not self.ends.has_to_answer(window, truth, self.tiers)
            near = RangeWindow(refusal.start_ms, refusal.end_ms)
            assert truth.bounds is not None and is_within(truth.bounds, Bounds(near.start_ms, near.end_ms))
            truth = self.tallies[chart].truth(near, at_ms, chart)
            answer = await self.client.top_k(near, 10_000, chart=chart)
        check_top_k(answer, truth, 10_000, self.watermark_ms)
        self.equal += 1


async def compare(gateway: str, seed: int, tiers: Tiers | None) -> Comparison:
    async with TopKClient(gateway) as client:
        comparison = Comparison(client, real_plays(), tiers)
        await comparison.ask_everything(seed)
    print(f"seed {seed}: {comparison.equal:,} answers equal, {comparison.refused:,} of them after a refusal")
    return comparison


def load(tmp_path: Path, start_up: Any, run_json: Any, *arguments: str) -> str:
    gateway = str(start_up(tmp_path / "data", "--shards", "2", *arguments).wait_ready())
    mapping = ("--song", "artist", "--song", "track", "--time", "played_at", "--chart", "channel")
    loaded = run_json("ingest", str(FILE), *mapping, gateway=gateway)["files"][0]
    assert (loaded["accepted"], loaded["skipped"], loaded["rejected"]) == (9982, 0, 0)
    return gateway


def test_every_window_of_real_plays_equals_the_tally(tmp_path: Path, start_up: Any, run_json: Any) -> None:
    gateway = load(tmp_path, start_up, run_json, "--tiers", FINE)
    done = asyncio.run(compare(gateway, 11, None))
    assert (done.equal, done.refused) == (ANSWERS, 0)


def test_under_the_default_tiers_it_is_equal_or_refused_with_bounds_that_work(
    tmp_path: Path, start_up: Any, run_json: Any
) -> None:
    gateway = load(tmp_path, start_up, run_json)
    done = asyncio.run(compare(gateway, 12, DEFAULT))
    assert done.equal == ANSWERS
    assert done.equal > done.refused > 0
