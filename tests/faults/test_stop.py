"""SIGTERM and what may be in its way: a process has ended with 0 within `--stop-seconds`, and nothing is lost by it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.cluster.processes import entries_of, ranked, top_k, wait_for
from tests.faults.files import FileFault, struck, write_control
from tests.faults.pair import STOP_SECONDS, Pair

pytestmark = pytest.mark.cluster


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    try:
        yield pair
    finally:
        pair.close()


def check(pair: Pair, sequences: int) -> None:
    counts = {f"song {sequence}": 1 for sequence in range(1, sequences + 1)} | {"all": sequences}
    assert entries_of(top_k(pair.address)) == ranked(counts)


def test_a_stop_takes_a_snapshot_and_ends_with_0(pair: Pair) -> None:
    for sequence in range(1, 6):
        pair.send(sequence)
    seconds, code = pair.stop_shard()
    assert code == 0 and seconds < STOP_SECONDS
    assert pair.shard.event("snapshot_taken") and pair.shard.event("stopped")
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    check(pair, 5)


def test_a_last_snapshot_that_takes_too_long_is_given_up_and_the_log_is_sealed(pair: Pair) -> None:
    for sequence in range(1, 6):
        pair.send(sequence)
    write_control(pair.control, [FileFault(1, "sync", "/snapshots/", "slow", seconds=60)], 1)
    seconds, code = pair.stop_shard()
    assert code == 0, pair.shard.stderr
    assert STOP_SECONDS / 2 < seconds < STOP_SECONDS + 2
    assert pair.shard.event("snapshot_given_up") and pair.shard.event("stopped")
    assert not pair.shard.event("stop_given_up")
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    assert not pair.shard.event("recovery_note")
    check(pair, 5)


def test_a_second_signal_gives_the_last_snapshot_up_at_once(pair: Pair) -> None:
    pair.send(1)
    write_control(pair.control, [FileFault(1, "sync", "/snapshots/", "slow", seconds=60)], 1)
    began = time.monotonic()
    pair.shard.process.send_signal(signal.SIGTERM)
    wait_for(lambda: 1 in struck(pair.control), 20, "the last snapshot has begun")
    pair.shard.process.send_signal(signal.SIGTERM)
    assert pair.shard.wait_end(20) == 0
    assert time.monotonic() - began < STOP_SECONDS
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    check(pair, 1)


def test_a_log_that_waits_for_its_disk_does_not_hold_up_the_end_and_a_resend_counts_once(pair: Pair) -> None:
    pair.send(1)
    write_control(pair.control, [FileFault(1, "sync", "/log/", "slow", seconds=60)], 1)

    def send_in_vain() -> None:
        with suppress(grpc.RpcError):
            pair.send(2, timeout=8)

    sending = threading.Thread(target=send_in_vain)
    sending.start()
    wait_for(lambda: 1 in struck(pair.control), 20, "the log waits for its disk")
    seconds, code = pair.stop_shard()
    assert code == 0, pair.shard.stderr
    assert seconds < STOP_SECONDS + 2
    sending.join()
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    pair.send(2)
    check(pair, 2)


def test_a_stop_during_recovery_is_heard_at_once(pair: Pair) -> None:
    pair.send(1)
    pair.shard.kill()
    write_control(pair.control, [FileFault(1, "map", "/log/", "slow", seconds=60)], 1)
    pair.shard = pair.start_shard()
    wait_for(lambda: 1 in struck(pair.control), 20, "the shard recovers")
    seconds, code = pair.stop_shard()
    assert code == 0, pair.shard.stderr
    assert seconds < STOP_SECONDS
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    check(pair, 1)


def test_a_failed_sync_during_the_last_group_is_no_orderly_end(pair: Pair) -> None:
    pair.send(1)
    write_control(pair.control, [FileFault(1, "sync", "/log/", "error")], 1)
    with suppress(grpc.RpcError):
        pair.send(2, timeout=2)
    assert pair.shard.wait_end(20) == 1
    assert pair.shard.event("log_failed")
    pair.shard = pair.start_shard()
    pair.shard.wait_ready()
    pair.send(2)
    check(pair, 2)
