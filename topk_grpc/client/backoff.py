"""How long to wait before the next attempt: exponential backoff with full jitter.

Full jitter (each wait drawn evenly from zero to a bound that doubles) spreads the clients that one failure cut off at
the same moment, best of the variants compared in M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_SECONDS: Final = 0.05
"""The bound of the first wait."""

LONGEST_SECONDS: Final = 5.0
"""The bound of every later wait doubles up to this."""


class Backoff:
    """Draws the waits between attempts."""

    def __init__(self, random: Callable[[], float]) -> None:
        """Starts at the shortest bound.

        Args:
            random: draws evenly from [0, 1).
        """
        self._random = random
        self._bound_seconds = FIRST_SECONDS

    def reset(self) -> None:
        """Something worked: the next wait is short again."""
        self._bound_seconds = FIRST_SECONDS

    def next_seconds(self, least_seconds: float = 0.0) -> float:
        """Draws the next wait and doubles the bound.

        Args:
            least_seconds: what the server asked for; the jitter comes on top of it.
        """
        wait = least_seconds + self._random() * self._bound_seconds
        self._bound_seconds = min(2 * self._bound_seconds, LONGEST_SECONDS)
        return wait
