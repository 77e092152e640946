"""docs/api.md against the code: every reason a client can meet is explained, with the status it comes with."""

from __future__ import annotations

import re
from pathlib import Path

from topk_grpc.config import GatewaySettings
from topk_grpc.gateway.rejects import SHARD_REASONS, reject_messages
from topk_grpc.kernels.wire import REASONS
from topk_grpc.pb.topk.v1 import shard_service_pb2, topk_service_pb2
from topk_grpc.rpc.status import TABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text()


def table(name: str) -> list[list[str]]:
    """The rows of the table between two marks, without its head."""
    text = PAGE.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_every_reason_of_a_reject_is_explained() -> None:
    documented = [row[0].strip("`") for row in table("rejects")]
    known = {reason for reason in REASONS if reason} | set(SHARD_REASONS.values())
    assert sorted(documented) == sorted(known)
    assert known == set(reject_messages(GatewaySettings(topology="file:unused")))
    assert set(SHARD_REASONS) == set(shard_service_pb2.RejectReason.values()) - {0}


def test_protos_name_the_same_rejects() -> None:
    proto = (ROOT / "protos/topk/v1/play.proto").read_text()
    comment = re.search(r"// A word for programs: (.*?)\.\n", proto, re.DOTALL)
    assert comment is not None
    assert set(re.findall(r"[A-Z_0-9]{4,}", comment[1])) == {row[0].strip("`") for row in table("rejects")}


def test_every_status_is_explained() -> None:
    documented = {reason.strip("`"): (status, wait) for reason, status, wait, _ in table("reasons")}
    known = {
        row.reason: (row.code.name, "" if row.retry_after_ms is None else f"{row.retry_after_ms} ms")
        for row in TABLE.values()
    }
    assert documented == known


def test_every_method_is_named() -> None:
    methods = topk_service_pb2.DESCRIPTOR.services_by_name["TopKService"].methods_by_name
    assert set(re.findall(r"^\| `(\w+)` \| ", PAGE.partition("\n## ")[0], flags=re.MULTILINE)) == set(methods)
