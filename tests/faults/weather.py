"""What is broken at the moment, and what was a moment ago: which failures are excused by it.

A process is away while a fault strikes it, and for some time after: it has to start, to recover, to be connected to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

CLEARING_SECONDS: Final = 30.0
"""How long after a fault its consequences may be felt: keepalive takes up to 25 s to find a dead connection."""


@dataclass
class _Disturbance:
    targets: frozenset[str]
    began: float
    ended: float | None = None


@dataclass
class Weather:
    _disturbances: list[_Disturbance] = field(default_factory=list)

    @contextmanager
    def broken(self, *targets: str) -> Iterator[None]:
        """Something is broken about these, until the block ends."""
        disturbance = _Disturbance(frozenset(targets), time.monotonic())
        self._disturbances.append(disturbance)
        try:
            yield
        finally:
            disturbance.ended = time.monotonic()

    def excuses(self, targets: Iterable[str], since: float) -> bool:
        """Whether any of these was broken, or had been a moment before, at any time since then (monotonic)."""
        wanted = set(targets)
        return any(
            wanted & one.targets and (one.ended is None or one.ended + CLEARING_SECONDS > since)
            for one in reversed(self._disturbances)
        )

    def forget(self, before: float) -> None:
        """Drops what nobody asks for any more."""
        self._disturbances = [one for one in self._disturbances if one.ended is None or one.ended > before]
