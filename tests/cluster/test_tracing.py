"""Traces of a cluster, as a collector gets them: one for each query, through the gateway and all shards."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster.processes import GLOBAL, Cluster, free_port, run_topk, wait_for
from topk_grpc.errors import SettingError
from topk_grpc.pb.topk.v1 import play_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import tracing

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="OpenTelemetry is not installed"
)
services = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

_Servicer: Any = services.TraceServiceServicer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


class Collector(_Servicer):  # type: ignore[misc]
    """Keeps what it is sent.

    Attributes:
        spans: service, instance and span.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, Any]] = []

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            about = {one.key: one.value.string_value for one in of_resource.resource.attributes}
            for scope in of_resource.scope_spans:
                self.spans += [(about["service.name"], about["service.instance.id"], span) for span in scope.spans]
        return trace_service.ExportTraceServiceResponse()

    def named(self, service: str, method: str, kind: int) -> list[tuple[str, Any]]:
        """Instances and spans of a service's calls, made or served."""
        return [
            (instance, span)
            for each, instance, span in list(self.spans)
            if each == service and span.name.endswith(method) and span.kind == kind
        ]


SERVER, CLIENT = 2, 3


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    it, address = Collector(), f"127.0.0.1:{free_port()}"
    server = grpc.server(ThreadPoolExecutor(2))
    services.add_TraceServiceServicer_to_server(it, server)
    server.add_insecure_port(address)
    server.start()
    yield it, address
    server.stop(None)


@pytest.fixture
def cluster(collector: tuple[Collector, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector[1]}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    it = Cluster(tmp_path, 2, {"TOPK_TRACING": "true"})
    try:
        yield it.start()
    finally:
        it.close()


def test_a_query_is_one_trace_through_gateway_and_shards(cluster: Cluster, collector: tuple[Collector, str]) -> None:
    found, _ = collector
    batch = play_pb2.PlayBatch(producer_id="p", sequence=1)
    now_ms = time.time_ns() // 1_000_000
    for number in range(50):
        batch.plays.add(song_id=f"song-{number}", played_at_ms=now_ms)
    cluster.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=30)
    answer = cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=3), timeout=30)
    assert answer.certificate.total_plays == 50
    wait_for(lambda: len(found.named("topk-shard", "QueryTopK", SERVER)) == 2, 30, "both shards' spans have come")
    wait_for(lambda: found.named("topk-gateway", "GetTopK", SERVER), 30, "the gateway's span has come")

    [(_, query)] = found.named("topk-gateway", "TopKService/GetTopK", SERVER)
    asked = [span for _, span in found.named("topk-gateway", "QueryTopK", CLIENT)]
    served = dict(found.named("topk-shard", "QueryTopK", SERVER))
    assert sorted(served) == ["shard-0", "shard-1"]
    assert [span.parent_span_id for span in asked] == [query.span_id] * 2
    assert {span.parent_span_id for span in served.values()} == {span.span_id for span in asked}
    assert {span.trace_id for span in (*asked, *served.values())} == {query.trace_id}
    wait_for(lambda: found.named("topk-gateway", "RecordPlays", SERVER), 30, "the batch's span has come")
    assert not [span.name for _, _, span in found.spans if "Append" in span.name or "Health" in span.name]


def test_a_refused_call_has_its_status(cluster: Cluster, collector: tuple[Collector, str]) -> None:
    found, _ = collector
    with pytest.raises(grpc.RpcError) as refused:
        cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=20_000), timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [(_, span)] = wait_for(lambda: found.named("topk-gateway", "GetTopK", SERVER), 30, "the span has come")
    codes = [one.value.int_value for one in span.attributes if one.key == "rpc.grpc.status_code"]
    assert codes == [grpc.StatusCode.INVALID_ARGUMENT.value[0]]


def test_without_the_extra_a_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingError, match=r"topk-grpc\[tracing\]"):
        tracing.start("gateway", "")
    assert not tracing.server_interceptors()


def test_streams_of_plays_work_and_are_not_traced(
    cluster: Cluster, collector: tuple[Collector, str], tmp_path: Path
) -> None:
    found, _ = collector
    plays = tmp_path / "plays.csv"
    plays.write_text("at,song\n" + "".join(f"{1_700_000_000 + row},song {row % 7}\n" for row in range(1000)))
    done = run_topk("ingest", str(plays), "--song", "song", "--time", "at", "--gateway", cluster.address)
    assert done.returncode == 0, done.stderr
    answer = cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=10), timeout=30)
    assert answer.certificate.total_plays == 1000
    wait_for(lambda: found.named("topk-gateway", "GetTopK", SERVER), 30, "the query's span has come")
    assert not [span.name for _, _, span in found.spans if "StreamPlays" in span.name or "Append" in span.name]
