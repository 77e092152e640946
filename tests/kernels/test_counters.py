"""Counting, against loops that say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples

ENTRIES, CHARTS = 12, 4
COUNT_MAX = 1 << 55

counts = st.one_of(st.integers(1, 5), st.just(COUNT_MAX))
added = st.lists(st.tuples(st.integers(0, ENTRIES - 1), counts), max_size=40)


def int64(values: Any) -> Any:
    return np.array(list(values), np.int64)


def int32(values: Any) -> Any:
    return np.array(list(values), np.int32)


@examples(150)
@given(
    plays=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=4), counts), max_size=30),
)
def test_expand_charts(kernels: Kernels, plays: list[tuple[bool, list[int], int]]) -> None:
    chosen = np.array([is_chosen for is_chosen, _, _ in plays], np.uint8)
    bounds = int32(np.cumsum([0, *(len(charts) for _, charts, _ in plays)]))
    numbers = int32(chart for _, charts, _ in plays for chart in charts)
    taken = [(i, charts, count) for i, (is_chosen, charts, count) in enumerate(plays) if is_chosen]
    songs, buckets = int32(i for i, _, _ in taken), int64(-i for i, _, _ in taken)
    room = len(numbers)
    out = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int64), np.empty(room, np.int64)
    written = kernels.counters.expand_charts(
        chosen, bounds, numbers, songs, buckets, int64(c for _, _, c in taken), *out, len(plays)
    )
    expected = [(chart, i, -i, count) for i, charts, count in taken for chart in charts]
    assert written == len(expected)
    assert list(zip(*(column[:written].tolist() for column in out), strict=True)) == expected


@examples(80)
@given(cells=added, before=st.integers(0, 3))
def test_sum_cells(kernels: Kernels, cells: list[tuple[int, int]], before: int) -> None:
    sums = np.full(ENTRIES, before, np.int64)
    entries, amounts = int32(entry for entry, _ in cells), int64(count for _, count in cells)
    entries.flags.writeable = amounts.flags.writeable = False  # sealed buckets are mapped read-only
    kernels.counters.sum_cells(entries, amounts, sums, len(cells))
    expected = [before + sum(count for entry, count in cells if entry == e) for e in range(ENTRIES)]
    assert sums.tolist() == expected


@examples(150)
@given(
    plays=st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=30),
    total=st.integers(0, 120),
    limit=st.just(100),
)
def test_reach_limit(kernels: Kernels, plays: list[tuple[bool, int]], total: int, limit: int) -> None:
    chosen = np.array([is_chosen for is_chosen, _ in plays], np.uint8)
    expected, sum_so_far = [], total
    for is_chosen, count in plays:
        fits = is_chosen and sum_so_far + count <= limit
        expected.append(int(fits))
        sum_so_far += count if fits else 0
    after = kernels.counters.reach_limit(int64(c for _, c in plays), chosen, total, limit, len(plays))
    assert (after, chosen.tolist()) == (sum_so_far, expected)


@pytest.mark.parametrize("limit", [(1 << 62), (1 << 63) - 1])
def test_reach_limit_near_the_end_of_the_range(kernels: Kernels, limit: int) -> None:
    amounts, chosen = int64([COUNT_MAX, COUNT_MAX, 2, 1, 1]), np.ones(5, np.uint8)
    assert kernels.counters.reach_limit(amounts, chosen, limit - COUNT_MAX - 2, limit, 5) == limit
    assert chosen.tolist() == [1, 0, 1, 0, 0]
