"""`topk token new`: makes a token, and the entry by which a gateway knows it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.gateway.tokens import digest_of, parse_tokens

_PREFIX: Final = "topk_"  # so that scanners for leaked secrets can know one
_BYTES: Final = 32


def new(
    name: str, roles: Sequence[str], expires: str | None, plays_per_second: float | None, append_to: Path | None
) -> None:
    """Prints a new token on standard output, once; the entry goes into the file, or to stderr.

    Raises:
        SettingError: the entry, or the file with it, would not be understood.
        InvalidArgumentError: `expires` is no time.
    """
    token = _PREFIX + secrets.token_urlsafe(_BYTES)
    entry = _entry(name, roles, digest_of(token), expires, plays_per_second)
    if append_to is None:
        parse_tokens(entry.encode(), "(new)")
        print(entry, end="", file=sys.stderr)  # noqa: T201
    else:
        _append(append_to, entry)
    print(token)  # noqa: T201


def _entry(name: str, roles: Sequence[str], digest: str, expires: str | None, plays_per_second: float | None) -> str:
    lines = [
        "[[token]]",
        f'name = "{name}"',
        f'sha256 = "{digest}"',
        f"roles = [{', '.join(f'{chr(34)}{role}{chr(34)}' for role in dict.fromkeys(roles))}]",
    ]
    if expires is not None:
        lines.append(f"expires = {_utc(expires)}")
    if plays_per_second is not None:
        lines.append(f"plays_per_second = {plays_per_second:g}")
    return "\n".join(lines) + "\n"


def _utc(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"--expires is {text!r}, which is no time: write 2027-01-31 or 2027-01-31T12:00:00Z"
        ) from error
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _append(path: Path, entry: str) -> None:
    """Replaces the file by one with the entry; a gateway never reads a part of it."""
    before = path.read_text() if path.exists() else ""
    gap = "\n" if before and not before.endswith("\n\n") else ""
    text = f"{before}{gap}{entry}"
    parse_tokens(text.encode(), str(path))
    target = path.resolve()
    mode = target.stat().st_mode & 0o777 if before else 0o600
    new = target.with_name(target.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)
