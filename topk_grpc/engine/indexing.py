"""Having the cells of a state indexed by slot: what is to be done, by any thread, and its use by the writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import Cells
from topk_grpc.engine.slot_index import SlotIndex, index_slots
from topk_grpc.engine.state import ShardState
from topk_grpc.ring.partitioners import partitioner_of


@dataclass(frozen=True, slots=True, eq=False)
class Unindexed:
    """Cells of a board, and what their index is made of; nothing of it changes any more."""

    board: str
    cells: Cells
    songs: NDArray[np.int32]
    song_slots: NDArray[np.int32]
    slots: int

    def index(self) -> SlotIndex:
        """The index; takes some 100 ns a cell."""
        return index_slots(self.cells.entries, self.songs, self.song_slots, self.slots)


def unindexed(state: ShardState) -> list[Unindexed]:
    """The chunks and blocks that are to be indexed; none where the slot is not the song's."""
    if not partitioner_of(state.settings.partitioner).whole_songs:
        return []
    song_slots = state.slots_of_songs()
    return [
        Unindexed(name, cells, state.songs_of(name), song_slots, state.settings.slots)
        for name, board in state.boards.items()
        for cells in board.cells.unindexed()
    ]


def use_indexes(state: ShardState, made: Sequence[tuple[Unindexed, SlotIndex]]) -> None:
    """Finds the cells of slots by these indexes from here on."""
    for name, board in state.boards.items():
        board.cells.use_indexes([(one.cells, index) for one, index in made if one.board == name])


def forget_indexes(state: ShardState) -> None:
    """Lets go of all indexes."""
    for board in state.boards.values():
        board.cells.forget_indexes()
