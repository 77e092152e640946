"""Every test of this folder starts real server processes, or uses the ones that are shared here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.processes import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that nobody kills, for tests that keep to charts and songs of their own."""
    shared = Cluster(tmp_path_factory.mktemp("shared"))
    try:
        yield shared.start()
    finally:
        shared.close()
