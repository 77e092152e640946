"""Refused callers in the log, one line each, without letting them fill the disk.

Whoever is refused can try again a thousand times a second. So lines of one kind are written at most `BURST` at once and
`PER_SECOND` for long; what is left out is counted, and the number is told with the next line, or after
`SUMMARY_SECONDS` where none comes. Metrics count everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from topk_grpc.rpc import log

BURST: Final = 20
PER_SECOND: Final = 1.0
SUMMARY_SECONDS: Final = 10.0


class LimitedLog:
    """Lines of one event. May be used from any thread.

    Args:
        event: the name of the lines.
        clock: seconds, monotonic; for tests.
    """

    def __init__(self, event: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._event = event
        self._clock = clock
        self._lock = threading.Lock()
        self._left = float(BURST)
        self._at = clock()
        self._suppressed = 0
        self._timer: threading.Timer | None = None

    def warning(self, **fields: Any) -> None:
        """Writes a line, or counts it."""
        with self._lock:
            now = self._clock()
            self._left = min(BURST, self._left + (now - self._at) * PER_SECOND)
            self._at = now
            if self._left < 1:
                self._suppressed += 1
                if self._timer is None:
                    self._timer = threading.Timer(SUMMARY_SECONDS, self._summarise)
                    self._timer.daemon = True
                    self._timer.start()
                return
            self._left -= 1
            if self._suppressed:
                fields["suppressed"] = self._suppressed
                self._suppressed = 0
        log.warning(self._event, **fields)

    def _summarise(self) -> None:
        with self._lock:
            self._timer = None
            suppressed, self._suppressed = self._suppressed, 0
        if suppressed:
            log.warning(f"{self._event}_suppressed", count=suppressed)
