"""Windows of real clusters: the same to the byte from anywhere, and as the naive tally has them, whatever is killed.

`test_random_traffic…` goes on for TOPK_SOAK_SECONDS (`make soak`), a few seconds without. It prints the seed of each
round; TOPK_SOAK_SEED=… begins with that one.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from tests.answers import check_songs, check_top_k
from tests.cluster.processes import Cluster, wait_for
from tests.oracle import ModelPart, ShardModel, Tally, Tiers, bounds_of, combined, is_within, slot_of
from tests.window_traffic import CHARTS, MINUTE, SECOND, SONGS, TIERS, steps_of
from topk_grpc import BlockingTopKClient
from topk_grpc.errors import OutOfRangeError, UnavailableError
from topk_grpc.kernels import compiled
from topk_grpc.model import (
    Answer,
    Bounds,
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    SongsAnswer,
    TumblingWindow,
    Window,
    parse_window,
)
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub
from topk_grpc.rpc import convert
from topk_grpc.topology import open_store

pytestmark = pytest.mark.cluster

SHARDS: Final = 3
SMALL_TIERS: Final = "1s:10s,5s:60s,20s:*"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def record(stub: TopKServiceStub, sequence: int, plays: list[Play], producer: str = "p") -> dict[int, str]:
    """What was rejected. Sent again until it is acknowledged, which it may be by another process than the first."""
    batch = PlayBatch(producer_id=producer, sequence=sequence, plays=[convert.play_to_pb(play) for play in plays])

    def acknowledged() -> pb.RecordPlaysResponse | None:
        try:
            return stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=20, wait_for_ready=True)
        except grpc.RpcError:
            return None

    response = wait_for(acknowledged, 60, "a batch is acknowledged")
    return {one.index: one.reason for one in response.rejected}


# --- To the byte ------------------------------------------------------------------------------------------------------

BEGIN_MS: Final = 1_700_000_000_000
KINDS: Final = (
    "tumbling:1m", "tumbling:5m@20s", "sliding:60s/20s", "sliding:90s", "session:20s", "session:90s",
    "range:2023-11-14T22:14:00..2023-11-14T22:33:20",
)  # fmt: skip


def history(seed: int) -> tuple[list[Play], list[Play]]:
    """Plays of 40 minutes with many ties, and corrections of some of them."""
    chance = random.Random(seed)
    plays = [
        Play(
            f"song {min(chance.randrange(120), chance.randrange(120))}",
            BEGIN_MS + chance.randrange(40 * MINUTE),
            chance.choice((1, 1, 1, 2)),
            tuple(chance.sample(CHARTS, chance.randrange(3))),
        )
        for _ in range(4000)
    ]
    taken_back = [Play(play.song_id, play.played_at_ms, -1, play.charts) for play in plays[::17]]
    return plays, taken_back


def send_shuffled(cluster: Cluster, plays: list[Play], seed: int, producer: str) -> None:
    shuffled = random.Random(seed).sample(plays, len(plays))
    for sequence, first in enumerate(range(0, len(plays), 300), 1):
        assert record(cluster.stub, sequence, shuffled[first : first + 300], producer) == {}


def answers_of(address: str) -> Iterator[tuple[str, bytes | tuple[int, int]]]:
    """The bytes of the entries of every window, or the bounds that a refusal names."""
    chance = random.Random(5)
    instants = [BEGIN_MS + chance.randrange(40 * MINUTE) for _ in range(6)] + [BEGIN_MS + 40 * MINUTE]
    with grpc.insecure_channel(address) as channel, BlockingTopKClient(address) as client:
        stub = TopKServiceStub(channel)
        for text, chart, at_ms in ((text, chart, at) for text in KINDS for chart in ("", *CHARTS) for at in instants):
            window = parse_window(text)
            request = pb.GetTopKRequest(window=convert.window_to_pb(window), k=50, chart=chart)
            request.as_of.time_ms = at_ms
            name = f"{text} of {chart!r} at {at_ms}"
            try:
                client.top_k(window, 1, chart=chart, as_of=at_ms)
            except OutOfRangeError as refusal:
                yield name, (refusal.start_ms, refusal.end_ms)
            else:
                entries = stub.GetTopK(request, timeout=30, wait_for_ready=True).entries
                yield name, pb.GetTopKResponse(entries=entries).SerializeToString(deterministic=True)


def test_entries_are_the_same_to_the_byte_from_any_gateway_in_any_order_of_arrival_and_after_restarts(
    tmp_path: Path,
) -> None:
    plays, taken_back = history(3)
    clusters = [Cluster(tmp_path / name, SHARDS, {"TOPK_TIERS": SMALL_TIERS}) for name in ("one", "other")]
    try:
        for seed, cluster in enumerate(clusters):
            cluster.root.mkdir()
            cluster.start()
            send_shuffled(cluster, plays, seed, "plays")
            send_shuffled(cluster, taken_back, seed, "corrections")
        addresses = [address for cluster in clusters for address in (cluster.address, cluster.add_gateway())]
        first = dict(answers_of(addresses[0]))
        refused = [name for name, answer in first.items() if isinstance(answer, tuple)]
        print(f"{len(first):,} answers, {len(refused):,} of them refusals")
        assert 0 < len(refused) < len(first) / 2
        for address in addresses[1:]:
            assert dict(answers_of(address)) == first
        clusters[0].kill("everything")
        clusters[1].stop()
        for cluster in clusters:
            cluster.start()
            cluster.wait_whole()
        for address in addresses:
            assert dict(answers_of(address)) == first
        tally = Tally([*plays, *taken_back])
        with BlockingTopKClient(addresses[0]) as client:
            for text in KINDS[2:6]:
                at_ms = BEGIN_MS + 38 * MINUTE
                truth = tally.truth(parse_window(text), at_ms, CHARTS[0])
                check_top_k(client.top_k(text, 50, chart=CHARTS[0], as_of=at_ms), truth, 50, tally.newest_ms())
    finally:
        for cluster in clusters:
            cluster.close()


# --- Random traffic ---------------------------------------------------------------------------------------------------

PLAYS_MAX: Final = 1500
"""Of a round; then another begins with an empty cluster."""


AGES: Final[tuple[Callable[[random.Random], int], ...]] = (
    lambda _: 0,
    lambda _: -200 * SECOND,
    lambda chance: chance.randrange(MINUTE),
    lambda chance: chance.randrange(6 * MINUTE),
    lambda chance: chance.randrange(50 * MINUTE, 75 * MINUTE),
)
"""Nothing in between: whether such a play joins a session depends on the windows that happen to stand."""


def random_window(chance: random.Random, at_ms: int) -> Window:
    size = chance.choice((1, 5, 7, 20, 60, 300, 1200)) * SECOND
    match chance.randrange(6):
        case 0:
            return GlobalWindow()
        case 1:
            return TumblingWindow(size, chance.choice((0, 0, 1, 5, 20)) * SECOND)
        case 2:
            slide = chance.choice((1, 5, 20, 60)) * SECOND
            return SlidingWindow(slide * chance.choice((1, 2, 3, 10, 30)), slide)
        case 3:
            return SlidingWindow(chance.choice((size, chance.randrange(1, 1800) * SECOND)))
        case 4:
            return SessionWindow(chance.choice((size, chance.randrange(1, 900) * SECOND)))
        case _:
            grain = chance.choice((SECOND, 5 * SECOND, 20 * SECOND, MINUTE))
            start = (at_ms - chance.randrange(-MINUTE, 65 * MINUTE)) // grain * grain
            return RangeWindow(start, start + chance.randrange(1, 60) * grain)


class Round:
    """A cluster, and models of its shards."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        # Tiers that drop nothing: a refusal then always names bounds that work.
        tiers = self.chance.choice([tiers for tiers in TIERS if tiers.endswith("*")])
        self.tiers = Tiers(steps_of(tiers))
        self.cluster = Cluster(folder, SHARDS, {"TOPK_TIERS": tiers})
        self.windows = [random_window(self.chance, now_ms()) for _ in range(6)]  # asked for at the clock: they stand
        self.sequence = self.compared = self.kills = 0

    def start(self) -> None:
        self.cluster.start()
        topology = asyncio.run(open_store(self.cluster.topology).read())
        self.slots, self.owners = topology.settings.slots, topology.owners
        owned = [frozenset(slot for slot, owner in enumerate(self.owners) if owner == shard) for shard in range(SHARDS)]
        self.models = [ShardModel(self.slots, one, SECOND, steps=self.tiers.steps) for one in owned]
        addresses = self.cluster.address, self.cluster.add_gateway()
        self.record([Play(song_id, now_ms()) for song_id in SONGS])  # from here on ages count from now
        self.clients = [BlockingTopKClient(address, deadline_seconds=60) for address in addresses]

    def close(self) -> None:
        self.cluster.close()
        for client in getattr(self, "clients", ()):
            client.close()

    @property
    def tally(self) -> Tally:
        tallies = [model.tally for model in self.models]
        late = [play for tally in tallies for play in tally.late]
        return Tally([play for tally in tallies for play in tally.plays], SECOND, late=late)

    def run(self, until: float) -> None:
        while self.compared == 0 or (time.monotonic() < until and len(self.tally.plays) < PLAYS_MAX):
            for _ in range(self.chance.randrange(1, 4)):
                self.send()
            if self.chance.random() < 0.06:
                victims = ("shard-0", "shard-1", "shard-2", "gateway", "everything")
                victim = self.chance.choice(victims)
                self.cluster.kill(victim)
                self.kills += 1
                if victim == "everything":
                    self.cluster.start()
            for _ in range(12):
                self.ask()

    def send(self) -> None:
        chance, counted, now = self.chance, self.tally.plays, now_ms()
        plays: list[Play] = []
        for _ in range(chance.randrange(1, 9)):
            age = chance.choice(AGES)(chance)
            charts = tuple(chance.sample(CHARTS, chance.randrange(3)))
            if counted and chance.random() < 0.1:
                old = chance.choice(counted)
                plays.append(Play(old.song_id, old.played_at_ms, -chance.randrange(1, 4), old.charts))
            elif chance.random() < 0.03:
                plays.append(Play(chance.choice(SONGS), now + 400 * SECOND, 1, charts))  # too far ahead
            else:
                plays.append(Play(chance.choice(SONGS), now - age, chance.randrange(1, 5), charts))
        self.record(plays)

    def record(self, plays: list[Play]) -> None:
        self.sequence += 1
        said = record(self.cluster.stub, self.sequence, plays)
        expected: dict[int, str] = {}
        for shard, model in enumerate(self.models):
            own = [one for one in enumerate(plays) if self.owners[slot_of(one[1].song_id, self.slots)] == shard]
            if own:
                part = ModelPart("p", self.sequence, 0, tuple(combined(own, SECOND)))
                expected |= model.submit(part, now_ms(), said).rejects
        assert said == expected

    def ask(self) -> None:
        chance, tally = self.chance, self.tally
        client, chart = chance.choice(self.clients), chance.choice(("", "", *CHARTS))
        if chance.random() < 0.4:
            self.compare(tally, client, chance.choice(self.windows), chart, None)
            return
        at_ms = chance.choice((now_ms(), tally.newest_ms(), now_ms() - chance.randrange(40 * MINUTE)))
        window = random_window(chance, at_ms)
        self.compare(tally, client, window, chart, None if isinstance(window, GlobalWindow) else at_ms)

    def compare(self, tally: Tally, client: BlockingTopKClient, window: Window, chart: str, as_of: int | None) -> None:
        """Asks until there is an answer: what was killed is on its way back."""

        def asked() -> bool:
            try:
                self.compare_once(tally, client, window, chart, as_of)
            except UnavailableError:
                return False
            return True

        wait_for(asked, 60, "a query is answered")

    def compare_once(
        self, tally: Tally, client: BlockingTopKClient, window: Window, chart: str, as_of: int | None
    ) -> None:
        """An answer equals the tally's; a refusal is right, and so are the bounds that it names."""
        k, before_ms = self.chance.choice((1, 3, 100)), now_ms()
        at_ms = before_ms if as_of is None else as_of
        try:
            answer = client.top_k(window, k, chart=chart, as_of=as_of)
            songs = client.songs([*SONGS, "unheard of"], window, chart=chart, as_of=as_of, neighbours=2)
        except OutOfRangeError as refusal:
            near = RangeWindow(refusal.start_ms, refusal.end_ms)
            if bounds_of(window, at_ms, SECOND) == bounds_of(window, at_ms if as_of else now_ms(), SECOND):
                truth = tally.truth(window, at_ms, chart)
                assert not tally.has_to_answer(window, truth, self.tiers), (window, at_ms)
                assert truth.bounds is not None and is_within(truth.bounds, Bounds(near.start_ms, near.end_ms))
            self.compare(tally, client, near, chart, at_ms)
            return
        if bounds_of(window, at_ms, SECOND) != bounds_of(window, at_ms if as_of else now_ms(), SECOND):
            return  # the window moved on while it was asked for
        truth = tally.truth(window, at_ms, chart)
        check_top_k(answer, truth, k, self.watermark_ms(tally, answer, before_ms))
        check_songs(songs, [*SONGS, "unheard of"], truth, 2, self.watermark_ms(tally, songs, before_ms))
        self.compared += 1 + len(songs.songs)

    @staticmethod
    def watermark_ms(tally: Tally, answer: Answer | SongsAnswer, before_ms: int) -> int:
        """The newest play's time; where that lies ahead, the clock as the gateway read it."""
        newest, said = tally.newest_ms(), answer.certificate.watermark_ms
        return said if before_ms <= said <= min(now_ms(), newest) else min(newest, before_ms)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_traffic_and_kills_leave_every_window_as_the_tally_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = float(os.environ.get("TOPK_SOAK_SECONDS", "12" if compiled() else "5"))
    first = int(os.environ.get("TOPK_SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    until = time.monotonic() + seconds
    compared = 0
    for number, seed in enumerate(range(first, first + 1_000_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        this = Round(folder, seed)
        try:
            this.start()
            this.run(until)
        except BaseException:
            print(f"seed {seed}: TOPK_SOAK_SEED={seed} plays it again")
            raise
        finally:
            this.close()
        compared += this.compared
        with capsys.disabled():
            print(
                f"\nseed {seed}: {len(this.tally.plays):,} plays, {this.kills} kills, {this.compared:,} answers"
                f" compared, {compared:,} in all"
            )
        if time.monotonic() >= until:
            break
    assert compared > 0
