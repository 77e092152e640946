"""`topk cluster delete-song`, and plays taken back by `topk ingest`: what they say, ask and do."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import DEADLINE_SECONDS, TOPK, clean_environment

pytestmark = pytest.mark.cluster


@pytest.fixture
def plays(shared_cluster: str, tmp_path: Path, run_topk: Any) -> str:
    """A name, unlike any before, under which three songs have plays."""
    name = tmp_path.name
    rows = [f"{name} {song},2020-05-0{day},C{day},2" for song in "abc" for day in (1, 2)]
    file = tmp_path / "plays.csv"
    file.write_text("\n".join(["song,t,c,n", *rows]))
    done = run_topk(*ingest(file), gateway=shared_cluster)
    assert done.returncode == 0, done.stderr
    return name


def ingest(file: Path) -> list[str]:
    return ["ingest", str(file), "--song", "song", "--time", "t", "--chart", "c", "--count", "n"]


def counts(run_json: Any, gateway: str, name: str, *arguments: str) -> list[int]:
    songs = run_json("rank", *(f"{name} {song}" for song in "abc"), *arguments, gateway=gateway)["songs"]
    return [song["count"] for song in songs]


def at_terminal(answer: bytes, *arguments: str, gateway: str) -> tuple[int, str, str]:
    """Runs a command whose standard input is a terminal, at which somebody answers. Status, stdout, stderr."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [*TOPK, *arguments],
            stdin=theirs,
            capture_output=True,
            check=False,
            timeout=DEADLINE_SECONDS,
            env=clean_environment() | {"TOPK_GATEWAY": gateway},
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_song_is_deleted_from_all_charts_and_windows(
    plays: str, shared_cluster: str, run_topk: Any, run_json: Any
) -> None:
    deleted = run_json("cluster", "delete-song", f"{plays} b", "--yes", gateway=shared_cluster)
    assert deleted == {"song_id": f"{plays} b", "plays": 4, "charts": 2}
    assert counts(run_json, shared_cluster, plays) == [4, 0, 4]
    assert counts(run_json, shared_cluster, plays, "--chart", "C1") == [2, 0, 2]
    assert counts(run_json, shared_cluster, plays, "-w", "tumbling:1d", "--as-of", "2020-05-02") == [2, 0, 2]
    again = run_topk("cluster", "delete-song", f"{plays} b", "-y", gateway=shared_cluster)
    assert (again.returncode, again.stdout) == (0, f"{plays} b had no plays\n")
    shown = run_topk("cluster", "delete-song", f"{plays} a", "--yes", gateway=shared_cluster)
    assert shown.stdout == f"{plays} a: 4 plays deleted, and those in 2 charts\n"


def test_where_nobody_can_be_asked_yes_is_needed(plays: str, shared_cluster: str, run_topk: Any, run_json: Any) -> None:
    done = run_topk("cluster", "delete-song", f"{plays} a", gateway=shared_cluster)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    assert counts(run_json, shared_cluster, plays) == [4, 4, 4]


def test_at_a_terminal_it_asks(plays: str, shared_cluster: str, run_json: Any) -> None:
    command = ("cluster", "delete-song", f"{plays} a", "--json")
    status, stdout, stderr = at_terminal(b"n\n", *command, gateway=shared_cluster)
    assert (status, stdout) == (1, "")
    assert "4 plays" in stderr
    assert counts(run_json, shared_cluster, plays) == [4, 4, 4]
    status, stdout, _ = at_terminal(b"y\n", *command, gateway=shared_cluster)
    assert status == 0
    assert '"plays": 4' in stdout
    assert counts(run_json, shared_cluster, plays) == [0, 4, 4]


def test_mistakes_are_one_line(shared_cluster: str, run_topk: Any) -> None:
    done = run_topk("cluster", "delete-song", "", "--yes", gateway=shared_cluster)
    assert done.returncode == 1
    assert "1 to 128 bytes" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_topk("cluster", "delete-song", "x", "--yes", gateway="127.0.0.1:9")
    assert done.returncode == 1
    assert "topk up" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_of_corrections_takes_plays_back_and_lists_what_it_cannot(
    plays: str, shared_cluster: str, run_topk: Any, run_json: Any, tmp_path: Path
) -> None:
    file = tmp_path / "bots.csv"
    rows = [f"{plays} a,2020-05-01,C1,-2", f"{plays} b,2020-05-01,C1,-3", f"{plays} c,2020-05-02,,-1"]
    file.write_text("\n".join(["song,t,c,n", *rows]))
    for _ in range(2):  # the same file counts once
        done = run_topk(*ingest(file), gateway=shared_cluster)
        assert done.returncode == 1  # as plays were rejected
        assert "NEGATIVE_BUCKET" in done.stdout + done.stderr
        assert counts(run_json, shared_cluster, plays) == [2, 4, 3]
        assert counts(run_json, shared_cluster, plays, "--chart", "C1") == [0, 2, 2]
