"""`topk shard`, `topk gateway` and `topk controller`: one role in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import uvloop

from topk_grpc import kernels
from topk_grpc.cli.failures import FINAL, FINAL_ERRORS, fail
from topk_grpc.config import ControllerSettings, GatewaySettings, ShardSettings

if TYPE_CHECKING:
    from topk_grpc.storage import Files

SLOW_KERNELS = (
    "warning: the kernels are not compiled; everything is exact, but hundreds of times slower. "
    "Install a C compiler and Python's headers, then install topk-grpc again"
)


def warn_if_slow() -> None:
    """Says on stderr that the kernels run uncompiled, if they do."""
    if not kernels.compiled():
        print(SLOW_KERNELS, file=sys.stderr)  # noqa: T201


def run_shard(settings: ShardSettings, files: Files | None = None) -> None:
    """Runs a shard until it is told to stop.

    Args:
        settings: of the shard.
        files: the file system that its data directory is on, the real one by default.

    Raises:
        TopKError: it cannot start, or cannot go on.
    """
    from topk_grpc.shard.server import serve

    _run(serve(settings, files))


def run_gateway(settings: GatewaySettings) -> None:
    """Runs a gateway until it is told to stop.

    Raises:
        TopKError: it cannot start, or cannot go on.
    """
    from topk_grpc.gateway.server import serve

    _run(serve(settings))


def run_controller(settings: ControllerSettings) -> None:
    """Runs a controller until it is told to stop.

    Raises:
        TopKError: it cannot start, or cannot go on.
    """
    from topk_grpc.controller.server import serve

    _run(serve(settings))


def _run(server: Coroutine[Any, Any, None]) -> None:
    warn_if_slow()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(server)
        except FINAL_ERRORS as error:
            fail(str(error), FINAL)
