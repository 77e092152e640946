"""Cells of given entries against a list of cells: in chunks, in blocks, and with what takes plays back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.engine import cells, spans
from topk_grpc.engine.cells import CellStore, Merge, merge, ordered_cells
from topk_grpc.engine.spans import cells_of, span_sums
from topk_grpc.model import COUNT_MAX

Cell = tuple[int, int, int]

BUCKETS = st.one_of(st.integers(-5, 9), st.integers(-5, 9), st.sampled_from([-(1 << 60), (1 << 60) - 1, 1 << 40]))
CELLS = st.lists(
    st.tuples(BUCKETS, st.integers(0, 6), st.one_of(st.integers(-2, 3).filter(bool), st.just(COUNT_MAX // 64))),
    max_size=25,
)


def store_of(steps: list[list[Cell]], blocks: int) -> CellStore:
    """A store whose first steps have become blocks."""
    store = CellStore()
    for number, step in enumerate(steps):
        if step:
            buckets, entries, counts = zip(*step, strict=True)
            store.append(np.array(buckets, np.int64), np.array(entries, np.int32), np.array(counts, np.int64))
        if number < blocks and (chunks := store.take_chunks()):
            whole = merge(chunks)
            store.replace(Merge(chunks, {}), number, ordered_cells(whole.columns()) if len(whole) else None, ())
    return store


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(CELLS, max_size=4),
    blocks=st.integers(0, 4),
    asked=st.lists(st.tuples(st.integers(0, 8), BUCKETS, st.integers(1, 4)), max_size=12),
    step_cells=st.sampled_from([1, 3, 1 << 20]),
)
def test_span_sums_are_those_of_every_cell_once(
    steps: list[list[Cell]], blocks: int, asked: list[tuple[int, int, int]], step_cells: int
) -> None:
    disjoint: list[tuple[int, int, int]] = []
    for entry, start, size in asked:
        if all(entry != one or start + size <= low or start >= high for one, low, high in disjoint):
            disjoint.append((entry, start, start + size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", 5)
        patch.setattr(spans, "_STEP_CELLS", step_cells)
        found = span_sums(
            store_of(steps, blocks),
            np.array([entry for entry, _, _ in disjoint], np.int32),
            np.array([start for _, start, _ in disjoint], np.int64),
            np.array([end for _, _, end in disjoint], np.int64),
        )
    assert found.tolist() == [
        sum(count for step in steps for bucket, one, count in step if one == entry and start <= bucket < end)
        for entry, start, end in disjoint
    ]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(CELLS, max_size=4),
    blocks=st.integers(0, 4),
    entries=st.sets(st.integers(0, 8)),
    step_cells=st.sampled_from([1, 3, 1 << 20]),
)
def test_cells_of_entries_are_added_up_by_bucket(
    steps: list[list[Cell]], blocks: int, entries: set[int], step_cells: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", 5)
        patch.setattr(spans, "_STEP_CELLS", step_cells)
        columns = cells_of(store_of(steps, blocks), np.array(sorted(entries), np.int32))
    expected: Counter[tuple[int, int]] = Counter()
    for step in steps:
        for bucket, entry, count in step:
            if entry in entries:
                expected[bucket, entry] += count
    found = {(bucket, entry): count for bucket, entry, count in zip(*(one.tolist() for one in columns), strict=True)}
    assert found == {key: count for key, count in expected.items() if count}
    assert [column.dtype for column in columns] == [np.int64, np.int32, np.int64]
