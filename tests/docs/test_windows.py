"""The commands of docs/windows.md, typed from top to bottom: each prints what the page shows."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import Cluster, environment

PAGE = Path(__file__).parents[2] / "docs" / "windows.md"
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("windows"))
    try:
        yield made.start()
    finally:
        made.close()


def type_in(script: str, folder: Path, address: str) -> str:
    """What a person would see."""
    (folder / "topk").write_text(f'#!/bin/sh\nexec {sys.executable} -m topk_grpc "$@"\n')
    (folder / "topk").chmod(0o755)
    variables = environment() | {"TOPK_GATEWAY": address, "COLUMNS": "100"}
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", script],
        check=False,
        cwd=folder,
        env=variables | {"PATH": f"{folder}:{variables['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert (done.returncode != 0) == done.stdout.startswith("error: "), done.stdout
    return done.stdout


def without_epoch(text: str) -> str:
    """The epoch depends on how often shards have registered."""
    return re.sub(r'(epoch"?:?) \d+', r"\1 N", text)


@pytest.mark.cluster
def test_what_the_page_shows_is_what_is_printed(cluster: Cluster, tmp_path: Path) -> None:
    printed = ""
    shown = 0
    for language, block in BLOCKS.findall(PAGE.read_text()):
        if language == "sh":
            printed = type_in(block, tmp_path, cluster.address)
        elif language == "text":
            assert without_epoch(printed) == without_epoch(block)
            shown += 1
    assert shown == 12


# --- Drawings: column 13 is 08:00, each further one a minute ----------------------------------------------------------

DRAWINGS = [block for language, block in BLOCKS.findall(PAGE.read_text()) if not language]
FIRST = 13


def minutes(line: str, marks: str) -> set[int]:
    return {column - FIRST for column, mark in enumerate(line[: FIRST + 41]) if mark in marks and column >= FIRST}


def test_drawn_plays_are_those_of_the_file() -> None:
    plays = re.findall(r"^2024-06-03T08:(\d\d):00Z,(.*),", PAGE.read_text(), flags=re.MULTILINE)
    rows = [
        line for drawing in DRAWINGS for line in drawing.splitlines() if line[FIRST:].strip(".o") == "" and "o" in line
    ]
    assert len(rows) == 16
    for line in rows:
        counted = {int(minute) for minute, song in plays if song == line[:FIRST].strip()}
        assert minutes(line, "o") - counted in (set(), {31}), line  # the late one
        assert minutes(line, "o") >= counted, line


def test_drawn_windows_lie_where_they_are() -> None:
    bars = [
        (found.start() - FIRST, found.end() - FIRST)
        for drawing in DRAWINGS
        for found in re.finditer(r"\[[^\[)]*\)", drawing.splitlines()[-1])
    ]
    assert bars == [(0, 20), (20, 40), (10, 30), (27, 37)]
    scales = [drawing.splitlines()[1] for drawing in DRAWINGS[:5]]
    assert all(minutes(scale, "|") == {0, 10, 20, 30, 40} for scale in scales)
    marks = [line for drawing in DRAWINGS[:5] for line in drawing.splitlines() if line.strip() == "T"]
    assert [minutes(mark, "T") for mark in marks] == [{36}] * 5


def test_drawn_sessions_are_those_of_the_plays_above() -> None:
    lines = [line for drawing in DRAWINGS for line in drawing.splitlines()]
    drawn = [(above, below) for above, below in itertools.pairwise(lines) if "open:" in below]
    assert len(drawn) == 4
    for above, below in drawn:
        sessions: list[list[int]] = []
        for minute in sorted(minutes(above, "o")):
            if sessions and minute - sessions[-1][-1] <= 5:
                sessions[-1].append(minute)
            else:
                sessions.append([minute])
        spans = [set(range(session[0], session[-1] + 1)) for session in sessions]
        assert minutes(below, "=") == spans[-1]
        assert minutes(below, "-") == set().union(*spans[:-1])
        assert f"open: {len(sessions[-1])} play" in below
