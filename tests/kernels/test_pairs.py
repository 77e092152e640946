"""The table of (chart, song) pairs, against a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples
from tests.kernels.test_strings import longest_run

Pair = tuple[int, int]

INT32_MAX = (1 << 31) - 1
pairs = st.tuples(
    st.one_of(st.integers(0, 3), st.just(INT32_MAX)),
    st.one_of(st.integers(0, 20), st.integers(0, INT32_MAX), st.just(INT32_MAX)),
)


def columns(pairs: list[Pair]) -> tuple[Any, Any]:
    return np.array([chart for chart, _ in pairs], np.int32), np.array([song for _, song in pairs], np.int32)


def check(table: Any, known: dict[Pair, int]) -> None:
    assert len(table) == len(known)
    assert table.find(*columns(list(known))).tolist() == list(known.values())
    assert list(zip(table.charts.tolist(), table.songs.tolist(), strict=True)) == list(known)


@examples(150)
@given(batches=st.lists(st.lists(pairs, max_size=60), max_size=8), asked=st.lists(pairs, max_size=20))
def test_numbers_are_given_in_order_of_arrival(kernels: Kernels, batches: list[list[Pair]], asked: list[Pair]) -> None:
    table = kernels.pairs.PairTable()
    known: dict[Pair, int] = {}
    for batch in batches:
        expected = [known.setdefault(pair, len(known)) for pair in batch]
        assert table.add(*columns(batch)).tolist() == expected
        assert table.find(*columns(asked)).tolist() == [known.get(pair, -1) for pair in asked]
    check(table, known)
    check(kernels.pairs.PairTable.from_arrays(table.to_arrays()), known)


def test_growth(kernels: Kernels) -> None:
    table = kernels.pairs.PairTable()
    known: dict[Pair, int] = {}
    random = np.random.default_rng(5)
    for _ in range(20):
        rows = kernels.sized(4000)
        charts, songs = random.integers(0, 30, rows, np.int32), random.integers(0, rows, rows, np.int32)
        expected = [known.setdefault(pair, len(known)) for pair in zip(charts.tolist(), songs.tolist(), strict=True)]
        assert table.add(charts, songs).tolist() == expected
    check(table, known)
    assert table.find(*columns([(chart + 30, song) for chart, song in known])).max() == -1
    again = kernels.pairs.PairTable.from_arrays(table.to_arrays())
    check(again, known)
    assert again.add(*columns([(99, 99), next(iter(known))])).tolist() == [len(known), 0]
    assert table.memory_bytes >= 8 * len(known)


def test_empty_table(kernels: Kernels) -> None:
    for table in (
        kernels.pairs.PairTable(),
        kernels.pairs.PairTable.from_arrays(kernels.pairs.PairTable().to_arrays()),
    ):
        assert table.find(*columns([(0, 0)])).tolist() == [-1]
        assert table.add(*columns([])).tolist() == []
        assert table.add(*columns([(0, 0), (0, 1), (0, 0), (1, 0)])).tolist() == [0, 1, 0, 2]


def test_snapshots_arrays_are_left_alone_by_later_additions(kernels: Kernels) -> None:
    table = kernels.pairs.PairTable()
    table.add(*columns([(1, song) for song in range(250)]))
    arrays = table.to_arrays()
    for first in range(250, 2000, 250):
        table.add(*columns([(2, song) for song in range(first, first + 250)]))
        assert arrays["charts"].tolist() == [1] * 250
        assert arrays["songs"].tolist() == list(range(250))


@pytest.mark.parametrize("of_one", ["chart", "song"])
def test_pairs_of_one_chart_or_one_song_spread_over_the_table(kernels: Kernels, of_one: str) -> None:
    rows = 4096
    same, different = np.full(rows, 7, np.int32), np.arange(rows, dtype=np.int32)
    table = np.zeros(2 * rows, np.int32)
    kernels.pairs.place(*((same, different) if of_one == "chart" else (different, same)), table, rows)
    assert np.count_nonzero(table) == rows
    assert longest_run(table) < 200
