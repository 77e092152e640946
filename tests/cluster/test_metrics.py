"""What servers count while real things happen: plays, queries, snapshots, a shard that hangs, slots that move."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.cluster.processes import GLOBAL, run_topk, wait_for
from tests.cluster.scraping import CONTROLLER, GATEWAY, SHARD, Scraped
from topk_grpc._version import VERSION
from topk_grpc.metrics import TABLE
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

pytestmark = pytest.mark.cluster

SECONDS = 60.0


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    settings = {"TOPK_SNAPSHOT_SECONDS": "1", "TOPK_QUERY_SECONDS": "2", "TOPK_HEAP_SIZE": "2"}
    settings |= {"TOPK_MEMORY_BYTES_MAX": str(1 << 40), "TOPK_STANDING_WINDOWS": "sliding:2s"}
    with Scraped(tmp_path_factory.mktemp("scraped"), settings=settings) as running:
        yield running


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def plays(*songs: tuple[str, int, int], producer: str, sequence: int = 1) -> pb.RecordPlaysRequest:
    """A batch of (song, time, count)."""
    request = pb.RecordPlaysRequest()
    request.batch.producer_id, request.batch.sequence, request.batch.first_sent_ms = producer, sequence, now_ms()
    for song_id, played_at_ms, count in songs:
        request.batch.plays.add(song_id=song_id, played_at_ms=played_at_ms, count=count, charts=["de"])
    return request


def test_each_server_answers_the_metrics_of_its_role(scraped: Scraped) -> None:
    for server, role, name in ((GATEWAY, "gateway", ""), (CONTROLLER, "controller", ""), (SHARD, "shard", "shard-0")):
        own = {row.name for row in TABLE if role in row.servers}
        assert {known for known in scraped.names(server) if known.startswith("topk_")} == own
        assert "process_open_fds" in scraped.names(server)
        assert scraped.value("topk_ready", server) == 1
        kernels = [f'kernels="{form}"' for form in ("compiled", "uncompiled")]
        info = next(line for line in scraped.text(server).splitlines() if line.startswith("topk_server_info{"))
        assert f'name="{name}",role="{role}",version="{VERSION}"' in info
        assert sum(form in info for form in kernels) == 1


def test_plays_are_counted_by_what_became_of_them(scraped: Scraped) -> None:
    names = ["topk_batches_received_total", "topk_batches_duplicate_total", "topk_plays_received_total"]
    names += ["topk_plays_accepted_total", "topk_plays_duplicate_total", "topk_plays_combined_total"]
    before = [scraped.value(name) for name in names]
    acks = scraped.value("topk_ack_seconds_count")
    reasons = ("MISSING_TIME", "IN_FUTURE")
    rejected = [scraped.value("topk_plays_rejected_total", reason=reason) for reason in reasons]
    now = now_ms()
    many = [(f"song {number}", now, 1) for number in range(50)]
    request = plays(*many, many[0], many[0], ("a", 0, 1), ("b", now + 3_600_000, 1), producer="by-fate")
    answer = scraped.cluster.stub.RecordPlays(request, timeout=20)
    assert (answer.accepted, len(answer.rejected)) == (52, 2)
    assert scraped.cluster.stub.RecordPlays(request, timeout=20).duplicate

    after = [scraped.value(name) for name in names]
    # The resend's plays are combined once more; of the rest it counts as received and as duplicate.
    assert [late - early for late, early in zip(after, before, strict=True)] == [2, 1, 108, 52, 54, 4]
    assert scraped.value("topk_ack_seconds_count") == acks + 2
    assert 0 < scraped.value("topk_ack_seconds_sum") < 60
    assert [scraped.value("topk_plays_rejected_total", reason=reason) for reason in reasons] == [
        number + 1 for number in rejected
    ]


def test_what_a_shard_does_with_plays(scraped: Scraped) -> None:
    names = ["topk_group_requests_count", "topk_group_requests_sum", "topk_group_bytes_sum", "topk_apply_seconds_count"]
    names += ["topk_apply_seconds_sum", "topk_fdatasync_seconds_count", "topk_fdatasync_seconds_sum"]
    before = [scraped.shards(name) for name in names]
    log = scraped.shards("topk_log_bytes")
    now = now_ms()
    songs = [(f"another {number}", now, 1) for number in range(200)]
    scraped.cluster.stub.RecordPlays(plays(*songs, producer="to-shards"), timeout=20)
    for name, early in zip(names, before, strict=True):
        assert all(late > one for late, one in zip(scraped.shards(name), early, strict=True)), name
    # Snapshots delete old segments, but none of these are full.
    assert all(late > early for late, early in zip(scraped.shards("topk_log_bytes"), log, strict=True))
    assert scraped.shards("topk_queue_requests") == [0, 0]
    assert scraped.shards("topk_queue_requests_max") == [256, 256]

    described = scraped.cluster.stub.DescribeCluster(pb.DescribeClusterRequest(), timeout=20)
    shards = sorted(described.shards, key=lambda shard: shard.shard_id)
    assert scraped.shards("topk_songs") == [shard.songs for shard in shards]
    assert scraped.shards("topk_entries") == [shard.entries for shard in shards]
    assert scraped.shards("topk_slots_owned") == [shard.slots for shard in shards]
    assert sum(scraped.shards("topk_slots_owned")) == 1024
    assert scraped.shards("topk_charts") == [1, 1]


def test_memory_is_told_by_part(scraped: Scraped) -> None:
    def cells() -> bool:  # a snapshot makes blocks of them, in files
        producer = f"memory {time.monotonic()}"
        scraped.cluster.stub.RecordPlays(plays(("in memory", now_ms(), 1), producer=producer), timeout=20)
        return max(scraped.shards("topk_memory_bytes", part="cells")) > 0

    wait_for(cells, SECONDS, "cells of plays")
    for part in ("names", "pairs", "rows", "heaps", "producers"):
        assert max(scraped.shards("topk_memory_bytes", part=part)) > 0, part
    for part in ("sessions", "images"):
        assert max(scraped.shards("topk_memory_bytes", part=part)) == 0, part
    assert scraped.shards("topk_memory_bytes_max") == [1 << 40] * 2


def test_late_plays_are_counted_where_they_are_late(scraped: Scraped) -> None:
    before = sum(scraped.shards("topk_late_plays_total"))
    now = now_ms()
    song = "never on time"  # of one shard, whose newest play counts
    scraped.cluster.stub.RecordPlays(plays((song, now, 1), producer="late"), timeout=20)
    late = plays((song, now - 299_000, 2), (song, now - 310_000, 4), (song, now - 86_400_000, 8), producer="later")
    scraped.cluster.stub.RecordPlays(late, timeout=20)
    assert sum(scraped.shards("topk_late_plays_total")) == before + 12


def test_queries_are_timed_by_the_kind_of_their_window(scraped: Scraped) -> None:
    kinds = {
        "global": "global",
        "tumbling": "tumbling:1h",
        "sliding": "sliding:10m",
        "session": "session:5m",
        "range": "range:2020-01-01..2020-01-02",
    }
    before = {kind: scraped.value("topk_query_seconds_count", window=kind) for kind in kinds}
    messages = scraped.value("topk_shard_query_messages_total", method="QueryTopK") if before["global"] else 0
    with scraped.client() as client:
        for text in kinds.values():
            client.top_k(text, k=2)
        client.songs(["nobody has played it"])
    for kind, count in before.items():
        assert scraped.value("topk_query_seconds_count", window=kind) == count + 1 + (kind == "global"), kind
    assert scraped.value("topk_shard_query_messages_total", method="QueryTopK") > messages
    assert scraped.value("topk_shard_query_bytes_total", method="QueryTopK") > 0


def test_windows_that_stand_are_counted_as_they_move(scraped: Scraped) -> None:
    before = min(scraped.shards("topk_slides_total"))
    assert min(scraped.shards("topk_standing_windows")) >= 1
    wait_for(lambda: min(scraped.shards("topk_slides_total")) >= before + 2, SECONDS, "sliding:2s moves on")


def test_heaps_that_are_filled_anew_are_counted(scraped: Scraped) -> None:
    before = sum(scraped.shards("topk_heap_rebuilds_total"))
    now = now_ms()
    # Of each shard's heap of two the best are taken back; what lies outside is found by looking at all.
    best = [(f"risen {number}", now, 1000 + number) for number in range(40)]
    scraped.cluster.stub.RecordPlays(plays(*best, producer="heaps"), timeout=20)
    fallen = [(song_id, time_ms, -count) for song_id, time_ms, count in best[8:]]
    answer = scraped.cluster.stub.RecordPlays(plays(*fallen, producer="heaps", sequence=2), timeout=20)
    assert not answer.rejected
    scraped.cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=2), timeout=20)
    assert sum(scraped.shards("topk_heap_rebuilds_total")) > before


def test_watchers_are_counted_while_they_watch(scraped: Scraped) -> None:
    assert scraped.value("topk_watchers") == 0
    calls = [
        scraped.cluster.stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=k), timeout=SECONDS) for k in (1, 1, 2)
    ]
    for call in calls:
        next(call)
    assert scraped.value("topk_watchers") == 3
    assert scraped.value("topk_watched_queries") == 2
    for call in calls:
        call.cancel()
    wait_for(lambda: scraped.value("topk_watchers") == 0, SECONDS, "nobody watches")
    assert scraped.value("topk_watched_queries") == 0


def test_snapshots_are_counted_and_age(scraped: Scraped) -> None:
    before = scraped.shards("topk_snapshot_seconds_count")

    def taken() -> bool:
        songs = [(f"kept {number}", now_ms(), 1) for number in range(20)]
        scraped.cluster.stub.RecordPlays(plays(*songs, producer=f"snapshots {time.monotonic()}"), timeout=20)
        counts = scraped.shards("topk_snapshot_seconds_count")
        return all(late > early + 1 for late, early in zip(counts, before, strict=True))

    wait_for(taken, SECONDS, "both shards take snapshots")
    assert all(0 <= age < SECONDS for age in scraped.shards("topk_snapshot_age_seconds"))
    assert scraped.shards("topk_snapshot_age_seconds_max") == [1, 1]
    assert all(0 <= left < 1 << 20 for left in scraped.shards("topk_snapshot_log_bytes"))
    assert scraped.shards("topk_snapshot_log_bytes_max") == [512 << 20] * 2
    assert scraped.shards("topk_snapshots_failed_total") == [0, 0]
    for free, size in zip(scraped.shards("topk_disk_free_bytes"), scraped.shards("topk_disk_bytes"), strict=True):
        assert 0 < free <= size


def test_a_shard_that_does_not_answer_is_seen_at_the_gateway(scraped: Scraped) -> None:
    unanswered = scraped.value("topk_shard_unanswered_total", shard="shard-0")
    partial = scraped.value("topk_queries_partial_total")
    failed = scraped.value("topk_calls_failed_total", reason="UNAVAILABLE")
    assert scraped.value("topk_shards") == 2
    songs = [(f"waits {number}", now_ms(), 1) for number in range(50)]
    waiting: list[threading.Thread] = []

    def record(number: int) -> None:
        with suppress(grpc.RpcError):
            scraped.cluster.stub.RecordPlays(plays(*songs, producer=f"waits {number}"), timeout=SECONDS)

    pid = scraped.cluster.pid("shard-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(4):  # more than may be under way
            waiting.append(threading.Thread(target=record, args=(number,)))
            waiting[-1].start()
        wait_for(lambda: scraped.value("topk_shard_pending_bytes", shard="shard-0") > 0, SECONDS, "plays wait for it")
        request = pb.GetTopKRequest(window=GLOBAL, k=1)
        with pytest.raises(grpc.RpcError):
            scraped.cluster.stub.GetTopK(request, timeout=SECONDS)
        request.allow_partial = True
        assert scraped.cluster.stub.GetTopK(request, timeout=SECONDS).certificate.missing_shards == ["shard-0"]
    finally:
        os.kill(pid, signal.SIGCONT)
    for thread in waiting:
        thread.join(SECONDS)
    assert scraped.value("topk_shard_unanswered_total", shard="shard-0") >= unanswered + 2
    assert scraped.value("topk_queries_partial_total") == partial + 1
    assert scraped.value("topk_calls_failed_total", reason="UNAVAILABLE") == failed + 1
    wait_for(lambda: scraped.value("topk_shard_pending_bytes", shard="shard-0") == 0, SECONDS, "all has been sent")
    assert scraped.value("topk_shard_pending_bytes_max") == 64 << 20


def test_a_restart_tells_of_its_recovery(scraped: Scraped) -> None:
    scraped.cluster.kill("shard-1")

    def recovered() -> bool:
        with suppress(OSError, AssertionError):  # it is not there yet, or has not recovered
            return scraped.value("topk_ready", SHARD + 1) == 1
        return False

    wait_for(recovered, SECONDS, "the shard is back")
    assert scraped.value("topk_recovering", SHARD + 1) == 0
    assert scraped.value("topk_recovery_ratio", SHARD + 1) == 1
    assert 0 < scraped.value("topk_recovery_seconds", SHARD + 1) < SECONDS
    scraped.cluster.wait_whole()
    epoch = scraped.value("topk_topology_epoch")
    wait_for(lambda: scraped.shards("topk_topology_epoch") == [epoch, epoch], SECONDS, "all know the same topology")
    assert epoch > 1


def test_calls_of_gateways_are_let_in_and_others_refused(scraped: Scraped) -> None:
    admitted = scraped.value("topk_calls_admitted_total", SHARD, role="cluster")
    scraped.cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=1), timeout=20)
    assert scraped.value("topk_calls_admitted_total", SHARD, role="cluster") > admitted


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_moves_are_told_by_the_controller_that_leads(tmp_path: Path) -> None:
    with Scraped(tmp_path, shards=1, settings={"TOPK_SLOTS": "64", "TOPK_MOVE_SHARE": "1"}) as scraped:
        assert scraped.value("topk_controller_active", CONTROLLER) == 1
        assert scraped.value("topk_migrations_total", CONTROLLER, outcome="committed") == 0
        added = run_topk("cluster", "add", "shard-1", "--no-wait", "--gateway", scraped.cluster.address)
        assert added.returncode == 0, added.stderr
        wait_for(
            lambda: (
                scraped.value("topk_slots_moved_total", CONTROLLER) == 32
                and scraped.value("topk_slots_left", CONTROLLER) == 0
            ),
            90,
            "half of the slots have moved",
        )
        assert scraped.value("topk_migrations_total", CONTROLLER, outcome="committed") >= 2
        assert scraped.value("topk_migrations_total", CONTROLLER, outcome="aborted") == 0
        assert 0 < scraped.value("topk_longest_stall_seconds", CONTROLLER) < SECONDS
        wait_for(lambda: scraped.shards("topk_slots_owned") == [32, 32], SECONDS, "both know what they own")
        assert scraped.value("topk_shards") == 2
