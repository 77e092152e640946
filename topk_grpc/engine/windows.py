"""From a window and an instant to the bounds that are counted.

All bounds are multiples of the resolution, so that whole time buckets are counted.
"""

from __future__ import annotations

from typing import Final

from topk_grpc.errors import WindowError
from topk_grpc.model import Bounds, GlobalWindow, TumblingWindow, Window, format_duration

TIME_MS_MAX: Final = 1 << 60
"""The farthest instant from the epoch, 36 million years: sums of an instant and a size stay within 64 bits."""


def bounds_of(window: Window, as_of_ms: int, resolution_ms: int) -> Bounds | None:
    """The bounds of a window at an instant T.

    Args:
        window: the window.
        as_of_ms: T; not looked at for the global window.
        resolution_ms: the cluster's grain r.

    Returns:
        None for the global window.

    Raises:
        WindowError: the window does not fit the resolution, or T lies out of all reason.
    """
    match window:
        case GlobalWindow():
            return None
        case TumblingWindow(size_ms, offset_ms):
            if size_ms % resolution_ms or offset_ms % resolution_ms:
                raise WindowError(
                    f"{window} does not fit the cluster's resolution: size and offset have to be multiples of"
                    f" {format_duration(resolution_ms)}"
                )
            if abs(as_of_ms) > TIME_MS_MAX:
                raise WindowError(f"as_of {as_of_ms} ms lies out of all reason: give milliseconds since the Unix epoch")
            start = (as_of_ms - offset_ms) // size_ms * size_ms + offset_ms
            return Bounds(start, start + size_ms)


def is_final(bounds: Bounds | None, *, complete: bool, watermark_ms: int, allowed_lateness_ms: int) -> bool:
    """Whether no more plays are to be expected in the window (DESIGN: finality); never for the global one."""
    return bounds is not None and complete and bounds.end_ms + allowed_lateness_ms <= watermark_ms
