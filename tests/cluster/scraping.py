"""What the servers of a cluster answer when they are scraped."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.processes import Cluster, free_ports
from topk_grpc.client import BlockingTopKClient

GATEWAY: Final = 0
CONTROLLER: Final = 1
SHARD: Final = 2
"""The first of the shards."""


class Scraped:
    """A cluster with metrics, its own for a test."""

    def __init__(self, root: Path, shards: int = 2, settings: Mapping[str, str] | None = None) -> None:
        self.port = free_ports(5)
        self.cluster = Cluster(root, shards, {"TOPK_METRICS_PORT": str(self.port), **(settings or {})})

    def __enter__(self) -> Scraped:
        try:
            self.cluster.start()
        except BaseException:
            self.cluster.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def text(self, server: int) -> str:
        """As it is answered."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + server}/metrics", timeout=20) as answer:
            return str(answer.read().decode())

    def names(self, server: int) -> set[str]:
        """The names that a server knows, as in the table."""
        families = list(text_string_to_metric_families(self.text(server)))
        return {f"{one.name}_total" if one.type == "counter" else one.name for one in families}

    def value(self, name: str, server: int = GATEWAY, **labels: str) -> float:
        """A sample, which has to be there."""
        for family in text_string_to_metric_families(self.text(server)):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return float(sample.value)
        raise AssertionError(f"server {server} has no {name} {labels}")

    def shards(self, name: str, **labels: str) -> list[float]:
        """The same of both shards."""
        return [self.value(name, SHARD, **labels), self.value(name, SHARD + 1, **labels)]

    def client(self, **options: Any) -> BlockingTopKClient:
        """A client of the gateway's."""
        return BlockingTopKClient(self.cluster.address, **options)
