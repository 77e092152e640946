"""Exact, windowed top-K over a stream of events, served by a gRPC cluster.

What stands here is the public interface; everything beneath may change between releases.

    async with topk_grpc.TopKClient("127.0.0.1:50050") as client:
        await client.record("Boston - More Than a Feeling")
        await client.flush()
        answer = await client.top_k("tumbling:1d", k=10)

The clients are imported when first asked for, since gRPC takes a moment to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from topk_grpc._version import VERSION as __version__  # noqa: N811
from topk_grpc.changes import Change, ChangeKind, WatchUpdate
from topk_grpc.errors import (
    DeadlineError,
    DuplicateBatchError,
    InvalidArgumentError,
    OutOfRangeError,
    PermissionDeniedError,
    ProducerExpiredError,
    RateLimitedError,
    RejectedPlaysError,
    ResourceExhaustedError,
    TopKError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
    WindowError,
)
from topk_grpc.model import (
    Answer,
    Bounds,
    Certificate,
    ChartHistory,
    ChartSummary,
    Entry,
    Finality,
    GlobalWindow,
    Play,
    RangeWindow,
    Rejected,
    SessionWindow,
    SlidingWindow,
    SongsAnswer,
    SongStanding,
    TumblingWindow,
    Window,
    parse_window,
)

if TYPE_CHECKING:
    from topk_grpc.client import BlockingTopKClient, ClientStats, TlsOptions, TopKClient

__all__ = [
    "Answer",
    "BlockingTopKClient",
    "Bounds",
    "Certificate",
    "Change",
    "ChangeKind",
    "ChartHistory",
    "ChartSummary",
    "ClientStats",
    "DeadlineError",
    "DuplicateBatchError",
    "Entry",
    "Finality",
    "GlobalWindow",
    "InvalidArgumentError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Play",
    "ProducerExpiredError",
    "RangeWindow",
    "RateLimitedError",
    "Rejected",
    "RejectedPlaysError",
    "ResourceExhaustedError",
    "SessionWindow",
    "SlidingWindow",
    "SongStanding",
    "SongsAnswer",
    "TlsOptions",
    "TopKClient",
    "TopKError",
    "TumblingWindow",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "WatchUpdate",
    "Window",
    "WindowError",
    "__version__",
    "parse_window",
]


def __getattr__(name: str) -> object:
    if name in {"BlockingTopKClient", "ClientStats", "TlsOptions", "TopKClient"}:
        import topk_grpc.client

        return getattr(topk_grpc.client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
