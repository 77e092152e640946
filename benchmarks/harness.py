"""What all benchmarks share: processes, rounds, ratios, and figures held against their targets.

Theory of operation. A machine's speed drifts by tens of percent within a minute, and other programs come and go. So
subjects that are compared take turns in short rounds (A B C A B C …) within one run; each round gives a ratio of
two neighbours in time, and what is reported is the median of those ratios with their least and largest. A ratio of
two medians, or of two runs, would compare two states of the machine.

What others took of the machine meanwhile is measured too (`ForeignCpu`): a run on a busy machine says so itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

ROOT: Final = Path(__file__).parent.parent
START_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 180.0

_STOP_SECONDS: Final = 20.0
_QUIET_SHARE: Final = 0.05
_QUIET_LOOK_SECONDS: Final = 0.2
_QUIET_SECONDS_MAX: Final = 10.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})


class BenchmarkError(Exception):
    """A benchmark could not be carried out; the message says why."""


# --- Processes --------------------------------------------------------------------------------------------------------


def clean_environment(**settings: object) -> dict[str, str]:
    """The environment without settings of a cluster, and with these: `clean_environment(segment_bytes=1 << 20)`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TOPK_")}
    return kept | {f"TOPK_{name.upper()}": str(value) for name, value in settings.items()}


def _cpu_ticks(pid: int) -> int:
    """User and system time of a process with all its threads; 0 if it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(words[11]) + int(words[12])


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that processes have taken so far."""
    return sum(_cpu_ticks(pid) for pid in pids) / _TICKS


class Process:
    """A child of the benchmark: started by exec, says a first line when ready, answers lines with lines.

    Use it as a context manager: its end is the process's end.

    Args:
        command: what to start.
        scratch: for a file with its standard error, which a failure's message quotes.
        environment: of the process.

    Attributes:
        greeting: the first line it wrote on standard output.
    """

    def __init__(self, command: Sequence[str], scratch: Path, environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.NamedTemporaryFile(dir=scratch, prefix="stderr-", mode="w+b")  # noqa: SIM115
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment or clean_environment()),
            cwd=ROOT,
        )
        self._pending = b""
        try:
            self.greeting = self._read_line(START_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def pids(self) -> list[int]:
        """The process and its children."""
        children = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(int(path.name)) == self.pid]
        return [self.pid, *children]

    def ask(self, **request: object) -> dict[str, Any]:
        """Sends a line of JSON; returns the line it answers with."""
        pipe: IO[bytes] | None = self._popen.stdin
        if pipe is None:
            raise BenchmarkError("the process has no standard input")
        try:
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        answer: dict[str, Any] = json.loads(self._read_line(ANSWER_SECONDS))
        return answer

    def wait_for_line(self, text: str) -> None:
        """Reads lines of its standard output until one holds `text`."""
        line = self.greeting
        while text.lower() not in line.lower():
            line = self._read_line(START_SECONDS)

    def _read_line(self, seconds: float) -> str:
        pipe = self._popen.stdout
        if pipe is None:
            raise BenchmarkError("the process has no standard output")
        os.set_blocking(pipe.fileno(), False)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            if time.monotonic() > deadline:
                raise self._failure(f"said nothing for {seconds:g} s")
            chunk = pipe.read(1 << 16)
            if chunk == b"":
                raise self._failure("ended")
            if chunk is None:
                time.sleep(0.005)
            else:
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def stderr(self) -> str:
        """What it has written on standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def _failure(self, what: str) -> BenchmarkError:
        errors = self.stderr()
        return BenchmarkError(f"{' '.join(self._popen.args)[:200]} {what}: {errors[-2000:]}")  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, number: int = signal.SIGTERM) -> None:
        """Ends it, gracefully first; returns when it has ended."""
        if self._popen.poll() is None:
            self._popen.send_signal(number)
            try:
                self._popen.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._errors.close()


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", name, *(str(argument) for argument in arguments)]


class Cluster(Process):
    """A real cluster: `topk up`, on a free port.

    Args:
        data_dir: on a real disk.
        shards: how many.
        settings: of the servers, by name.
    """

    def __init__(self, data_dir: Path, shards: int, **settings: object) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        command = module("topk_grpc", "up", "--shards", shards, "--data-dir", data_dir, "--port", 0)
        super().__init__(command, data_dir.parent, clean_environment(**settings))
        self.address = self.greeting.removeprefix("ready: ")

    def shard_pids(self) -> list[int]:
        """The shards' process ids."""
        return [pid for pid in self.pids() if b"\0--shard-id\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_quiet(pids: Sequence[int], seconds: float = _QUIET_SECONDS_MAX) -> None:
    """Returns when the processes have come to rest: one subject's afterwork must not slow the next one down."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = cpu_seconds(pids)
        time.sleep(_QUIET_LOOK_SECONDS)
        if cpu_seconds(pids) - before <= _QUIET_SHARE * _QUIET_LOOK_SECONDS:
            return


class ForeignCpu:
    """The share of the machine that others take between `begin` and `end`.

    Args:
        pids: the benchmark's own processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._busy, self._total = self._machine()
        self._own = cpu_seconds(self._pids)

    @staticmethod
    def _machine() -> tuple[int, int]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, sum(ticks)

    def share(self) -> float:
        """0 to 1, since this object was made."""
        busy, total = self._machine()
        own = cpu_seconds(self._pids) - self._own
        return max(0.0, (busy - self._busy) - own * _TICKS) / max(1, total - self._total)


# --- Disks ------------------------------------------------------------------------------------------------------------


def file_system(path: Path) -> str:
    """The type of the file system that a path lies on."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


@contextlib.contextmanager
def scratch_directory(parent: Path | None) -> Iterator[Path]:
    """A directory for data under `parent` (None: where the benchmark was started), removed at the end.

    Raises:
        BenchmarkError: it would lie in memory, where fdatasync costs nothing.
    """
    place = (parent or Path.cwd()).absolute()
    kind = file_system(place)
    if kind in _MEMORY_FILE_SYSTEMS:
        raise BenchmarkError(f"{place} is in memory ({kind}): give a directory on a disk with --data-dir")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=place) as scratch:
        yield Path(scratch)
