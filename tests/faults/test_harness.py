"""The storm's own parts: that they notice what they are there for, and break what they say."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.faults import verdict
from tests.faults.cluster import GATEWAYS, SHARDS
from tests.faults.files import CONTROL, SECTOR, FaultyFiles, FileFault, struck, write_control
from tests.faults.ledger import CHARTS, DAY, IDS, NAMES, SECOND, SETS, Ledger, Plays, Range, between
from tests.faults.proxy import TO_CLIENT, TO_SERVER, Proxy, Trouble
from tests.faults.schedule import KINDS, lane
from tests.faults.weather import CLEARING_SECONDS, Weather
from topk_grpc.model import Answer, Bounds, Certificate, Entry, Finality, SongsAnswer, SongStanding

NOW = 1_700_000_000_000


def plays(counts: Sequence[int], songs: Sequence[int], bucket: int = 600, charts: int = 0) -> Plays:
    rows = len(counts)
    places = np.full(rows, charts), np.full(rows, bucket), np.array(songs), np.zeros(rows, np.int64)
    return Plays("now", *places, np.array(counts))


# --- Ledger -----------------------------------------------------------------------------------------------------------


def test_a_count_lies_between_what_was_acknowledged_before_and_what_was_sent_by_then() -> None:
    ledger = Ledger(NOW, 60)
    certain, uncertain, back = plays([5], [1]), plays([3], [1]), plays([-2], [1])
    ledger.add_sent(certain)
    ledger.add_acknowledged(certain)
    asked = ledger.moment("", None)
    ledger.add_sent(uncertain)
    ledger.add_sent(back)
    truth = between(asked, ledger.moment("", None))
    assert (truth.low[1], truth.high[1]) == (3, 8)
    ledger.add_acknowledged(uncertain)
    ledger.add_acknowledged(back)
    moment = ledger.moment("", None)
    truth = between(moment, moment)
    assert truth.low[1] == truth.high[1] == 6
    assert ledger.all_acknowledged


def test_the_ledger_cuts_time_and_charts_as_the_oracle_does() -> None:
    chance = random.Random(3)
    ledger = Ledger(NOW, 60)
    grid = ledger.grids["now"]
    for _ in range(200):
        charts, bucket = chance.randrange(len(SETS)), chance.randrange(grid.buckets)
        some = plays([chance.randint(1, 4)], [chance.randrange(10)], bucket, charts)
        ledger.add_sent(some)
        ledger.add_acknowledged(some)
    tally = ledger.tally()
    spans = [None, Bounds(0, 1), Bounds(NOW - DAY, NOW + DAY)]
    for _ in range(20):
        start = grid.first_ms + chance.randrange(-50, grid.buckets + 50) * SECOND
        spans.append(Bounds(start, start + chance.randrange(1, 900) * SECOND))
    for bounds, chart in itertools.product(spans, CHARTS):
        moment = ledger.moment(chart, bounds)
        counted = {NAMES[song]: int(count) for song, count in enumerate(moment.acknowledged) if count}
        assert counted == tally.counts(chart, bounds)


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def truth_of(counts: dict[str, tuple[int, int]]) -> Range:
    low, high = np.zeros(len(NAMES), np.int64), np.zeros(len(NAMES), np.int64)
    for name, (least, most) in counts.items():
        low[IDS[name]], high[IDS[name]] = least, most
    return Range(low, high)


A, B, C = NAMES[1], NAMES[2], NAMES[3]
TRUTH = truth_of({A: (5, 6), B: (5, 5), C: (2, 4)})


def answer(*entries: tuple[str, int], total: int = 13, distinct: int = 3) -> Answer:
    listed = tuple(Entry(rank, name, count, 0.0) for rank, (name, count) in enumerate(entries, 1))
    other = total - sum(count for _, count in entries)
    return Answer(None, Certificate(True, (), 1, NOW, Finality.PRELIMINARY, total, distinct, other), listed)


def test_a_true_answer_has_nothing_wrong() -> None:
    assert not list(verdict.top_k(answer((A, 5), (B, 5), (C, 3)), 10, TRUTH))
    assert not list(verdict.top_k(answer((A, 6), total=14), 1, TRUTH))


@pytest.mark.parametrize(
    ("said", "k", "what"),
    [
        (answer((A, 4), (B, 5), (C, 3), total=12), 10, "must have 5 to 6"),  # lost
        (answer((A, 7), (B, 5), (C, 3), total=15), 10, "must have 5 to 6"),  # counted twice
        (answer((B, 5), (A, 5), (C, 3)), 10, "out of order"),
        (answer((A, 5), (A, 5), (C, 3)), 10, "not distinct"),
        (answer((A, 5), (B, 5), total=13), 10, "C".replace("C", C) + " is missing"),
        (answer((B, 5), total=12), 1, A + " is missing"),
        (answer((A, 6), (B, 5), (C, 3), total=11), 10, "total_plays is 11"),
        (answer((A, 6), (B, 5), (C, 3), total=16), 10, "total_plays is 16"),
        (answer((A, 6), (B, 5), (C, 3), total=14, distinct=4), 10, "distinct_songs is 4"),
        (answer((A, 6), ("never played", 5), (C, 3), total=14), 10, "never played"),
    ],
)
def test_a_wrong_answer_is_noticed(said: Answer, k: int, what: str) -> None:
    assert any(what in problem for problem in verdict.top_k(said, k, TRUTH))


def test_a_wrong_rank_is_noticed() -> None:
    def said(rank: int) -> SongsAnswer:
        return SongsAnswer(None, answer(total=13).certificate, (SongStanding(C, 3, rank),))

    assert not list(verdict.songs(said(3), [C], TRUTH))
    assert any("has rank 2, and must have 3 to 3" in one for one in verdict.songs(said(2), [C], TRUTH))
    assert any("has rank 4, and must have 3 to 3" in one for one in verdict.songs(said(4), [C], TRUTH))


def test_songs_of_a_missing_shard_are_not_asked_for() -> None:
    owners = verdict.Owners([0, 1, 2, 0], SHARDS)
    left = owners.without(["shard-1"])
    assert 0 < left.sum() < len(NAMES)
    assert (verdict.of_some(TRUTH, left).low[~left] == 0).all()


def test_weather_excuses_only_what_was_broken_a_moment_ago() -> None:
    weather = Weather()
    with weather.broken("shard-1"):
        assert weather.excuses(["shard-1", "gateway-0"], 1e12)
        assert not weather.excuses(["shard-0"], 0)
    ended = weather._disturbances[0].ended
    assert ended is not None
    assert weather.excuses(["shard-1"], ended + CLEARING_SECONDS - 1)
    assert not weather.excuses(["shard-1"], ended + CLEARING_SECONDS + 1)


# --- Schedule ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_faults_again_and_every_kind_is_dealt() -> None:
    first, second, other = (
        list(itertools.islice(lane(seed, KINDS, SHARDS, GATEWAYS), 3 * len(KINDS))) for seed in ("1", "1", "2")
    )
    assert first == second != other
    for deck in (first[: len(KINDS)], first[len(KINDS) : 2 * len(KINDS)]):
        assert sorted(fault.kind for fault in deck) == sorted(KINDS)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_files_fail_as_they_are_told_and_only_so_often(tmp_path: Path) -> None:
    control = tmp_path / "control"
    files = FaultyFiles(control, tmp_path / "attic")
    file = files.create(tmp_path / "a.log")
    write_control(control, [FileFault(7, "sync", ".log", "error", skip=1), FileFault(8, "write", "", "short")], 1)
    with pytest.raises(OSError, match="Input/output"):
        file.write(0, [b"x" * 100])
    assert (tmp_path / "a.log").stat().st_size == 50
    file.write(0, [b"y" * 100])
    file.sync()
    with pytest.raises(OSError) as raised:
        file.sync()
    assert raised.value.errno == errno.EIO
    file.sync()
    file.close()
    assert struck(control) == {7, 8}
    write_control(control, [FileFault(7, "map", "", "error")], 1)  # a number strikes once, whoever reads it again
    assert bytes(FaultyFiles(control, tmp_path / "attic").map(tmp_path / "a.log")) == b"y" * 100


def test_a_failed_sync_leaves_what_was_synced_before(tmp_path: Path) -> None:
    control = tmp_path / "control"
    files = FaultyFiles(control, tmp_path / "attic")
    file = files.create(tmp_path / "a")
    file.write(0, [b"s" * 10_000])
    file.sync()
    write_control(control, [FileFault(1, "sync", "", "error")], 5)
    file.write(4000, [b"n" * 6000])
    with pytest.raises(OSError):
        file.sync()
    content = (tmp_path / "a").read_bytes()
    assert content[:4000] == b"s" * 4000
    assert {b"s", b"n"} == {content[at : at + 1] for at in range(4000, 10_000)}


POWER = f"""
import os, sys
from pathlib import Path
from tests.faults.files import FaultyFiles
root = Path(sys.argv[1])
files = FaultyFiles(Path(os.environ["{CONTROL}"]), root / "attic")
file = files.create(root / "data" / "old")
file.write(0, [b"s" * {20 * SECTOR}])
file.sync()
files.sync_directory(root / "data")
file.write({5 * SECTOR}, [b"n" * {15 * SECTOR}])
for number in range(6):
    files.create(root / "data" / str(number)).write(0, [b"x" * 5000])
files.rename(root / "data" / "0", root / "data" / "renamed")
files.remove(root / "data" / "old")
files.sync_directory(root / "data" / "none of this name")
"""


def test_a_loss_of_power_keeps_what_was_synced_and_some_of_the_rest(tmp_path: Path) -> None:
    seen: set[tuple[int, bool, bool]] = set()
    for seed in range(12):
        root = tmp_path / str(seed)
        (root / "data").mkdir(parents=True)
        control = root / "control"
        write_control(control, [FileFault(1, "sync_directory", "none of this name", "power")], seed)
        done = subprocess.run(
            [sys.executable, "-c", POWER, str(root)], check=False, env=os.environ | {CONTROL: str(control)}
        )
        assert done.returncode == -signal.SIGKILL
        names = {path.name for path in (root / "data").iterdir()}
        if "old" in names:
            content = (root / "data" / "old").read_bytes()
            assert content[: 5 * SECTOR] == b"s" * 5 * SECTOR
            sectors = [content[at : at + SECTOR] for at in range(5 * SECTOR, 20 * SECTOR, SECTOR)]
            assert set(sectors) <= {b"s" * SECTOR, b"n" * SECTOR}
        else:
            assert "renamed" in names  # names are lost in order
        seen.add((len(names), "old" in names, "renamed" in names))
    assert len(seen) > 3


# --- Network ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def echo_behind_a_proxy() -> AsyncIterator[tuple[Proxy, int]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
            writer.write(b"the end")
            writer.write_eof()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(lambda: int(server.sockets[0].getsockname()[1]))
    try:
        yield proxy, await proxy.start()
    finally:
        await proxy.close()
        server.close()


async def test_a_proxy_passes_on_cuts_and_passes_on_again() -> None:
    async with echo_behind_a_proxy() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        for cut in ({TO_SERVER}, {TO_CLIENT}, {TO_SERVER, TO_CLIENT}):
            proxy.trouble = Trouble(cut=frozenset(cut))
            writer.write(b"two")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(3), 0.2)
            proxy.trouble = Trouble()
            assert await reader.readexactly(3) == b"two"
        proxy.trouble = Trouble(delay_seconds=0.2)
        began = asyncio.get_running_loop().time()
        writer.write(b"late")
        assert await reader.readexactly(4) == b"late"
        assert asyncio.get_running_loop().time() - began >= 0.4
        proxy.trouble = Trouble()
        writer.write_eof()
        assert await reader.read() == b"the end"
        writer.close()


async def test_a_proxy_resets_half_closes_and_forgets() -> None:
    async with echo_behind_a_proxy() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        assert proxy.half_close(TO_SERVER) == 1
        assert await reader.read() == b"the end"
        writer.close()

        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        assert proxy.forget() == 1
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        again, another = await asyncio.open_connection("127.0.0.1", port)
        another.write(b"new")
        assert await again.readexactly(3) == b"new"
        assert proxy.reset() == 2
        with pytest.raises(ConnectionResetError):
            await again.read()
        writer.close()
        another.close()


def test_a_report_with_any_finding_has_not_passed() -> None:
    from tests.faults.storm import Report

    assert Report(1).passed
    for name in ("lost", "double", "wrong_answers", "other_findings"):
        report = Report(1)
        setattr(report, name, 1)
        assert not report.passed
    assert "lost 0, double 0, wrong answers 0" in Report(1).line()
