"""`topk watch` as a real process: lines, JSON, a terminal, and gateways that go; and `topk top --history`."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from topk_grpc import BlockingTopKClient, Bounds, Certificate, Entry, Finality, WatchUpdate
from topk_grpc.changes import diff
from topk_grpc.cli.reach import Reach
from topk_grpc.cli.watch import LiveView, Request, change_line
from topk_grpc.errors import UnavailableError
from topk_grpc.model import Answer, ChartHistory

HOUR = 3_600_000
MIDNIGHT = 1_588_291_200_000


class Watch:
    """A running `topk watch`."""

    def __init__(self, gateway: str, *arguments: str, stdout: Any = subprocess.PIPE) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TOPK_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "topk_grpc", "watch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment | {"TOPK_GATEWAY": gateway, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.decode().rstrip("\n"))  # noqa: PERF401  # seen as they come
        stream.close()

    def end(self, number: int | None = None) -> int:
        """The exit status."""
        if number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join()


@pytest.fixture
def client(shared_cluster: str) -> Iterator[BlockingTopKClient]:
    with BlockingTopKClient(shared_cluster, linger_ms=1) as made:
        yield made


@pytest.mark.cluster
def test_lines_tell_each_change(shared_cluster: str, client: BlockingTopKClient, until: Any) -> None:
    client.record("[bold]Für Elise[/]", MIDNIGHT, count=3, charts=["lines"])
    client.flush()
    watch = Watch(shared_cluster, "--chart", "lines", "-k", "2")
    until(lambda: len(watch.lines) == 2 or watch.process.poll(), "the list")
    assert watch.lines == ["global: all time, chart lines", "     1  new               3  [bold]Für Elise[/]"]
    client.record("b", MIDNIGHT, count=5, charts=["lines"])
    client.flush()
    until(lambda: len(watch.lines) == 4, "the next list")
    assert [line.split() for line in watch.lines[2:]] == [
        ["1", "new", "5", "b"],
        ["2", "▼1", "3", "[bold]Für", "Elise[/]"],
    ]
    client.record("c", MIDNIGHT, count=4, charts=["lines"])
    client.record("b", MIDNIGHT, charts=["lines"])
    client.flush()
    until(lambda: len(watch.lines) >= 7, "the last list")
    assert [line.split()[:3] for line in watch.lines[4:]] == [["2", "left", "3"], ["1", "6", "b"], ["2", "new", "4"]]
    assert watch.end(signal.SIGINT) == 0
    assert watch.errors == []


@pytest.mark.cluster
def test_json_is_an_object_an_update(
    shared_cluster: str, client: BlockingTopKClient, until: Any, run_json: Any
) -> None:
    client.record("a", MIDNIGHT, charts=["json"])
    client.flush()
    window = "range:2020-05-01..2020-05-02"
    watch = Watch(shared_cluster, "--chart", "json", "--window", window, "--json", "--updates", "2")
    until(lambda: watch.lines or watch.process.poll(), "the list")
    client.record("b", MIDNIGHT, count=3, charts=["json"])
    client.flush()
    assert watch.end() == 0
    first, second = map(json.loads, watch.lines)
    a, b = {"rank": 1, "song_id": "a", "count": 1, "share": 1.0}, {"rank": 1, "song_id": "b", "count": 3, "share": 0.75}
    assert (first["number"], first["reset"], first["entries"]) == (1, False, [a])
    assert first["changes"] == [{"kind": "ENTERED", "previous_rank": None, "entry": a}]
    a = a | {"rank": 2, "share": 0.25}
    assert second["entries"] == [b, a]
    assert second["number"] == 2
    assert second["changes"] == [
        {"kind": "ENTERED", "previous_rank": None, "entry": b},
        {"kind": "MOVED", "previous_rank": 1, "entry": a},
    ]
    top = run_json("top", "--chart", "json", "--window", window, gateway=shared_cluster)
    for field in ("window", "entries"):
        assert second[field] == top[field]
    assert second["certificate"]["total_plays"] == 4


@pytest.mark.cluster
def test_a_terminal_gets_a_table(shared_cluster: str, client: BlockingTopKClient, until: Any) -> None:
    client.record("first song", MIDNIGHT, count=3, charts=["live"])
    client.flush()
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:
            pass  # the other end is closed

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    watch = Watch(shared_cluster, "--chart", "live", stdout=theirs)
    os.close(theirs)
    until(lambda: b"first song" in shown or watch.process.poll() is not None, f"the table: {watch.errors}")
    client.record("second song", MIDNIGHT, count=5, charts=["live"])
    client.flush()
    until(lambda: b"second song" in shown and "▼1".encode() in shown, "the movement")
    assert b"8 plays of 2 songs" in shown
    assert watch.end(signal.SIGINT) == 0
    reader.join()
    os.close(ours)
    assert "\x1b[" in shown.decode()
    assert watch.errors == []


@pytest.mark.cluster
def test_a_gateway_that_goes_is_waited_for(tmp_path: Path, start_up: Any, until: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "1")
    gateway = up.wait_ready()
    with BlockingTopKClient(gateway) as client:
        client.record("a", MIDNIGHT)
    watch = Watch(gateway)
    until(lambda: len(watch.lines) == 2 or watch.process.poll(), "the list")
    assert up.stop() == 0
    until(lambda: watch.errors, "a word about it")
    assert watch.errors[0].startswith(f"gateway {gateway}: ")
    assert watch.errors[0].endswith("; trying again")
    again = start_up(tmp_path / "data", "--port", gateway.rpartition(":")[2])
    assert again.wait_ready() == gateway
    with BlockingTopKClient(gateway) as client:
        client.record("b", MIDNIGHT, count=2)
    until(lambda: len(watch.lines) == 4, f"the next list: {watch.lines} {watch.errors}")
    assert [line.split()[:2] for line in watch.lines[2:]] == [["1", "new"], ["2", "▼1"]]
    assert watch.end(signal.SIGINT) == 0
    assert watch.errors[1:] == [f"gateway {gateway}: connected again"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("-k", "0"), "1 to 1000"), (("-w", "sometimes"), "is not a window"), (("--latest",), "global")],
)
def test_mistakes_are_one_line(shared_cluster: str, run_topk: Any, arguments: tuple[str, ...], said: str) -> None:
    done = run_topk("watch", *arguments, gateway=shared_cluster)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.cluster
def test_a_reader_that_has_seen_enough_ends_it(shared_cluster: str, client: BlockingTopKClient) -> None:
    command = f"{sys.executable} -m topk_grpc watch --chart pipe --gateway {shared_cluster} --json"
    piped = subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert piped.stdout is not None
    assert json.loads(piped.stdout.readline())["entries"] == []
    until = time.monotonic() + 30
    while piped.poll() is None and time.monotonic() < until:
        client.record("a", MIDNIGHT, charts=["pipe"])  # each is a line that nobody reads
        client.flush()
    out, errors = piped.communicate(timeout=10)
    assert (piped.returncode, out, errors) == (0, b"", b"")


@pytest.mark.cluster
def test_history_of_a_chart(shared_cluster: str, client: BlockingTopKClient, run_json: Any, run_topk: Any) -> None:
    for pane, counts in enumerate([{"a": 1}, {}, {"b": 5, "a": 3, "c": 1}, {"a": 9, "b": 2}]):
        for song, count in counts.items():
            client.record(song, MIDNIGHT + pane * HOUR, count=count, charts=["history"])
    client.flush()
    at = ("--window", "tumbling:1h", "--as-of", str(MIDNIGHT + 3 * HOUR), "--chart", "history", "-k", "2")
    answer = run_json("top", *at, "--history", gateway=shared_cluster)
    told = [[entry[name] for name in ("previous_rank", "peak_rank", "panes_on_chart")] for entry in answer["entries"]]
    assert told == [[2, 1, 3], [1, 1, 2]]
    answer = run_json("top", *at, "--history-panes", "2", gateway=shared_cluster)
    assert [entry["panes_on_chart"] for entry in answer["entries"]] == [2, 2]
    shown = run_topk("top", *at, "--history", gateway=shared_cluster).stdout
    assert re.search(r"rank .* last .* peak .* on chart", shown)
    assert "history_panes" not in shown
    assert client.top_k("tumbling:1h", 2, chart="history", as_of=MIDNIGHT + 3 * HOUR, history_panes=4).entries[
        0
    ].history == ChartHistory(2, 1, 3)
    refused = run_topk("top", "--history", gateway=shared_cluster)
    assert (refused.returncode, "tumbling windows only" in refused.stderr) == (1, True)


# --- Without processes ------------------------------------------------------------------------------------------------


def update(*songs: str, previous: WatchUpdate | None = None) -> WatchUpdate:
    entries = tuple(Entry(rank, song, 10 - rank, 0.1) for rank, song in enumerate(songs, 1))
    certificate = Certificate(True, (), 1, 0, Finality.PRELIMINARY, 90, 9)
    before = previous.answer.entries if previous else ()
    return WatchUpdate(Answer(Bounds(0, HOUR), certificate, entries), diff(before, entries), 1)


def test_marks_stay_some_seconds_and_fade() -> None:
    from rich.console import Console

    now = 0.0
    view = LiveView(Request("tumbling:1h", 3, "", False, False, Reach("here:1"), False, 0), lambda: now)

    def screen() -> str:
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        console.print(view.render())
        console.file.close()
        return console.export_text()

    assert "waiting" in screen()
    first = update("a", "b", "c")
    view.show(first)
    assert not re.search(r"\bnew\b", screen())
    assert "1970-01-01T00:00:00Z to 1970-01-01T01:00:00Z" in screen()
    second = update("b", "[x]", "a", previous=first)
    view.show(second)
    assert re.search(r"▲1.*b ", screen())
    assert re.search(r"new.*\[x\]", screen())
    assert re.search(r"▼2.*a ", screen())
    now = 4.0
    view.show(update("b", "[x]", "a", previous=second))
    assert "▼2" in screen()
    now = 5.5
    assert "▼2" not in screen()
    view.interrupted(UnavailableError("it is away"))
    assert "gateway here:1: it is away; trying again" in screen()
    assert "10.00 %" in screen()
    view.show(second)
    assert "away" not in screen()


def test_a_line_for_each_kind_of_change() -> None:
    changes = diff(update("a", "b", "c").answer.entries, update("b", "a", "d").answer.entries)
    assert [change_line(change).split() for change in changes] == [
        ["3", "left", "7", "c"],
        ["1", "▲1", "9", "b"],
        ["2", "▼1", "8", "a"],
        ["3", "new", "7", "d"],
    ]
