"""Who does not belong is refused: with the right status, a line in the log, and a count."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.cluster.processes import GLOBAL, Server, reason_of, run_topk, wait_for
from tests.security.secured import Secured, bearer
from topk_grpc.gateway.access import ROLES_OF_METHODS
from topk_grpc.pb.topk.v1 import admin_service_pb2 as admin_pb
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.admin_service_pb2_grpc import ClusterAdminServiceStub
from topk_grpc.pb.topk.v1.play_pb2 import Play, PlayBatch
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.rpc.access import OPEN_METHODS

pytestmark = pytest.mark.cluster

TOP = pb.GetTopKRequest(window=GLOBAL, k=1)
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def batch(sequence: int = 1, producer_id: str = "p") -> PlayBatch:
    play = Play(song_id="song", played_at_ms=1_700_000_000_000)
    return PlayBatch(producer_id=producer_id, sequence=sequence, plays=[play])


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("metadata", "code", "reason", "token"),
    [
        ((), UNAUTHENTICATED, "TOKEN_MISSING", None),
        ((("authorization", "Basic dG9wazp0b3Br"),), UNAUTHENTICATED, "TOKEN_MISSING", None),
        ((("authorization", "Bearer topk_nobody-knows-it"),), UNAUTHENTICATED, "TOKEN_UNKNOWN", None),
        (bearer("bygone"), UNAUTHENTICATED, "TOKEN_EXPIRED", "bygone"),
        (bearer("ingester"), grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", "ingester"),
    ],
)
def test_a_query_without_the_right_token_is_refused_logged_and_counted(
    secured: Secured, metadata: Any, code: grpc.StatusCode, reason: str, token: str | None
) -> None:
    before = secured.refused(reason)
    with secured.stub() as stub:
        error: Any = refused(lambda: stub.GetTopK(TOP, timeout=20, metadata=metadata))

    assert (error.code(), reason_of(error)) == (code, reason)
    assert secured.refused(reason) == before + 1
    line = wait_for(
        lambda: [line for line in secured.events("caller_refused") if line["reason"] == reason], 10, "it is logged"
    )[-1]
    assert (line["method"], line.get("token")) == ("/topk.v1.TopKService/GetTopK", token)
    assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_streams_are_refused_as_calls_are(secured: Secured) -> None:
    with secured.stub() as stub:
        plays = refused(lambda: list(stub.StreamPlays(iter([]), timeout=20, metadata=bearer("asker"))))
        steps = refused(lambda: list(stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=1), timeout=20)))
    assert reason_of(plays) == "PERMISSION_DENIED"
    assert reason_of(steps) == "TOKEN_MISSING"


def test_each_role_may_do_what_it_is_for_and_nothing_else(secured: Secured) -> None:
    with secured.channel(secured.client_pair) as channel:
        stub = secured_stub(channel)
        admin = ClusterAdminServiceStub(channel)
        calls: dict[str, Callable[[Any], Any]] = {
            "ingest": lambda metadata: stub.RecordPlays(
                pb.RecordPlaysRequest(batch=batch(producer_id="roles")), timeout=20, metadata=metadata
            ),
            "query": lambda metadata: stub.GetTopK(TOP, timeout=20, metadata=metadata),
            "admin": lambda metadata: admin.DeleteSong(
                admin_pb.ClusterAdminServiceDeleteSongRequest(song_id="nobody"), timeout=20, metadata=metadata
            ),
        }
        may = {"ingester": {"ingest"}, "asker": {"query"}, "operator": {"query", "admin"}}
        for (name, roles), role in itertools.product(may.items(), calls):
            if role in roles:
                calls[role](bearer(name))
            else:
                error: Any = refused(lambda role=role, name=name: calls[role](bearer(name)))  # type: ignore[misc]
                assert reason_of(error) == "PERMISSION_DENIED", (name, role)
        for name in may:  # the limits of batches concern producers too
            assert stub.DescribeCluster(pb.DescribeClusterRequest(), timeout=20, metadata=bearer(name)).shards


def secured_stub(channel: grpc.Channel) -> Any:
    from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub

    return TopKServiceStub(channel)


def test_an_unknown_method_says_nothing_to_strangers(secured: Secured) -> None:
    with secured.channel(secured.client_pair) as channel:
        call: Any = channel.unary_unary("/topk.v1.TopKService/DropEverything")
        assert reason_of(refused(lambda: call(b"", timeout=20))) == "TOKEN_MISSING"
        known: Any = refused(lambda: call(b"", timeout=20, metadata=bearer("asker")))
        assert known.code() is grpc.StatusCode.UNIMPLEMENTED


def test_every_method_that_is_served_has_its_roles(secured: Secured) -> None:
    with secured.channel(secured.client_pair) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        assert reason_of(refused(lambda: list(reflection.ServerReflectionInfo(iter([listing]), timeout=20)))) == (
            "TOKEN_MISSING"
        )
        [answer] = reflection.ServerReflectionInfo(iter([listing]), timeout=20, metadata=bearer("asker"))
    served = {
        f"/{service.name}/{method.name}"
        for service in answer.list_services_response.service
        for method in Default().FindServiceByName(service.name).methods
    }
    assert served == set(ROLES_OF_METHODS) | OPEN_METHODS


def test_health_is_open(secured: Secured) -> None:
    with secured.channel(secured.client_pair) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("nobody", "no_client_certificate"),
        ("expired", "expired_certificate"),
        ("foreign", "foreign_certificate"),
        ("plaintext", "not_tls"),
    ],
)
def test_a_client_without_the_right_certificate_is_hung_up_on_logged_and_counted(
    secured: Secured, who: str, reason: str
) -> None:
    pairs = {
        "expired": lambda: secured.client_ca.issue("expired", days=-1),
        "foreign": lambda: secured.foreign_ca.issue("foreign"),
    }
    pair = pairs[who]() if who in pairs else None
    before = secured.handshakes_failed(reason)
    with secured.channel(pair, tls=who != "plaintext") as channel:
        error: Any = refused(
            lambda: secured_stub(channel).GetTopK(TOP, timeout=20, metadata=bearer("asker"), wait_for_ready=False)
        )

    assert error.code() is grpc.StatusCode.UNAVAILABLE  # gRPC's word for it: no call was ever made
    wait_for(lambda: secured.handshakes_failed(reason) > before, 10, "it is counted")
    wait_for(
        lambda: any(line["reason"] == reason for line in secured.events("tls_handshake_failed")), 10, "it is logged"
    )


def test_a_client_refuses_a_cluster_of_another_ca(secured: Secured) -> None:
    with secured.channel(secured.client_pair, ca=secured.foreign_ca) as channel:
        error: Any = refused(lambda: secured_stub(channel).GetTopK(TOP, timeout=20, metadata=bearer("asker")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in error.details()


def test_a_shard_refuses_whoever_is_not_its_cluster(secured: Secured) -> None:
    topology = secured.topology()
    shard = topology["shards"][0]
    port = secured.metrics_port + 2  # behind the controller's
    meant = (("topk-cluster-id", topology["cluster_id"]), ("topk-shard-id", shard["shard_id"]))
    describe = shard_pb.DescribeShardRequest()
    before = secured.refused("FOREIGN_CALLER", port=port)
    member = secured.own_ca.issue("member")

    with secured.channel(member, address=shard["address"]) as channel:
        stub = ShardServiceStub(channel)
        for metadata in (meant, (*meant, ("topk-cluster-secret", "0" * 64)), (*meant, *bearer("operator"))):
            error: Any = refused(lambda metadata=metadata: stub.DescribeShard(describe, timeout=20, metadata=metadata))  # type: ignore[misc]
            assert (error.code(), reason_of(error)) == (UNAUTHENTICATED, "FOREIGN_CALLER")
        stream: Any = refused(lambda: list(stub.Append(iter([]), timeout=20, metadata=meant)))
        assert reason_of(stream) == "FOREIGN_CALLER"
        right = (*meant, ("topk-cluster-secret", topology["secret"]))
        assert stub.DescribeShard(describe, timeout=20, metadata=right).coverage.slots
    assert secured.refused("FOREIGN_CALLER", port=port) == before + 4
    wait_for(
        lambda: any(line["reason"] == "FOREIGN_CALLER" for line in secured.events("caller_refused")), 10, "it is logged"
    )

    # A client's certificate is none of the cluster's, nor is the lack of one.
    for pair in (secured.client_pair, None):
        with secured.channel(pair, address=shard["address"]) as channel:
            error = refused(lambda: ShardServiceStub(channel).DescribeShard(describe, timeout=20, metadata=right))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
    for reason in ("foreign_certificate", "no_client_certificate"):
        wait_for(lambda reason=reason: secured.handshakes_failed(reason, port=port), 10, f"{reason} is counted")  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--data-dir", "{tmp}/data", "--host", "0.0.0.0"),
        ("gateway", "--topology", "file:{tmp}/t.json", "--listen", "0.0.0.0:0"),
        ("gateway", "--topology", "file:{tmp}/t.json", "--listen", "[::]:0"),
        (
            "shard",
            "--topology",
            "file:{tmp}/t.json",
            "--shard-id",
            "s",
            "--data-dir",
            "{tmp}/s",
            "--listen",
            "0.0.0.0:0",
        ),
    ],
)
def test_plaintext_for_other_machines_has_to_be_said(tmp_path: Any, arguments: tuple[str, ...]) -> None:
    command = [each.format(tmp=tmp_path) for each in arguments]
    done = run_topk(*command)
    assert done.returncode == 2
    assert "--plaintext" in done.stderr
    assert not (tmp_path / "data").exists()
    if command[0] != "up":  # with it, the next thing to be missed is the topology
        done = run_topk(*command, "--plaintext", "--topology-wait-seconds", "0")
        assert done.returncode == 1
        assert "no topology" in done.stderr


def test_a_gateway_that_asks_nobody_says_so(secured: Secured, tmp_path: Path) -> None:
    topology = f"file:{secured.data_dir / 'topology.json'}"
    arguments = ["gateway", "--topology", topology, "--listen", "0.0.0.0:0", "--plaintext"]
    gateway = Server(arguments, tmp_path / "open")
    try:
        gateway.wait_ready()
        for event in ("plaintext", "open_to_everyone"):
            wait_for(lambda event=event: gateway.event(event), 10, f"{event} is logged")  # type: ignore[misc]
    finally:
        gateway.stop()
    assert not secured.events("open_to_everyone")
