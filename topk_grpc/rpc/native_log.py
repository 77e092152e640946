"""What native libraries print on file descriptor 2, as log lines.

gRPC's core ends a connection whose TLS handshake fails before any code of ours hears of it; all it does is print a
line. Those lines are what a refused certificate is logged and counted by. So descriptor 2 becomes a pipe, which a
thread reads; Python's own stderr, and with it the log, goes on to where descriptor 2 led before.

What must not happen:

- **That a thread of gRPC waits for the pipe**, while the reader waits for that thread to let go of the interpreter. The
  pipe takes 1 MiB, and a write into a full one fails instead of waiting: a flood of messages loses some of them.
- **That the last words of a crash are lost**: an abort prints why, and the process is gone before the reader has its
  turn. A helper (one `sh`) holds the pipe too, and reads what is left in it when the process has ended, however it did.
  Where there is no `/bin/sh`, or where the kernel takes the helper along (in a container whose first process this is),
  the tracebacks of all threads are still written: faulthandler goes past the pipe.
- **That whoever provokes messages fills the disk**: those that are no errors are limited, as refused calls are.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import os
import re
import sys
import threading
from typing import Final

from topk_grpc import metrics
from topk_grpc.rpc import log
from topk_grpc.rpc.refusals import LimitedLog

_PIPE_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 1 << 16
_DETAIL_CHARACTERS: Final = 300
_MESSAGE_CHARACTERS: Final = 8000
_JOIN_SECONDS: Final = 2.0

# Waits until the process has ended (it holds the other end of descriptor 3), then passes on what nobody has read.
_LAST_WORDS: Final = "read ended <&3; exec cat >&2"

_HANDSHAKE: Final = re.compile(r"Handshake failed with error (.*)")
_PREFIX: Final = re.compile(r"(?:[IWEF]\d{4}|[IWEF]0000) [\d:.]+\s+\d+ ")
_BOILERPLATE: Final = "All log messages before absl::InitializeLog() is called"

_REASONS: Final = (
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "no_client_certificate"),
    ("has expired", "expired_certificate"),
    ("unable to get local issuer", "foreign_certificate"),
    ("self signed", "foreign_certificate"),
    ("self-signed", "foreign_certificate"),
    ("CERTIFICATE_VERIFY_FAILED", "invalid_certificate"),
    ("WRONG_VERSION_NUMBER", "not_tls"),
    ("HTTP_REQUEST", "not_tls"),
    ("HTTPS_PROXY_REQUEST", "not_tls"),
    ("_ALERT_", "refused_by_peer"),
)


def reason_of(detail: str) -> str:
    """Why a handshake failed, in the words of the metric."""
    return next((reason for mark, reason in _REASONS if mark in detail), "other")


class NativeLog:
    """Makes log lines out of what is printed."""

    def __init__(self) -> None:
        self._handshakes = LimitedLog("tls_handshake_failed")
        for reason in (*(reason for _, reason in _REASONS), "other"):
            metrics.TLS_HANDSHAKES_FAILED.labels(reason)
        self._others = LimitedLog("native_message")

    def take(self, text: str) -> None:
        """Logs some whole lines; those that belong to no handshake stay together."""
        rest: list[str] = []
        for line in text.splitlines():
            found = _HANDSHAKE.search(line)
            if found is not None:
                reason = reason_of(found[1])
                metrics.TLS_HANDSHAKES_FAILED.labels(reason).inc()
                self._handshakes.warning(reason=reason, detail=found[1][:_DETAIL_CHARACTERS])
            elif line.strip() and _BOILERPLATE not in line:
                rest.append(line)
        if rest:
            self._pass_on("\n".join(rest)[:_MESSAGE_CHARACTERS])

    def _pass_on(self, text: str) -> None:
        if _PREFIX.match(text) and text[0] in "IW":
            self._others.warning(message=text)
        else:
            log.error("native_message", message=text)


def capture() -> None:
    """Takes descriptor 2 over until the process ends. Call it once, before the log is configured."""
    original = os.dup(2)
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):  # more than this user may have: 64 KiB do
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.set_blocking(writer, False)
    sys.stderr = os.fdopen(original, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(file=original)
    os.dup2(writer, 2)
    os.close(writer)
    _start_helper(reader, original)
    thread = threading.Thread(target=_read, args=(reader,), name="native log", daemon=True)
    thread.start()
    atexit.register(_give_back, original, thread)


def _start_helper(reader: int, original: int) -> None:
    alive, held = os.pipe()  # `held` is never closed: the kernel does it when the process ends
    try:
        os.posix_spawn(
            "/bin/sh",
            ["topk-last-words", "-c", _LAST_WORDS],
            {"PATH": os.defpath},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, original, 2),
                (os.POSIX_SPAWN_DUP2, original, 1),
                (os.POSIX_SPAWN_DUP2, reader, 0),
                (os.POSIX_SPAWN_DUP2, alive, 3),  # last, as one of the others may be 3 here
            ],
            setpgroup=0,  # Ctrl-C is not meant for it
        )
    except OSError:
        os.close(held)
    os.close(alive)


def _read(reader: int) -> None:
    native = NativeLog()
    rest = b""
    while chunk := os.read(reader, _CHUNK_BYTES):
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) > _CHUNK_BYTES:
            whole, newline, rest = whole + newline + rest, b"\n", b""
        if newline:
            native.take(whole.decode(errors="replace"))
    if rest:
        native.take(rest.decode(errors="replace"))


def _give_back(original: int, thread: threading.Thread) -> None:
    """At an ordinary end: the pipe ends, and the thread with it, when it has passed everything on."""
    os.dup2(original, 2)
    thread.join(_JOIN_SECONDS)
