"""Sums by key, against a dictionary."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples


def check(kernels: Kernels, keys: list[int], values: list[int], bits: int) -> None:
    expected: Counter[int] = Counter()
    for key, value in zip(keys, values, strict=True):
        expected[key] += value
    columns = np.array(keys, np.uint64), np.array(values, np.int64)
    found, sums = kernels.sorting.sum_by_key(*columns, bits, *map(np.empty_like, columns))
    assert (found.dtype, sums.dtype) == (np.uint64, np.int64)
    assert list(zip(found.tolist(), sums.tolist(), strict=True)) == sorted(expected.items())


@examples(60)
@given(data=st.data(), bits=st.sampled_from([1, 10, 11, 12, 22, 23, 33, 44, 55, 63, 64]))
def test_sum_by_key(kernels: Kernels, data: st.DataObject, bits: int) -> None:
    top = (1 << bits) - 1
    keys = st.one_of(st.integers(0, min(top, 5)), st.integers(0, top), st.just(top))
    rows = data.draw(st.lists(st.tuples(keys, st.integers(-(1 << 40), 1 << 40)), max_size=30))
    check(kernels, [key for key, _ in rows], [value for _, value in rows], bits)


@pytest.mark.parametrize("distinct", [1, 2, 3000, 1 << 40])
def test_many_rows(kernels: Kernels, distinct: int) -> None:
    random = np.random.default_rng(17)
    rows = kernels.sized(20_000)
    check(
        kernels,
        random.integers(0, distinct, rows).tolist(),
        random.integers(1, 9, rows).tolist(),
        distinct.bit_length(),
    )


def test_pass_is_stable(kernels: Kernels) -> None:
    keys = np.array([3, 1, 3, 1, 2, 3], np.uint64) << np.uint64(11)
    values = np.arange(6, dtype=np.int64)
    out = np.empty(6, np.uint64), np.empty(6, np.int64)
    kernels.sorting.sort_by_digit(keys, values, *out, 11, np.zeros(2049, np.int64), 6)
    assert (out[0] >> np.uint64(11)).tolist() == [1, 1, 2, 3, 3, 3]
    assert out[1].tolist() == [1, 3, 4, 0, 2, 5]
