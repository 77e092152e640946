"""Where the cells of each slot lie in a chunk or block, so that a slot that moves is found without a look at all cells.

Cells lie in the order of their arrival or of time, those of a slot all over. Only while slots move somebody asks for
them by slot: then each chunk and block that is closed is sorted by slot once, as an index of 4 bytes a cell, by another
thread than the writer's, before slots are frozen. What is not indexed is looked through; so an index is never needed,
and never wrong: closed cells do not change, nor does the slot of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class SlotIndex:
    """Of one chunk or block.

    Attributes:
        order: the rows of its cells by slot, those of a slot in their order, int32[cells].
        stops: where each slot's rows end in it, int64[slots].
    """

    order: NDArray[np.int32]
    stops: NDArray[np.int64]

    def rows(self, slots: Sequence[int]) -> NDArray[np.int32]:
        """The rows of some slots' cells."""
        starts = np.concatenate(([0], self.stops))
        return np.concatenate([self.order[starts[slot] : self.stops[slot]] for slot in slots])


def index_slots(
    entries: NDArray[np.int32], songs: NDArray[np.int32], song_slots: NDArray[np.int32], slots: int
) -> SlotIndex:
    """The index of some cells. From any thread: what it is given does not change.

    Args:
        entries: of the cells.
        songs: of each entry of the board; empty where that is the entry's own number.
        song_slots: of each song.
        slots: of the cluster.
    """
    of_songs = songs[entries] if len(songs) else entries
    # Sorted by radix, being that short.
    of_cells = song_slots[of_songs].astype(np.uint16 if slots <= 1 << 16 else np.int32)
    order = np.argsort(of_cells, kind="stable").astype(np.int32)
    return SlotIndex(order, np.cumsum(np.bincount(of_cells, minlength=slots)))
