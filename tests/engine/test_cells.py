"""Cells by time against a dictionary: chunks, blocks, merging, and both ways to add up."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.engine import cells
from topk_grpc.engine.cells import BLOCK_CELLS, Cells, CellStore, Merge, choose_merges, merge, ordered_cells
from topk_grpc.engine.tiers import Tiers, everything_at
from topk_grpc.model import COUNT_MAX

Cell = tuple[int, int, int]

BUCKETS = st.one_of(st.integers(-5, 5), st.integers(-5, 5), st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 40]))
ENTRIES = st.one_of(st.integers(0, 5), st.sampled_from([1 << 20, (1 << 31) - 1]))
COUNTS = st.one_of(st.integers(1, 3), st.sampled_from([1 << 30, COUNT_MAX]))
KEEP_ALL = Tiers(everything_at(1)).roll_up(0)
CELLS = st.lists(st.tuples(BUCKETS, ENTRIES, COUNTS), min_size=1, max_size=30)


def columns_of(some: list[Cell]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    buckets, entries, counts = zip(*some, strict=True)
    return np.array(buckets, np.int64), np.array(entries, np.int32), np.array(counts, np.int64)


def unordered(some: list[Cell]) -> Cells:
    buckets, entries, counts = columns_of(some)
    return Cells(buckets, entries, counts, int(buckets.min()), int(buckets.max()), ordered=False)


def summed(some: list[Cell]) -> list[Cell]:
    """By bucket, then entry; equal ones added up."""
    sums: Counter[tuple[int, int]] = Counter()
    for bucket, entry, count in some:
        sums[bucket, entry] += count
    return sorted((bucket, entry, count) for (bucket, entry), count in sums.items())


def listed(block: Cells) -> list[Cell]:
    return list(zip(block.buckets.tolist(), block.entries.tolist(), block.counts.tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(CELLS, min_size=1, max_size=4))
def test_merge_sorts_and_adds_up_whatever_the_spans_are(parts: list[list[Cell]]) -> None:
    whole = [cell for part in parts for cell in part]
    merged = merge([unordered(part) for part in parts])
    assert listed(merged) == summed(whole)
    assert (merged.first, merged.last) == (min(whole)[0], max(whole)[0])
    assert merged.ordered
    dtypes = {name: column.dtype for name, column in merged.columns().items()}
    assert dtypes == {"buckets": np.int64, "entries": np.int32, "counts": np.int64}
    again = merge([merged, unordered(parts[0])])  # blocks are merged with chunks
    assert listed(again) == summed([*whole, *parts[0]])


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(CELLS, min_size=1, max_size=6),
    blocks=st.lists(st.booleans(), min_size=6, max_size=6),
    step=st.integers(1, 12),
)
def test_merge_span_by_span_is_merge_all_at_once(parts: list[list[Cell]], blocks: list[bool], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_STEP_CELLS", step)
        given_parts = [
            merge([unordered(part)]) if block else unordered(part) for part, block in zip(parts, blocks, strict=False)
        ]
        assert listed(merge(given_parts)) == summed([cell for part in parts for cell in part])


def test_what_arrived_in_order_is_merged_in_many_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_STEP_CELLS", 10)
    parts = [[(3 * number + bucket, entry, 1) for bucket in range(4) for entry in range(3)] for number in range(20)]
    in_order = [unordered(part) for part in parts]
    assert len(cells._spans(in_order)) > 15
    assert listed(merge(in_order)) == summed([cell for part in parts for cell in part])
    at_random = [unordered([(0, 0, 1), (100, 0, 1), *part]) for part in parts]
    assert len(cells._spans(at_random)) == 1


@settings(max_examples=200, deadline=None)
@given(some=CELLS, start=BUCKETS, end=BUCKETS)
def test_within_is_half_open_in_chunks_and_in_blocks(some: list[Cell], start: int, end: int) -> None:
    expected = Counter((entry, count) for bucket, entry, count in summed(some) if start <= bucket < end)
    block = merge([unordered(some)])
    found = ordered_cells(block.columns()).within(start, end)
    assert Counter(zip(found.entries.tolist(), found.counts.tolist(), strict=True)) == expected
    found = unordered(some).within(start, end)
    inside = Counter((entry, count) for bucket, entry, count in some if start <= bucket < end)
    assert Counter(zip(found.entries.tolist(), found.counts.tolist(), strict=True)) == inside


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.one_of(st.lists(st.tuples(BUCKETS, st.integers(0, 9), COUNTS), max_size=12), st.none()), max_size=9
    ),
    start=BUCKETS,
    end=BUCKETS,
    entries=st.sampled_from([10, 100, 100_000]),
    replace_later=st.booleans(),
)
def test_a_store_adds_up_any_span_sparse_or_dense(
    steps: list[list[Cell] | None], start: int, end: int, entries: int, replace_later: bool
) -> None:
    """None is a snapshot; its block comes into use at once, or when more cells have come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", 5)
        store = CellStore()
        known: list[Cell] = []
        pending: tuple[Merge, int, Cells, tuple[int, ...]] | None = None
        for number, step in enumerate(steps):
            if step is None:
                if pending is not None:
                    store.replace(*pending)
                    pending = None
                chunks = store.take_chunks()
                if not chunks:
                    continue
                (merged,) = choose_merges(chunks, store.blocks, store.done, KEEP_ALL)
                pending = (merged, number, ordered_cells(merged.cells(KEEP_ALL).columns()), KEEP_ALL.borders)
            elif step:
                store.append(*columns_of(step))
                known += step
            if pending is not None and not replace_later:
                store.replace(*pending)
                pending = None
        expected: Counter[int] = Counter()
        for bucket, entry, count in known:
            if start <= bucket < end:
                expected[entry] += count
        found, sums = store.sums(start, end, entries)
        assert list(zip(found.tolist(), sums.tolist(), strict=True)) == sorted(expected.items())
        assert found.dtype == np.int32
        assert sums.dtype == np.int64


def test_taken_chunks_stay_in_use_until_their_block_is_there_and_later_ones_beyond_it() -> None:
    store = CellStore()
    store.append(*columns_of([(1, 1, 5), (2, 1, 7)]))
    chunks = store.take_chunks()
    assert len(chunks) == 1
    store.append(*columns_of([(1, 2, 1)]))
    assert store.take_chunks()[:1] == chunks  # a snapshot that failed is taken anew, with what has come meanwhile
    store.replace(Merge(chunks, {}), 9, ordered_cells(merge(chunks).columns()), KEEP_ALL.borders)
    assert list(store.blocks) == [9]
    assert [column.tolist() for column in store.sums(0, 3, 3)] == [[1, 2], [12, 1]]
    assert len(store.take_chunks()) == 1


def test_small_new_blocks_are_merged_and_large_old_ones_left() -> None:
    def block(size: int) -> Cells:
        column = np.broadcast_to(np.int64(0), size)
        return Cells(column, np.broadcast_to(np.int32(0), size), column, 0, 0, ordered=True)

    def choose_merge(chunks: list[Cells], blocks: dict[int, Cells]) -> list[int]:
        (merged,) = choose_merges(chunks, blocks, {}, KEEP_ALL)
        return list(merged.blocks)

    assert choose_merge([block(10)], {}) == []
    assert choose_merge([block(10)], {1: block(1000), 2: block(20)}) == [2]
    assert choose_merge([block(10)], {1: block(60), 2: block(20)}) == [2, 1]
    assert choose_merge([block(10)], {1: block(5), 2: block(21)}) == []
    assert choose_merge([block(BLOCK_CELLS)], {1: block(BLOCK_CELLS + 1)}) == []
    # So a cell is merged a logarithmic number of times, and few blocks stand.
    standing: dict[int, Cells] = {}
    moved = 0
    for number in range(1000):
        merged = choose_merge([block(10)], standing)
        size = 10 + sum(len(standing.pop(old)) for old in merged)
        moved += size
        standing[number] = block(size)
    assert len(standing) <= 10
    assert moved <= 10_000 * 10
