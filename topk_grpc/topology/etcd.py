"""A topology in etcd, for the processes of many machines.

    PREFIX/topology      the topology, as codec.py writes it
    PREFIX/change        a number drawn for the last change, put in the same transaction
    PREFIX/leader/NAME   of the leader of that name, under its lease
    PREFIX/alive/NAME    the text of the process of that name, under its lease

A change is one transaction: if the topology is still of the revision that was read, put the new one and the number of
the change. Whoever sent one and heard nothing reads again. The number says whether it was made. If the revision is
still the old one the same transaction is sent once more: at most one of the two can find that revision. If a later
epoch is there, ours may have been among those that it replaced, which nobody can tell any more: the outcome stays
unknown.

A watch begins with a read and goes on from the revision of that read, and does the same again whenever it ends: after a
restart of etcd, when its member has lost the majority, or when etcd has compacted what it was to go on from. To ask for
every revision missed since the last one seen would bring nothing: only the newest topology counts, and the read has it.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Final

from aetcd import rpc

from topk_grpc.errors import TopologyError, UnavailableError
from topk_grpc.model import Topology
from topk_grpc.topology.codec import decode, encode
from topk_grpc.topology.etcd_client import EtcdClient
from topk_grpc.topology.etcd_members import addresses_of
from topk_grpc.topology.etcd_presence import EtcdPresence
from topk_grpc.topology.store import Leadership, StoreAccess, check_succession

CHANGE_SECONDS: Final = 10.0
"""How long a change whose answer got lost is looked for."""

_PAUSE_SECONDS: Final = (0.05, 2.0)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is there at one revision.

    Attributes:
        topology: None: there is none.
        topology_revision: of its last change.
        change: the number of that.
        revision: of the whole store.
    """

    topology: Topology | None
    topology_revision: int
    change: bytes
    revision: int


class EtcdTopologyStore:
    """The store `etcd://HOST:PORT[,HOST:PORT…]/PREFIX`. Belongs to one event loop.

    Args:
        url: as above.
        access: what etcd asks for.

    Raises:
        TopologyError: the URL is none.
        SettingError: what `access` says cannot be used.
    """

    def __init__(self, url: str, access: StoreAccess) -> None:
        members, _, prefix = url.removeprefix("etcd://").partition("/")
        prefix = prefix.strip("/")
        if not prefix:
            raise TopologyError(
                f"--topology is {url!r}, without a prefix: write etcd://HOST:PORT/PREFIX, one for each cluster"
            )
        self._key = f"{prefix}/topology".encode()
        self._change_key = f"{prefix}/change".encode()
        self._where = f"etcd://{members}/{prefix}/topology"
        self._client = EtcdClient(addresses_of(members, url), access)
        self._presence = EtcdPresence(self._client, prefix)

    async def read(self) -> Topology:
        """As `TopologyStore.read`.

        Raises:
            SettingError: etcd refuses the user.
        """
        found = await self._find()
        if found.topology is None:
            raise TopologyError(
                f"there is no topology at {self._where}: check --topology, or make the cluster that keeps it there"
            )
        return found.topology

    async def compare_and_set(self, topology: Topology) -> None:
        """As `TopologyStore.compare_and_set`; returns when a majority of etcd's members has it on disk.

        Raises:
            SettingError: etcd refuses the user.
        """
        raw, change = encode(topology), secrets.token_bytes(16)
        deadline = time.monotonic() + CHANGE_SECONDS
        pauses = _pauses()
        unsure = False
        while True:
            try:
                found = await self._find()
            except UnavailableError as error:
                if not unsure:
                    raise
                await self._wait(topology, deadline, next(pauses), error)
                continue
            if found.change == change:
                return
            if unsure and found.topology is not None and found.topology.epoch > topology.epoch:
                raise self._unknown(topology, "others have changed it since")
            check_succession(found.topology, topology, self._where)
            try:
                if await self._replace(found, raw, change):
                    return
            except UnavailableError as error:
                unsure = True
                await self._wait(topology, deadline, next(pauses), error)

    async def watch(self) -> AsyncGenerator[Topology, None]:
        """As `TopologyStore.watch`.

        Raises:
            SettingError: etcd refuses the user.
        """
        epoch = -1
        pauses = _pauses()
        while not self._client.closed.is_set():
            began = time.monotonic()
            try:
                found = await self._find()
                if found.topology is not None and found.topology.epoch > epoch:
                    epoch = found.topology.epoch
                    yield found.topology
                async with aclosing(self._client.changes(self._key, found.revision + 1)) as changes:
                    async for raw in changes:
                        topology = decode(raw, self._where)
                        if topology.epoch > epoch:
                            epoch = topology.epoch
                            yield topology
            except UnavailableError:
                if time.monotonic() - began > _PAUSE_SECONDS[1]:
                    pauses = _pauses()
                await self._client.pause(next(pauses))

    def lead(self, name: str) -> AbstractAsyncContextManager[Leadership]:
        """As `TopologyStore.lead`."""
        return self._presence.lead(name)

    def announce(self, name: str, text: str) -> AbstractAsyncContextManager[None]:
        """As `TopologyStore.announce`."""
        return self._presence.announce(name, text)

    async def alive(self) -> Mapping[str, str]:
        """As `TopologyStore.alive`."""
        return await self._presence.alive()

    async def close(self) -> None:
        """Ends all watches, and closes the connections."""
        await self._client.close()

    # --- Steps --------------------------------------------------------------------------------------------------------

    async def _find(self) -> _Found:
        reads = [rpc.RequestOp(request_range=rpc.RangeRequest(key=key)) for key in (self._key, self._change_key)]
        answer = await self._client.call("KV", "Txn", rpc.TxnRequest(success=reads))
        topologies, changes = (list(each.response_range.kvs) for each in answer.responses)
        return _Found(
            topology=decode(topologies[0].value, self._where) if topologies else None,
            topology_revision=topologies[0].mod_revision if topologies else 0,
            change=changes[0].value if changes else b"",
            revision=answer.header.revision,
        )

    async def _replace(self, found: _Found, raw: bytes, change: bytes) -> bool:
        """Puts a topology in the place of the one found; whether that was still there.

        Raises:
            UnavailableError: nobody knows.
        """
        # A key that is not there is of revision 0.
        unchanged = rpc.Compare(
            key=self._key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=found.topology_revision
        )
        puts = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))
            for key, value in ((self._key, raw), (self._change_key, change))
        ]
        request = rpc.TxnRequest(compare=[unchanged], success=puts)
        return bool((await self._client.call("KV", "Txn", request, failover=False)).succeeded)

    async def _wait(self, topology: Topology, deadline: float, seconds: float, failure: UnavailableError) -> None:
        """Waits before a change is looked for once more; not for ever."""
        if time.monotonic() > deadline:
            raise self._unknown(topology, str(failure)) from failure
        await self._client.pause(seconds)

    def _unknown(self, topology: Topology, reason: str) -> UnavailableError:
        return UnavailableError(
            f"whether epoch {topology.epoch} has replaced {topology.epoch - 1} at {self._where} is unknown ({reason}):"
            " read it and decide again"
        )


def _pauses() -> Iterator[float]:
    """How long to wait from try to try."""
    pause, pause_max = _PAUSE_SECONDS
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(pause_max, 2 * pause)
