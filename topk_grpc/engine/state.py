"""All that a shard knows: songs, charts, boards, producers, and which slots it owns.

The state changes in three ways only: `admission` sets marks before a record is logged, `apply` counts what the record
says, and the records of ownership and expiry. Replaying the log calls the same functions, so a recovered shard is the
shard that was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine import soundness
from topk_grpc.engine.boards import Board, global_songs
from topk_grpc.engine.cells import ordered_cells
from topk_grpc.engine.copies import Copy
from topk_grpc.engine.ownership import Ownership
from topk_grpc.engine.producers import Producers
from topk_grpc.engine.sessions import Past
from topk_grpc.engine.standing import StandingWindows
from topk_grpc.engine.tiers import RollUp, Tier, Tiers, everything_at, parse_tiers
from topk_grpc.errors import ForeignDirectoryError, OutOfRangeError, VersionError
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.pairs import PairTable
from topk_grpc.kernels.strings import StringTable
from topk_grpc.model import Bounds, ClusterSettings, SessionWindow, Window, parse_window

GLOBAL: Final = "global"
CHARTS: Final = "charts"
STATE_FORMAT: Final = 3
_STATE_FORMATS: Final = (2, STATE_FORMAT)  # in 2 there was nothing of a slot but whether it is owned


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
        tiers: how fine the plays of each age are kept; None: all at the resolution.

    Attributes:
        songs, charts: the interned names; chart 0 is the global one, the empty name.
        pairs: the entries of the chart board.
        boards: the global board and the chart board, under `GLOBAL` and `CHARTS`.
        producers: marks, rejects and times of producers.
        ownership: the slots that this shard owns, gives away and is given.
        newest_event_ms: the time of the newest play; 0 without any.
        oldest_event_ms: the time of the oldest play; None without any.
        tiers: how fine the plays of each age are kept.
        standing: the windows kept up to date.
        pending_plays: plays admitted and not yet applied; they count against the largest total.
        late_plays: plays applied since the start that came late; see engine/apply.py.
    """

    def __init__(self, settings: ClusterSettings, heap_size: int, tiers: Sequence[Tier] | None = None) -> None:
        self.settings = settings
        self.tiers = Tiers(tiers or everything_at(settings.resolution_ms))
        self.songs = StringTable()
        self.charts = StringTable()
        self.charts.add_texts([""])
        self.pairs = PairTable()
        self.boards = {GLOBAL: Board(heap_size), CHARTS: Board(heap_size)}
        self.producers = Producers()
        self.ownership = Ownership(settings.slots)
        self.newest_event_ms = 0
        self.oldest_event_ms: int | None = None
        self.pending_plays = 0
        self.late_plays = 0
        self.standing = StandingWindows(self.boards, settings.resolution_ms)
        self._song_slots: NDArray[np.int32] = np.empty(0, np.int32)

    @property
    def entries(self) -> int:
        """(chart, song) pairs, the global chart included."""
        return len(self.boards[GLOBAL]) + len(self.pairs)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.memory_by_part().values())

    def memory_by_part(self) -> dict[str, int]:
        """Bytes of the arrays of each part. From any thread."""
        parts = {
            "names": self.songs.memory_bytes + self.charts.memory_bytes,
            "pairs": self.pairs.memory_bytes,
            "producers": self.producers.memory_bytes,
            "images": self.ownership.image_bytes,
        }
        for board in self.boards.values():
            for part, size in board.memory_by_part().items():
                parts[part] = parts.get(part, 0) + size
        return parts

    def own(self, slots: Iterable[int]) -> None:
        """Owns these slots from here on."""
        self.ownership.own(slots)

    def configure(self, tiers: Sequence[Tier], standing: Iterable[Window]) -> None:
        """Keeps plays in these tiers and these windows standing from here on."""
        windows = tuple(standing)
        if self.oldest_event_ms is None:
            self.tiers = Tiers(tiers, windows)  # nothing has been rolled up: no time stands behind a newest play of 0
        else:
            self.tiers = self.tiers.changed(tiers, windows, self.newest_event_ms)
        self.standing.set(windows)

    def can_cut(self, bounds: Bounds) -> bool:
        """Whether a window can be cut at these bounds."""
        try:
            self.tiers.check(bounds, self.newest_event_ms, self.oldest_event_ms)
        except OutOfRangeError:
            return False
        return True

    def move_standing(self, window: Window, bounds: Bounds, between: Callable[[], None] | None = None) -> None:
        """Brings a standing window to bounds; folds it where they cannot be cut.

        `between` is called on the way, when all but this window can be read.
        """
        self.look_back()
        if isinstance(window, SessionWindow) or self.can_cut(bounds):
            self.standing.move(window, bounds, between)
        else:
            self.standing.fold(window)

    @property
    def past(self) -> Past:
        """How far back the finest buckets are kept."""
        oldest = self.oldest_event_ms
        return Past.of(self.roll_up, None if oldest is None else oldest // self.settings.resolution_ms)

    def look_back(self) -> None:
        """Tells the boards how far back the finest buckets are kept."""
        for board in self.boards.values():
            board.past = self.past if board.sessions else None

    def note_times(self, oldest_ms: int, newest_ms: int) -> None:
        """Takes note of the times of plays that are counted."""
        known = self.oldest_event_ms
        self.oldest_event_ms = oldest_ms if known is None else min(known, oldest_ms)
        self.newest_event_ms = newest_ms if known is None else max(newest_ms, self.newest_event_ms)
        self.look_back()

    @property
    def roll_up(self) -> RollUp:
        """What merging does now to cells by their age."""
        return self.tiers.roll_up(self.newest_event_ms)

    @property
    def slots_bitmap(self) -> bytes:
        """The slots that queries are answered from, slot s at bit s mod 8 of byte s div 8."""
        return np.packbits(self.ownership.answered, bitorder="little").tobytes()

    @property
    def owned(self) -> NDArray[np.uint8]:
        """uint8[slots], 1 where this shard takes plays of the slot."""
        return self.ownership.owned

    def slots_of_songs(self) -> NDArray[np.int32]:
        """The slot of each song, int32[songs]; those known before are not hashed again."""
        known, count = len(self._song_slots), len(self.songs)
        if known < count:
            hashes = hash_strings(
                self.songs.arena, self.songs.starts[known:count], self.songs.sizes(known, count - known)
            )
            slots = (hashes % np.uint64(self.settings.slots)).astype(np.int32)
            self._song_slots = np.concatenate((self._song_slots, slots))
        return self._song_slots

    def songs_of(self, board: str) -> NDArray[np.int32]:
        """The song of each entry of a board; empty where that is the entry's own number."""
        return global_songs() if board == GLOBAL else self.pairs.songs

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_snapshot(self, copy: Copy = np.copy) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
        """What a snapshot keeps beside the cells: what JSON holds, and arrays. What can still change is copied.

        Args:
            copy: copies what is large.
        """
        producers, marks = self.producers.to_snapshot()
        parts = {
            "songs": self.songs.to_arrays(),
            "names": self.charts.to_arrays(),
            "pairs": self.pairs.to_arrays(),
            "marks": marks,
        }
        parts |= {name: board.to_arrays(copy) for name, board in self.boards.items()}
        sessions, parts["sessions"] = self._sessions_to_snapshot(copy)
        ownership, parts["images"] = self.ownership.to_snapshot()
        arrays = {f"{part}.{name}": array for part, named in parts.items() for name, array in named.items()}
        meta = {
            "state_format": STATE_FORMAT,
            "slots": self.settings.slots,
            "partitioner": self.settings.partitioner,
            "resolution_ms": self.settings.resolution_ms,
            "newest_event_ms": self.newest_event_ms,
            "oldest_event_ms": self.oldest_event_ms,
            "tiers": str(self.tiers),
            "tier_floors": self.tiers.floors,
            "standing_windows": [str(window) for window in self.standing],
            "sessions": sessions,
            "blocks_rolled_up": {
                name: {str(number): done for number, done in board.cells.done.items()}
                for name, board in self.boards.items()
            },
            "ownership": ownership,
            "producers": producers,
        }
        return meta, arrays

    def _sessions_to_snapshot(self, copy: Copy) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.generic]]]:
        """Standing sessions are kept: what they began with may be rolled up by now."""
        told: list[dict[str, Any]] = []
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, board in self.boards.items():
            for window, span in board.sessions.items():
                meta, arrays[f"{len(told)}"] = span.to_snapshot(len(board), copy)
                told.append({"board": name, "window": str(window), "span": meta})
        return told, arrays

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
            VersionError: another release wrote it.
            ForeignDirectoryError: the snapshot was taken in a cluster with other settings.
            InvalidArgumentError: it contradicts itself.
            KeyError, TypeError, ValueError: something is missing from it, or of another kind.
        """
        if meta["state_format"] not in _STATE_FORMATS:
            raise VersionError(
                f"the snapshot's state has format {meta['state_format']}, this release reads"
                f" {' and '.join(map(str, _STATE_FORMATS))}: start the release that wrote it"
            )
        check_settings(ClusterSettings(meta["slots"], meta["partitioner"], meta["resolution_ms"]), settings)

        def part(prefix: str) -> dict[str, NDArray[np.generic]]:
            return {name.partition(".")[2]: array for name, array in arrays.items() if name.partition(".")[0] == prefix}

        tiers = parse_tiers(meta["tiers"], settings.resolution_ms)
        standing = [parse_window(text) for text in meta["standing_windows"]]
        soundness.check_times(meta, len(tiers))
        soundness.check_standing(standing, settings.resolution_ms)
        soundness.check_producers(meta["producers"])
        soundness.check_marks(part("marks"))
        songs, charts = soundness.check_strings(part("songs"), "songs"), soundness.check_charts(part("names"))
        entries = {GLOBAL: songs, CHARTS: soundness.check_pairs(part("pairs"), charts, songs)}

        state = cls(settings, heap_size)
        state.songs = StringTable.from_arrays(part("songs"))
        state.charts = StringTable.from_arrays(part("names"))
        state.pairs = PairTable.from_arrays(part("pairs"))
        state.producers = Producers.from_snapshot(meta["producers"], part("marks"))
        for name, board in state.boards.items():
            entry_charts = state.pairs.charts if name == CHARTS else global_songs()
            soundness.check_board(part(name), name, entry_charts, entries[name], charts)
            board.restore(part(name), state.songs_of(name), entry_charts, state.songs)
            for number, cells in blocks.get(name, {}).items():
                soundness.check_block(cells, f"block {number}", entries[name])
            board.cells.restore_blocks(
                {number: ordered_cells(columns) for number, columns in blocks.get(name, {}).items()},
                soundness.borders_by_block(meta["blocks_rolled_up"][name]),
            )
        state.tiers = Tiers(tiers, standing, meta["tier_floors"])
        state.standing.set(standing)
        state.newest_event_ms = meta["newest_event_ms"]
        state.oldest_event_ms = meta["oldest_event_ms"]
        columns = part("sessions")
        for index, told in enumerate(meta["sessions"]):
            board = state.boards[told["board"]]
            soundness.check_sessions(told["span"], columns.get(f"{index}"), entries[told["board"]])
            board.restore_sessions(
                board.sessions[parse_window(told["window"])],
                told["span"],
                columns[f"{index}"],  # type: ignore[arg-type]
            )
        state.look_back()
        if "owned" in meta:
            state.own(soundness.integer(slot, 0, settings.slots - 1, "an owned slot") for slot in meta["owned"])
        else:
            state.ownership = Ownership.from_snapshot(settings.slots, meta["ownership"], part("images"))
        return state
