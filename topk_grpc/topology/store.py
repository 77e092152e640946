"""The port to a topology store: what every kind of store promises.

Each change replaces the whole topology and raises the epoch by one. Two writers that read the same epoch cannot both
succeed. A change that failed in any way but a conflict may have happened all the same: read again and look.

Beside the topology a store knows who leads and who lives. Neither decides anything about slots: a leader that was
deposed without knowing it changes nothing, as its change would replace an epoch that is not there any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from topk_grpc.config import StoreSettings
from topk_grpc.errors import TopologyConflictError, TopologyError
from topk_grpc.model import Topology


@dataclass(frozen=True, slots=True)
class Leadership:
    """The time for which this process is the leader.

    Attributes:
        lost: set when it is not any more, or cannot be sure to be.
    """

    lost: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """What a store that is a server asks for. Empty: it does not.

    Attributes:
        ca: a PEM file with the CA of the store's certificates; with it, or a certificate, TLS is spoken.
        cert: a PEM file with the certificate to show.
        key: a PEM file with its private key.
        user: the name to log in with.
        password_file: a file whose first line is the password.
        plaintext: allow a store on another machine without TLS.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""
    plaintext: bool = False

    @classmethod
    def of(cls, settings: StoreSettings) -> StoreAccess:
        """What settings say."""
        return cls(
            ca=settings.etcd_ca,
            cert=settings.etcd_cert,
            key=settings.etcd_key,
            user=settings.etcd_user,
            password_file=settings.etcd_password_file,
            plaintext=settings.plaintext,
        )


class TopologyStore(Protocol):
    """One cluster's topology."""

    async def read(self) -> Topology:
        """The present topology, no older than the call.

        Raises:
            TopologyError: there is none yet.
            CorruptError: what is kept there is damaged.
            VersionError: a newer release wrote it.
            UnavailableError: the store does not answer.
        """
        ...

    async def compare_and_set(self, topology: Topology) -> None:
        """Replaces the topology of epoch `topology.epoch - 1`; returns when the new one is durable.

        The first topology has epoch 1 (0 will do) and is taken only while there is none.

        Raises:
            TopologyConflictError: another one is there; read it and decide again.
            InvalidArgumentError: the new one contradicts itself.
            UnavailableError: the store does not answer. Whether it has taken the new one is unknown.
        """
        ...

    def watch(self) -> AsyncGenerator[Topology, None]:
        """The present topology, waiting for the first if there is none, then later ones until the store is closed.

        The newest always arrives, also after the store was away; those that are replaced at once may be left out.

        Raises:
            CorruptError: what is kept there is damaged.
            VersionError: a newer release wrote it.
        """
        ...

    def lead(self, name: str) -> AbstractAsyncContextManager[Leadership]:
        """Waits until this process is the one leader of that name, also while the store is away.

        It leads until the context is left or `lost` is set. When its process dies another one follows within seconds.

        Args:
            name: of the office.
        """
        ...

    def announce(self, name: str, text: str) -> AbstractAsyncContextManager[None]:
        """Says while the context lasts that a process of that name lives; waits for the store to have taken it.

        Of several of one name the latest is seen. It ends by itself within seconds of the process's death.

        Args:
            name: of the process.
            text: what the others may want to know, as its address.
        """
        ...

    async def alive(self) -> Mapping[str, str]:
        """The text of each name that is announced now.

        Raises:
            UnavailableError: the store does not answer.
        """
        ...

    async def close(self) -> None:
        """Ends all watches."""
        ...


def check_succession(present: Topology | None, topology: Topology, where: str) -> None:
    """Refuses a topology that may not replace the present one.

    Args:
        present: what is there; None: nothing.
        topology: what is to replace it.
        where: the file or key, for messages.

    Raises:
        TopologyConflictError: it is of another cluster, or not of the next epoch.
    """
    if present is None:
        if topology.epoch <= 1:
            return
        raise TopologyConflictError(
            f"epoch {topology.epoch} was to replace {topology.epoch - 1} at {where}, but there is none"
        )
    if present.cluster_id != topology.cluster_id:
        raise TopologyConflictError(
            f"{where} keeps the topology of cluster {present.cluster_id}, not of {topology.cluster_id}: "
            "give each cluster a place of its own"
        )
    if present.epoch != topology.epoch - 1:
        raise TopologyConflictError(
            f"epoch {topology.epoch} was to replace {topology.epoch - 1} at {where}, but {present.epoch} is "
            "there: read it and decide again"
        )


def open_store(url: str, access: StoreAccess | None = None) -> TopologyStore:
    """Opens the store that `--topology` names.

    Args:
        url: `file:PATH`, for processes of one machine (the directory of PATH has to exist, the file need not), or
            `etcd://HOST:PORT[,HOST:PORT…]/PREFIX`, which belongs to the event loop that runs.
        access: what a store that is a server asks for.

    Raises:
        TopologyError: no store of this release.
        SettingError: what `access` says cannot be used.
    """
    from topk_grpc.topology.file import FileTopologyStore  # the stores know this port

    scheme, _, rest = url.partition(":")
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if scheme == "file" and path and not path.startswith("//"):
        return FileTopologyStore(Path(path))
    if url.startswith("etcd://"):
        return _open_etcd(url, access or StoreAccess())
    raise TopologyError(
        f"--topology is {url!r}, which is no store that this release knows: write file:PATH or"
        " etcd://HOST:PORT[,HOST:PORT…]/PREFIX (environment: TOPK_TOPOLOGY)"
    )


def _open_etcd(url: str, access: StoreAccess) -> TopologyStore:
    try:
        from topk_grpc.topology.etcd import EtcdTopologyStore
    except ModuleNotFoundError as error:
        if error.name != "aetcd":
            raise
        raise TopologyError(
            f"--topology is {url!r}, and the package aetcd is missing: pip install 'topk-grpc[etcd]'"
        ) from error
    return EtcdTopologyStore(url, access)
