"""The data directory of a shard: log, snapshots, recovery. It knows bytes, not songs.

The file formats, and what recovery makes of a crash at each step, are drawn in docs/formats/.
"""

from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.files import Files, OsFiles
from topk_grpc.storage.log import Log
from topk_grpc.storage.log_format import Record
from topk_grpc.storage.recovery import Recovery, recover
from topk_grpc.storage.replay import ADVICE
from topk_grpc.storage.snapshot import Block, Snapshot, SnapshotStore

__all__ = [
    "ADVICE",
    "Block",
    "DataDirectory",
    "Files",
    "Log",
    "OsFiles",
    "Record",
    "Recovery",
    "Snapshot",
    "SnapshotStore",
    "recover",
]
