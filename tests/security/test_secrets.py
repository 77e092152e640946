"""Tokens and the cluster's secret are seen nowhere but where they are kept."""

from __future__ import annotations

import json
import stat
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.cluster.processes import GLOBAL, run_topk
from tests.security.secured import TOKENS, Secured, bearer
from topk_grpc import TopKClient
from topk_grpc.cli.reach import Reach
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import Play, PlayBatch
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.topology.codec import decode

MISTYPED = "topk_mistyped-token-of-somebody"


def use_everything(secured: Secured) -> list[str]:
    """Calls of all kinds, good and bad; what came back, as text."""
    seen = []
    wrong = (("authorization", f"Bearer {MISTYPED}"),)
    batch = PlayBatch(producer_id="s", sequence=1, plays=[Play(song_id="a", played_at_ms=1)])
    with secured.stub() as stub:
        for metadata in (*map(bearer, TOKENS), wrong):
            for method, request in (
                (stub.GetTopK, pb.GetTopKRequest(window=GLOBAL, k=3)),
                (stub.DescribeCluster, pb.DescribeClusterRequest()),
                (stub.RecordPlays, pb.RecordPlaysRequest(batch=batch)),
            ):
                try:
                    seen.append(str(method(request, metadata=metadata, timeout=20)))
                except grpc.RpcError as error:
                    seen.append(f"{error} {error.trailing_metadata()}")
    topology = secured.topology()
    with secured.channel(secured.own_ca.issue("member"), address=topology["shards"][0]["address"]) as channel:
        for secret in (topology["secret"], topology["secret"][:-1]):
            with suppress(grpc.RpcError):
                answer = ShardServiceStub(channel).DescribeShard(
                    shard_pb.DescribeShardRequest(), metadata=(("topk-cluster-secret", secret),), timeout=20
                )
                seen.append(str(answer))
    return seen


@pytest.mark.cluster
def test_no_secret_is_logged_answered_counted_or_listed(secured: Secured, tmp_path: Path) -> None:
    """With debug logs on, and after calls that failed for what they showed."""
    seen = use_everything(secured)
    token_file = tmp_path / "token"
    token_file.write_text(MISTYPED)
    cli = run_topk(
        *(
            "charts",
            "--gateway",
            secured.address,
            "--token-file",
            str(token_file),
            "--tls-ca",
            str(secured.own_ca.path),
        ),
        *("--tls-cert", str(secured.client_pair.cert), "--tls-key", str(secured.client_pair.key)),
    )
    assert cli.returncode == 1
    seen += [cli.stdout, cli.stderr, secured.server.stderr, secured.server.out.read_text()]
    for number in range(4):
        with urllib.request.urlopen(f"http://127.0.0.1:{secured.metrics_port + number}/metrics", timeout=10) as answer:
            seen.append(answer.read().decode())
    processes = [*secured.pids().values(), secured.server.pid]
    assert len(processes) == 5
    seen += [(Path("/proc") / str(pid) / "cmdline").read_bytes().decode() for pid in processes]

    secret = str(secured.topology()["secret"])
    assert len(secret) == 64
    everything = "\n".join(seen)
    assert '"level": "debug"' in everything  # so that there was something to find
    for hidden in (secret, MISTYPED, *(token for token, _, _ in TOKENS.values())):
        assert hidden not in everything


@pytest.mark.cluster
def test_the_topology_is_for_its_owner_alone(secured: Secured) -> None:
    assert stat.S_IMODE((secured.data_dir / "topology.json").stat().st_mode) == 0o600


def test_what_holds_a_secret_does_not_show_it() -> None:
    topology = {
        **{"format": 2, "cluster_id": "c", "epoch": 1, "secret": "not-to-be-shown", "settings": {"slots": 1}},
        **{"shards": [{"shard_id": "s"}], "owners": [0]},
    }
    shown = [
        repr(decode(json.dumps(topology).encode(), "here")),
        repr(TopKClient("127.0.0.1:1", token="not-to-be-shown")),
        repr(Reach("127.0.0.1:1", {"token": "not-to-be-shown"})),
    ]
    assert all("not-to-be-shown" not in text for text in shown)


def test_a_new_token_is_printed_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    make = ("token", "new", "--role", "ingest", "--append-to", str(tokens))
    first = run_topk(
        *make, "--name", "one", "--role", "query", "--expires", "2030-01-31", "--plays-per-second", "50000"
    )
    second = run_topk(*make, "--name", "two")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("topk_")
    assert first.stdout != second.stdout
    text = tokens.read_text()
    assert first.stdout.strip() not in text
    assert 'roles = ["ingest", "query"]\nexpires = 2030-01-31T00:00:00Z\nplays_per_second = 50000\n' in text
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    twice = run_topk(*make, "--name", "two")
    assert twice.returncode == 1
    assert "twice" in twice.stderr
    assert tokens.read_text() == text
