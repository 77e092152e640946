"""Each benchmark in a tiny form, so that none of them rots; what they print is not judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    bench_hot_song,
    bench_ingest,
    bench_memory,
    bench_query,
    bench_rebalance,
    bench_recovery,
    bench_storage,
    bench_windows,
    figures,
    harness,
    plays,
)
from benchmarks.figures import Figure, Report, Target
from benchmarks.harness import BenchmarkError
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

pytestmark = pytest.mark.cluster


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for data; a temporary directory in memory will do here."""
    monkeypatch.setattr(harness, "_MEMORY_FILE_SYSTEMS", frozenset())
    return tmp_path


def test_ingest_measures_system_relay_and_redis(disk: Path) -> None:
    report = bench_ingest.run(
        bench_ingest.Options(
            batch_plays=(256,), rounds=2, seconds=0.2, songs=500, streams=2, in_flight=2, pool_plays=2048, data_dir=disk
        )
    )  # fmt: skip
    rates = {figure.name: figure.value for figure in report.figures}
    assert rates["system, 256 a batch"] > 0
    assert rates["relay, 256 a batch"] > 0
    assert len(report.details["256"]["system"]) == 2
    assert not list(disk.glob(".bench-*"))  # nothing stays
    if shutil.which("redis-server") is None:
        assert "left out" in report.notes[0]
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    assert rates["redis, 256 a batch"] > 0
    assert rates["system / redis, 256 a batch"] > 0


def test_query_measures_idle_and_busy(disk: Path) -> None:
    options = bench_query.Options(
        shards=2, songs=300, k=10, queries=2, busy_queries=2, history_seconds=0.2, batch_plays=256, pool_plays=2048,
        data_dir=disk,
    )  # fmt: skip
    report = bench_query.run(options)
    assert len(report.figures) == 16
    assert all(figure.value > 0 for figure in report.figures)
    assert sum(figure.target is not None for figure in report.figures) == 1


def test_hot_song_measures_the_fullest_shard(disk: Path) -> None:
    options = bench_hot_song.Options(rounds=1, plays=40_000, songs=3000, batch_plays=1000, shards=2, data_dir=disk)
    report = bench_hot_song.run(options)
    figures = {figure.name: figure for figure in report.figures}
    assert len(figures) == 12
    assert sum(figure.target is not None for figure in report.figures) == 4
    for name in ("plays in parts, hot song / uniform", "bytes in parts, hot song / uniform"):
        assert figures[name].met  # these do not depend on the machine
    drawn = bench_hot_song.songs_of("hot song", 1000, 50, 1)
    assert 500 <= (drawn == 0).sum() < 560


def test_memory_measures_an_entry(disk: Path) -> None:
    report = bench_memory.run(
        bench_memory.Options(
            songs=20_000, few_songs=100, warm_up_seconds=0.2, batch_plays=512, snapshot_seconds=1, data_dir=disk
        )
    )
    assert report.details["entries"] == 19_900


def test_storage_measures_a_core(disk: Path) -> None:
    report = bench_storage.run(bench_storage.Options(plays=4096, songs=200, batch_plays=256, data_dir=disk))
    assert all(figure.value > 0 for figure in report.figures)


def test_recovery_measures_snapshots_and_replay(disk: Path) -> None:
    report = bench_recovery.run(
        bench_recovery.Options(entries=2000, plays=4096, songs=200, batch_plays=256, rounds=2, data_dir=disk)
    )
    assert sum(figure.target is not None for figure in report.figures) == 4
    assert all(figure.value > 0 for figure in report.figures)


def test_windows_measure_ingest_queries_slides_and_size(disk: Path) -> None:
    options = bench_windows.Options(
        rounds=1, seconds=0.2, songs=600, many_songs=1200, slide_plays=3000, k=10, queries=2, busy_queries=2,
        batch_plays=256, pool_plays=2048, data_dir=disk,
    )  # fmt: skip
    report = bench_windows.run(options)
    assert sum(figure.target is not None for figure in report.figures) == 10
    assert all(figure.value > 0 for figure in report.figures)


def test_rebalance_measures_ingest_while_slots_move(disk: Path) -> None:
    options = bench_rebalance.Options(
        rounds=1, seconds=0.1, songs=500, batch_plays=256, pool_plays=2048, data_dir=disk
    )  # fmt: skip
    report = bench_rebalance.run(options)
    figures = {figure.name: figure for figure in report.figures}
    assert figures["slots move / nothing moves"].value > 0
    assert figures["slots moved"].value > 0
    assert figures["moved with them"].value > 0
    assert not list(disk.glob(".bench-*"))


def test_plays_are_33_bytes_of_protobuf() -> None:
    pool = plays.PlayPool(50, 1.0, 64, 512)
    pool.stamp(2)
    body = pool.batch(3, 1.5)
    assert len(body) == 64 * plays.PLAY_BYTES
    batch = pb.StreamPlaysRequest.FromString(plays.request(body, b"p", 7, 9)).batch
    assert (batch.producer_id, batch.sequence, batch.first_sent_ms, len(batch.plays)) == ("p", 7, 9, 64)
    assert {len(play.song_id) for play in batch.plays} == {plays.ID_BYTES}
    times = np.array([play.played_at_ms for play in batch.plays])
    assert times.max() - times.min() < 1000 * plays.SPREAD_SECONDS
    every = [
        play.song_id
        for some in pool.every_song()
        for play in pb.StreamPlaysRequest.FromString(plays.request(some, b"p", 1, 1)).batch.plays
    ]
    assert len(every) == len(set(every)) == 50


def test_data_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_MEMORY_FILE_SYSTEMS", frozenset({harness.file_system(tmp_path)}))
    with pytest.raises(BenchmarkError, match="--data-dir"), harness.scratch_directory(tmp_path):
        pass


def test_a_process_that_ends_is_an_error_that_quotes_it(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="the following arguments are required"):
        harness.Process(harness.module("benchmarks.redis_load"), tmp_path)


def test_figures_are_judged_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    met = Figure.of("met", [3.0, 1.0, 2.0], "×", Target(">=", 2))
    missed = Figure.of("missed", [3.0, 1.0, 2.0], "ms", Target("<=", 1.5))
    report = Report("some", [met, missed, Figure("told", 12_345.6, "plays/s")], ["a note"])
    assert (met.value, met.low, met.high, met.met, missed.met) == (2.0, 1.0, 3.0, True, False)
    figures.print_reports([report], as_json=False)
    text = capsys.readouterr().out
    assert "12,346" in text
    assert "missed" in text
    assert "a note" in text
    figures.print_reports([report], as_json=True)
    (printed,) = json.loads(capsys.readouterr().out)["reports"]
    assert [figure["met"] for figure in printed["figures"]] == [True, False, None]
