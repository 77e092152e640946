"""Windows of a cluster whose shards share every song, against the tally, while shards are killed.

What is sent, broken and asked is that of test_windows_against_oracle.py, without what needs a song's whole count.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.answers import check_top_k
from tests.gateway.cluster import SLOTS, Cluster, batch, record, rejects
from tests.gateway.test_windows_against_oracle import SHARDS, Clock, Traffic, moving_clock
from tests.oracle import ModelPart, Truth
from tests.window_traffic import STEPS, TIERS, WINDOWS, Ask, Recover, Step
from topk_grpc import TopKClient
from topk_grpc.kernels import compiled
from topk_grpc.model import GlobalWindow, Play, SessionWindow, Window


class SpreadTraffic(Traffic):
    """Runs steps on a cluster whose shards share every song: one model has all plays."""

    async def send(self, *plays: Play) -> None:
        self.sequence += 1
        said = rejects(await record(self.cluster.gateways[self.sequence % 2], batch(self.sequence, plays)))
        kept = [one for one in enumerate(plays) if one[1].count > 0]
        refused = self.models[0].submit(ModelPart("p", self.sequence, 0, tuple(kept)), Clock.now_ms).rejects
        assert said == refused | {at: "CORRECTION_UNSUPPORTED" for at, play in enumerate(plays) if play.count < 0}

    async def compare(self, window: Window, truth: Truth, chart: str, as_of: int | str | None) -> None:
        self.turn += 1
        for k in (1, 2, 3, 100):
            answer = await self.clients[self.turn % 2].top_k(window, k, chart=chart, as_of=as_of)
            assert answer.certificate.distinct_songs is None
            known = dataclasses.replace(answer.certificate, distinct_songs=len(truth.ranked))
            watermark_ms = min(self.tally.newest_ms(), Clock.now_ms)
            check_top_k(dataclasses.replace(answer, certificate=known), truth, k, watermark_ms)
            self.compared += 1


async def play_through(steps: list[Step], tiers: str, windows: list[Window], folder: Path) -> int:
    cluster = Cluster(folder)
    try:
        await cluster.begin(SHARDS, tiers=tiers, partitioner="round_robin")
        gateways = [await cluster.gateway(clock=lambda: Clock.now_ms) for _ in range(2)]
        async with TopKClient(gateways[0].address) as one, TopKClient(gateways[1].address) as other:
            traffic = SpreadTraffic(cluster, [one, other], (0,) * SLOTS, tiers)
            for step in (*steps, Recover(0)):
                await traffic.run(step, windows)
            for before_ms, chart in itertools.product((None, 0, 61_000), ("", "US")):
                await traffic.run(Ask(False, before_ms, tuple(range(len(windows))), chart), windows)
            return traffic.compared
    finally:
        await cluster.end()


@pytest.mark.timeout(900)  # finding the smallest failure takes its time
def test_any_window_says_what_the_tally_says() -> None:
    compared = 0

    @settings(max_examples=12 if compiled() else 2, deadline=None)
    @given(
        steps=st.lists(STEPS, min_size=5, max_size=25),
        tiers=st.sampled_from(TIERS),
        windows=st.lists(WINDOWS, min_size=6, max_size=8, unique=True),
    )
    def check(steps: list[Step], tiers: str, windows: list[Window]) -> None:
        nonlocal compared
        counted: list[Window] = [
            GlobalWindow(),
            *(window for window in windows if not isinstance(window, SessionWindow)),
        ]
        with moving_clock(), tempfile.TemporaryDirectory() as folder:
            compared += asyncio.run(play_through(steps, tiers, counted, Path(folder)))

    check()
    assert compared > (500 if compiled() else 50)
