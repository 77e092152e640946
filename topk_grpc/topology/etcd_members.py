"""The way to etcd's members: which is asked next, connections, certificates, logins."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from aetcd import rpc

from topk_grpc.config import is_loopback
from topk_grpc.errors import SettingError, TopologyError
from topk_grpc.rpc.channels import open_channel
from topk_grpc.rpc.tls import PemFiles, channel_credentials
from topk_grpc.topology.store import StoreAccess

_CHANNEL_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses pings that come faster than every 5 s,
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),  # and all without a call under way
)


@dataclass(slots=True, eq=False)
class EtcdMember:
    """One member, and the way to it as long as the certificates stay as they are.

    Attributes:
        address: HOST:PORT.
        failed: set when it did not answer a call, and then replaced: its watches do not wait for what it will not say.
        channel: None before the first call.
        generation: of the certificates that the channel was opened with.
    """

    address: str
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    channel: grpc.aio.Channel | None = None
    generation: int = 0


class EtcdMembers:
    """The members of one etcd cluster. Belongs to one event loop.

    Args:
        addresses: HOST:PORT of each.
        access: what they ask for.
        call_seconds: how long one may take to answer.

    Raises:
        SettingError: a file cannot be used, or the cluster's secret would travel in plaintext to another machine.
    """

    def __init__(self, addresses: Sequence[str], access: StoreAccess, call_seconds: float) -> None:
        self._members = [EtcdMember(address) for address in addresses]
        self._access = access
        self._call_seconds = call_seconds
        self._files: PemFiles | None = None
        self._token: str | None = None
        self._logging_in = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()  # channels being closed
        if access.ca or access.cert:
            self._files = PemFiles(access.cert, access.key, access.ca)
        elif not access.plaintext:
            far = [address for address in addresses if not is_loopback(address.rpartition(":")[0])]
            if far:
                raise SettingError(
                    f"etcd at {far[0]} is on another machine, and would be sent the cluster's secret in plaintext: give"
                    " --etcd-ca, or say --plaintext where the network keeps others out"
                )
        if access.user:
            self._password()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def first(self) -> EtcdMember:
        """The member to be asked: the one that answered last."""
        return self._members[0]

    def turn_from(self, member: EtcdMember) -> None:
        """Asks another one first from here on."""
        member.failed.set()
        member.failed = asyncio.Event()
        if self._members[0] is member:
            self._members.append(self._members.pop(0))

    def channel(self, member: EtcdMember) -> grpc.aio.Channel:
        """The connection to a member, with the certificates as they are now."""
        generation = 0
        if self._files is not None:
            self._files.refresh()
            generation = self._files.generation
        if member.channel is None or member.generation != generation:
            if member.channel is not None:  # one with the old certificates: its calls may end, its watches begin anew
                task = asyncio.create_task(member.channel.close(grace=self._call_seconds))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            credentials = None if self._files is None else channel_credentials(self._files.pems)
            member.channel = open_channel(member.address, options=_CHANNEL_OPTIONS, credentials=credentials)
            member.generation = generation
        return member.channel

    async def close(self) -> None:
        """Closes the connections; calls may end."""
        channels = [member.channel for member in self._members if member.channel is not None]
        await asyncio.gather(*(channel.close(grace=self._call_seconds) for channel in channels), *self._closing)

    # --- Login --------------------------------------------------------------------------------------------------------

    @property
    def logs_in(self) -> bool:
        """Whether there is a user."""
        return bool(self._access.user)

    async def login(self, member: EtcdMember) -> str | None:
        """The token of the login; None where there is no user.

        Raises:
            SettingError: the password cannot be read.
            grpc.RpcError: as the member said.
        """
        if not self._access.user:
            return None
        async with self._logging_in:
            if self._token is None:
                stub: Any = rpc.AuthStub(self.channel(member))
                request = rpc.AuthenticateRequest(name=self._access.user, password=self._password())
                self._token = str((await stub.Authenticate(request, timeout=self._call_seconds)).token)
            return self._token

    def forget_login(self, token: str | None) -> None:
        """Logs in anew the next time: etcd has forgotten the token."""
        if self._token == token:
            self._token = None

    def _password(self) -> str:
        path = Path(self._access.password_file)
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise SettingError(
                f"--etcd-password-file {path} cannot be read ({error.strerror}): check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise SettingError(
                f"--etcd-password-file {path} is not UTF-8: write the password on its first line"
            ) from error
        if not lines or not lines[0]:
            raise SettingError(f"--etcd-password-file {path} is empty: write the password on its first line")
        return lines[0]


def addresses_of(text: str, url: str) -> list[str]:
    """The members that `etcd://HOST:PORT[,HOST:PORT…]/PREFIX` names.

    Raises:
        TopologyError: it names none.
    """
    if "@" in text:  # and a password with it, maybe, which is not repeated
        raise TopologyError("--topology names a user in its URL: write it with --etcd-user and --etcd-password-file")
    addresses = text.split(",")
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise TopologyError(
                f"--topology is {url!r}, where {address!r} is no address of etcd: write"
                " etcd://HOST:PORT[,HOST:PORT…]/PREFIX"
            )
    return addresses
