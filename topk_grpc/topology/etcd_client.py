"""A client of etcd's members: calls with deadlines, the next member when one does not answer, login, TLS.

The messages and stubs are those of the package aetcd. Its own client is not used: it speaks to one member, in
plaintext, and logs in once, while etcd forgets logins when it restarts.

A call goes to the member that answered last, and to each of the others once if it does not. Linearizable reads are
answered by members that see a majority alone, so whichever answers is as good as any. A change is not sent to the next
member by itself, as it may have been made: see `TopologyStore.compare_and_set`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from aetcd import rpc

from topk_grpc.config import is_loopback
from topk_grpc.errors import SettingError, TopologyError, UnavailableError
from topk_grpc.rpc import log
from topk_grpc.rpc.channels import open_channel
from topk_grpc.rpc.tls import PemFiles, channel_credentials
from topk_grpc.topology.store import StoreAccess

CALL_SECONDS: Final = 3.0
"""How long one member may take to answer."""

_CHANNEL_OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses pings that come faster than every 5 s,
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),  # and all without a call under way
)
_REFUSALS: Final = frozenset({
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
})  # fmt: skip
_LOGIN_OVER: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")


@dataclass(slots=True, eq=False)
class _Member:
    """One member, and the way to it as long as the certificates stay as they are."""

    address: str
    channel: grpc.aio.Channel | None = None
    generation: int = 0


class EtcdClient:
    """Calls to one etcd cluster. Belongs to one event loop.

    Args:
        addresses: HOST:PORT of its members.
        access: what they ask for.

    Raises:
        SettingError: a file cannot be used, or the cluster's secret would travel in plaintext to another machine.
    """

    def __init__(self, addresses: Sequence[str], access: StoreAccess) -> None:
        self._members = [_Member(address) for address in addresses]
        self._access = access
        self._files: PemFiles | None = None
        self._token: str | None = None
        self._away_since: float | None = None
        self._closed = asyncio.Event()
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

    @property
    def closed(self) -> asyncio.Event:
        """Set when the client is closed."""
        return self._closed

    # --- Calls --------------------------------------------------------------------------------------------------------

    async def call(self, service: str, method: str, request: Any, *, failover: bool = True) -> Any:
        """Makes a call that has one request and one answer.

        Args:
            service: KV or Lease.
            method: of the service.
            request: its message.
            failover: ask the next member when one does not answer: for calls that may be made twice.

        Raises:
            UnavailableError: no member answers. Whether the call was made is unknown.
            SettingError: etcd refuses it.
        """
        failure = UnavailableError("etcd was not asked: the store is closed")
        for _ in self._members:
            if self._closed.is_set():
                break
            member = self._members[0]
            try:
                answer = await self._call_member(member, service, method, request)
            except (grpc.RpcError, UnavailableError) as error:
                failed = error if isinstance(error, UnavailableError) else self._failure_of(member, error)
                if not isinstance(failed, UnavailableError):
                    raise failed from error
                failure = failed
                self._turn_from(member)
                if not failover:
                    break
            else:
                self._note_answer()
                return answer
        if failover:
            self._note_away(failure)
        raise failure

    async def _call_member(self, member: _Member, service: str, method: str, request: Any) -> Any:
        for last in (False, True):
            token = await self._login(member)
            stub: Any = getattr(rpc, f"{service}Stub")(self._channel(member))
            try:
                call = getattr(stub, method)(request, timeout=CALL_SECONDS, metadata=_metadata(token))
                answer = await (call.read() if isinstance(call, grpc.aio.StreamStreamCall) else call)
                if answer is grpc.aio.EOF:
                    raise UnavailableError(f"etcd at {member.address} ended the call without an answer")
                return answer
            except grpc.RpcError as error:
                if last or not self._access.user or not _is_login_over(error.details()):
                    raise
                self._forget_login(token)
        raise AssertionError("the second try returns or raises")

    async def changes(self, key: bytes, revision: int) -> AsyncGenerator[bytes, None]:
        """The values that a key is given from a revision on, until the client is closed.

        Raises:
            UnavailableError: the watch has ended: its member is away, sees no majority, or has forgotten the revision.
            SettingError: etcd refuses it.
        """
        member = self._members[0]
        wanted = rpc.WatchCreateRequest(key=key, start_revision=revision)

        async def requests() -> AsyncGenerator[Any, None]:
            yield rpc.WatchRequest(create_request=wanted)
            await self._closed.wait()  # etcd takes the end of the requests for the end of the watch

        try:
            token = await self._login(member)
            stub: Any = rpc.WatchStub(self._channel(member))
            # A member that has lost the majority ends the watch then, instead of telling nothing for ever.
            call = stub.Watch(requests(), metadata=(*_metadata(token), ("hasleader", "true")))
            try:
                while not self._closed.is_set():
                    response = await self._read_until_closed(call)
                    if response is grpc.aio.EOF or response.canceled:
                        self._forget_login(token)  # of a login that is over a watch is not told
                        raise UnavailableError(f"etcd at {member.address} has ended the watch ({_why(response)})")
                    for event in response.events:
                        if event.type == rpc.Event.PUT:
                            yield event.kv.value
            finally:
                call.cancel()
        except grpc.RpcError as error:
            self._turn_from(member)
            raise self._failure_of(member, error) from error

    async def _read_until_closed(self, call: Any) -> Any:
        """The next message of a stream; EOF at its end, or when the client or the channel is closed."""
        reading, closing = asyncio.ensure_future(call.read()), asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() and not reading.cancelled() else grpc.aio.EOF
        finally:
            reading.cancel()
            closing.cancel()

    async def pause(self, seconds: float) -> None:
        """Waits; not longer than until the client is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """Ends what is under way, and closes the connections."""
        self._closed.set()  # which ends the watches; other calls may take their time to be answered
        channels = [member.channel for member in self._members if member.channel is not None]
        await asyncio.gather(*(channel.close(grace=CALL_SECONDS) for channel in channels), *self._closing)

    # --- Members ------------------------------------------------------------------------------------------------------

    def _channel(self, member: _Member) -> grpc.aio.Channel:
        generation = 0
        if self._files is not None:
            self._files.refresh()
            generation = self._files.generation
        if member.channel is None or member.generation != generation:
            if member.channel is not None:  # one with the old certificates: its calls may end, its watches begin anew
                task = asyncio.create_task(member.channel.close(grace=CALL_SECONDS))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            credentials = None if self._files is None else channel_credentials(self._files.pems)
            member.channel = open_channel(member.address, options=_CHANNEL_OPTIONS, credentials=credentials)
            member.generation = generation
        return member.channel

    def _turn_from(self, member: _Member) -> None:
        if self._members[0] is member:
            self._members.append(self._members.pop(0))

    def _failure_of(self, member: _Member, error: grpc.RpcError) -> UnavailableError | SettingError:
        details = str(error.details()).partition("\n")[0]
        if error.code() not in _REFUSALS:
            return UnavailableError(f"etcd at {member.address} does not answer ({details})")
        return SettingError(
            f"etcd at {member.address} refuses this process ({details}): check --etcd-user, --etcd-password-file and"
            " what the user may do there"
        )

    def _note_away(self, failure: UnavailableError) -> None:
        if self._away_since is None and not self._closed.is_set():
            self._away_since = time.monotonic()
            log.warning(
                "topology_store_away",
                reason=str(failure),
                consequence="the last topology known stays in use; changes wait",
            )

    def _note_answer(self) -> None:
        if self._away_since is not None:
            log.event("topology_store_back", away_seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None

    # --- Login --------------------------------------------------------------------------------------------------------

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

    async def _login(self, member: _Member) -> str | None:
        """The token of the login; None where there is no user."""
        if not self._access.user:
            return None
        async with self._logging_in:
            if self._token is None:
                stub: Any = rpc.AuthStub(self._channel(member))
                request = rpc.AuthenticateRequest(name=self._access.user, password=self._password())
                self._token = str((await stub.Authenticate(request, timeout=CALL_SECONDS)).token)
            return self._token

    def _forget_login(self, token: str | None) -> None:
        if self._token == token:
            self._token = None


def _why(response: Any) -> str:
    """Why a watch has ended."""
    if response is grpc.aio.EOF:
        return "it stops"
    if response.compact_revision:
        return f"what was before revision {response.compact_revision} is compacted"
    return response.cancel_reason or "it does not say why"


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("token", token),)


def _is_login_over(details: str | None) -> bool:
    return any(each in (details or "") for each in _LOGIN_OVER)


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
