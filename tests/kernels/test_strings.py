"""The table of strings, against a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples


def columns(texts: list[str], same_hash: int | None = None) -> tuple[bytes, Any, Any, Any]:
    """The arguments of `add` and `find`; the hashes are XXH64, or all the same."""
    encoded = [text.encode() for text in texts]
    sizes = np.array([len(one) for one in encoded], np.int32)
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    hashes = [xxhash.xxh64_intdigest(one) if same_hash is None else same_hash for one in encoded]
    return b"".join(encoded), begins, sizes, np.array(hashes, np.uint64)


def longest_run(index: Any) -> int:
    """The most neighbouring places in use."""
    free = np.flatnonzero(np.concatenate([index, index]) == 0)
    return int(np.diff(free).max()) - 1


def check(table: Any, known: dict[str, int]) -> None:
    """That the table holds what the dictionary does, and nothing else."""
    assert len(table) == len(known)
    assert table.find_texts(list(known)).tolist() == list(known.values())
    assert [table.text(number) for number in known.values()] == list(known)
    sizes = [len(text.encode()) for text in known]
    assert table.sizes(0, len(known)).tolist() == sizes
    assert table.arena_used == sum(sizes) + 6 * len(known)


words = st.one_of(
    st.text(max_size=8),
    st.text("ab", max_size=4),
    st.sampled_from(["", "é", "e\u0301", "日本語", "\x00", "\x00\x00", "a" * 255, "a" * 256, "a" * 257]),
)


@examples(150)
@given(batches=st.lists(st.lists(words, max_size=30), max_size=6), asked=st.lists(words, max_size=20))
def test_numbers_are_given_in_order_of_arrival(kernels: Kernels, batches: list[list[str]], asked: list[str]) -> None:
    table = kernels.strings.StringTable()
    known: dict[str, int] = {}
    for batch in batches:
        expected = [known.setdefault(text, len(known)) for text in batch]
        assert table.add_texts(batch).tolist() == expected
        before = len(table)
        assert table.find_texts(asked).tolist() == [known.get(text, -1) for text in asked]
        assert len(table) == before
    check(table, known)
    check(kernels.strings.StringTable.from_arrays(table.to_arrays()), known)


@examples(60)
@given(
    batches=st.lists(st.lists(words, max_size=30), max_size=6),
    same=st.sampled_from([0, 1, 0xFFFF, (1 << 64) - 1, 0x123456789ABCDEF0]),
)
def test_strings_with_equal_hashes_stay_apart(kernels: Kernels, batches: list[list[str]], same: int) -> None:
    table = kernels.strings.StringTable()
    known: dict[str, int] = {}
    for batch in batches:
        expected = [known.setdefault(text, len(known)) for text in batch]
        assert table.add(*columns(batch, same)).tolist() == expected
    assert table.find(*columns([*known, "unknown word"], same)).tolist() == [*known.values(), -1]


def test_growth(kernels: Kernels) -> None:
    table = kernels.strings.StringTable()
    known: dict[str, int] = {}
    random = np.random.default_rng(5)
    for _ in range(20):
        batch = [f"song {'é' * (i % 7)}{i}" for i in random.integers(0, kernels.sized(60_000), kernels.sized(4000))]
        expected = [known.setdefault(text, len(known)) for text in batch]
        assert table.add_texts(batch).tolist() == expected
    check(table, known)
    assert table.find_texts([text + "x" for text in known]).max() == -1
    again = kernels.strings.StringTable.from_arrays(table.to_arrays())
    check(again, known)
    assert again.add_texts(["new", next(iter(known))]).tolist() == [len(known), 0]
    assert table.memory_bytes >= table.arena_used + 8 * len(known)


@pytest.mark.parametrize("prefix", ["", "a", "a long beginning that all the strings share " * 5])
def test_beginnings_are_not_the_whole(kernels: Kernels, prefix: str) -> None:
    texts = [prefix + end for end in ("", "a", "b", "aa", "ab", "a\x00", "\x00", "\x00\x00")]
    table = kernels.strings.StringTable()
    distinct = dict.fromkeys(texts)
    for same in (None, 7):
        table = kernels.strings.StringTable()
        assert table.add(*columns(list(distinct), same)).tolist() == list(range(len(distinct)))


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 32_767, 32_768, 65_534, 65_535])
def test_sizes(kernels: Kernels, size: int) -> None:
    table = kernels.strings.StringTable()
    texts = ["x" * size, "x" * (size - 1) + "y" if size else "y", "between"]
    assert table.add_texts(texts).tolist() == [0, 1, 2]
    assert table.find_texts(texts).tolist() == [0, 1, 2]
    assert [table.text(number) for number in range(3)] == texts
    again = kernels.strings.StringTable.from_arrays(table.to_arrays())
    assert again.find_texts(texts).tolist() == [0, 1, 2]


def test_empty_string_is_a_string(kernels: Kernels) -> None:
    table = kernels.strings.StringTable()
    assert table.find_texts([""]).tolist() == [-1]
    assert table.add_texts(["", "a", ""]).tolist() == [0, 1, 0]
    assert table.text(0) == ""


def test_empty_table(kernels: Kernels) -> None:
    for table in (
        kernels.strings.StringTable(),
        kernels.strings.StringTable.from_arrays(kernels.strings.StringTable().to_arrays()),
    ):
        assert len(table) == 0
        assert table.add_texts([]).tolist() == []
        assert table.find_texts(["a"]).tolist() == [-1]
        assert table.add_texts(["a"]).tolist() == [0]


def test_snapshots_arrays_are_left_alone_by_later_additions(kernels: Kernels) -> None:
    table = kernels.strings.StringTable()
    table.add_texts([f"song {i}" for i in range(250)])
    arrays = table.to_arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    for first in range(250, 2000, 250):
        table.add_texts([f"song {i}" for i in range(first, first + 250)])
        assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    assert len(kernels.strings.StringTable.from_arrays(arrays)) == 250


def test_strings_may_lie_anywhere_in_the_data(kernels: Kernels) -> None:
    data = np.frombuffer(b"xxabcxabx", np.uint8)
    begins, sizes = np.array([6, 2, 2, 3], np.int64), np.array([2, 3, 2, 1], np.int32)
    hashes = kernels.hash.hash_strings(data, begins, sizes)
    table = kernels.strings.StringTable()
    assert table.add(data, begins, sizes, hashes).tolist() == [0, 1, 0, 2]
    assert [table.text(number) for number in range(3)] == ["ab", "abc", "b"]


@pytest.mark.parametrize("slots", [1024, 4096, 65_536])
def test_songs_of_one_slot_spread_over_the_index(kernels: Kernels, slots: int) -> None:
    rows = 4096
    random = np.random.default_rng(3).integers(0, 1 << 64, rows, np.uint64, endpoint=False)
    hashes = random // np.uint64(slots) * np.uint64(slots) + np.uint64(5)
    index = np.zeros(2 * rows, np.uint64)
    kernels.strings.place(hashes, np.arange(6, 6 + 10 * rows, 10, dtype=np.int64), index, 0, rows)
    assert np.count_nonzero(index) == rows
    assert longest_run(index) < 200
