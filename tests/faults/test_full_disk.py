"""A real disk without room: writes are refused, reads go on, and both are back when there is room again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.cluster.processes import entries_of, ranked, reason_of, top_k, wait_for
from tests.faults.cluster import Disk
from tests.faults.pair import Pair

pytestmark = pytest.mark.cluster


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk.make(tmp_path / "disk", 16 << 20)
    if not disk.mounted:
        pytest.skip(f"no small disk can be mounted here: {disk.why_not}")
    try:
        yield disk
    finally:
        disk.close()


@pytest.fixture
def pair(disk: Disk, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, {"TOPK_SEGMENT_BYTES": str(1 << 16)})
    try:
        yield pair
    finally:
        pair.close()


def send_until_refused(pair: Pair, first: int) -> tuple[int, grpc.RpcError]:
    """The sequence that had no room, and what was said of it."""
    for sequence in range(first, first + 20_000):
        try:
            pair.send(sequence)
        except grpc.RpcError as error:
            return sequence, error
    raise AssertionError("the disk is full, and everything was written")


def retry_info_of(error: grpc.RpcError) -> bool:
    status = rpc_status.from_call(error)
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


def counts(sequences: int) -> list[tuple[int, str, int]]:
    return ranked({f"song {sequence}": 1 for sequence in range(1, sequences + 1)} | {"all": sequences}, k=10)


def test_writes_are_refused_reads_go_on_and_service_resumes_when_there_is_room(disk: Disk, pair: Pair) -> None:
    pid = pair.shard.process.pid
    for sequence in range(1, 4):
        pair.send(sequence)
    disk.fill()
    refused, error = send_until_refused(pair, 4)
    for _ in range(3):
        assert isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(error) == "DISK_FULL"
        assert retry_info_of(error)  # the client knows that trying again helps
        assert entries_of(top_k(pair.address, k=10)) == counts(refused - 1)
        disk.fill()
        again, error = send_until_refused(pair, refused)
        assert again == refused

    disk.free()

    def sent() -> bool:
        with suppress(grpc.RpcError):
            return bool(pair.send(refused).accepted)
        return False

    wait_for(sent, 30, "the batch that had no room is taken")
    pair.send(refused)  # and counts once
    assert entries_of(top_k(pair.address, k=10)) == counts(refused)
    assert pair.shard.process.pid == pid and pair.shard.process.poll() is None


def test_a_shard_killed_on_a_full_disk_starts_when_there_is_room_and_has_everything(disk: Disk, pair: Pair) -> None:
    disk.fill()
    refused, _ = send_until_refused(pair, 1)
    disk.fill()
    pair.shard.kill()
    pair.shard = pair.start_shard()
    assert pair.shard.wait_end(40) == 1  # `topk up` and Kubernetes start it again
    assert "Free disk space" in pair.shard.stderr
    disk.free()
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    pair.send(refused)
    assert entries_of(top_k(pair.address, k=10)) == counts(refused)
