"""Standing windows: kept up to date as plays arrive, so that a query costs O(k).

Theory of operation. A tumbling or sliding window stands at bounds [start, end) and holds the sum of the cells in
between, for each entry of both boards (`boards.Span`). A play whose bucket lies within is counted when it arrives; any
other waits in its cell until the window moves there. Moving takes the cells that leave away and adds those that enter,
whichever way it goes: what has to be touched is what changes. Idle or not, a window is moved by the clock, and by
queries that are ahead of it. How sessions stand is told in engine/session_spans.py.

What stands is decided by settings and by queries, and logged, since a standing window keeps the grain it needs
(engine/tiers.py). Its counts are not: they are summed from the cells again after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from topk_grpc.engine.boards import Board, Span
from topk_grpc.engine.session_spans import SessionSpan
from topk_grpc.model import Bounds, SessionWindow, Window


class StandingWindows:
    """The windows that stand on a shard's boards. One writer.

    Args:
        boards: of the shard, by name.
        resolution_ms: the cluster's.

    Attributes:
        slides: moves of windows to other bounds.
    """

    def __init__(self, boards: Mapping[str, Board], resolution_ms: int) -> None:
        self._boards = boards
        self._resolution_ms = resolution_ms
        self._used_ms: dict[Window, int] = {}
        self.slides = 0

    def __iter__(self) -> Iterator[Window]:
        return iter(self._used_ms)

    def __contains__(self, window: object) -> bool:
        return window in self._used_ms

    def __len__(self) -> int:
        return len(self._used_ms)

    def set(self, windows: Iterable[Window]) -> None:
        """Lets these windows stand, and no others. New ones are empty until they are moved."""
        wanted = list(dict.fromkeys(windows))
        for window in [known for known in self._used_ms if known not in wanted]:
            del self._used_ms[window]
            for board in self._boards.values():
                board.close_span(window)
        for window in wanted:
            if window not in self._used_ms:
                self._used_ms[window] = 0
                for board in self._boards.values():
                    if isinstance(window, SessionWindow):
                        board.open_sessions(window, window.gap_ms // self._resolution_ms)
                    else:
                        board.open_span(window)

    def use(self, window: Window | None, now_ms: int) -> None:
        """Notes that a window was asked for, if it stands."""
        if window in self._used_ms:
            self._used_ms[window] = now_ms

    def unused_since(self, before_ms: int) -> list[Window]:
        """Windows that nobody has asked for since."""
        return [window for window, used_ms in self._used_ms.items() if used_ms < before_ms]

    def move(self, window: Window, bounds: Bounds, between: Callable[[], None] | None = None) -> None:
        """Brings a window to bounds, multiples of the resolution, that can be cut exactly. Sessions only move on.

        `between` is called on the way, when all but this window can be read.
        """
        start, end = bounds.start_ms // self._resolution_ms, bounds.end_ms // self._resolution_ms
        moved = False
        for board in self._boards.values():
            if (sessions := board.sessions.get(window)) is not None:
                before = sessions.end
                board.move_sessions(sessions, end)
                moved |= sessions.end != before
            span = board.spans.get(window)
            if span is not None and (span.start, span.end) != (start, end):
                board.move_span(span, start, end, between)
                moved = True
        self.slides += moved

    def fold(self, window: Window) -> None:
        """Lets a window stand nowhere: where it lies cannot be cut any more. Moving it counts it anew."""
        for board in self._boards.values():
            span = board.spans.get(window)
            if span is not None and span.start != span.end:
                board.move_span(span, 0, 0)

    def sessions(self, board: str, gap_ms: int, end_ms: int) -> SessionSpan | None:
        """The sessions of a board that stand at this end under this gap."""
        span = self._boards[board].sessions.get(SessionWindow(gap_ms))
        return span if span is not None and span.end == end_ms // self._resolution_ms else None

    def span(self, board: str, bounds: Bounds) -> Span | None:
        """The span of a board that stands at exactly these bounds, whichever window it belongs to."""
        start, end = bounds.start_ms // self._resolution_ms, bounds.end_ms // self._resolution_ms
        for span in self._boards[board].spans.values():
            if span.start == start and span.end == end:
                return span
        return None
