"""The way of parts to one shard: one ordered stream, few and large messages, and nothing lost when it breaks.

Parts of batches wait in a queue. While requests are under way the next ones gather, and then travel together: so one
message carries the parts of many client streams when the shard is busy, and a single part when it is idle. A request
that was written but not answered when the stream broke may or may not have been applied: its parts go back to the front
of the queue, in order, and are sent again; the shard's marks see to it that they count once. `Part.sends` says that
this happened, since the shard's `duplicate` then means nothing to the client.

A stream on which nothing is answered for `record_seconds`, though requests are under way, is given up, and its
connection with it: it may be dead without an end, and what waited that long has been given up by its clients.

Bounds: `pending_bytes_max` wait for one shard, then `submit` does, and with it the clients' streams; besides them there
are the requests under way, `REQUESTS_UNDER_WAY_MAX` of `part_bytes_max`, which wait as well when a stream breaks.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Never

import grpc

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import DeadlineError, InvalidArgumentError, ResourceExhaustedError, TopKError, UnavailableError
from topk_grpc.kernels.encode import varint
from topk_grpc.model import ShardInfo
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.rpc import log
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error

REQUESTS_UNDER_WAY_MAX: Final = 2
"""One is on its way while the shard works on the other. More do not keep it busier, and gather less in each."""
BACKOFF_SECONDS: Final = (0.05, 2.0)
_APPEND: Final = "/topk.v1.ShardService/Append"


@dataclass(slots=True, eq=False)
class Part:
    """A part of a client's batch on its way.

    Attributes:
        epoch: of the topology it was split by.
        pieces: of the ShardBatch's bytes.
        size: bytes of them.
        outcome: what the shard said; cancelled when nobody waits any more.
        shard_id: the shard.
        sends: how often it was written to a stream.
    """

    epoch: int
    pieces: tuple[bytes | memoryview, ...]
    size: int
    outcome: asyncio.Future[pb.BatchOutcome]
    shard_id: str
    sends: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    request_id: int
    parts: list[Part] = field(default_factory=list)


class ShardLink:
    """Parts to one shard. Belongs to one event loop.

    Args:
        settings: the gateway's.
        channels: the way to the cluster's shards.
        shard: its name and present address.
    """

    def __init__(self, settings: GatewaySettings, channels: ShardChannels, shard: ShardInfo) -> None:
        self._settings = settings
        self._channels = channels
        self._shard = shard
        self._waiting: deque[Part] = deque()
        self._waiting_bytes = 0
        self._under_way: deque[_Request] = deque()
        self._progress_at = 0.0  # the loop's time of the last sign that the stream moves
        self._answered = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._moved = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def address(self) -> str:
        """Where the shard is believed to be."""
        return self._shard.address

    def move(self, shard: ShardInfo) -> None:
        """Takes note of where the shard is now."""
        if shard.address != self._shard.address:
            self._shard = shard
            self._moved.set()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the parts that wait. From any thread."""
        return self._waiting_bytes

    async def submit(self, part: Part) -> None:
        """Queues a part; waits only while too much waits already."""
        while self._waiting_bytes > self._settings.pending_bytes_max:
            self._room.clear()
            await self._room.wait()
        self._waiting.append(part)
        self._waiting_bytes += part.size
        self._wake.set()

    # --- Sending ------------------------------------------------------------------------------------------------------

    def _take_request(self, request_id: int) -> tuple[_Request, bytes] | None:
        """The next parts as one request; None if nothing waits."""
        request = _Request(request_id)
        pieces: list[bytes | memoryview] = []
        size = 0
        while self._waiting and (not request.parts or size + self._waiting[0].size <= self._settings.part_bytes_max):
            part = self._waiting.popleft()
            self._waiting_bytes -= part.size
            if part.outcome.done():  # nobody waits for it any more
                continue
            request.parts.append(part)
            part.sends += 1
            pieces += (b"\x1a", varint(part.size), *part.pieces)
            size += part.size
        if self._waiting_bytes <= self._settings.pending_bytes_max:
            self._room.set()
        if not request.parts:
            return None
        epoch = max(part.epoch for part in request.parts)
        return request, b"".join((b"\x08", varint(request_id), b"\x10", varint(epoch), *pieces))

    def _put_back(self) -> None:
        """Parts that were written but not answered wait again, before all others."""
        for request in reversed(self._under_way):
            for part in reversed(request.parts):
                self._waiting.appendleft(part)
                self._waiting_bytes += part.size
        self._under_way.clear()

    async def _run(self) -> None:
        low, high = BACKOFF_SECONDS
        backoff = low
        while True:
            await self._wake.wait()
            self._moved.clear()
            try:
                answered = await self._run_stream() if self._shard.address else False
            except Exception as error:  # an address that is none, say: the topology may be set right
                answered = False
                self._log_end(error)
            self._put_back()
            backoff = low if answered else min(high, 2 * backoff)
            if self._waiting:
                self._wake.set()
            with suppress(TimeoutError):  # a shard that came back at another address is tried at once
                await asyncio.wait_for(self._moved.wait(), random.uniform(low, backoff))

    async def _run_stream(self) -> bool:
        """Serves one stream until it ends; whether anything was answered on it."""
        self._answered = False
        async with self._channels.open(self._shard.address) as channel:
            metadata = self._channels.metadata(self._shard.shard_id)
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(_APPEND)(metadata=metadata)
            works = self._receive(call), self._send(call), self._moved.wait(), self._check_progress()
            tasks = [asyncio.ensure_future(work) for work in works]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except Exception as error:  # whatever it was, the parts are kept and the next stream may do better
                self._log_end(error)
            finally:
                for task in tasks:
                    task.cancel()
                call.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return self._answered

    async def _check_progress(self) -> Never:
        """Waits until nothing has been answered for too long.

        Raises:
            DeadlineError: then.
        """
        seconds = self._settings.record_seconds
        left = seconds
        while left > 0:
            await asyncio.sleep(left)
            left = self._progress_at + seconds - asyncio.get_running_loop().time() if self._under_way else seconds
        raise DeadlineError(f"nothing was answered for {seconds:g} s (--record-seconds)")

    async def _receive(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        while isinstance(raw := await call.read(), bytes):  # or EOF
            self._answered = True
            self._take_response(pb.AppendResponse.FromString(raw))

    async def _send(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        request_id = 0
        while True:
            if len(self._under_way) < REQUESTS_UNDER_WAY_MAX:
                taken = self._take_request(request_id + 1)
                if taken is not None:
                    request_id += 1
                    request, raw = taken
                    if not self._under_way:
                        self._progress_at = asyncio.get_running_loop().time()
                    self._under_way.append(request)
                    await call.write(raw)
                    continue
            self._wake.clear()
            await self._wake.wait()

    def _take_response(self, response: pb.AppendResponse) -> None:
        request = self._under_way[0] if self._under_way else _Request(0)
        if response.request_id != request.request_id or len(response.outcomes) != len(request.parts):
            raise asyncio.InvalidStateError(
                f"the shard answered request {response.request_id} where {request.request_id} was due"
            )
        self._under_way.popleft()
        self._progress_at = asyncio.get_running_loop().time()
        for part, outcome in zip(request.parts, response.outcomes, strict=True):
            if not part.outcome.done():
                part.outcome.set_result(outcome)
        self._wake.set()

    def _log_end(self, error: BaseException) -> None:
        failure = from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
        metrics.SHARD_UNANSWERED.labels(self._shard.shard_id).inc()
        known = isinstance(failure, TopKError)  # a shard that goes is an ordinary event, a defect needs its traceback
        log.warning(
            "shard_stream_ended",
            shard=self._shard.shard_id,
            address=self._shard.address,
            reason=str(failure),
            error=None if known else failure,
        )
        if isinstance(failure, InvalidArgumentError | ResourceExhaustedError):
            # The shard refuses the bytes themselves, or its disk is full: their clients are told and may send again.
            for request in self._under_way:
                for part in request.parts:
                    if not part.outcome.done():
                        part.outcome.set_exception(failure)
                        part.outcome.exception()  # of a batch's parts only the first to fail is asked
            self._under_way.clear()

    async def close(self) -> None:
        """Ends the stream; the clients of parts without an answer are told to send them again."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._put_back()
        failure = UnavailableError(f"{self._shard.shard_id} is gone from here: send the batch again, it counts once")
        while self._waiting:
            part = self._waiting.popleft()
            if not part.outcome.done():
                part.outcome.set_exception(failure)
                part.outcome.exception()  # of a batch's parts only the first to fail is asked
