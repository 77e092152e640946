"""A real Prometheus scrapes a real cluster: every panel of the dashboard has data, and every alert can be evaluated."""

from __future__ import annotations

import json
import math
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from tests.cluster.processes import free_port, wait_for
from tests.cluster.scraping import GATEWAY, Scraped
from tests.deploy.dashboards import expressions
from tests.deploy.promql import DEPLOY, needs_prometheus
from topk_grpc.client import BlockingTopKClient
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240), needs_prometheus]

SECONDS = 90.0
SERVERS = 4
WITHOUT_DATA = {
    "Failed TLS handshakes": "the cluster of this test speaks plaintext; tests/security has those that fail",
}
SETTINGS = {
    "TOPK_SNAPSHOT_SECONDS": "1",
    "TOPK_STANDING_WINDOWS": "sliding:10s",
    "TOPK_PRODUCER_PLAYS_PER_SECOND": "1000",
    "TOPK_RATE_BURST_SECONDS": "0.1",
}
WINDOWS = ("global", "tumbling:1h", "sliding:10s", "session:5m", "range:2020-01-01..2020-01-02")


class Prometheus:
    """A server on the loopback interface, with the alerts of deploy/ for rules."""

    def __init__(self, root: Path, targets: list[str]) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus/alerts.yaml")]
        config["scrape_configs"][0]["static_configs"] = [{"labels": {"cluster": "test"}, "targets": targets}]
        path = root / "prometheus.json"
        path.write_text(json.dumps(config))
        self._address = f"127.0.0.1:{free_port()}"
        self.log = root / "prometheus.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("prometheus", f"--config.file={path}", f"--storage.tsdb.path={root / 'tsdb'}"),
                    f"--web.listen-address={self._address}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{self._address}/api/v1/{path}?{query}", timeout=20) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        return told["data"]

    def values(self, expression: str) -> list[float]:
        """The values of an expression now, those aside that are no numbers."""
        samples = self.get("query", query=expression)["result"]
        return [value for sample in samples if not math.isnan(value := float(sample["value"][1]))]

    def ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        with suppress(OSError):
            return bool(self.get("status/buildinfo"))
        return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def prometheus(root: Path, targets: list[str]) -> Iterator[Prometheus]:
    server = Prometheus(root, targets)
    try:
        wait_for(server.ready, SECONDS, "Prometheus answers")
        yield server
    finally:
        server.stop()


def use(client: BlockingTopKClient) -> None:
    """A little of everything."""
    now = time.time_ns() // 1_000_000
    for number in range(300):
        client.record(f"song {number % 40}", now, charts=["de"])
    client.record("late", now - 86_400_000)
    client.record("in the future", now + 86_400_000)
    with suppress(Exception):  # the play that is rejected
        client.flush()
    for window in WINDOWS:
        client.top_k(window, k=5)
    client.songs(["song 1"])
    client.charts()


def call_as_a_stranger(address: str) -> None:
    """Makes a call to a shard without the cluster's secret."""
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        ShardServiceStub(channel).DescribeShard(shard_pb.DescribeShardRequest(), timeout=20)


def test_every_panel_has_data_and_every_alert_can_be_evaluated(tmp_path: Path) -> None:
    with Scraped(tmp_path, settings=SETTINGS) as scraped:
        targets = [f"127.0.0.1:{scraped.port + server}" for server in range(SERVERS)]
        shards = json.loads((tmp_path / "data/topology.json").read_text())["shards"]
        with prometheus(tmp_path, targets) as server, scraped.client() as client:
            wait_for(lambda: server.values("sum(up)") == [SERVERS], SECONDS, "all servers are scraped")
            wanted = [(title, text) for title, text in expressions("20s") if title not in WITHOUT_DATA]
            without = {text for _, text in wanted}

            def all_have_data() -> bool:
                use(client)
                call_as_a_stranger(shards[0]["address"])
                without.difference_update([text for text in without if server.values(text)])
                return not without

            try:
                wait_for(all_have_data, SECONDS, "every panel has data")
            except AssertionError as error:
                raise AssertionError(f"no data: {sorted(without)}") from error
            for title, text in expressions():
                assert title not in WITHOUT_DATA or not server.values(text), f"{title} has data after all"

            def evaluated() -> list[dict[str, Any]] | None:
                rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
                return rules if all(rule["health"] == "ok" for rule in rules) else None

            rules = wait_for(evaluated, SECONDS, "all alerts are evaluated")
            assert len(rules) == (DEPLOY / "prometheus/alerts.yaml").read_text().count("- alert: ")
            wrong = [rule["name"] for rule in rules if rule["state"] == "firing"]
            assert not set(wrong) - {"TopkPlaysRejected", "TopkLatePlays"}, wrong

        for index in range(SERVERS):
            checked = subprocess.run(
                ["promtool", "check", "metrics"],
                input=scraped.text(GATEWAY + index),
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
