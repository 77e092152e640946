"""A gateway's gate: tokens, and the role that each method needs.

The file is looked at each `POLL_SECONDS`. A new one that cannot be used leaves the tokens before in force: a slip of
the pen must not lock everybody out, nor let anybody in. It is logged, and `topk_tokens_file_failed` is 1 until it has
been put right. After every change, and when a token expires, the streams that run are asked about again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from topk_grpc import metrics
from topk_grpc.errors import (
    PermissionDeniedError,
    SettingError,
    TokenExpiredError,
    TokenMissingError,
    TokenUnknownError,
)
from topk_grpc.gateway.tokens import ADMIN, INGEST, NO_TOKENS, QUERY, Tokens, digest_of, parse_tokens
from topk_grpc.rpc import log
from topk_grpc.rpc.access import ANYBODY, OPEN_METHODS, Caller

POLL_SECONDS: Final = 1.0

_ANY: Final = frozenset({INGEST, QUERY, ADMIN})

_V1: Final = "/topk.v1.TopKService/"
ROLES_OF_METHODS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        f"{_V1}StreamPlays": frozenset({INGEST}),
        f"{_V1}RecordPlays": frozenset({INGEST}),
        f"{_V1}GetTopK": frozenset({QUERY}),
        f"{_V1}WatchTopK": frozenset({QUERY}),
        f"{_V1}GetSongs": frozenset({QUERY}),
        f"{_V1}ListCharts": frozenset({QUERY}),
        # Producers ask it too, for the limits of batches.
        f"{_V1}DescribeCluster": _ANY,
        **{
            f"/topk.v1.ClusterAdminService/{method}": frozenset({ADMIN})
            for method in (
                "DeleteSong",
                "AddShards",
                "DrainShards",
                "RemoveShard",
                "Rebalance",
                "PauseMoves",
                "ResumeMoves",
            )
        },
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY,
    }
)
"""The roles of which one lets a token call a method. Health (rpc/access.py) is open; a test finds what is missing."""

_SCHEME: Final = "bearer "


class TokenGate:
    """Lets in who carries a token of the file. Belongs to one event loop.

    Args:
        path: the tokens file.
        clock: seconds since the epoch; for tests.

    Raises:
        SettingError: the file cannot be used.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = clock
        self._identity: tuple[int, ...] | None = None
        self._problem = ""
        self._tokens: Tokens = NO_TOKENS
        self._looked_at = clock()
        self._load()

    # --- Asking -------------------------------------------------------------------------------------------------------

    def credential(self, metadata: Mapping[str, Any]) -> str:
        """The token's hash; empty without a token."""
        given = metadata.get("authorization", "")
        if not isinstance(given, str) or given[: len(_SCHEME)].lower() != _SCHEME:
            return ""
        return digest_of(given[len(_SCHEME) :].strip())

    def admit(self, method: str, credential: str) -> Caller:
        """As `rpc.access.Gate.admit`."""
        if method in OPEN_METHODS:
            return ANYBODY
        if not credential:
            raise TokenMissingError(
                "this gateway asks for a token: send the metadata `authorization: Bearer TOKEN` (topk: --token-file or"
                " TOPK_TOKEN; TopKClient: token=)"
            )
        token = self._tokens.get(credential)
        if token is None:
            raise TokenUnknownError("the token is not known to this gateway: check it, or ask for another one")
        if token.expires_at <= self._clock():
            raise TokenExpiredError(f"the token {token.name} has expired: ask for another one")
        needed = ROLES_OF_METHODS.get(method, _ANY)
        if not needed & token.roles:
            raise PermissionDeniedError(
                f"the token {token.name} may not call {method}: that takes the role {' or '.join(sorted(needed))}"
            )
        return Caller(token.name, next(iter(needed)) if len(needed) == 1 else "any", token.plays_per_second)

    def knows(self, method: str) -> bool:
        """Whether the table has the method."""
        return method in ROLES_OF_METHODS or method in OPEN_METHODS

    def name_of(self, credential: str) -> str:
        """The token's name."""
        token = self._tokens.get(credential)
        return "" if token is None else token.name

    # --- Following the file -------------------------------------------------------------------------------------------

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Looks at the file and the clock until it is cancelled.

        Args:
            on_change: is called when calls that were let in before may not be any more.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            changed = False
            try:
                changed = await asyncio.to_thread(self._load)  # the file may lie on a network
                metrics.TOKENS_FILE_FAILED.set(0)
            except SettingError as error:
                if str(error) != self._problem:  # once for each problem
                    self._problem = str(error)
                    log.error("tokens_file_unusable", reason=str(error), consequence="the tokens before stay in force")
                metrics.TOKENS_FILE_FAILED.set(1)
            except Exception as error:  # whatever it is, the next change must not go unseen
                log.error("tokens_file_unusable", error=error)
                metrics.TOKENS_FILE_FAILED.set(1)
            before, self._looked_at = self._looked_at, self._clock()
            expired = any(before < token.expires_at <= self._looked_at for token in self._tokens.values())
            if changed or expired:
                on_change()

    def _load(self) -> bool:
        """Reads the file if it is another one than before; whether its tokens are others.

        Raises:
            SettingError: it cannot be used.
        """
        try:
            stat = self._path.stat()
            identity = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
            if identity == self._identity:
                return False
            raw = self._path.read_bytes()
        except OSError as error:
            raise SettingError(f"the tokens file {self._path} cannot be read: {error.strerror}") from error
        tokens = parse_tokens(raw, str(self._path))
        self._identity = identity
        self._problem = ""
        metrics.TOKENS.set(len(tokens))
        if tokens == self._tokens:
            return False
        self._tokens = tokens
        now = self._clock()
        log.event(
            "tokens_loaded",
            file=str(self._path),
            tokens=len(tokens),
            expired=sum(token.expires_at <= now for token in tokens.values()),
            never_expiring=sum(math.isinf(token.expires_at) for token in tokens.values()),
        )
        return True
