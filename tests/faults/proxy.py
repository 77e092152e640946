"""A network that can be broken: a TCP relay in user space, between two processes of the cluster.

Each direction of each connection is a reader and a writer with a short queue between them. What is wrong with the
network is asked before each piece is passed on, so that a fault strikes connections that stand as well as new ones.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

_CHUNK: Final = 64 << 10
_QUEUE: Final = 64
_POLL_SECONDS: Final = 0.02

TO_SERVER: Final = 0
TO_CLIENT: Final = 1


@dataclass
class Trouble:
    """What is wrong.

    Attributes:
        cut: the directions in which nothing passes; senders notice nothing.
        delay_seconds: what each piece waits, up to twice as long by chance.
        bytes_per_second: how fast pieces pass; 0: no limit.
    """

    cut: frozenset[int] = frozenset()
    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0


class _Connection:
    """Two streams, joined."""

    def __init__(self, proxy: Proxy, streams: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self.proxy = proxy
        self.streams = streams  # the client's, the server's
        self.forgotten = False

    def reset(self) -> None:
        """Both ends hear of it at once, by RST."""
        for stream in self.streams:
            with suppress(OSError, ValueError, AttributeError):  # it may be closed already
                sock = stream.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.transport.abort()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int) -> None:
        """Passes on what comes in one direction until its end, and then the end."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE)
        sending = asyncio.create_task(self._send(queue, writer, direction))
        try:
            while not sending.done():
                data = await reader.read(_CHUNK)
                delay = self.proxy.trouble.delay_seconds
                await queue.put((time.monotonic() + delay * random.uniform(1, 2) if delay else 0.0, data))
                if not data:
                    break
            if not self.forgotten:
                await sending
        except OSError:
            self.reset()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, direction: int
    ) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while direction in self.proxy.trouble.cut or self.forgotten:
                await asyncio.sleep(_POLL_SECONDS)
            if rate := self.proxy.trouble.bytes_per_second:
                await asyncio.sleep(len(data) / rate)
            try:
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
            except (OSError, RuntimeError):  # that end is gone, or was told that nothing more comes
                self.reset()
                return


class Proxy:
    """Relays connections to one server.

    Args:
        target: is asked for the server's port at each connection.
    """

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self.trouble = Trouble()
        self.refused: Callable[[int], bool] = lambda _: False
        """Is asked with the port of whoever connects: whether nothing gets through from there, and nobody is told."""
        self.relayed = 0
        """Connections so far."""

    async def start(self) -> int:
        """Listens; returns the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.relayed += 1
        task = asyncio.current_task()
        assert task is not None
        port = int(writer.get_extra_info("peername")[1])
        try:
            while self.trouble.cut or self.refused(port):  # the handshake does not pass either
                await asyncio.sleep(_POLL_SECONDS)
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, (writer, server_writer))
        self._connections[connection] = task
        try:
            await asyncio.gather(
                connection.relay(reader, server_writer, TO_SERVER), connection.relay(server_reader, writer, TO_CLIENT)
            )
        except asyncio.CancelledError:
            if self._server is not None:
                raise
        finally:
            del self._connections[connection]
            writer.transport.abort()
            server_writer.transport.abort()

    # --- What tests do to it ------------------------------------------------------------------------------------------

    def reset(self) -> int:
        """Ends all connections by RST; returns how many."""
        for connection in self._connections:
            connection.reset()
        return len(self._connections)

    def half_close(self, direction: int) -> int:
        """Tells the receivers of one direction that nothing more comes; the other direction goes on."""
        for connection in self._connections:
            stream = connection.streams[0 if direction == TO_CLIENT else 1]
            with suppress(OSError, RuntimeError):
                stream.write_eof()
        return len(self._connections)

    def forget(self) -> int:
        """All connections that stand are dead from now on, and nobody is told: as when a router has lost its table."""
        for connection in self._connections:
            connection.forgotten = True
        return len(self._connections)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._connections.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
