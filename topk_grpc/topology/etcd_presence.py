"""Who leads and who lives, by leases of etcd.

A key under a lease is gone when the lease has not been refreshed for its time. etcd counts that from when it has
received a refresh, its holder from when it has sent it, and stops a margin earlier: so a leader that is cut off knows
that it may have been replaced before it can be. Whose clock runs wrong by more than the margin in that time, or who is
stopped with its clock, may believe on; a change of the topology that it then makes is refused for its epoch.

An announcement is made anew when its lease was lost. A leader is not made anew: who lost it has to begin again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from aetcd import rpc

from topk_grpc.errors import SettingError, TopKError, TopologyError, UnavailableError
from topk_grpc.rpc import log
from topk_grpc.topology.etcd_client import EtcdClient
from topk_grpc.topology.store import Leadership

LEASE_SECONDS: Final = 10
"""After this time without a refresh etcd gives a lease up. One refresh may meet a member that hangs, and then one that
has no leader yet."""

MARGIN_SECONDS: Final = 1.0
"""So much earlier its holder does."""

_REFRESH_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.5


@dataclass(slots=True)
class _Lease:
    """A lease that was granted.

    Attributes:
        lease_id: etcd's number.
        until: the loop's time up to which it holds for sure.
    """

    lease_id: int
    until: float


class EtcdPresence:
    """Leaders and announcements of one cluster.

    Args:
        client: of its etcd.
        prefix: of its keys.
    """

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._leaders = f"{prefix}/leader/"
        self._alive = f"{prefix}/alive/"

    @asynccontextmanager
    async def lead(self, name: str) -> AsyncGenerator[Leadership, None]:
        """As `TopologyStore.lead`.

        Raises:
            SettingError: etcd refuses the user.
        """
        key = f"{self._leaders}{name}".encode()
        lease = await self._win(key)
        leadership = Leadership()
        holding = asyncio.create_task(self._hold(lease, key))
        holding.add_done_callback(lambda _: leadership.lost.set())
        try:
            yield leadership
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            await self._revoke(lease)

    @asynccontextmanager
    async def announce(self, name: str, text: str) -> AsyncGenerator[None, None]:
        """As `TopologyStore.announce`.

        Raises:
            SettingError: etcd refuses the user.
        """
        said = asyncio.Event()
        saying = asyncio.create_task(self._keep_saying(f"{self._alive}{name}".encode(), text.encode(), said))
        first = asyncio.create_task(said.wait())
        try:
            await asyncio.wait({saying, first}, return_when=asyncio.FIRST_COMPLETED)
            if saying.done():
                saying.result()
            yield
        finally:
            for task in (first, saying):
                task.cancel()
            await asyncio.gather(first, saying, return_exceptions=True)

    async def alive(self) -> dict[str, str]:
        """As `TopologyStore.alive`.

        Raises:
            SettingError: etcd refuses the user.
        """
        prefix = self._alive.encode()
        request = rpc.RangeRequest(key=prefix, range_end=prefix[:-1] + bytes([prefix[-1] + 1]))
        found = await self._client.call("KV", "Range", request)
        return {each.key[len(prefix) :].decode(): each.value.decode() for each in found.kvs}

    # --- Leases -------------------------------------------------------------------------------------------------------

    async def _win(self, key: bytes) -> _Lease:
        """Waits until the key could be made; its lease."""
        while True:
            with suppress(TopologyError, UnavailableError):  # a lost lease and etcd are waited for as another leader is
                if not (await self._client.call("KV", "Range", rpc.RangeRequest(key=key))).kvs:
                    lease = await self._grant()
                    won = False
                    try:
                        won = await self._make(key, lease)
                    finally:
                        if not won:
                            await self._revoke(lease)
                    if won:
                        return lease
            await asyncio.sleep(_POLL_SECONDS)

    async def _keep_saying(self, key: bytes, text: bytes, said: asyncio.Event) -> None:
        held: _Lease | None = None
        try:
            while True:
                try:
                    lease = await self._grant()
                    await self._client.call("KV", "Put", rpc.PutRequest(key=key, value=text, lease=lease.lease_id))
                    said.set()
                    before, held = held, lease
                    if before is not None:  # only now: so the key was there all the time, if etcd has kept it
                        await self._revoke(before)
                    await self._hold(lease, key)
                except (TopologyError, UnavailableError):
                    pass  # the lease was lost in between; or etcd is away, which the client has told
                except SettingError as error:  # what the user may do has changed, and may again
                    if not said.is_set():
                        raise
                    log.warning("announcement_refused", key=key.decode(), reason=str(error))
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            if held is not None:
                await self._revoke(held)

    async def _grant(self) -> _Lease:
        sent = asyncio.get_running_loop().time()
        answer = await self._client.call("Lease", "LeaseGrant", rpc.LeaseGrantRequest(TTL=LEASE_SECONDS))
        return _Lease(answer.ID, sent + answer.TTL - MARGIN_SECONDS)

    async def _make(self, key: bytes, lease: _Lease) -> bool:
        absent = rpc.Compare(key=key, target=rpc.Compare.VERSION, result=rpc.Compare.EQUAL, version=0)
        put = rpc.PutRequest(key=key, value=secrets.token_hex(8).encode(), lease=lease.lease_id)
        request = rpc.TxnRequest(compare=[absent], success=[rpc.RequestOp(request_put=put)])
        return bool((await self._client.call("KV", "Txn", request, failover=False)).succeeded)

    async def _hold(self, lease: _Lease, key: bytes) -> None:
        """Refreshes a lease; returns when it is lost, or the key is not under it any more."""
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout_at(lease.until):
                    await asyncio.sleep(_REFRESH_SECONDS)
                    with suppress(UnavailableError):
                        if not await self._refresh(lease, key):
                            return

    async def _refresh(self, lease: _Lease, key: bytes) -> bool:
        """Asks for more time; whether there is any, and the key is still there."""
        sent = asyncio.get_running_loop().time()
        request = rpc.LeaseKeepAliveRequest(ID=lease.lease_id)
        seconds = int((await self._client.call("Lease", "LeaseKeepAlive", [request])).TTL)
        if seconds <= 0:
            return False
        lease.until = sent + seconds - MARGIN_SECONDS
        found = await self._client.call("KV", "Range", rpc.RangeRequest(key=key))
        return any(each.lease == lease.lease_id for each in found.kvs)

    async def _revoke(self, lease: _Lease) -> None:
        """Ends a lease, and with it its key. If etcd cannot be told now it ends by itself."""
        with suppress(TopKError):
            await self._client.call("Lease", "LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease.lease_id))
