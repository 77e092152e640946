"""One cluster with everything switched on, for tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.security.secured import Secured


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    cluster = Secured(tmp_path_factory.mktemp("secured"))
    try:
        yield cluster
    finally:
        cluster.close()
