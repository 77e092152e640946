"""Every window of a whole cluster against the naive tally: several shards, two gateways, shards killed in between.

What plays are sent, where time stands, what breaks and what is asked is drawn by hypothesis, as for the engine alone
(tests/engine). Here it goes through the public API: splitting, merging, ranks over all shards, refusals, certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.answers import check_songs, check_top_k
from tests.gateway.cluster import SLOTS, Cluster, batch, record, rejects
from tests.oracle import ModelPart, ShardModel, Tally, Tiers, Truth, combined, is_within, slot_of
from tests.window_traffic import (
    CHARTS,
    MINUTE,
    NOW,
    SECOND,
    SONGS,
    STEPS,
    TIERS,
    WINDOWS,
    Ask,
    AskAround,
    Delete,
    Move,
    Pass,
    Recover,
    Send,
    Snapshot,
    Stand,
    Step,
    TakeBack,
    range_around,
    steps_of,
)
from topk_grpc import TopKClient
from topk_grpc.errors import OutOfRangeError
from topk_grpc.kernels import compiled
from topk_grpc.model import Bounds, GlobalWindow, Play, RangeWindow, Window
from topk_grpc.pb.topk.v1 import admin_service_pb2 as admin_pb
from topk_grpc.pb.topk.v1 import admin_service_pb2_grpc as admin_grpc
from topk_grpc.shard import owner as owner_module

SHARDS: Final = 3


class Clock:
    """What shards and gateways take for the time."""

    now_ms = NOW


class Traffic:
    """Runs steps on a cluster and on models of its shards, and compares what they say."""

    def __init__(self, cluster: Cluster, clients: list[TopKClient], owners: tuple[int, ...], tiers: str) -> None:
        self.cluster, self.clients, self.owners = cluster, clients, owners
        self.tiers = Tiers(steps_of(tiers))
        slots = [frozenset(slot for slot, owner in enumerate(owners) if owner == shard) for shard in range(SHARDS)]
        self.models = [ShardModel(SLOTS, owned, SECOND, steps=self.tiers.steps) for owned in slots]
        for shard, model in zip(cluster.shards, self.models, strict=True):
            model.first_fine_ms = lambda newest_ms, shard=shard: shard.core.state.tiers.borders(newest_ms)[0]  # type: ignore[misc]
        self.sequence = 0
        self.turn = 0
        self.compared = 0

    @property
    def tally(self) -> Tally:
        tallies = [model.tally for model in self.models]
        plays, deleted, late = (
            [*itertools.chain(*lists)] for lists in zip(*((t.plays, t.deleted, t.late) for t in tallies), strict=True)
        )
        return Tally(plays, SECOND, deleted, late)

    async def run(self, step: Step, windows: list[Window]) -> None:
        match step:
            case Send(plays):
                now = Clock.now_ms
                await self.send(*(Play(song_id, now - age, count, charts) for song_id, age, count, charts in plays))
            case TakeBack(which, count, whole_charts, later_ms):
                counted = self.tally.plays
                if counted:
                    play = counted[which % len(counted)]
                    charts = play.charts if whole_charts else CHARTS
                    await self.send(Play(play.song_id, play.played_at_ms + later_ms, -count, charts))
            case AskAround():
                if counted := self.tally.plays:
                    await self.ask(range_around(counted, step), Clock.now_ms, step.chart, None)
            case Delete(song_id):
                stub = admin_grpc.ClusterAdminServiceStub(self.cluster.gateways[0].channel)
                await stub.DeleteSong(admin_pb.ClusterAdminServiceDeleteSongRequest(song_id=song_id))
                for model in self.models:
                    model.tally.delete_song(song_id)
            case Stand() | Move():
                pass  # shards do it themselves: what is asked for at the clock stands from then on
            case Pass(milliseconds):
                Clock.now_ms += milliseconds
            case Snapshot():
                await asyncio.gather(*(shard.owner._take_snapshot() for shard in self.cluster.shards))
            case Recover(heap_size):
                shard = self.cluster.shards[heap_size % SHARDS]
                await shard.kill()
                await shard.start()
            case Ask(live, before_ms, which, chart):
                newest_ms = self.tally.newest_ms()
                for number in which:
                    window = windows[number % len(windows)]
                    if live:
                        await self.ask(window, Clock.now_ms, chart, None)
                    elif before_ms is None:
                        await self.ask(window, newest_ms or Clock.now_ms, chart, "latest")
                    else:
                        await self.ask(window, Clock.now_ms - before_ms, chart, Clock.now_ms - before_ms)

    async def send(self, *plays: Play) -> None:
        self.sequence += 1
        gateway = self.cluster.gateways[self.sequence % 2]
        response = await record(gateway, batch(self.sequence, plays, first_sent_ms=0))
        said, expected = rejects(response), dict[int, str]()
        for shard, model in enumerate(self.models):
            own = [one for one in enumerate(plays) if self.owners[slot_of(one[1].song_id, SLOTS)] == shard]
            part = ModelPart("p", self.sequence, 0, tuple(combined(own, SECOND)))
            if own:
                expected |= model.submit(part, Clock.now_ms, said).rejects
        assert said == expected
        for reason in expected.values():
            event(reason)

    async def ask(self, window: Window, at_ms: int, chart: str, as_of: int | str | None) -> None:
        """An answer equals the tally's; a refusal is right, and so are the bounds that it names."""
        tally = self.tally
        truth = tally.truth(window, at_ms, chart)
        as_of = None if isinstance(window, GlobalWindow) else as_of
        try:
            await self.compare(window, truth, chart, as_of)
        except OutOfRangeError as refusal:
            event(f"{type(window).__name__} refused")
            assert not tally.has_to_answer(window, truth, self.tiers), (window, at_ms)
            if truth.bounds is not None and self.tiers.keep_all:
                near = RangeWindow(refusal.start_ms, refusal.end_ms)
                assert is_within(truth.bounds, Bounds(near.start_ms, near.end_ms))
                await self.compare(near, tally.truth(near, 0, chart), chart, None)
        else:
            event(f"{type(window).__name__} answered")

    async def compare(self, window: Window, truth: Truth, chart: str, as_of: int | str | None) -> None:
        self.turn += 1
        client = self.clients[self.turn % 2]
        watermark_ms = min(self.tally.newest_ms(), Clock.now_ms)
        for k in (1, 3, 100):
            answer = await client.top_k(window, k, chart=chart, as_of=as_of)
            check_top_k(answer, truth, k, watermark_ms)
        asked = [*SONGS, "unheard of"]
        answer_songs = await client.songs(asked, window, chart=chart, as_of=as_of, neighbours=2)
        check_songs(answer_songs, asked, truth, 2, watermark_ms)
        self.compared += 3 + len(asked)


@contextlib.contextmanager
def moving_clock() -> Iterator[None]:
    Clock.now_ms = NOW
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner_module, "now_ms", lambda: Clock.now_ms)
        yield


async def play_through(steps: list[Step], tiers: str, windows: list[Window], folder: Path) -> int:
    """How many answers were compared."""
    cluster = Cluster(folder)
    try:
        await cluster.begin(SHARDS, tiers=tiers)
        gateways = [await cluster.gateway(clock=lambda: Clock.now_ms) for _ in range(2)]
        owners = (await cluster.store.read()).owners
        async with TopKClient(gateways[0].address) as one, TopKClient(gateways[1].address) as other:
            traffic = Traffic(cluster, [one, other], owners, tiers)
            for step in (*steps, Recover(0)):
                await traffic.run(step, windows)
            every = tuple(range(len(windows)))
            for before_ms, chart in itertools.product((None, 0, 7_654, 61_000, 15 * MINUTE), ("", "US")):
                await traffic.run(Ask(False, before_ms, every, chart), windows)
            return traffic.compared
    finally:
        await cluster.end()


@pytest.mark.timeout(900)  # finding the smallest failure takes its time
def test_a_cluster_says_what_the_tally_says() -> None:
    compared = 0

    @settings(max_examples=30 if compiled() else 5, deadline=None)
    @given(
        steps=st.lists(STEPS, min_size=5, max_size=30),
        tiers=st.sampled_from(TIERS),
        windows=st.lists(WINDOWS, min_size=6, max_size=8, unique=True),
    )
    def check(steps: list[Step], tiers: str, windows: list[Window]) -> None:
        nonlocal compared
        with moving_clock(), tempfile.TemporaryDirectory() as folder:
            compared += asyncio.run(play_through(steps, tiers, windows, Path(folder)))

    check()
    print(f"{compared:,} answers compared")
    assert compared > (10_000 if compiled() else 1000)
