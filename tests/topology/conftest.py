"""Stores of every kind, each test with a cluster of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.topology.etcd_server import EtcdServer, needs_etcd
from topk_grpc.topology import TopologyStore, open_store


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One that nobody kills."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(params=["file", pytest.param("etcd", marks=needs_etcd)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where one cluster's topology is kept."""
    if request.param == "file":
        return f"file:{tmp_path / 'topology.json'}"
    server: EtcdServer = request.getfixturevalue("shared_etcd")
    return server.url(f"tests/{uuid.uuid4().hex}")


@pytest.fixture
async def any_store(url: str) -> AsyncIterator[TopologyStore]:
    store = open_store(url)
    yield store
    await store.close()
