"""Log lines: one per event, JSON where stderr is no terminal.

An event is a short name for programs and fields with values: `event("ready", address="127.0.0.1:50050")`. What other
packages log (grpc, asyncio) comes out in the same form, as the event `log`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from topk_grpc.errors import SettingError

LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""The names of `--log-level`."""

_logger: Final = logging.getLogger("topk")
_FIELDS: Final = "topk_fields"


def _describe(record: logging.LogRecord, common: Mapping[str, Any]) -> dict[str, Any]:
    """A record's fields in the order they are written; `traceback` last, where there is one."""
    moment = datetime.fromtimestamp(record.created, UTC)
    line: dict[str, Any] = {
        "time": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
        "level": record.levelname.lower(),
    }
    fields = getattr(record, _FIELDS, None)
    if fields is None:
        line |= {"event": "log", **common, "logger": record.name, "message": record.getMessage()}
    else:
        line |= {"event": record.getMessage(), **common, **fields}
    if record.exc_info:
        line["traceback"] = logging.Formatter().formatException(record.exc_info)
    return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; values that JSON does not know are written as text."""

    def __init__(self, common: Mapping[str, Any]) -> None:
        super().__init__()
        self._common = common

    def format(self, record: logging.LogRecord) -> str:
        """Formats one record."""
        return json.dumps(_describe(record, self._common), default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, event, then `name=value`; a traceback below."""

    def __init__(self, common: Mapping[str, Any]) -> None:
        super().__init__()
        self._common = common

    def format(self, record: logging.LogRecord) -> str:
        """Formats one record."""
        line = _describe(record, self._common)
        time, level, event = line.pop("time"), line.pop("level"), line.pop("event")
        traceback = line.pop("traceback", None)
        fields = " ".join(f"{name}={_quote(value)}" for name, value in line.items())
        text = f"{time} {level:<7} {event} {fields}".rstrip()
        return text if traceback is None else f"{text}\n{traceback}"


def _quote(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c == '"' for c in text) else text


def configure(level: str = "info", stream: TextIO | None = None, **common: Any) -> None:
    """Sends the process's log lines to a stream; call it once, at the start of a role.

    Args:
        level: one of `LEVELS`; lines below it are not written.
        stream: where to; None is stderr. JSON unless it is a terminal.
        common: fields that every line carries, such as role="shard".

    Raises:
        SettingError: no such level.
    """
    if level not in LEVELS:
        raise SettingError(
            f"--log-level is {level!r}: it has to be one of {', '.join(LEVELS)} (environment: TOPK_LOG_LEVEL)"
        )
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter(common) if target.isatty() else JsonFormatter(common))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.INFO))  # other packages' debug lines are not ours to show
    _logger.setLevel(LEVELS[level])


def event(name: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Writes one line.

    Args:
        name: what happened, in words joined by underscores: `snapshot_written`.
        level: of `logging`.
        error: an exception whose traceback belongs to the line.
        fields: values, with the unit last in their names: `duration_ms=12`.
    """
    if _logger.isEnabledFor(level):
        info = None if error is None else (type(error), error, error.__traceback__)
        _logger.log(level, "%s", name, exc_info=info, extra={_FIELDS: fields})


def debug(name: str, **fields: Any) -> None:
    """An event that helps only while looking for a fault."""
    event(name, level=logging.DEBUG, **fields)


def warning(name: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """An event that somebody should look at, while the service goes on."""
    event(name, level=logging.WARNING, error=error, **fields)


def error(name: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """An event that cost somebody an answer, or ends the process."""
    event(name, level=logging.ERROR, error=error, **fields)
