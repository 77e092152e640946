"""Locks on files: the kernel gives them back when their holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topk_grpc.errors import UnavailableError

_AGAIN_SECONDS = 0.005


def try_lock(path: Path) -> int | None:
    """Takes the exclusive lock of a file, which is made where there is none.

    Returns:
        The descriptor that holds the lock until it is closed; None: somebody else has it.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Holds the exclusive lock of a file; for turns that take milliseconds.

    Raises:
        UnavailableError: somebody else had it for so long.
        OSError: the file cannot be opened.
    """
    deadline = time.monotonic() + seconds
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"another process holds {path} for over {seconds:g} s: try again, or look for a process that hangs"
            )
        time.sleep(_AGAIN_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(descriptor: int) -> bool:
    """Whether anybody else holds the lock of an open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def is_still(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
