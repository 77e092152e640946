"""Lines about refused callers: limited, and nothing goes untold. The port for metrics."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from topk_grpc import metrics
from topk_grpc.errors import AddressInUseError
from topk_grpc.rpc import log, refusals
from topk_grpc.rpc.refusals import LimitedLog


@pytest.fixture
def lines() -> Iterator[Any]:
    """What has been logged so far, as a function."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    log.configure("info", stream)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_lines_are_limited_and_the_next_one_says_how_many_were_left_out(lines: Any) -> None:
    now = 0.0
    limited = LimitedLog("refused", lambda: now)
    for _ in range(1000):
        limited.warning(reason="x")
    assert len(lines()) == refusals.BURST
    now += 1.5 / refusals.PER_SECOND
    limited.warning(reason="x")
    assert lines()[-1]["suppressed"] == 1000 - refusals.BURST
    limited.warning(reason="x")
    assert len(lines()) == refusals.BURST + 1


def test_what_was_left_out_is_told_though_no_line_follows(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "SUMMARY_SECONDS", 0.05)
    limited = LimitedLog("refused", lambda: 0.0)
    for _ in range(refusals.BURST + 7):
        limited.warning(reason="x")
    deadline = time.monotonic() + 20
    while lines()[-1]["event"] != "refused_suppressed":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lines()[-1]["count"] == 7


def test_a_port_for_metrics_that_is_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"port {port} .*--metrics-port"):
            metrics.serve("127.0.0.1", port, "shard")
