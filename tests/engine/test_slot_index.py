"""Finding the cells of slots by an index and by a look at all of them: the same cells, whatever lies where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.engine import cells
from topk_grpc.engine.cells import Cells, CellStore
from topk_grpc.engine.slot_index import SlotIndex, index_slots

SLOTS = 8
SONGS = 40
SONG_SLOTS = (np.arange(SONGS, dtype=np.int32) * 5) % SLOTS
PAIR_SONGS = (np.arange(60, dtype=np.int32) * 7) % SONGS


def drawn(seed: int, rows: int, entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return (
        numbers.integers(-5, 50, rows),
        numbers.integers(0, entries, rows).astype(np.int32),
        numbers.integers(-3, 9, rows),
    )


def counted(pieces: Iterable[Cells]) -> Counter[tuple[int, int, int]]:
    found: Counter[tuple[int, int, int]] = Counter()
    for piece in pieces:
        assert len(piece)
        assert piece.first <= piece.buckets.min() <= piece.buckets.max() <= piece.last
        found.update(zip(piece.buckets.tolist(), piece.entries.tolist(), piece.counts.tolist(), strict=True))
    return found


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with patch.object(cells, "CHUNK_CELLS", 50):
        yield


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 400),
    slots=st.sets(st.integers(0, SLOTS - 1), min_size=1).map(sorted),
    charted=st.booleans(),
    half=st.booleans(),
)
def test_an_index_finds_what_a_look_at_all_finds(
    seed: int, rows: int, slots: list[int], charted: bool, half: bool
) -> None:
    songs = PAIR_SONGS if charted else np.empty(0, np.int32)
    entry_slots = SONG_SLOTS[PAIR_SONGS] if charted else SONG_SLOTS
    store = CellStore()
    store.append(*drawn(seed, rows, len(entry_slots)))
    chosen = np.isin(entry_slots, slots)
    chosen[seed % len(chosen)] = False  # an entry without plays is left out, though its slot moves
    numbers = np.where(chosen, np.arange(len(chosen)) + 100, -1).astype(np.int32)
    expected = counted(store.of_entries(numbers))
    assert expected == counted(store.of_entries(numbers, slots))
    for share in (8, 0):  # by rows where these are few; always
        with patch.object(cells, "_SCAN_ROWS", share):
            todo = store.unindexed()
            store.use_indexes(
                [(one, index_slots(one.entries, songs, SONG_SLOTS, SLOTS)) for one in todo[:: 2 if half else 1]]
            )
            assert counted(store.of_entries(numbers, slots)) == expected
    store.forget_indexes()
    assert len(store.unindexed()) == rows // 50


def test_an_index_lists_the_rows_of_each_slot_in_order() -> None:
    entries = np.array([3, 0, 1, 3, 2], np.int32)
    index = index_slots(entries, np.empty(0, np.int32), np.array([1, 0, 1, 7], np.int32), SLOTS)
    assert [index.rows([slot]).tolist() for slot in (0, 1, 7, 5)] == [[2], [1, 4], [0, 3], []]
    assert index.rows([7, 0]).tolist() == [0, 3, 2]
    wide = index_slots(entries, np.empty(0, np.int32), np.array([1, 0, 1, 70_000], np.int32), 1 << 17)
    assert wide.rows([70_000]).tolist() == [0, 3]


def test_the_index_of_a_chunk_that_is_gone_is_let_go() -> None:
    store = CellStore()
    store.append(*drawn(1, 120, SONGS))
    (first, second) = store.unindexed()
    nothing = SlotIndex(np.empty(0, np.int32), np.zeros(SLOTS, np.int64))
    store.use_indexes([(first, nothing), (second, nothing)])
    assert not store.unindexed()
    store.replace(cells.Merge([first], {}), 7, second, ())
    store.use_indexes([])
    assert len(store._indexes) == 1
