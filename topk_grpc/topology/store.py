"""The port to a topology store: what every kind of store promises.

Each change replaces the whole topology and raises the epoch by one. Two writers that read the same epoch cannot both
succeed. A change that failed in any way but a conflict may have happened all the same: read again and look.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from topk_grpc.errors import TopologyError
from topk_grpc.model import Topology
from topk_grpc.topology.file import FileTopologyStore


class TopologyStore(Protocol):
    """One cluster's topology."""

    async def read(self) -> Topology:
        """The present topology.

        Raises:
            TopologyError: there is none yet.
            CorruptError: what is kept there is damaged.
            VersionError: a newer release wrote it.
        """
        ...

    async def compare_and_set(self, topology: Topology) -> None:
        """Replaces the topology of epoch `topology.epoch - 1`; returns when the new one is durable.

        The first topology has epoch 1 (0 will do) and is taken only while there is none.

        Raises:
            TopologyConflictError: another one is there; read it and decide again.
            InvalidArgumentError: the new one contradicts itself.
        """
        ...

    def watch(self) -> AsyncGenerator[Topology, None]:
        """The present topology, waiting for the first if there is none, then later ones until the store is closed.

        The newest always arrives; those that are replaced at once may be left out.

        Raises:
            CorruptError: what is kept there is damaged.
            VersionError: a newer release wrote it.
        """
        ...

    async def close(self) -> None:
        """Ends all watches."""
        ...


def open_store(url: str) -> TopologyStore:
    """Opens the store that `--topology` names.

    Args:
        url: `file:PATH`, for processes of one machine. The directory of PATH has to exist, the file need not.

    Raises:
        TopologyError: no store of this release.
    """
    scheme, colon, rest = url.partition(":")
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if scheme != "file" or not colon or not path or path.startswith("//"):
        raise TopologyError(
            f"--topology is {url!r}, which is no store that this release knows: write file:PATH "
            "(environment: TOPK_TOPOLOGY)"
        )
    return FileTopologyStore(Path(path))
