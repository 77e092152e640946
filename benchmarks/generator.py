"""The load generator, a process of its own: raw gRPC streams of encoded batches, each awaiting its acknowledgement.

It is the same for the real system and for the bare relay; only the method's name and the check of the answers
differ. Commands come as lines of JSON on standard input, and each is answered by a line:

    {"do": "prepare", "seconds": S}   encodes the batches of a round that begins soon
    {"do": "run", "seconds": S}       sends; counts acknowledgements from RAMP_SECONDS on, for S seconds
    {"do": "load"}                    plays each song once, returns when all is acknowledged

The clock runs on full pipes only: what is acknowledged in the first `RAMP_SECONDS` and after the end counts for
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import uvloop

from benchmarks.plays import PlayPool, request
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

RAMP_SECONDS: Final = 0.4
DRAIN_SECONDS: Final = 60.0

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

Check = Callable[[bytes, int, int], None]
"""Looks at an acknowledgement's bytes, given the sequence and the plays of the oldest batch that waits for one."""


def check_counted(raw: bytes, sequence: int, plays: int) -> None:
    """The real system's acknowledgement: durable, and every play counted once."""
    response = pb.StreamPlaysResponse.FromString(raw)
    if (response.sequence, response.accepted, response.duplicate) != (sequence, plays, False):
        raise RuntimeError(f"batch {sequence} of {plays} plays was answered {response}"[:500])


def check_nothing(raw: bytes, sequence: int, plays: int) -> None:
    """The relay's answer says nothing but that it came."""


@dataclass(slots=True)
class Tally:
    """What was acknowledged between two times."""

    begin: float
    end: float
    plays: int = 0
    plays_total: int = 0
    ack_ms: list[float] = field(default_factory=list)

    def add(self, plays: int, sent_at: float) -> None:
        """Counts a batch that was acknowledged just now."""
        now = time.perf_counter()
        self.plays_total += plays
        if self.begin <= now < self.end:
            self.plays += plays
            self.ack_ms.append((now - sent_at) * 1000)


class Producer:
    """One stream after the other, under one producer_id."""

    def __init__(self, channel: grpc.aio.Channel, method: str, in_flight: int, check: Check) -> None:
        self._open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
        self._in_flight = in_flight
        self._check = check
        self._producer_id = uuid.uuid4().hex.encode()
        self._sequence = 0

    async def run(self, bodies: Iterator[tuple[bytes, int]], tally: Tally) -> None:
        """Sends all batches on one stream; returns when the last is acknowledged."""
        call = self._open_call()
        waiting: deque[tuple[float, int, int]] = deque()
        room = asyncio.Semaphore(self._in_flight)

        async def read() -> None:
            while isinstance(raw := await call.read(), bytes):  # else it is grpc.aio.EOF
                sent_at, sequence, plays = waiting.popleft()
                self._check(raw, sequence, plays)
                tally.add(plays, sent_at)
                room.release()
            if waiting:
                raise RuntimeError(
                    f"the stream ended, and {len(waiting)} batches are unacknowledged: {await call.details()}"
                )

        async def write() -> None:
            for body, plays in bodies:
                await room.acquire()
                self._sequence += 1
                message = request(body, self._producer_id, self._sequence, time.time_ns() // 1_000_000)
                waiting.append((time.perf_counter(), self._sequence, plays))
                await call.write(message)
            await call.done_writing()

        async with asyncio.timeout(DRAIN_SECONDS * 2), asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(write())


class Generator:
    """All streams to one address."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._pool = PlayPool(arguments.songs, arguments.zipf, arguments.batch_plays, arguments.pool_plays)
        check = check_counted if arguments.check else check_nothing
        # A connection a stream, as clients on as many machines have.
        self._channels = [
            grpc.aio.insecure_channel(arguments.address, options=CHANNEL_OPTIONS) for _ in range(arguments.streams)
        ]
        self._producers = [
            Producer(channel, arguments.method, arguments.in_flight, check) for channel in self._channels
        ]

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out a command."""
        match command["do"]:
            case "prepare":
                await asyncio.to_thread(self._pool.stamp, command["seconds"] + RAMP_SECONDS)
                return {}
            case "run":
                return await self._run(command["seconds"])
            case "load":
                return await self._load()
            case unknown:
                raise ValueError(f"no such command: {unknown}")

    async def _run(self, seconds: float) -> dict[str, Any]:
        began = time.perf_counter()
        tally = Tally(began + RAMP_SECONDS, began + RAMP_SECONDS + seconds)

        def bodies(first: int) -> Iterator[tuple[bytes, int]]:
            turn = first
            while (now := time.perf_counter()) < tally.end:
                yield self._pool.batch(turn, now - began), self._pool.batch_plays
                turn += len(self._producers)

        await self._send([bodies(index) for index in range(len(self._producers))], tally)
        return {"plays": tally.plays, "seconds": seconds, "plays_total": tally.plays_total, "ack_ms": tally.ack_ms}

    async def _load(self) -> dict[str, Any]:
        tally = Tally(0, 0)
        bodies = [(body, body.count(b"track-")) for body in await asyncio.to_thread(self._pool.every_song)]
        count = len(self._producers)
        await self._send([iter(bodies[index::count]) for index in range(count)], tally)
        return {"plays_total": tally.plays_total}

    async def _send(self, bodies: list[Iterator[tuple[bytes, int]]], tally: Tally) -> None:
        async with asyncio.TaskGroup() as group:
            for producer, some in zip(self._producers, bodies, strict=True):
                group.create_task(producer.run(some, tally))

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


async def _serve(arguments: argparse.Namespace) -> None:
    generator = Generator(arguments)
    print("ready", flush=True)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await generator.do(json.loads(line))), flush=True)
    finally:
        await generator.close()


def main() -> None:
    """Serves commands until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--method", default="/topk.v1.TopKService/StreamPlays")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--songs", type=int, required=True)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--batch-plays", type=int, required=True)
    parser.add_argument("--pool-plays", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(_serve(arguments))


if __name__ == "__main__":
    main()
