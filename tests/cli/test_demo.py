"""The demo, small, and that its comparison sees mistakes; the load generator, short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.cli.load import EncodedPlays, Zipf, song_columns, song_name
from topk_grpc.cli.tally import PANE_MS, PANES, Stream, Verdict, compare, ranking
from topk_grpc.client import TopKClient
from topk_grpc.kernels import compiled
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

NOW_MS = 1_700_000_000_000


async def send(client: TopKClient, stream: Stream, batches: int) -> None:
    for _ in range(batches):
        batch = stream.next_batch()
        columns = (batch.song_data, batch.song_offsets, batch.played_at_ms)
        await client.record_columns(*columns, None, batch.chart_data, batch.chart_offsets)
    await client.flush()


async def verdict_of(client: TopKClient, stream: Stream) -> Verdict:
    return await compare(client, stream, 1, lambda *_: None)


@pytest.mark.cluster
async def test_the_comparison_is_of_every_count_and_sees_a_single_play(tmp_path: Path, start_up: Any) -> None:
    gateway = start_up(tmp_path / "data", "--shards", "2").wait_ready()
    stream = Stream(12_000, 30_000, 1000, NOW_MS, 1)
    assert stream.charts == 2
    async with TopKClient(gateway) as client:
        await send(client, stream, 40)  # more than a round
        verdict = await verdict_of(client, stream)
        assert verdict.mistakes == []
        assert verdict.counts == 12_000
        await client.record(song_name(77), stream.pane_starts[0])  # one play that the stream does not know of
        await client.flush()
        verdict = await verdict_of(client, stream)
        assert verdict.mistake_count
        stream.sent[3] -= 1
        assert (await verdict_of(client, stream)).mistake_count > 10
        assert len(verdict.mistakes) <= 10


@pytest.mark.cluster
def test_the_demo_ends_with_a_verdict(run_topk: Any) -> None:
    done = run_topk("demo", "--seconds", "3", "--songs", "15000")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = re.search(r"PASS: every one of ([\d,]+) counts is exact", done.stdout)
    assert verdict, done.stdout
    # The slow form may have to do with fewer songs in the time.
    assert verdict[1] == "15,000" or not compiled()
    assert "kill -9" in done.stdout + done.stderr
    where = done.stdout.split("data in ")[1].split()[0]
    assert where.startswith("/")
    assert not Path(where).exists()


@pytest.mark.cluster
def test_bench_measures(shared_cluster: str, run_json: Any, run_topk: Any) -> None:
    before = run_json("top", gateway=shared_cluster)["certificate"]["total_plays"]
    arguments = ("bench", "--seconds", "0.5", "--songs", "1000", "--batch-plays", "500", "--producers", "3")
    figures = run_json(*arguments, gateway=shared_cluster)
    assert figures["plays"] > 0
    assert figures["rejected"] == 0
    assert figures["plays_per_second"] == pytest.approx(figures["plays"] / figures["seconds"], rel=0.01)
    for name in ("ack_ms", "top_k_idle_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p99"]
    assert run_json("top", gateway=shared_cluster)["certificate"]["total_plays"] == before + figures["plays"]
    assert "plays/s durable" in run_topk(*arguments, gateway=shared_cluster).stdout


def test_a_stream_counts_what_it_hands_out() -> None:
    stream = Stream(500, 1700, 300, NOW_MS, 3)
    counts, panes = np.zeros(500, int), np.zeros((PANES, 500), int)
    for _ in range(14):
        batch = stream.next_batch()
        np.add.at(counts, batch.songs, 1)
        pane = stream.pane_starts.index(int(batch.played_at_ms[0]))
        np.add.at(panes[pane], batch.songs, 1)
    assert counts.min() >= 1
    assert stream.counts().tolist() == counts.tolist()
    assert [stream.counts(pane).tolist() for pane in range(PANES)] == panes.tolist()
    assert stream.pane_starts[-1] <= NOW_MS
    assert all(start % PANE_MS == 0 for start in stream.pane_starts)
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda song: (-counts[song], song_name(song)))
    assert ranking(stream.counts()).tolist() == order


def test_zipf_draws_by_popularity() -> None:
    drawn = np.bincount(Zipf(1000, 1.0, 5).draw(200_000), minlength=1000)
    ranked = np.sort(drawn)[::-1]
    harmonic = float(np.sum(1 / np.arange(1, 1001)))
    for place in (1, 2, 10):
        assert ranked[place - 1] == pytest.approx(200_000 / harmonic / place, rel=0.1)
    assert (Zipf(1000, 1.0, 5).draw(50) == Zipf(1000, 1.0, 5).draw(50)).all()


@settings(max_examples=50, deadline=None)
@given(
    songs=st.lists(st.integers(0, 10**11 - 1), min_size=1, max_size=20),
    producer=st.text(min_size=1, max_size=20).map(str.encode),
    sequence=st.integers(1, 1 << 60),
)
def test_encoded_plays_are_the_message(songs: list[int], producer: bytes, sequence: int) -> None:
    times = np.arange(len(songs), dtype=np.int64) + NOW_MS
    plays = EncodedPlays.of(np.asarray(songs, np.int64), times)
    batch = pb.StreamPlaysRequest.FromString(plays.request(producer, sequence, 7)).batch
    assert (batch.producer_id.encode(), batch.sequence, batch.first_sent_ms) == (producer, sequence, 7)
    assert [(play.song_id, play.played_at_ms) for play in batch.plays] == [
        (song_name(song), when) for song, when in zip(songs, times.tolist(), strict=True)
    ]
    data, offsets = song_columns(np.asarray(songs, np.int64))
    assert bytes(data).decode() == "".join(song_name(song) for song in songs)
    assert offsets[-1] == len(data)
