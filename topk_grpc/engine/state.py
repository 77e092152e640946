"""All that a shard knows: songs, charts, boards, producers, and which slots it owns.

The state changes in three ways only: `admission` sets marks before a record is logged, `apply` counts what the record
says, and the records of ownership and expiry. Replaying the log calls the same functions, so a recovered shard is the
shard that was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.boards import Board, global_songs
from topk_grpc.engine.cells import Cells, ordered_cells
from topk_grpc.engine.producers import Producers
from topk_grpc.errors import ForeignDirectoryError
from topk_grpc.kernels.pairs import PairTable
from topk_grpc.kernels.strings import StringTable
from topk_grpc.model import ClusterSettings

GLOBAL: Final = "global"
CHARTS: Final = "charts"
STATE_FORMAT: Final = 1


def check_settings(kept: ClusterSettings, present: ClusterSettings) -> None:
    """Refuses data of a cluster with other settings: it would be read as something else.

    Raises:
        ForeignDirectoryError: they differ.
    """
    if kept != present:
        raise ForeignDirectoryError(
            f"the data were written under {kept}, the topology says {present}: start this shard with the topology that"
            " they were made for"
        )


class ShardState:
    """A shard's state. One writer, which also answers the queries.

    Args:
        settings: the cluster's.
        heap_size: the best entries that each chart keeps in order.

    Attributes:
        songs, charts: the interned names; chart 0 is the global one, the empty name.
        pairs: the entries of the chart board.
        boards: the global board and the chart board, under `GLOBAL` and `CHARTS`.
        producers: marks, rejects and times of producers.
        owned: uint8[slots], 1 where this shard owns the slot.
        newest_event_ms: the time of the newest play; 0 without any.
        pending_plays: plays admitted and not yet applied; they count against the largest total.
    """

    def __init__(self, settings: ClusterSettings, heap_size: int) -> None:
        self.settings = settings
        self.songs = StringTable()
        self.charts = StringTable()
        self.charts.add_texts([""])
        self.pairs = PairTable()
        self.boards = {GLOBAL: Board(heap_size), CHARTS: Board(heap_size)}
        self.producers = Producers()
        self.owned: NDArray[np.uint8] = np.zeros(settings.slots, np.uint8)
        self.newest_event_ms = 0
        self.pending_plays = 0

    @property
    def entries(self) -> int:
        """(chart, song) pairs, the global chart included."""
        return len(self.boards[GLOBAL]) + len(self.pairs)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        tables = self.songs.memory_bytes + self.charts.memory_bytes + self.pairs.memory_bytes
        return tables + self.producers.memory_bytes + sum(board.memory_bytes for board in self.boards.values())

    def own(self, slots: Iterable[int]) -> None:
        """Owns these slots from here on."""
        self.owned[list(slots)] = 1

    @property
    def slots_bitmap(self) -> bytes:
        """The owned slots, slot s at bit s mod 8 of byte s div 8."""
        return np.packbits(self.owned, bitorder="little").tobytes()

    def songs_of(self, board: str) -> NDArray[np.int32]:
        """The song of each entry of a board; empty where that is the entry's own number."""
        return global_songs() if board == GLOBAL else self.pairs.songs

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_snapshot(self) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
        """What a snapshot keeps beside the cells: what JSON holds, and arrays. What can still change is copied."""
        producers, marks = self.producers.to_snapshot()
        parts = {
            "songs": self.songs.to_arrays(),
            "names": self.charts.to_arrays(),
            "pairs": self.pairs.to_arrays(),
            "marks": marks,
        }
        parts |= {name: board.to_arrays() for name, board in self.boards.items()}
        arrays = {f"{part}.{name}": array for part, named in parts.items() for name, array in named.items()}
        meta = {
            "state_format": STATE_FORMAT,
            "slots": self.settings.slots,
            "partitioner": self.settings.partitioner,
            "resolution_ms": self.settings.resolution_ms,
            "newest_event_ms": self.newest_event_ms,
            "owned": np.flatnonzero(self.owned).tolist(),
            "producers": producers,
        }
        return meta, arrays

    @classmethod
    def from_snapshot(
        cls,
        settings: ClusterSettings,
        heap_size: int,
        meta: Mapping[str, Any],
        arrays: Mapping[str, NDArray[np.generic]],
        blocks: Mapping[str, Mapping[int, Mapping[str, NDArray[np.generic]]]],
    ) -> ShardState:
        """The state that `to_snapshot` described.

        Args:
            settings: the cluster's, as the topology has them.
            heap_size: may differ from the one before.
            meta, arrays: from `to_snapshot`.
            blocks: for each board the columns of its blocks by number.

        Raises:
            ForeignDirectoryError: the snapshot was taken in a cluster with other settings.
        """
        check_settings(ClusterSettings(meta["slots"], meta["partitioner"], meta["resolution_ms"]), settings)

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {name.partition(".")[2]: array for name, array in arrays.items() if name.partition(".")[0] == prefix}

        state = cls(settings, heap_size)
        state.songs = StringTable.from_arrays(part("songs"))
        state.charts = StringTable.from_arrays(part("names"))
        state.pairs = PairTable.from_arrays(part("pairs"))
        state.producers = Producers.from_snapshot(meta["producers"], part("marks"))
        for name, board in state.boards.items():
            charts = state.pairs.charts if name == CHARTS else global_songs()
            board.restore(part(name), state.songs_of(name), charts, state.songs)
            board.cells.restore_blocks(
                {number: ordered_cells(columns) for number, columns in blocks.get(name, {}).items()}
            )
        state.newest_event_ms = meta["newest_event_ms"]
        state.own(meta["owned"])
        return state

    def take_chunks(self) -> dict[str, list[Cells]]:
        """For each board the chunks that a snapshot taken now turns into a block."""
        return {name: board.cells.take_chunks() for name, board in self.boards.items()}
