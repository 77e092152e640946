"""Taking a song's plays back, all of them: from its cells, bucket by bucket, as so many corrections.

Rows, totals, heaps, standing windows and snapshots follow by the way that every count goes. The song stays interned,
with no plays: it is listed nowhere, and plays of it that come later count. Marks are left alone: a resend of a batch
that had counted before does not bring its plays back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.boards import global_songs
from topk_grpc.engine.spans import cells_of
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.kernels.hash import hash_strings


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a song had.

    Attributes:
        plays: in the global chart.
        charts: in how many charts it had plays, the global one left out.
    """

    plays: int
    charts: int


def _entries(state: ShardState, song_id: str) -> dict[str, NDArray[np.int32]]:
    """The entries of a song that have plays, by board, ascending."""
    song = int(state.songs.find_texts([song_id])[0])
    entries = {
        GLOBAL: np.array([song] if song >= 0 else [], np.int32),
        CHARTS: np.flatnonzero(state.pairs.songs == song).astype(np.int32),
    }
    return {name: some[_counts(state, name, some) > 0] for name, some in entries.items()}


def _counts(state: ShardState, name: str, entries: NDArray[np.int32]) -> NDArray[np.int64]:
    """Their plays of all time."""
    return np.array([state.boards[name].count(entry) for entry in entries.tolist()], np.int64)


def owns(state: ShardState, song_id: str) -> bool:
    """Whether the shard owns the song's slot."""
    data = song_id.encode()
    hashes = hash_strings(data, np.zeros(1, np.int64), np.array([len(data)], np.int32))
    return bool(state.owned[int(hashes[0]) % len(state.owned)])


def plays_of(state: ShardState, song_id: str) -> Deleted:
    """What a song has."""
    entries = _entries(state, song_id)
    return Deleted(int(_counts(state, GLOBAL, entries[GLOBAL]).sum()), len(entries[CHARTS]))


def delete(state: ShardState, song_id: str) -> None:
    """Takes all plays of a song back, on both boards."""
    for name, entries in _entries(state, song_id).items():
        if not len(entries):
            continue
        board = state.boards[name]
        buckets, owners, counts = cells_of(board.cells, entries)
        # Cells older than the last tier are dropped, and then count in no window but the global one. What they leave of
        # the counts of all time is taken back from where they lay.
        rest = _counts(state, name, entries)
        np.subtract.at(rest, np.searchsorted(entries, owners), counts)
        left = np.flatnonzero(rest)
        buckets = np.append(buckets, np.full(len(left), state.roll_up.first_kept - 1, np.int64))
        owners = np.append(owners, entries[left])
        in_charts = name == CHARTS
        board.add(
            owners,
            state.pairs.charts[owners] if in_charts else np.zeros(len(owners), np.int32),
            buckets,
            -np.append(counts, rest[left]),
            state.songs_of(name),
            state.songs,
            len(board),
            state.pairs.charts if in_charts else global_songs(),
        )
