"""The tokens file: who may do what, and until when.

    [[token]]
    name = "radio-importer"                  # for the log and for you; not secret
    sha256 = "9f86d081884c7d65…"             # of the token: who reads this file cannot use it
    roles = ["ingest"]                       # of ingest, query, admin
    expires = 2027-01-31T00:00:00Z           # optional
    plays_per_second = 50000                 # optional

Tokens are 256 random bits (`topk token new`), so a plain hash is enough: there is nothing to guess, and looking a hash
up in a table tells nothing about the token. What is not understood is refused, as a misspelt `expires` would otherwise
be a token for good.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from types import MappingProxyType
from typing import Any, Final

from topk_grpc.errors import SettingError

INGEST: Final = "ingest"
QUERY: Final = "query"
ADMIN: Final = "admin"
ROLES: Final = (INGEST, QUERY, ADMIN)

_FIELDS: Final = {"name", "sha256", "roles", "expires", "plays_per_second"}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token; not the token.

    Attributes:
        name: for people.
        roles: what it may do.
        expires_at: seconds since the epoch; infinity where it does not expire.
        plays_per_second: what it may send; 0: as much as it likes.
    """

    name: str
    roles: frozenset[str]
    expires_at: float = math.inf
    plays_per_second: float = 0.0


Tokens = Mapping[str, Token]
"""By the SHA-256 of the token, in hex."""

NO_TOKENS: Final[Tokens] = MappingProxyType({})


def digest_of(token: str) -> str:
    """What the file has in the place of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse_tokens(raw: bytes, where: str) -> Tokens:
    """Reads a tokens file.

    Args:
        raw: its bytes.
        where: its name, for messages.

    Raises:
        SettingError: it is not as above; the message says where.
    """
    try:
        members = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"the tokens file {where} is no TOML: {error}") from error
    entries = members.pop("token", [])
    if members or not isinstance(entries, list):
        what = f"has {', '.join(sorted(members))}" if members else "has a [token]"
        raise SettingError(f"the tokens file {where} {what}: it holds [[token]] tables and nothing else")
    tokens: dict[str, Token] = {}
    names: set[str] = set()
    for number, entry in enumerate(entries, 1):
        try:
            digest, token = _token(entry)
            if digest in tokens or token.name in names:
                raise ValueError("its name or its sha256 stands there twice")
        except ValueError as error:
            name = entry.get("name", "") if isinstance(entry, dict) else ""
            shown = f" ({name})" if isinstance(name, str) and _NAME.fullmatch(name) else ""
            raise SettingError(f"the tokens file {where}, token {number}{shown}: {error}") from error
        tokens[digest] = token
        names.add(token.name)
    return tokens


def _token(entry: Any) -> tuple[str, Token]:
    if not isinstance(entry, dict):
        raise ValueError("it is no table")  # noqa: TRY004  # the file is at fault
    unknown = sorted(set(entry) - _FIELDS)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown: a token has {', '.join(sorted(_FIELDS))}")
    name, digest, roles = entry.get("name"), entry.get("sha256"), entry.get("roles")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("name has to be 1 to 64 letters, digits and any of . _ @ -")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest.lower()):
        # What stands there may be the token itself, by mistake: it is not repeated.
        raise ValueError("sha256 has to be 64 hex digits: the hash of the token, as `topk token new` prints it")
    if not isinstance(roles, list) or not roles or not all(role in ROLES for role in roles):
        raise ValueError(f"roles has to be a list of {', '.join(ROLES)}")
    rate = entry.get("plays_per_second", 0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1e12:
        raise ValueError("plays_per_second has to be a number from 0 (no limit)")
    return digest.lower(), Token(name, frozenset(roles), _expires_at(entry.get("expires")), float(rate))


def _expires_at(value: Any) -> float:
    if value is None:
        return math.inf
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())  # at its beginning
    if not isinstance(value, datetime):
        raise ValueError("expires has to be a TOML date or time, without quotes: 2027-01-31T00:00:00Z")  # noqa: TRY004
    return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).timestamp()
