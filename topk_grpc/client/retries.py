"""Which ends of a stream are worth another one.

As rpc/status.py says of any call, and one more: INTERNAL without details. Servers of ours explain theirs; the bare one
comes from gRPC itself, when a stream breaks while a message is written, or from a proxy that reset it.
"""

from __future__ import annotations

from typing import Final

import grpc

from topk_grpc.rpc.status import is_retriable, retry_after_ms

_DETAILS_KEY: Final = "grpc-status-details-bin"


def retry_after_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """Judges how a stream ended.

    Returns:
        The least time to wait before the next one, in seconds; None where no other would fare better.
    """
    bare_internal = error.code() is grpc.StatusCode.INTERNAL and not any(
        key == _DETAILS_KEY for key, _ in error.trailing_metadata() or ()
    )
    if not bare_internal and not is_retriable(error):
        return None
    return (retry_after_ms(error) or 0) / 1000
