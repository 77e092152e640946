"""Data directories that releases have written are read by this one, and answer as they did; newer ones are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shard.cores import CLUSTER, settings_of
from topk_grpc._version import VERSION
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.errors import VersionError
from topk_grpc.model import Bounds
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.audit import audit_stopped
from topk_grpc.shard.core import ShardCore
from topk_grpc.storage.checksums import crc32c, decode_self_checked, encode_self_checked

SAMPLES = Path(__file__).parent / "samples"
VERSIONS = sorted(path.name for path in SAMPLES.iterdir() if (path / "expected.json").exists())


@pytest.fixture(params=VERSIONS)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLES / request.param, tmp_path / "sample"))


def check_answers(core: ShardCore, sample: Path) -> None:
    answers = json.loads((sample / "expected.json").read_text())["answers"]
    assert len(answers) > 10
    for told in answers:
        bounds = None if told["bounds_ms"] is None else Bounds(*told["bounds_ms"])
        scope = Scope(told["chart"], bounds, told["gap_ms"])
        ranked, totals = query.top_k(core.state, scope, 10_000)
        expected = [tuple(entry) for entry in told["entries"]]
        assert list(zip(ranked.song_ids, ranked.counts, strict=True)) == expected, scope
        assert totals.plays == sum(count for _, count in expected)


def test_the_release_under_way_has_a_sample() -> None:
    assert VERSION.partition("+")[0] in VERSIONS


def test_a_sample_answers_as_it_did_and_its_batches_are_duplicates(sample: Path) -> None:
    assert audit_stopped(sample / "shard-0").differences == []
    core = ShardCore(settings_of(sample / "shard-0"), CLUSTER)
    assert core.recover() == []
    check_answers(core, sample)
    now_ms = core.state.newest_event_ms
    requests = [bytes.fromhex(one) for one in json.loads((sample / "expected.json").read_text())["requests"]]
    assert len(requests) > 10
    for answer in core.commit(requests, now_ms):
        assert isinstance(answer, bytes)
        assert all(outcome.duplicate for outcome in pb.AppendResponse.FromString(answer).outcomes)
    check_answers(core, sample)
    core.close()
    again = ShardCore(settings_of(sample / "shard-0"), CLUSTER)  # as this release writes it
    assert again.recover() == []
    check_answers(again, sample)
    again.close()


def test_a_sample_without_its_newest_snapshot_answers_as_it_did(sample: Path) -> None:
    newest = max((sample / "shard-0/snapshots").iterdir())
    (newest / "manifest.json").write_bytes(b"{}")
    core = ShardCore(settings_of(sample / "shard-0"), CLUSTER)
    assert len(core.recover()) == 1
    check_answers(core, sample)
    core.close()


def newer_format(shard: Path) -> None:
    content = decode_self_checked((shard / "FORMAT").read_bytes())
    assert content is not None
    (shard / "FORMAT").write_bytes(encode_self_checked(content | {"format": 99}))


def newer_log(shard: Path) -> None:
    segment = max((shard / "log").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    data[36:40] = crc32c(bytes(data[:36])).to_bytes(4, "little")
    segment.write_bytes(data)


def newer_snapshot(shard: Path) -> None:
    change_manifest(shard, lambda content: content | {"format": 99})


def newer_state(shard: Path) -> None:
    change_manifest(shard, lambda content: content | {"meta": {**content["meta"], "state_format": 99}})


def change_manifest(shard: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    manifest = max((shard / "snapshots").iterdir()) / "manifest.json"
    content = decode_self_checked(manifest.read_bytes())
    assert content is not None
    manifest.write_bytes(encode_self_checked(change(content)))


@pytest.mark.parametrize("change", [newer_format, newer_log, newer_snapshot, newer_state])
def test_a_newer_format_is_refused_and_left_as_it_is(sample: Path, change: Callable[[Path], None]) -> None:
    shard = sample / "shard-0"
    change(shard)
    before = {path: path.read_bytes() for path in shard.rglob("*") if path.is_file()}
    with pytest.raises(VersionError, match=re.compile("release")):
        ShardCore(settings_of(shard), CLUSTER).recover()
    after = {path: path.read_bytes() for path in shard.rglob("*") if path.is_file() and path.name != "LOCK"}
    assert after == before
