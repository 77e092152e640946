"""From a window and an instant to the bounds that are counted.

All bounds are multiples of the resolution, so that whole time buckets are counted.
"""

from __future__ import annotations

from typing import Never

from topk_grpc.errors import WindowError
from topk_grpc.model import (
    TIME_MS_MAX,
    Bounds,
    GlobalWindow,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
    format_duration,
)


def bounds_of(window: Window, as_of_ms: int, resolution_ms: int) -> Bounds | None:
    """The bounds of a window at an instant T.

    Args:
        window: the window.
        as_of_ms: T; not looked at for the global window and for ranges.
        resolution_ms: the cluster's grain r.

    Returns:
        None for the global window. For sessions the span that the last play of an open one lies in.

    Raises:
        WindowError: the window does not fit the resolution, or T lies out of all reason.
    """
    if abs(as_of_ms) > TIME_MS_MAX:
        raise WindowError(f"as_of {as_of_ms} ms lies out of all reason: give milliseconds since the Unix epoch")
    bucket = as_of_ms // resolution_ms * resolution_ms
    match window:
        case GlobalWindow():
            return None
        case TumblingWindow(size_ms, offset_ms):
            if size_ms % resolution_ms or offset_ms % resolution_ms:
                _refuse(window, "size and offset", resolution_ms)
            start = (as_of_ms - offset_ms) // size_ms * size_ms + offset_ms
            return Bounds(start, start + size_ms)
        case SlidingWindow(size_ms, slide_ms):
            if size_ms % resolution_ms or slide_ms % resolution_ms:
                _refuse(window, "size and slide", resolution_ms)
            end = as_of_ms // slide_ms * slide_ms if slide_ms else bucket + resolution_ms
            return Bounds(end - size_ms, end)
        case SessionWindow(gap_ms):
            if gap_ms % resolution_ms:
                _refuse(window, "its gap", resolution_ms)
            return Bounds(bucket - gap_ms, bucket + resolution_ms)
        case RangeWindow(start_ms, end_ms):
            if start_ms % resolution_ms or end_ms % resolution_ms:
                _refuse(window, "start and end", resolution_ms)
            return Bounds(start_ms, end_ms)


def _refuse(window: Window, what: str, resolution_ms: int) -> Never:
    raise WindowError(
        f"{window} does not fit the cluster's resolution: {what} have to be multiples of"
        f" {format_duration(resolution_ms)}"
    )


def is_final(bounds: Bounds | None, *, complete: bool, watermark_ms: int, allowed_lateness_ms: int) -> bool:
    """Whether no more plays are to be expected in the window (DESIGN: finality); never for the global one."""
    return bounds is not None and complete and bounds.end_ms + allowed_lateness_ms <= watermark_ms
