"""A client of etcd: calls with deadlines, the next member when one does not answer, watches.

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
from typing import Any, Final

import grpc
from aetcd import rpc

from topk_grpc.errors import SettingError, TopKError, TopologyError, UnavailableError
from topk_grpc.metrics import TOPOLOGY_STORE_AWAY
from topk_grpc.rpc import log
from topk_grpc.topology.etcd_members import EtcdMember, EtcdMembers
from topk_grpc.topology.store import StoreAccess

CALL_SECONDS: Final = 3.0
"""How long one member may take to answer."""

_REFUSALS: Final = frozenset({
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
})  # fmt: skip
_LOGIN_OVER: Final = ("invalid auth token", "revision of auth store is old", "user name is empty")


class EtcdClient:
    """Calls to one etcd cluster. Belongs to one event loop.

    Args:
        addresses: HOST:PORT of its members.
        access: what they ask for.

    Raises:
        SettingError: a file cannot be used, or the cluster's secret would travel in plaintext to another machine.
    """

    def __init__(self, addresses: Sequence[str], access: StoreAccess) -> None:
        self._members = EtcdMembers(addresses, access, CALL_SECONDS)
        self._away_since: float | None = None
        self._closed = asyncio.Event()

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
            TopologyError: what it names is not there (any more).
            SettingError: etcd refuses it.
        """
        failure = UnavailableError("etcd was not asked: the store is closed")
        for _ in range(len(self._members)):
            if self._closed.is_set():
                break
            member = self._members.first
            try:
                answer = await self._call_member(member, service, method, request)
            except (grpc.RpcError, UnavailableError) as error:
                failed = error if isinstance(error, UnavailableError) else self._failure_of(member, error)
                if not isinstance(failed, UnavailableError):
                    self._note_answer()
                    raise failed from error
                failure = failed
                self._members.turn_from(member)
                if not failover:
                    break
            else:
                self._note_answer()
                return answer
        if failover:
            self._note_away(failure)
        raise failure

    async def _call_member(self, member: EtcdMember, service: str, method: str, request: Any) -> Any:
        for last in (False, True):
            token = await self._members.login(member)
            stub: Any = getattr(rpc, f"{service}Stub")(self._members.channel(member))
            try:
                call = getattr(stub, method)(request, timeout=CALL_SECONDS, metadata=_metadata(token))
                answer = await (call.read() if isinstance(call, grpc.aio.StreamStreamCall) else call)
                if answer is grpc.aio.EOF:
                    raise UnavailableError(f"etcd at {member.address} ended the call without an answer")
                return answer
            except grpc.RpcError as error:
                if last or not self._members.logs_in or not _is_login_over(error.details()):
                    raise
                self._members.forget_login(token)
        raise AssertionError("the second try returns or raises")

    async def changes(self, key: bytes, revision: int) -> AsyncGenerator[bytes, None]:
        """The values that a key is given from a revision on, until the client is closed.

        Raises:
            UnavailableError: the watch has ended: its member is away, sees no majority, or has forgotten the revision.
            SettingError: etcd refuses it.
        """
        member = self._members.first
        failed = member.failed
        wanted = rpc.WatchCreateRequest(key=key, start_revision=revision)

        async def requests() -> AsyncGenerator[Any, None]:
            yield rpc.WatchRequest(create_request=wanted)
            await self._closed.wait()  # etcd takes the end of the requests for the end of the watch

        try:
            token = await self._members.login(member)
            stub: Any = rpc.WatchStub(self._members.channel(member))
            # A member that has lost the majority ends the watch then, instead of telling nothing for ever.
            call = stub.Watch(requests(), metadata=(*_metadata(token), ("hasleader", "true")))
            try:
                while not self._closed.is_set():
                    response = await self._read_unless(call, failed)
                    if response is grpc.aio.EOF or response.canceled:
                        self._members.forget_login(token)  # of a login that is over a watch is not told
                        raise UnavailableError(f"etcd at {member.address} has ended the watch ({_why(response)})")
                    for event in response.events:
                        if event.type == rpc.Event.PUT:
                            yield event.kv.value
            finally:
                call.cancel()
        except grpc.RpcError as error:
            self._members.turn_from(member)
            raise self._failure_of(member, error) from error

    async def _read_unless(self, call: Any, failed: asyncio.Event) -> Any:
        """The next message of a stream; EOF at its end, when its member fails, or when something is closed."""
        reading = asyncio.ensure_future(call.read())
        others = [asyncio.ensure_future(event.wait()) for event in (self._closed, failed)]
        try:
            await asyncio.wait({reading, *others}, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() and not reading.cancelled() else grpc.aio.EOF
        finally:
            for task in (reading, *others):
                task.cancel()

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
        await self._members.close()

    # --- What is said of it -------------------------------------------------------------------------------------------

    def _failure_of(self, member: EtcdMember, error: grpc.RpcError) -> TopKError:
        details = str(error.details()).partition("\n")[0]
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return TopologyError(f"etcd at {member.address} has nothing of the kind ({details})")
        if error.code() not in _REFUSALS:
            return UnavailableError(f"etcd at {member.address} does not answer ({details})")
        return SettingError(
            f"etcd at {member.address} refuses this process ({details}): check --etcd-user, --etcd-password-file and"
            " what the user may do there"
        )

    def _note_away(self, failure: UnavailableError) -> None:
        if self._away_since is None and not self._closed.is_set():
            self._away_since = time.monotonic()
            TOPOLOGY_STORE_AWAY.set(1)
            log.warning(
                "topology_store_away",
                reason=str(failure),
                consequence="the last topology known stays in use; changes wait",
            )

    def _note_answer(self) -> None:
        if self._away_since is not None:
            log.event("topology_store_back", away_seconds=round(time.monotonic() - self._away_since, 1))
            self._away_since = None
            TOPOLOGY_STORE_AWAY.set(0)


def _why(response: Any) -> str:
    """Why a watch has ended."""
    if response is grpc.aio.EOF:
        return "it stops, or answers nobody"
    if response.compact_revision:
        return f"what was before revision {response.compact_revision} is compacted"
    return response.cancel_reason or "it does not say why"


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("token", token),)


def _is_login_over(details: str | None) -> bool:
    return any(each in (details or "") for each in _LOGIN_OVER)
