"""The two forms of a log line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from topk_grpc.errors import SettingError
from topk_grpc.rpc import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("topk")
    kept = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])
    ours.setLevel(kept[2])


def raised() -> ValueError:
    try:
        raise ValueError("broken")
    except ValueError as error:
        return error


def test_lines_are_json_where_nobody_looks() -> None:
    stream = io.StringIO()
    log.configure("info", stream, role="shard", shard_id="shard-0")
    log.event("ready", address="127.0.0.1:1", path=io)
    log.error("failed", error=raised())
    log.debug("unseen")
    logging.getLogger("grpc").warning("said %d", 5)
    ready, failed, foreign = map(json.loads, stream.getvalue().splitlines())
    assert list(ready)[:5] == ["time", "level", "event", "role", "shard_id"]
    assert ready["address"] == "127.0.0.1:1"
    assert (failed["level"], failed["event"]) == ("error", "failed")
    assert "ValueError: broken" in failed["traceback"]
    assert (foreign["event"], foreign["logger"], foreign["message"]) == ("log", "grpc", "said 5")


def test_lines_are_text_on_a_terminal() -> None:
    stream = Terminal()
    log.configure("debug", stream)
    log.event("ready", address="127.0.0.1:1", note="two words", nothing="")
    log.warning("failed", error=raised())
    first, second, *rest = stream.getvalue().splitlines()
    assert first.endswith('info    ready address=127.0.0.1:1 note="two words" nothing=""')
    assert second.endswith("warning failed")
    assert rest[-1] == "ValueError: broken"


def test_levels_hold() -> None:
    stream = io.StringIO()
    log.configure("warning", stream)
    log.event("unseen")
    log.warning("seen")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["seen"]
    with pytest.raises(SettingError, match="--log-level"):
        log.configure("loud")
