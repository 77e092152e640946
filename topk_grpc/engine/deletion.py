"""Taking back all plays of some entries: a song's, or those of slots that were handed to another shard.

Each window that is kept loses what it holds of them; their cells are cancelled by as many negative ones, bucket by
bucket, which are gone with them at the next merge. So rows, totals, heaps and snapshots follow. The songs stay
interned, with no plays: they are listed nowhere, and plays of them that come later count. Marks are left alone here: a
resend of a batch that had counted before a song was deleted does not bring its plays back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    wanted = np.zeros(len(state.songs), np.bool_)
    if song >= 0:
        wanted[song] = True
    return entries_of(state, wanted)


def entries_of(state: ShardState, songs: NDArray[np.bool_]) -> dict[str, NDArray[np.int32]]:
    """The entries of some songs that have plays, by board, ascending; songs is bool[songs]."""
    entries = {
        GLOBAL: np.flatnonzero(songs).astype(np.int32),
        CHARTS: np.flatnonzero(songs[state.pairs.songs]).astype(np.int32),
    }
    return {name: some[state.boards[name].counts_of(some) > 0] for name, some in entries.items()}


def remove(state: ShardState, entries: Mapping[str, NDArray[np.int32]], slots: Sequence[int] = ()) -> None:
    """Takes away all plays of some entries, given by board, as `entries_of` finds them; `slots`: as `Board.remove`."""
    for name, some in entries.items():
        if len(some):
            state.boards[name].remove(some, slots)


def owns(state: ShardState, song_id: str) -> bool:
    """Whether the shard owns the song's slot."""
    data = song_id.encode()
    hashes = hash_strings(data, np.zeros(1, np.int64), np.array([len(data)], np.int32))
    return bool(state.owned[int(hashes[0]) % len(state.owned)])


def plays_of(state: ShardState, song_id: str) -> Deleted:
    """What a song has."""
    entries = _entries(state, song_id)
    return Deleted(int(state.boards[GLOBAL].counts_of(entries[GLOBAL]).sum()), len(entries[CHARTS]))


def delete(state: ShardState, song_id: str) -> None:
    """Takes all plays of a song back, on both boards."""
    remove(state, _entries(state, song_id))
