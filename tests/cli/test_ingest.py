"""`topk ingest` into a real cluster: real plays against published counts, broken files, and kill -9 of everything."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from topk_grpc import BlockingTopKClient
from topk_grpc.cli.tabular import BATCH_ROWS
from topk_grpc.kernels import compiled

pytestmark = pytest.mark.cluster

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real plays at {SHARED}")
CLASSIC = SHARED / "classic_rock"
CLASSIC_MAPPING = ("--song", "combined", "--time", "date_time", "--chart", "callsign")
MAPPING = ("--song", "song", "--time", "t")
T = "2014-06-16 18:28:34"


def counts_of(answer: Any) -> dict[str, int]:
    return {entry["song_id"]: entry["count"] for entry in answer["entries"]}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@needs_data
def test_real_plays_give_the_published_counts(tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any) -> None:
    gateway = start_up(tmp_path / "data", "--shards", "2").wait_ready()
    file = str(CLASSIC / "plays.csv.gz")

    def check() -> None:
        answer = run_json("top", "--window", "global", "-k", "2500", gateway=gateway)
        assert answer["window"] == {"start_ms": None, "end_ms": None}
        assert answer["certificate"]["total_plays"] == 37_673
        assert answer["certificate"]["complete"] is True
        counts = counts_of(answer)
        assert sum(counts.values()) == 37_673
        assert [entry["rank"] for entry in answer["entries"]] == list(range(1, len(counts) + 1))
        with (CLASSIC / "published_counts.csv").open(encoding="utf-8") as lines:
            published = {row["combined"]: int(row["playcount"] or 0) for row in csv.DictReader(lines)}
        both = counts.keys() & published.keys()
        assert len(both) == 2227
        # Published as 0: its plays were published under another artist.
        assert {song for song in both if counts[song] != published[song]} <= {
            "Hey, Hey (What Can I Do?) by Dread Zeppelin"
        }
        with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert counts == Counter(row["combined"] for row in rows)
        chart = run_json("top", "-k", "2500", "--chart", "KSEG", gateway=gateway)
        assert sum(counts_of(chart).values()) == chart["certificate"]["total_plays"] == 1821
        charts = {each["chart"]: each["total_plays"] for each in run_json("charts", gateway=gateway)["charts"]}
        assert charts == Counter(row["callsign"] for row in rows)

    first = run_json("ingest", file, *CLASSIC_MAPPING, gateway=gateway)["files"][0]
    assert (first["rows"], first["plays"], first["accepted"], first["batches_before"]) == (37_673, 37_673, 37_673, 0)
    check()
    again = run_json("ingest", file, *CLASSIC_MAPPING, gateway=gateway)["files"][0]
    assert again["batches_before"] == again["batches"] == 5
    check()
    unpacked = write(tmp_path / "renamed.csv", gzip.decompress(Path(file).read_bytes()))
    assert run_json("ingest", unpacked, *CLASSIC_MAPPING, gateway=gateway)["files"][0]["batches_before"] == 5
    check()


@needs_data
def test_times_with_offsets_fall_into_their_days(tmp_path: Path, start_up: Any, run_json: Any) -> None:
    gateway = start_up(tmp_path / "data", "--shards", "2").wait_ready()
    arguments = ("--song", "artist", "--song", "track", "--time", "played_at", "--chart", "channel")
    loaded = run_json("ingest", str(SHARED / "somafm" / "plays.csv.gz"), *arguments, gateway=gateway)["files"][0]
    assert (loaded["plays"], loaded["skipped"], loaded["rejected"]) == (9982, 0, 0)
    with gzip.open(SHARED / "somafm" / "plays.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    days: dict[str, Counter[str]] = {}
    for row in rows:
        day = datetime.fromisoformat(row["played_at"]).astimezone(UTC).date().isoformat()
        days.setdefault(day, Counter())[f"{row['artist']} - {row['track']}"] += 1
    for day, expected in days.items():
        answer = run_json("top", "-w", "tumbling:1d", "--as-of", day, "-k", "10000", gateway=gateway)
        assert counts_of(answer) == expected


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "ndjson", "ndjson.zst", "parquet", "-"])
def test_every_format_gives_the_same_counts(
    tmp_path: Path, shared_cluster: str, run_topk: Any, run_json: Any, kind: str
) -> None:
    chart = f"format {kind}"
    rows = [(f"{kind}, song “{row % 7}”", 1_402_943_314 + row, 1 + row % 3) for row in range(100)]
    lines = [f'"{song}",{when},{chart},{count}' for song, when, count in rows]
    text = "song,t,c,n\n" + "\n".join(lines) + "\n"
    ndjson = "\n".join(json.dumps({"song": s, "t": t, "c": chart, "n": n}) for s, t, n in rows)
    path = tmp_path / f"a.{kind}"
    match kind:
        case "csv" | "-":
            write(path, text)
        case "csv.gz":
            write(path, gzip.compress(text.encode()))
        case "tsv":
            write(path, "song\tt\tc\tn\n" + "".join(f"{s}\t{t}\t{chart}\t{n}\n" for s, t, n in rows))
        case "ndjson":
            write(path, ndjson)
        case "ndjson.zst":
            write(path, pa.compress(ndjson.encode(), "zstd", asbytes=True))
        case _:
            songs, times, counts = zip(*rows, strict=True)
            table = {"song": songs, "t": pa.array(times, pa.timestamp("s")), "c": [chart] * 100, "n": counts}
            parquet.write_table(pa.table(table), path)
    mapping = (*MAPPING, "--chart", "c", "--count", "n")
    if kind == "-":
        done = run_topk("ingest", "-", *mapping, "--producer-id", "me", gateway=shared_cluster, stdin=path.read_bytes())
    else:
        done = run_topk("ingest", str(path), *mapping, gateway=shared_cluster)
    assert done.returncode == 0, done.stderr
    expected: Counter[str] = Counter()
    for song, _, count in rows:
        expected[song] += count
    assert counts_of(run_json("top", "-k", "100", "--chart", chart, gateway=shared_cluster)) == expected


BAD: dict[str, tuple[str | bytes, tuple[str, ...], list[str]]] = {
    "missing column": ("title,t\nx,1402943314\n", (), ["no column 'song'", "title, t"]),
    "malformed time": (f"song,t\na,{T}\nb,soon\n", (), ["row 2", "column 't'", "'soon'", "ISO 8601", "--skip-bad"]),
    "missing time": (f"song,t\na,{T}\nb,\n", (), ["row 2", "column 't'", "missing"]),
    "seconds as milliseconds": (
        "song,t\na,1402943314\n",
        ("--time-unit", "ms"),
        ["row 1", "1970-01-17", "--time-unit"],
    ),
    "empty song": (f"song,t\n,{T}\n", (), ["row 1", "column 'song'", "empty"]),
    "id of 129 bytes": (f"song,t\n{'x' * 129},{T}\n", (), ["row 1", "129 bytes", "128"]),
    "invalid UTF-8": (b"song,t\nBj\xf6rk," + T.encode() + b"\n", (), ["row 1", "Bj\\\\xf6rk", "not UTF-8"]),
    "far future": ("song,t\na,2090-01-01\n", (), ["row 1", "2090", "future"]),
    "too many cells": (f"song,t\na,{T}\nb,c,{T}\n", (), ["row 2", "3 cells", "--skip-bad"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_before_anything_counts(
    tmp_path: Path, shared_cluster: str, run_topk: Any, run_json: Any, name: str
) -> None:
    content, arguments, expected = BAD[name]
    before = run_json("top", gateway=shared_cluster)["certificate"]["total_plays"]
    file = write(tmp_path / "plays.csv", content)
    done = run_topk("ingest", file, *MAPPING, *arguments, gateway=shared_cluster)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}")
    for part in expected:
        assert part in line
    assert run_json("top", gateway=shared_cluster)["certificate"]["total_plays"] == before


def test_one_bad_file_stops_all(tmp_path: Path, shared_cluster: str, run_topk: Any, run_json: Any) -> None:
    good = write(tmp_path / "good.csv", f"song,t\none bad stops all,{T}\n")
    bad = write(tmp_path / "bad.csv", "song,t\nx,soon\n")
    assert run_topk("ingest", good, bad, *MAPPING, gateway=shared_cluster).returncode == 1
    assert run_json("rank", "one bad stops all", gateway=shared_cluster)["songs"][0]["count"] == 0


def test_bad_rows_can_be_skipped(tmp_path: Path, shared_cluster: str, run_topk: Any, run_json: Any) -> None:
    rows = [f"skip {row % 5},{T}" if row % 100 else "skip x,never" for row in range(1, 3 * BATCH_ROWS)]
    rows[BATCH_ROWS : 2 * BATCH_ROWS] = ["no time,"] * BATCH_ROWS  # a whole batch without a good row
    rows.insert(50, "too,many,cells")
    file = write(tmp_path / "a.csv", "song,t\n" + "\n".join(rows))
    good = Counter(row.split(",")[0] for row in rows if row.endswith(f",{T}"))
    for turn in range(2):
        done = run_topk("ingest", file, *MAPPING, "--skip-bad", gateway=shared_cluster)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("skipped: ") == 20
        assert f"{len(rows) - good.total():,} bad rows skipped" in done.stdout
        assert ("all of them had been counted before" in done.stdout) == bool(turn)
        songs = run_json("rank", *(f"skip {n}" for n in range(5)), "skip x", "no time", "too", gateway=shared_cluster)
        assert {song["song_id"]: song["count"] for song in songs["songs"] if song["count"]} == good


def test_rows_that_the_cluster_rejects_are_listed(tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any) -> None:
    gateway = start_up(tmp_path / "data", "--shards", "2", "--song-id-bytes-max", "20").wait_ready()
    rows = [f"song {row},{T}" for row in range(BATCH_ROWS + 10)]
    rows[3] = f"{'long' * 10},{T}"
    rows[BATCH_ROWS + 4] = f"{'longer' * 10},{T}"
    file = write(tmp_path / "a.csv", "song,t\n" + "\n".join(rows))
    for _ in range(2):  # a resend is answered as the first
        done = run_topk("ingest", file, *MAPPING, gateway=gateway)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if line.startswith("rejected: ")]
        assert [("row 4 " in line, f"row {BATCH_ROWS + 5:,} " in line) for line in lines] == [
            (True, False),
            (False, True),
        ]
        assert all("SONG_ID_TOO_LONG" in line for line in lines)
        assert "2 rows rejected by the cluster" in done.stdout
        assert run_json("top", gateway=gateway)["certificate"]["total_plays"] == BATCH_ROWS + 8


def test_standard_input_goes_on_where_it_stopped(
    tmp_path: Path, shared_cluster: str, run_topk: Any, run_json: Any
) -> None:
    rows = [f"stdin {row},{T}" for row in range(BATCH_ROWS + 100)]
    broken = "\n".join(["song,t", *rows[:-1], "stdin last,oops"]).encode()
    arguments = ("ingest", "-", *MAPPING, "--producer-id", "stream 1")
    done = run_topk(*arguments, gateway=shared_cluster, stdin=broken)
    assert done.returncode == 1
    assert f"row {BATCH_ROWS + 100:,}" in done.stderr
    assert f"The {BATCH_ROWS:,} rows before this one's batch are counted" in done.stderr
    standing = run_json("rank", "stdin 0", f"stdin {BATCH_ROWS}", gateway=shared_cluster)["songs"]
    assert [song["count"] for song in standing] == [1, 0]
    whole = "\n".join(["song,t", *rows]).encode()
    for _ in range(2):
        assert run_topk(*arguments, gateway=shared_cluster, stdin=whole).returncode == 0
        standing = run_json(
            "rank", "stdin 0", f"stdin {BATCH_ROWS}", f"stdin {BATCH_ROWS + 99}", gateway=shared_cluster
        )
        assert [song["count"] for song in standing["songs"]] == [1, 1, 1]


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, shared_cluster: str, run_topk: Any) -> None:
    file = write(tmp_path / "a.csv", f"song,t\na,{T}\n")
    cases = [
        (("-", *MAPPING), "--producer-id"),
        ((file, *MAPPING, "--producer-id", "x"), "standard input"),
        (("-", file, *MAPPING, "--producer-id", "x"), "alone"),
        ((file, file, *MAPPING), "twice"),
        ((file, *MAPPING, "--time-unit", "days"), "--time-unit is 'days'"),
        ((file, *MAPPING, "--format", "xml"), "--format is 'xml'"),
        ((str(tmp_path / "none.csv"), *MAPPING), "No such file"),
        ((str(tmp_path), *MAPPING), "directory"),
    ]
    for arguments, said in cases:
        done = run_topk("ingest", *arguments, gateway=shared_cluster)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert said in done.stderr


def test_without_a_cluster_it_says_so(tmp_path: Path, run_topk: Any) -> None:
    file = write(tmp_path / "a.csv", f"song,t\na,{T}\n")
    for arguments in (
        ("ingest", file, *MAPPING),
        ("top",),
        ("rank", "x"),
        ("charts",),
        ("cluster", "status"),
        ("bench",),
    ):
        done = run_topk(*arguments, gateway="127.0.0.1:1")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "127.0.0.1:1" in done.stderr
        assert "topk up" in done.stderr


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, run_topk: Any) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('hidden')")
    file = write(tmp_path / "a.csv", "song,t\n")
    done = run_topk("ingest", file, *MAPPING, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "pip install 'topk-grpc[ingest]'" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path, run_topk: Any) -> None:
    done = run_topk("ingest", str(tmp_path / "none.csv"), *MAPPING, environment={"TOPK_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_kill_of_everything_in_the_middle_loses_and_doubles_nothing(
    tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any
) -> None:
    """kill -9 of the ingest, the supervisor, every shard and the gateway; then all again; twice over."""
    rows = 1_000_000 if compiled() else 60_000
    songs = [f"song {row * row % 7919}" for row in range(rows)]
    file = write(tmp_path / "a.csv", "song,t,c\n" + "".join(f"{song},{T},chart {len(song)}\n" for song in songs))
    expected = Counter(songs)
    data = tmp_path / "data"
    for after in (1, rows // 2):
        up = start_up(data, "--shards", "2")
        gateway = up.wait_ready()
        command = [sys.executable, "-m", "topk_grpc", "ingest", file, *MAPPING, "--chart", "c", "--gateway", gateway]
        ingest = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with BlockingTopKClient(gateway) as client:
                while client.top_k("global", 1).certificate.total_plays < after and ingest.poll() is None:
                    time.sleep(0.005)
            assert ingest.poll() is None, "the ingest was too quick to be killed in the middle: give it more rows"
        finally:
            ingest.kill()
            ingest.wait()
        up.kill_everything()
    gateway = start_up(data).wait_ready()
    before = run_json("top", "-k", "1", gateway=gateway)["certificate"]["total_plays"]
    assert rows // 2 <= before < rows
    done = run_topk("ingest", file, *MAPPING, "--chart", "c", gateway=gateway)
    assert done.returncode == 0, done.stderr
    answer = run_json("top", "-k", "10000", gateway=gateway)
    assert counts_of(answer) == expected
    charts = {each["chart"]: each["total_plays"] for each in run_json("charts", gateway=gateway)["charts"]}
    assert charts == Counter(f"chart {len(song)}" for song in songs)
