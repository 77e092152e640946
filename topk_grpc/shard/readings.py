"""What is read of a shard when its metrics are scraped.

All of it is read on the thread of the scrape, beside the writer: attributes, lengths, and sums over what was copied in
one step. So a scrape waits for nobody, and no group or query waits for a scrape; numbers of one scrape may be of
moments that lie microseconds apart.
"""

from __future__ import annotations

import os

from topk_grpc import metrics
from topk_grpc.config import ShardSettings
from topk_grpc.shard.core import ShardCore
from topk_grpc.shard.owner import ShardOwner


def read_from(core: ShardCore, owner: ShardOwner, settings: ShardSettings) -> None:
    """Has the metrics of a shard that has recovered read from it."""
    state = core.state
    metrics.QUEUE_REQUESTS.read_from(lambda: owner.waiting_requests)
    metrics.QUEUE_REQUESTS_MAX.read_from(lambda: settings.queue_requests_max)
    metrics.LATE_PLAYS.read_from(lambda: state.late_plays)

    metrics.ENTRIES.read_from(lambda: state.entries)
    metrics.SONGS.read_from(lambda: len(state.songs))
    metrics.CHARTS.read_from(lambda: len(state.charts) - 1)
    metrics.MEMORY_BYTES.read_from(state.memory_by_part)
    metrics.MEMORY_BYTES_MAX.read_from(lambda: settings.memory_bytes_max)
    metrics.STANDING_WINDOWS.read_from(lambda: len(state.standing))
    metrics.SLIDES.read_from(lambda: state.standing.slides)
    metrics.HEAP_REBUILDS.read_from(lambda: sum(board.heap_rebuilds for board in state.boards.values()))
    metrics.SCANS.read_from(lambda: owner.waiting_scans)
    metrics.SCANS_MAX.read_from(lambda: settings.scan_queue_max)
    metrics.SLOTS_OWNED.read_from(lambda: int(state.owned.sum()))

    metrics.LOG_BYTES.read_from(lambda: core.log_bytes)
    metrics.SNAPSHOT_LOG_BYTES.read_from(lambda: core.snapshot_log_bytes)
    metrics.SNAPSHOT_LOG_BYTES_MAX.read_from(lambda: settings.snapshot_log_bytes)
    metrics.SNAPSHOT_AGE_SECONDS.read_from(lambda: owner.snapshot_age_seconds)
    metrics.SNAPSHOT_AGE_SECONDS_MAX.read_from(lambda: settings.snapshot_seconds)
    metrics.DISK_FREE_BYTES.read_from(lambda: _disk_bytes(settings.data_dir, free=True))
    metrics.DISK_BYTES.read_from(lambda: _disk_bytes(settings.data_dir, free=False))


def _disk_bytes(data_dir: str, *, free: bool) -> int | None:
    """The size of the file system, or what of it this process may still use; None where the disk does not say."""
    try:
        told = os.statvfs(data_dir)
    except OSError:  # a disk that fails must not take the other metrics along
        return None
    return (told.f_bavail if free else told.f_blocks) * told.f_frsize
