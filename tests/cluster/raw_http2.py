"""HTTP/2 by hand, for what no gRPC library would send: frames as RFC 9113 has them, headers without compression."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 1, 1, 4
STREAM_PLAYS = "/topk.v1.TopKService/StreamPlays"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(text: str) -> bytes:
    raw = text.encode()
    return bytes([len(raw)]) + raw


def call_headers(path: str) -> bytes:
    """Of a gRPC call, as HPACK literals: POST, http, path, authority, content-type, te."""
    return (
        b"\x83\x86\x04" + _literal(path) + b"\x01" + _literal("here")
        + b"\x0f\x10" + _literal("application/grpc") + b"\x00" + _literal("te") + _literal("trailers")
    )  # fmt: skip


def grpc_message(payload: bytes, announced: int | None = None) -> bytes:
    """A message as gRPC frames it; it may announce more than there is."""
    return b"\0" + struct.pack(">I", len(payload) if announced is None else announced) + payload


class RawConnection:
    """A connection that has introduced itself."""

    def __init__(self, address: str, hello: bytes = PREFACE + frame(SETTINGS)) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self._unread = b""
        self._next_stream = 1
        self.socket.sendall(hello)

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def begin(self, path: str = STREAM_PLAYS) -> tuple[int, bytes]:
        """The number of a new stream, and the frame that opens it."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream, frame(HEADERS, END_HEADERS, stream, call_headers(path))

    def open(self, path: str = STREAM_PLAYS) -> int:
        stream, opening = self.begin(path)
        self.send(opening)
        return stream

    def frames(self, seconds: float) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of what comes, pings and settings answered; ends with the connection."""
        deadline = time.monotonic() + seconds
        while True:
            while len(self._unread) >= 9:
                size = int.from_bytes(self._unread[:3], "big")
                if len(self._unread) < 9 + size:
                    break
                kind, flags, stream = struct.unpack(">BBI", self._unread[3:9])
                payload, self._unread = self._unread[9 : 9 + size], self._unread[9 + size :]
                if kind in {PING, SETTINGS} and not flags & ACK:
                    with suppress(OSError):
                        self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
                yield kind, flags, stream, payload
            left = deadline - time.monotonic()
            assert left > 0, f"nothing ended within {seconds:g} s"
            self.socket.settimeout(left)
            try:
                part = self.socket.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"nothing ended within {seconds:g} s") from None
            except ConnectionError:
                return
            if not part:
                return
            self._unread += part

    def wait_ended(self, streams: set[int], seconds: float) -> None:
        """Returns when the server has ended all of these streams."""
        left = set(streams)
        for kind, flags, stream, _ in self.frames(seconds):
            if kind == RST_STREAM or (flags & END_STREAM and kind in {HEADERS, DATA}):
                left.discard(stream)
            if not left:
                return
        raise AssertionError(f"the connection was closed with {len(left)} streams open")

    def wait_answered(self, streams: set[int], seconds: float) -> set[int]:
        """Returns which of these streams are open, when each has had a message or its end."""
        answered, open_ = set(), set()
        for kind, flags, stream, _ in self.frames(seconds):
            if kind == DATA and stream in streams:
                open_.add(stream)
                answered.add(stream)
            elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                answered.add(stream)
            if answered >= streams:
                return open_
        raise AssertionError(f"the connection was closed with {len(streams - answered)} streams unanswered")

    def wait_closed(self, seconds: float) -> list[tuple[int, bytes]]:
        """Returns what was said when the server has closed the connection."""
        return [(kind, payload) for kind, _, _, payload in self.frames(seconds)]
