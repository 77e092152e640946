"""Redis as people use it for leaderboards, and the fastest way of feeding it: ZINCRBY in pre-encoded pipelines.

    ZINCRBY plays 1 SONG

for each play, as raw bytes of its protocol over a Unix socket, by a process that does nothing but send them and
count the replies. The next pipelines are always on their way, so the server never waits. It gets the same songs in
the same order as the real system.

What Redis is spared: windows, batches counted once, waiting for the disk (the append-only file is synced once a
second, behind the replies) and rewriting that file. It speaks the generator's commands; see generator.py.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from benchmarks.generator import RAMP_SECONDS
from benchmarks.plays import ID_BYTES, POOL_PLAYS, song_ids
from topk_grpc.cli.load import Zipf

KEY: Final = b"plays"
_COMMAND: Final = b"*4\r\n$7\r\nZINCRBY\r\n$%d\r\n%s\r\n$1\r\n1\r\n$%d\r\n" % (len(KEY), KEY, ID_BYTES)


def server_command(directory: Path) -> list[str]:
    """The command that starts the server under test; it listens on `directory`/redis.sock."""
    options = {
        "port": "0",
        "unixsocket": str(directory / "redis.sock"),
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "auto-aof-rewrite-percentage": "0",
        "save": "",
        "loglevel": "notice",
    }
    return ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]


class Pipelines:
    """One connection with several pipelines under way."""

    def __init__(self, path: str, in_flight: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._in_flight = in_flight
        self._waiting: deque[list[Any]] = deque()  # replies missing, plays, sent at

    def send(self, pipeline: bytes, plays: int) -> list[tuple[int, float]]:
        """Sends one; returns the plays and sending times of those that were answered meanwhile."""
        done = []
        while len(self._waiting) >= self._in_flight:
            done += self._receive()
        self._waiting.append([plays, plays, time.perf_counter()])
        self._socket.sendall(pipeline)
        return done

    def drain(self) -> list[tuple[int, float]]:
        """Waits for all replies."""
        done = []
        while self._waiting:
            done += self._receive()
        return done

    def _receive(self) -> list[tuple[int, float]]:
        chunk = self._socket.recv(1 << 20)
        if not chunk or b"-" in chunk:
            raise RuntimeError(f"Redis refused: {chunk[:200]!r}")
        replies = chunk.count(b"$")  # each reply is one bulk string, a number
        done = []
        while replies:
            oldest = self._waiting[0]
            taken = min(replies, oldest[0])
            oldest[0] -= taken
            replies -= taken
            if not oldest[0]:
                self._waiting.popleft()
                done.append((oldest[1], oldest[2]))
        return done

    def command(self, *words: bytes) -> bytes:
        """One command outside of any pipeline; its reply, which has to be one line."""
        self._socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
        reply = b""
        while not reply.endswith(b"\r\n"):
            reply += self._socket.recv(1 << 16)
        return reply


class RedisLoad:
    """Sends plays to one server."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._ids = song_ids(arguments.songs)
        self._pipelines = Pipelines(arguments.path, arguments.in_flight)
        self._plays = arguments.pipeline
        batches = max(2, arguments.pool_plays // self._plays)
        drawn = Zipf(arguments.songs, arguments.zipf, 1).draw(batches * self._plays)
        self._pool = [self._encode(part) for part in drawn.reshape(batches, self._plays)]
        self._turn = 0

    def _encode(self, songs: Any) -> bytes:
        return b"".join(_COMMAND + song.tobytes() + b"\r\n" for song in self._ids[songs])

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out a command."""
        match command["do"]:
            case "prepare":
                return {}
            case "run":
                return self._run(command["seconds"])
            case "load":
                return self._load()
            case unknown:
                raise ValueError(f"no such command: {unknown}")

    def _run(self, seconds: float) -> dict[str, Any]:
        begin = time.perf_counter() + RAMP_SECONDS
        end = begin + seconds
        answer: dict[str, Any] = {"plays": 0, "seconds": seconds, "plays_total": 0, "ack_ms": []}

        def count(done: list[tuple[int, float]]) -> None:
            now = time.perf_counter()
            for plays, sent_at in done:
                answer["plays_total"] += plays
                if begin <= now < end:
                    answer["plays"] += plays
                    answer["ack_ms"].append((now - sent_at) * 1000)

        while time.perf_counter() < end:
            count(self._pipelines.send(self._pool[self._turn % len(self._pool)], self._plays))
            self._turn += 1
        count(self._pipelines.drain())
        return answer

    def _load(self) -> dict[str, Any]:
        """Each song once, by ZADD of many at a time: how they come in does not matter to what is measured."""
        for start in range(0, len(self._ids), 10_000):
            words = [b"ZADD", KEY]
            for song in self._ids[start : start + 10_000]:
                words += (b"1", song.tobytes())
            self._pipelines.command(*words)
        size = int(self._pipelines.command(b"ZCARD", KEY)[1:])
        return {"plays_total": size}


def main() -> None:
    """Serves commands until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="of the server's socket")
    parser.add_argument("--songs", type=int, required=True)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--pipeline", type=int, required=True)
    parser.add_argument("--pool-plays", type=int, default=POOL_PLAYS)
    parser.add_argument("--in-flight", type=int, default=4)
    load = RedisLoad(parser.parse_args())
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(load.do(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
