"""A client's way to a cluster: a channel, and what each call proves the caller with.

gRPC fixes a channel's certificates when it is opened. So where their files have changed since, the next call gets a new
channel; calls under way end on the old one, which is closed with the one after it. The token goes as metadata with each
call, as gRPC's own call credentials work in TLS only, and a cluster on this machine alone has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import grpc

from topk_grpc.config import is_loopback
from topk_grpc.errors import SettingError
from topk_grpc.rpc.channels import open_channel, target_of
from topk_grpc.rpc.tls import PemFiles, TlsOptions, channel_credentials

Token = str | Path | Callable[[], str]
"""A token, a file that holds one, or what gives one; the last two are asked anew for each call."""

Metadata = tuple[tuple[str, str], ...]

_NO_METADATA: Final[Metadata] = ()


class Connection:
    """Where to call, and as whom. Belongs to one event loop, from the first call on.

    Args:
        target: as `channels.target_of` takes it.
        tls: how to speak TLS; True: with the public CAs; None or False: plaintext.
        token: shown with each call; None: none.
        plaintext: send the token in plaintext to other machines too.

    Raises:
        SettingError: the target is no address, a file cannot be used, or the token would travel in plaintext.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        tls: TlsOptions | bool | None = None,
        token: Token | None = None,
        plaintext: bool = False,
    ) -> None:
        self._target = target_of(target)
        options = TlsOptions() if tls is True else tls or None
        self._files = None if options is None else PemFiles(options.cert, options.key, options.ca)
        if token is not None and options is None and not plaintext and not _is_local(target):
            raise SettingError(
                f"the token would go to {self._target} in plaintext: use TLS (tls=True, --tls), or say plaintext where"
                " the network keeps others out"
            )
        self._token = token
        self._channel: grpc.aio.Channel | None = None
        self._generation = 0
        self._old: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.metadata()  # a token that cannot be had is told of now

    @property
    def channel(self) -> grpc.aio.Channel:
        """To make a call on, now; it may be another one the next time."""
        generation = 0
        if self._files is not None:
            self._files.refresh()
            generation = self._files.generation
        if self._channel is None or generation != self._generation:
            self._retire()
            credentials = None if self._files is None else channel_credentials(self._files.pems)
            self._channel = open_channel(self._target, credentials=credentials)
            self._generation = generation
        return self._channel

    def metadata(self) -> Metadata:
        """What a call carries.

        Raises:
            SettingError: the token cannot be read, or is none.
        """
        if self._token is None:
            return _NO_METADATA
        return (("authorization", f"Bearer {_read(self._token)}"),)

    def has_other(self, shown: Metadata) -> bool:
        """Whether there is another token by now than the one that was shown."""
        try:
            return self.metadata() != shown
        except SettingError:
            return False

    async def close(self) -> None:
        """Ends all calls."""
        channels = [each for each in (self._channel, self._old) if each is not None]
        self._channel = self._old = None
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    def _retire(self) -> None:
        if self._old is not None:  # its calls have had the life of a certificate to end
            task = asyncio.get_running_loop().create_task(self._old.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._old = self._channel


def _is_local(target: str | Sequence[str]) -> bool:
    targets = [target] if isinstance(target, str) else target
    bare = [each.strip().removeprefix("dns:").lstrip("/") for each in targets]
    return all(each.startswith("unix:") or is_loopback(each.rpartition(":")[0]) for each in bare)


def _read(token: Token) -> str:
    """The token itself; messages must not hold it."""
    if isinstance(token, Path):
        try:
            text = token.read_text(errors="surrogateescape")
        except OSError as error:
            raise SettingError(f"the token file {token} cannot be read: {error.strerror}") from error
        where = f"the token file {token}"
    else:
        text, where = (token if isinstance(token, str) else token()), "the token"
    text = text.strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise SettingError(f"{where} holds no token: one is a single word of ASCII, as `topk token new` prints it")
    return text
