"""Memory that is made ready before something is copied into it.

The system hands out fresh memory page by page, at the first touch; that takes several times as long as the copy. A
snapshot copies what can change while writes wait, so another thread touches the memory before they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Copy = Callable[[NDArray[Any]], NDArray[Any]]
"""Copies an array."""

_ALIGNED: Final = 64


class Room:
    """Memory for copies, all of it touched. Copies beyond its size get memory of their own.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size, np.uint8)
        self._memory.fill(0)
        self._used = 0

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array, contiguous."""
        start, stop = self._used, self._used + array.nbytes
        if stop > len(self._memory):
            return array.copy()
        self._used = start + aligned(array.nbytes)
        copied = self._memory[start:stop].view(array.dtype).reshape(array.shape)
        np.copyto(copied, array)
        return copied


def aligned(size: int) -> int:
    """What a copy of so many bytes takes of a room at the most."""
    return -(-size // _ALIGNED) * _ALIGNED


def copied_bytes(copying: Callable[[Copy], object]) -> int:
    """How large a room is that holds all that something copies; nothing is copied.

    Args:
        copying: called with what to copy by.
    """
    size = 0

    def count(array: NDArray[Any]) -> NDArray[Any]:
        nonlocal size
        size += aligned(array.nbytes)
        return array

    copying(count)
    return size
