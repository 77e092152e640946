"""`top`, `rank`, `charts`, `cluster status`: what they print, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import run_topk

pytestmark = pytest.mark.cluster

PLAYS = """song,t,c
Für Elise,2020-05-01 10:00:00,AT
Für Elise,2020-05-01 23:59:59,AT
Für Elise,2020-05-02 00:00:00,DE
[bold]not markup[/],2020-05-01 12:00:00,DE
A,2020-05-01 12:00:00,
B,2020-05-02 12:00:00,DE
"""


@pytest.fixture(scope="module")
def gateway(shared_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from topk_grpc.cli.ingest import Request, run
    from topk_grpc.cli.mapping import Mapping
    from topk_grpc.cli.reach import Reach

    file = tmp_path_factory.mktemp("plays") / "plays.csv"
    file.write_text(PLAYS)
    run(Request((str(file),), Mapping(("song",), "t", "c"), "auto", "", None, False, Reach(shared_cluster), False))
    return shared_cluster


def test_top_as_json(gateway: str, run_json: Any) -> None:
    answer = run_json("top", "--window", "tumbling:1d", "--as-of", "2020-05-01", "-k", "2", gateway=gateway)
    assert answer == {
        "window": {"start_ms": 1588291200000, "end_ms": 1588377600000},
        "certificate": {
            "complete": True,
            "missing_shards": [],
            "epoch": answer["certificate"]["epoch"],
            "watermark_ms": 1588420800000,
            "finality": "FINAL",
            "total_plays": 4,
            "distinct_songs": 3,
            "other_plays": 1,
        },
        "entries": [
            {"rank": 1, "song_id": "Für Elise", "count": 2, "share": 0.5},
            {"rank": 2, "song_id": "A", "count": 1, "share": 0.25},
        ],
    }
    assert isinstance(answer["certificate"]["epoch"], int)


def test_top_of_all_time_has_no_bounds(gateway: str, run_json: Any) -> None:
    answer = run_json("top", gateway=gateway)
    assert answer["window"] == {"start_ms": None, "end_ms": None}
    assert answer["certificate"]["finality"] == "PRELIMINARY"
    assert [entry["song_id"] for entry in answer["entries"]] == ["Für Elise", "A", "B", "[bold]not markup[/]"]


def test_as_of_takes_every_form(gateway: str, run_json: Any) -> None:
    def total(as_of: str) -> int:
        arguments = ("top", "-w", "tumbling:1d", "--as-of", as_of)
        return int(run_json(*arguments, gateway=gateway)["certificate"]["total_plays"])

    assert total("2020-05-01T12:00:00+02:00") == total("1588291200000") == 4
    assert total("latest") == 2
    assert run_json("top", "-w", "tumbling:1d", gateway=gateway)["entries"] == []  # now


def test_rank_as_json(gateway: str, run_json: Any) -> None:
    answer = run_json("rank", "B", "nobody", "--window", "global", "--neighbours", "1", gateway=gateway)
    assert answer["songs"] == [
        {
            "song_id": "B",
            "count": 1,
            "rank": 3,
            "share": 1 / 6,
            "above": [{"rank": 2, "song_id": "A", "count": 1, "share": 1 / 6}],
            "below": [{"rank": 4, "song_id": "[bold]not markup[/]", "count": 1, "share": 1 / 6}],
        },
        {"song_id": "nobody", "count": 0, "rank": None, "share": 0.0, "above": [], "below": []},
    ]
    assert answer["certificate"]["total_plays"] == 6
    assert answer["window"] == {"start_ms": None, "end_ms": None}


def test_charts_and_status_as_json(gateway: str, run_json: Any) -> None:
    assert run_json("charts", gateway=gateway) == {
        "charts": [
            {"chart": "DE", "total_plays": 3, "distinct_songs": 3},
            {"chart": "AT", "total_plays": 2, "distinct_songs": 1},
        ]
    }
    status = run_json("cluster", "status", gateway=gateway)
    assert (status["slots"], status["partitioner"], status["resolution_ms"]) == (1024, "ring", 1000)
    assert sum(shard["total_plays"] for shard in status["shards"]) == 6
    assert all(shard["reachable"] for shard in status["shards"])


def test_tables_show_names_as_they_are(gateway: str, run_topk: Any) -> None:
    done = run_topk("top", gateway=gateway)
    assert done.returncode == 0
    assert "[bold]not markup[/]" in done.stdout
    assert "6 plays of 4 songs; exact, all shards answered; preliminary" in done.stdout
    assert "2020-05-02T12:00:00Z" in done.stdout
    for arguments in (("rank", "B", "-n", "1"), ("charts",), ("cluster", "status")):
        shown = run_topk(*arguments, gateway=gateway)
        assert shown.returncode == 0, shown.stderr
        assert "│" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("top", "-k", "0"), "1 to 10000"),
        (("top", "-k", "10001"), "1 to 10000"),
        (("top", "-w", "sometimes"), "'sometimes' is not a window"),
        (("top", "-w", "tumbling:1x"), "'1x' is not a duration"),
        (("top", "-w", "tumbling:1500ms"), "resolution"),
        (("top", "--as-of", "latest"), "global"),
        (("top", "-w", "tumbling:1d", "--as-of", "yesterday"), "'yesterday' is not a time"),
        (("rank", "x", "-n", "101"), "100"),
        (("rank", *(f"s{n}" for n in range(101))), "100"),
    ],
)
def test_mistakes_are_one_line(gateway: str, run_topk: Any, arguments: tuple[str, ...], said: str) -> None:
    done = run_topk(*arguments, gateway=gateway)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_several_gateways_may_be_named(gateway: str, run_json: Any) -> None:
    assert run_json("top", gateway=f"{gateway}, {gateway}")["certificate"]["total_plays"] == 6


def test_version_says_how_kernels_run(run_topk: Any) -> None:
    done = run_topk("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("topk-grpc 0.")
    assert done.stdout.strip().endswith(("compiled kernels", "pure Python kernels"))


def test_help_needs_none_of_the_heavy_imports(tmp_path: Path, run_topk: Any) -> None:
    for name in ("grpc", "numpy", "pyarrow", "uvloop"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    for arguments in (("--help",), ("shard", "--help"), ("ingest", "--help"), ("cluster", "--help")):
        assert run_topk(*arguments, environment={"PYTHONPATH": str(tmp_path)}).returncode == 0


@pytest.mark.parametrize("command", ["top", "rank", "watch"])
def test_help_shows_how_windows_are_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run_topk(command, "--help")
    assert done.returncode == 0, done.stderr
    shown = "".join(done.stdout.replace("│", " ").split())
    assert "tumbling:SIZE[@OFFSET](" in shown
    assert "sliding:SIZE[/SLIDE](" in shown
