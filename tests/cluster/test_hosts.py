"""A cluster on three hosts with addresses and names of their own, one of which is cut off, and two from each other.

    alpha   etcd, a controller, a gateway
    beta    shard-0, another gateway
    gamma   shard-1

Answers are exact, or say what is missing; and when the network is whole again, so is the cluster, without anybody's
help. A host that gets another address keeps its name, and its shard its slots. The hosts are network namespaces
(hosts.py); where none can be made these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.hosts import Network, why_not
from tests.cluster.processes import Server, environment, ranked, wait_for
from tests.oracle import slot_of
from tests.topology.etcd_server import EtcdServer, needs_etcd

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_etcd, pytest.mark.timeout(300)]

ROOT: Final = Path(__file__).parents[2]
GATEWAYS: Final = ("alpha:50050", "beta:50050")
SLOTS: Final = 64
HEAL_SECONDS: Final = 90.0
"""A connection that died without a word is found out within 25 s, on a machine that is not busy."""
SONGS_MIN: Final = 10
"""Of so many songs some are each shard's, as good as surely."""

SETTINGS: Final = {"TOPK_PLAINTEXT": "true", "TOPK_QUERY_SECONDS": "3"}
"""The network between the hosts is theirs alone."""


@dataclass
class Hosts:
    """The cluster.

    Attributes:
        played: what was acknowledged so far, by song.
    """

    root: Path
    network: Network
    servers: dict[str, Server] = field(default_factory=dict)
    played: Counter[str] = field(default_factory=Counter)
    etcd: EtcdServer | None = None

    def start(self) -> None:
        network = self.network
        etcd = EtcdServer(self.root / "etcd", host=network.addresses["alpha"], within=network.within("alpha"))
        self.etcd = etcd
        etcd.start()
        self.run("alpha", "controller", "controller", "--create-shards", "2", "--slots", str(SLOTS)).wait_ready()
        for host, gateway in (("alpha", "gateway-0"), ("beta", "gateway-1")):
            self.run(host, gateway, "gateway", "--listen", f"{network.addresses[host]}:50050")
        for host, shard in (("beta", "shard-0"), ("gamma", "shard-1")):
            self.run_shard(host, shard)
        for server in self.servers.values():
            server.wait_ready()

    def run(self, host: str, name: str, *arguments: str) -> Server:
        assert self.etcd is not None
        command = [*self.network.within(host), sys.executable, "-m", "topk_grpc"]
        server = Server([*arguments, "--topology", self.etcd.url()], self.root / name, SETTINGS, command)
        self.servers[name] = server
        return server

    def run_shard(self, host: str, name: str) -> Server:
        """A shard that listens at its host's address, and is known by its host's name."""
        return self.run(
            *(host, name, "shard", "--shard-id", name, "--data-dir", str(self.root / name), "--join"),
            *("--listen", f"{self.network.addresses[host]}:7000", "--advertise", f"{host}:7000"),
        )

    def close(self) -> None:
        for server in self.servers.values():
            server.kill()
        if self.etcd is not None:
            self.etcd.kill()

    # --- Those who send and ask ---------------------------------------------------------------------------------------

    @contextmanager
    def playing(self, host: str, gateways: str = ",".join(GATEWAYS)) -> Iterator[None]:
        """A producer on a host; in the end everything that it has played is acknowledged."""
        command = [*self.network.within(host), sys.executable, "-m", "tests.cluster.player", gateways, str(id(self))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as player:
            try:
                yield
                told, _ = player.communicate("", timeout=HEAL_SECONDS)
                assert player.returncode == 0
                self.played.update(json.loads(told))
            finally:
                player.kill()

    def topk(self, host: str, *arguments: str) -> tuple[dict[str, Any], str]:
        """What a command on a host prints, and what it says where it fails."""
        command = [*self.network.within(host), sys.executable, "-m", "topk_grpc", *arguments, "--json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment())
        return json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr

    def top(self, host: str, gateway: str, *options: str) -> tuple[dict[str, Any], str]:
        """All songs, as a gateway answers somebody on a host."""
        return self.topk(host, "top", "--window", "global", "-k", "1000", "--gateway", gateway, *options)

    def slots(self) -> dict[str, int]:
        """How many each shard owns."""
        status, problem = self.topk("alpha", "cluster", "status", "--gateway", GATEWAYS[0])
        assert status, problem
        return {shard["shard_id"]: shard["slots"] for shard in status["shards"]}

    def check(self) -> None:
        """Every count from both gateways, as soon as they can say."""
        for host, gateway in (("alpha", GATEWAYS[0]), ("beta", GATEWAYS[1]), ("gamma", GATEWAYS[0])):
            answer = wait_for(partial_of(self.top, host, gateway), HEAL_SECONDS, f"{gateway} answers {host}")
            assert answer["certificate"]["complete"]
            found = [(entry["rank"], entry["song_id"], entry["count"]) for entry in answer["entries"]]
            assert found == ranked(self.played), f"{gateway}, asked on {host}"

    def check_partial(self, answer: dict[str, Any], missing: str, played: Counter[str]) -> None:
        """An answer names who is missing, and has every play of all others."""
        certificate = answer["certificate"]
        assert (certificate["complete"], certificate["missing_shards"]) == (False, [missing])
        found = {entry["song_id"]: entry["count"] for entry in answer["entries"]}
        assert found == {song: count for song, count in played.items() if song in found}
        assert certificate["total_plays"] == sum(found.values())
        slots = {slot_of(song, SLOTS) for song in found}
        assert slots.isdisjoint(slot_of(song, SLOTS) for song in played.keys() - found.keys())


def partial_of(ask: Callable[..., tuple[dict[str, Any], str]], *arguments: str) -> Callable[[], dict[str, Any]]:
    """Only the answer; none where there was an error."""
    return lambda: ask(*arguments)[0]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Network(["alpha", "beta", "gamma"]) as network:
        made = Hosts(tmp_path_factory.mktemp("hosts"), network)
        try:
            made.start()
            yield made
        finally:
            made.close()


def test_a_cluster_across_hosts_is_reached_by_its_names(hosts: Hosts) -> None:
    assert hosts.slots() == {"shard-0": SLOTS // 2, "shard-1": SLOTS // 2}
    with hosts.playing("gamma"):
        time.sleep(1)
    hosts.check()


def test_a_host_that_is_cut_off_is_named_and_comes_back_by_itself(hosts: Hosts) -> None:
    while len(hosts.played) < SONGS_MIN:
        with hosts.playing("alpha"):
            time.sleep(1)
    hosts.check()
    with hosts.playing("alpha"):
        hosts.network.cut_off("gamma")
        try:
            before = Counter(hosts.played)
            answer = wait_for(
                partial_of(hosts.top, "alpha", GATEWAYS[0], "--allow-partial"), HEAL_SECONDS, "a partial answer"
            )
            assert answer["certificate"]["missing_shards"] == ["shard-1"]
            found = {entry["song_id"]: entry["count"] for entry in answer["entries"]}
            here = {song for song in before if song in found}
            assert here and all(found[song] >= before[song] for song in here)
            refused = hosts.top("beta", GATEWAYS[1])[1]
            assert "shard-1 does not answer" in refused
            assert refused.count("\n") == 1
        finally:
            hosts.network.cut_off("gamma", cut=False)
    hosts.check()
    assert hosts.slots() == {"shard-0": SLOTS // 2, "shard-1": SLOTS // 2}


def test_two_hosts_that_do_not_reach_each_other_hold_up_only_what_is_between_them(hosts: Hosts) -> None:
    """The gateway beside shard-0 does not reach shard-1, and neither does shard-0, which is to give its slots away."""
    hosts.check()
    hosts.network.part("beta", "gamma")
    try:
        answer = wait_for(
            partial_of(hosts.top, "beta", GATEWAYS[1], "--allow-partial"), HEAL_SECONDS, "a partial answer"
        )
        hosts.check_partial(answer, "shard-1", hosts.played)
        whole = wait_for(partial_of(hosts.top, "alpha", GATEWAYS[0]), HEAL_SECONDS, "the gateway on alpha answers")
        assert whole["certificate"]["complete"]
        with hosts.playing("alpha", GATEWAYS[0]):
            drains, problem = hosts.topk("alpha", "cluster", "drain", "shard-0", "--no-wait", "--gateway", GATEWAYS[0])
            assert drains, problem
            controller = hosts.servers["controller"]
            wait_for(lambda: controller.event("migration_aborted"), HEAL_SECONDS, "a move between them fails")
            assert hosts.slots() == {"shard-0": SLOTS // 2, "shard-1": SLOTS // 2}
        answer = wait_for(partial_of(hosts.top, "alpha", GATEWAYS[0]), HEAL_SECONDS, "the gateway on alpha answers")
        assert [(one["rank"], one["song_id"], one["count"]) for one in answer["entries"]] == ranked(hosts.played)
    finally:
        hosts.network.part("beta", "gamma", cut=False)
    wait_for(lambda: hosts.slots() == {"shard-0": 0, "shard-1": SLOTS}, HEAL_SECONDS, "the slots have moved")
    hosts.check()
    again, problem = hosts.topk("alpha", "cluster", "add", "shard-0", "--gateway", GATEWAYS[0])
    assert again, problem
    assert hosts.slots() == {"shard-0": SLOTS // 2, "shard-1": SLOTS // 2}
    hosts.check()


def test_a_host_with_another_address_keeps_its_name_and_its_shard_its_slots(hosts: Hosts) -> None:
    hosts.check()
    with hosts.playing("alpha"):
        hosts.servers["shard-1"].kill()
        hosts.network.move("gamma", "10.77.0.33")
        hosts.run_shard("gamma", "shard-1").wait_ready()
    hosts.check()
    assert hosts.slots() == {"shard-0": SLOTS // 2, "shard-1": SLOTS // 2}
    with hosts.playing("beta"):
        hosts.servers["shard-1"].stop()
        elsewhere = hosts.run(
            *("gamma", "shard-1", "shard", "--shard-id", "shard-1", "--data-dir", str(hosts.root / "shard-1")),
            *("--listen", "10.77.0.33:7001"),  # at another port, and by its address
        )
        elsewhere.wait_ready()
    hosts.check()


def test_all_traffic_is_between_the_hosts(hosts: Hosts) -> None:
    """Every process is in a namespace of the test's own."""
    for name, server in hosts.servers.items():
        own = Path(f"/proc/{server.pid}/ns/net").readlink()
        assert own != Path("/proc/self/ns/net").readlink(), name
