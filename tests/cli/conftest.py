"""Real processes of the real command, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOPK = [sys.executable, "-m", "topk_grpc"]
DEADLINE_SECONDS = 60.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Looks until the condition holds; fails when it takes too long."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TOPK_")}


class Up:
    """A running `topk up`."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*TOPK, "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment() | (environment or {}),
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        lines.extend(line.rstrip("\n") for line in stream)
        stream.close()

    def wait_ready(self) -> str:
        """The gateway's address."""
        wait_until(lambda: self.lines or self.process.poll() is not None, f"ready; stderr: {self.errors}")
        assert self.lines, f"exit status {self.process.returncode}: {self.errors}"
        assert self.lines[0].startswith("ready: "), self.lines
        return self.lines[0].removeprefix("ready: ")

    def wait_end(self) -> int:
        """The exit status."""
        code = self.process.wait(DEADLINE_SECONDS)
        for reader in self._readers:
            reader.join()
        return code

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait_end()

    def children(self) -> dict[str, int]:
        """Process ids by role: `gateway`, `shard-0` …"""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1]) != self.process.pid:
                    continue
                words = path.joinpath("cmdline").read_bytes().decode().split("\0")
                if "--topology" in words:
                    role = words[words.index("--shard-id" if "--shard-id" in words else "topk_grpc") + 1]
                    found[role] = int(path.name)
        return found

    def kill_everything(self) -> None:
        """kill -9 of all processes at one moment."""
        self.process.send_signal(signal.SIGSTOP)  # so that it neither starts them again nor lets go of their stdin
        for pid in self.children().values():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.wait_end()

    def close(self) -> None:
        """Ends everything, whatever the test left."""
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
        self.wait_end()
        wait_until(lambda: not any(alive(pid) for pid in children.values()), "children end with their parent")


Starter = Callable[..., Up]


@pytest.fixture
def start_up() -> Iterator[Starter]:
    """Starts `topk up` on a free port; ends it with the test."""
    started: list[Up] = []

    def start(data_dir: Path, *arguments: str, environment: dict[str, str] | None = None) -> Up:
        port = () if "--port" in arguments else ("--port", "0")
        up = Up("--data-dir", str(data_dir), *port, *arguments, environment=environment)
        started.append(up)
        return up

    yield start
    for up in started:
        up.close()


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that a module's tests share, each with songs of its own."""
    up = Up("--data-dir", str(tmp_path_factory.mktemp("shared") / "data"), "--port", "0", "--shards", "2")
    try:
        yield up.wait_ready()
    finally:
        up.close()


def topk(*arguments: str, gateway: str = "", stdin: bytes = b"", environment: dict[str, str] | None = None) -> Any:
    """Runs a command to its end; `.returncode`, `.stdout`, `.stderr`. None of them may show a traceback."""
    done = subprocess.run(
        [*TOPK, *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=DEADLINE_SECONDS,
        env=clean_environment() | {"TOPK_GATEWAY": gateway} | (environment or {}),
    )
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in stderr or "TOPK_DEBUG" in (environment or {}), stderr
    return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)


def topk_json(*arguments: str, gateway: str) -> Any:
    """What a command prints with `--json`; it has to work."""
    done = topk(*arguments, "--json", gateway=gateway)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def run_topk() -> Callable[..., Any]:
    return topk


@pytest.fixture
def run_json() -> Callable[..., Any]:
    return topk_json


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until
