"""Shards join, drain and leave a cluster of real processes under load, some of which are killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import READY_SECONDS, Cluster, Server, is_alive, ranked, run_topk, top_k, wait_for
from topk_grpc.client import BlockingTopKClient
from topk_grpc.errors import UnavailableError
from topk_grpc.gateway.tokens import digest_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SONGS = 400
SLOTS = 1024


class Producer:
    """Plays songs through one client, as fast as it goes, and counts what it plays."""

    def __init__(self, address: str) -> None:
        self.counts: Counter[str] = Counter()
        self.ended = threading.Event()
        self._client = BlockingTopKClient(address, batch_plays=200, deadline_seconds=60)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        turn = 0
        while not self.ended.is_set():
            turn += 1
            song = f"song {turn * turn % SONGS}"
            self._client.record(song, int(time.time() * 1000))
            self.counts[song] += 1
            if turn % 200 == 0:
                time.sleep(0.005)

    def stop(self) -> None:
        """Everything that was played is acknowledged after that."""
        self.ended.set()
        self._thread.join(90)
        assert not self._thread.is_alive()
        until = time.monotonic() + 90
        while True:
            try:
                self._client.flush()
                break
            except UnavailableError:
                assert time.monotonic() < until
        self._client.close()


def is_gone(pid: int) -> bool:
    return not is_alive(pid)


@contextmanager
def playing(address: str) -> Iterator[Producer]:
    producer = Producer(address)
    try:
        yield producer
    finally:
        producer.stop()


@pytest.fixture
def elastic(tmp_path: Path) -> Iterator[Cluster]:
    """Two shards that nobody else uses."""
    cluster = Cluster(tmp_path)
    try:
        yield cluster.start()
    finally:
        cluster.close()


def topk(cluster: Cluster | str, *arguments: str, seconds: float = 90) -> Any:
    """Runs a command that has to work; what it prints with `--json`."""
    gateway = cluster if isinstance(cluster, str) else cluster.address
    done = run_topk(*arguments, "--json", "--gateway", gateway, seconds=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(cluster: Cluster, *arguments: str) -> str:
    """Runs a command that has to fail; the line that it says why with."""
    done = run_topk(*arguments, "--gateway", cluster.address)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr


def slots_of(cluster: Cluster | str) -> dict[str, int]:
    return {shard["shard_id"]: shard["slots"] for shard in topk(cluster, "cluster", "status")["shards"]}


def check(cluster: Cluster, producer: Producer) -> None:
    """Every play counts once, and the order is right to the end."""
    found = [(one.rank, one.song_id, one.count) for one in top_k(cluster.address).entries]
    assert found == ranked(producer.counts)


def test_shards_join_and_leave_under_load(elastic: Cluster) -> None:
    with playing(elastic.address) as producer:
        added = topk(elastic, "cluster", "add", "--shards", "2")
        assert added["shards"] == ["shard-2", "shard-3"]
        assert added["slots_moved"] >= SLOTS // 2  # a few of them twice, as the two do not start at one moment
        assert slots_of(elastic) == dict.fromkeys(["shard-0", "shard-1", "shard-2", "shard-3"], SLOTS // 4)
        drained = topk(elastic, "cluster", "drain", "shard-2", "shard-3")
        assert drained["slots_moved"] == SLOTS // 2
        status = topk(elastic, "cluster", "status")
        assert [shard["state"] for shard in status["shards"]] == ["active", "active", "drained", "drained"]
        assert (status["slots_left"], status["migrations"], status["paused"]) == (0, [], False)
        longest = max(added["longest_stall_ms"], drained["longest_stall_ms"])
        print(f"longest wait of a slot's plays: {longest} ms")
        assert longest > 0
        for name in ("shard-2", "shard-3"):
            pid = elastic.pid(name)
            topk(elastic, "cluster", "remove", name)
            wait_for(partial(is_gone, pid), READY_SECONDS, f"{name} is stopped")
        assert slots_of(elastic).keys() == {"shard-0", "shard-1"}
    check(elastic, producer)
    aside = elastic.data_dir / "removed.shards"
    wait_for(lambda: len(list(aside.glob("*"))) == 2, READY_SECONDS, "the directories are set aside")
    assert not (elastic.data_dir / "shard-2").exists()
    assert topk(elastic, "cluster", "add", "shard-2")["slots_moved"] > 0  # the name is free again
    check(elastic, producer)
    elastic.stop()
    elastic.start()
    elastic.wait_whole()
    check(elastic, producer)


def kill(cluster: Cluster, victim: str) -> None:
    """kill -9; returns when everything answers again."""
    cluster.kill(victim)
    if victim in {"supervisor", "everything"}:
        cluster.start()
    cluster.wait_whole()


@pytest.mark.timeout(300)
def test_a_shard_joins_whoever_is_killed_meanwhile(elastic: Cluster) -> None:
    with playing(elastic.address) as producer:
        topk(elastic, "cluster", "add", "--no-wait")
        wait_for(lambda: slots_of(elastic).get("shard-2"), READY_SECONDS, "the new shard has its first slots")
        for victim in ("controller", "shard-2", "shard-0", "gateway", "supervisor", "everything"):
            kill(elastic, victim)
        even = [SLOTS // 3, SLOTS // 3, SLOTS // 3 + 1]
        wait_for(lambda: sorted(slots_of(elastic).values()) == even, 90, "the shards have what they are to have")
    check(elastic, producer)


@pytest.mark.timeout(300)
def test_a_shard_drains_whoever_is_killed_meanwhile(elastic: Cluster) -> None:
    with playing(elastic.address) as producer:
        topk(elastic, "cluster", "drain", "shard-0", "--no-wait")
        wait_for(lambda: slots_of(elastic)["shard-0"] < SLOTS // 2, READY_SECONDS, "shard-0 drains")
        for victim in ("shard-0", "controller", "everything"):
            kill(elastic, victim)
        topk(elastic, "cluster", "drain", "shard-0")  # again does no harm, and waits
        topk(elastic, "cluster", "remove", "shard-0")
        wait_for(lambda: slots_of(elastic).keys() == {"shard-1"}, READY_SECONDS, "shard-0 is gone")
    check(elastic, producer)


def test_a_shard_that_hangs_holds_up_no_moves_of_others(elastic: Cluster) -> None:
    topk(elastic, "cluster", "add", "shard-2")
    pid = elastic.pid("shard-2")
    os.kill(pid, signal.SIGSTOP)
    try:
        topk(elastic, "cluster", "add", "shard-3", "--no-wait")
        wait_for(lambda: slots_of(elastic).get("shard-3", 0) > 0, 60, "shard-3 gets slots of the shards that answer")
        waits = run_topk("cluster", "add", "--gateway", elastic.address, "shard-3")
        assert "has a shard 'shard-3' already" in waits.stderr
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: set(slots_of(elastic).values()) == {SLOTS // 4}, 60, "everybody has a quarter")


def test_moves_are_paused_and_resumed(elastic: Cluster) -> None:
    topk(elastic, "cluster", "pause")
    topk(elastic, "cluster", "add", "--no-wait")
    wait_for(
        lambda: topk(elastic, "cluster", "status")["shards"][2]["state"] == "active", READY_SECONDS, "it has started"
    )
    plan = topk(elastic, "cluster", "rebalance", "--dry-run")
    assert (plan["slots"], plan["slots_min"]) == (SLOTS // 3, SLOTS // 3)
    assert {move["target"] for move in plan["moves"]} == {"shard-2"}
    topk(elastic, "cluster", "rebalance", "--no-wait")
    status = topk(elastic, "cluster", "status")
    assert (status["paused"], status["slots_left"], status["shards"][2]["slots"]) == (True, SLOTS // 3, 0)
    topk(elastic, "cluster", "resume")
    topk(elastic, "cluster", "rebalance")
    assert slots_of(elastic)["shard-2"] == SLOTS // 3


def test_mistakes_are_told_in_one_line(elastic: Cluster) -> None:
    assert "has no shard 'shard-7', only shard-0, shard-1" in refusal(elastic, "cluster", "drain", "shard-7")
    assert "has no shard 'shard-7'" in refusal(elastic, "cluster", "remove", "shard-7")
    assert "no other shard that has started is left" in refusal(elastic, "cluster", "drain", "shard-0", "shard-1")
    assert "owns 512 slots" in refusal(elastic, "cluster", "remove", "shard-0")
    assert "has a shard 'shard-1' already" in refusal(elastic, "cluster", "add", "shard-2", "shard-1")
    for name in ("../up", "-x", "a.b", "ä", "x" * 64):
        done = run_topk("cluster", "add", "--gateway", elastic.address, "--", name)
        assert "is no name for a shard" in done.stderr
    assert "for its 1024 slots" in refusal(elastic, "cluster", "add", *(f"s{number}" for number in range(1023)))
    both = run_topk("cluster", "add", "x", "--shards", "2", "--gateway", elastic.address)
    assert both.returncode == 2
    assert slots_of(elastic) == {"shard-0": 512, "shard-1": 512}
    elastic.stop()
    gone = refusal(elastic, "cluster", "drain", "shard-0")
    assert "Start a cluster" in gone


def test_only_who_administers_may_change_the_cluster(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    entries = [("asker", ["query"]), ("operator", ["query", "admin"])]
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{digest_of(name)}"\nroles = {json.dumps(roles)}\n'
            for name, roles in entries
        )
    )
    cluster = Cluster(tmp_path, settings={"TOPK_TOKENS_FILE": str(tokens)})
    try:
        cluster.start()
        changes: list[list[str]] = [["add"], ["drain", "shard-0"], ["remove", "shard-0"], ["rebalance"], ["pause"]]
        for change in [*changes, ["resume"]]:
            assert "asks for a token" in refusal(cluster, "cluster", *change)
            for name, _ in entries:
                (tmp_path / name).write_text(name)
            may_not = refusal(cluster, "cluster", *change, "--token-file", str(tmp_path / "asker"))
            assert "the token asker may not call" in may_not
        topk(cluster, "cluster", "pause", "--token-file", str(tmp_path / "operator"))
    finally:
        cluster.close()


# --- Roles by themselves ----------------------------------------------------------------------------------------------


class Roles:
    """Processes of single roles on one topology, in any order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.topology = f"file:{root / 'topology.json'}"
        self.servers: list[Server] = []

    def start(self, name: str, *arguments: str) -> Server:
        server = Server([*arguments, "--topology", self.topology], self.root / name)
        self.servers.append(server)
        return server

    def shard(self, name: str, *arguments: str) -> Server:
        return self.start(name, "shard", "--shard-id", name, "--data-dir", str(self.root / name), *arguments)

    def close(self) -> None:
        for server in self.servers:
            with suppress(ProcessLookupError):
                server.kill()


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    them = Roles(tmp_path)
    yield them
    them.close()


def test_roles_find_together_in_any_order_and_the_next_controller_takes_over(roles: Roles) -> None:
    shards = {name: roles.shard(name, "--join") for name in ("node-0", "node-1")}
    entrance = roles.start("gateway", "gateway", "--listen", "127.0.0.1:0")
    for server in (*shards.values(), entrance):
        wait_for(partial(server.event, "topology_awaited"), READY_SECONDS, "it waits for the topology")
    first = roles.start("c0", "controller", "--create-shards", "2", "--shard-prefix", "node-", "--slots", "128")
    first.wait_ready()
    created = first.event("topology_created")
    assert created is not None
    assert (created["shards"], created["slots"]) == (2, 128)
    for shard in shards.values():
        shard.wait_ready()
    wait_for(lambda: first.event("leading"), READY_SECONDS, "the first controller leads")
    second = roles.start("c1", "controller", "--create-shards", "2", "--move-share", "1")
    second.wait_ready()
    gateway = entrance.wait_ready()
    assert slots_of(gateway) == {"node-0": 64, "node-1": 64}

    joined = roles.shard("node-2", "--join")
    joined.wait_ready()
    wait_for(lambda: slots_of(gateway).get("node-2") == 42, 60, "the shard that has joined gets its share")
    assert second.event("leading") is None
    first.kill()
    wait_for(lambda: second.event("leading"), READY_SECONDS, "the second controller leads")
    assert topk(gateway, "cluster", "drain", "node-2")["slots_moved"] == 42
    wait_for(lambda: joined.event("drained"), READY_SECONDS, "the shard says that it is drained")
    topk(gateway, "cluster", "remove", "node-2")
    wait_for(lambda: joined.event("removed_from_cluster"), READY_SECONDS, "it says that it was removed")
    joined.stop()
    assert joined.process.returncode == 0

    refused = roles.shard("node-2")
    assert refused.wait_end() == 1
    assert "the topology knows no shard 'node-2'" in refused.stderr
    assert "--join" in refused.stderr
    roles.shard("node-2", "--join").wait_ready()  # its directory owns nothing: it may come back
    wait_for(lambda: slots_of(gateway).get("node-2") == 42, 60, "it gets its share again")
    second.stop()
    assert second.process.returncode == 0


def test_a_joining_shard_with_the_plays_of_another_is_refused(roles: Roles, tmp_path: Path) -> None:
    roles.start("c", "controller", "--create-shards", "1").wait_ready()
    owner = roles.shard("shard-0")
    owner.wait_ready()
    owner.stop()
    arguments = ["shard", "--shard-id", "shard-9", "--data-dir", str(tmp_path / "shard-0"), "--join"]
    foreign = roles.start("foreign", *arguments)
    assert foreign.wait_end() == 3
    assert "holds the plays of shard-0" in foreign.stderr


def test_a_shard_that_waits_for_a_topology_is_alive_and_stops_when_asked(roles: Roles) -> None:
    waiting = roles.shard("shard-0", "--join")
    wait_for(lambda: waiting.event("topology_awaited"), READY_SECONDS, "it waits")
    waiting.stop()
    assert waiting.process.returncode == 0
