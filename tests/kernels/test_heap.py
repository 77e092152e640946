"""Heaps of the best entries, selection and places, against sorted lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples

IDS = ["", "a", "aa", "aaa", "ab", "b", "b\x00", "é", "e\u0301", "z", "日", "日本", "𝄞", "\uffff", "a" * 300, "a" * 299]
"""Beginnings of each other; and characters whose order as UTF-16 is another than as UTF-8."""


@dataclass
class Songs:
    """Song ids as the kernels take them, and as bytes."""

    ids: list[bytes]
    starts: Any
    arena: Any


def songs_of(kernels: Kernels, ids: list[str]) -> Songs:
    table = kernels.strings.StringTable()
    table.add_texts(ids)
    return Songs([text.encode() for text in ids], table.starts, table.arena)


def best(counts: dict[int, int], ids: dict[int, bytes], k: int) -> list[int]:
    """The k first of the order: more plays first, then the smaller id."""
    return sorted((e for e, c in counts.items() if c > 0), key=lambda e: (-counts[e], ids[e]))[:k]


class Board:
    """Heaps of several charts, with the rows they belong to, as a shard keeps them."""

    def __init__(self, kernels: Kernels, songs: Songs, entries: list[tuple[int, int]], size: int, alone: bool) -> None:
        """Makes an empty board.

        Args:
            entries: chart and song of each entry.
            size: of each heap.
            alone: an entry's number is its song's, as in the global chart.
        """
        self.kernels, self.all_songs, self.entries = kernels, songs, entries
        charts = 1 + max(chart for chart, _ in entries)
        self.heap = np.full((charts, size), -1, np.int32)
        self.keys = np.full((charts, size), -1, np.int64)
        self.sizes = np.zeros(charts, np.int32)
        self.outside = np.zeros((charts, 2), np.int64)
        self.totals = np.zeros((charts, 2), np.int64)
        self.rows = np.full((len(entries), 6), 77, np.int64)  # the columns of other windows, which are left alone
        self.rows[:, 2:4] = 0
        self.songs = np.array([] if alone else [song for _, song in entries], np.int32)
        self.ids = {entry: songs.ids[song] for entry, (_, song) in enumerate(entries)}

    def play(self, changes: list[tuple[int, int]], sign: int = 1) -> None:
        """Adds counts to entries, or takes them away."""
        changed = np.array([entry for entry, _ in changes], np.int32)
        counts = np.array([count for _, count in changes], np.int64)
        charts = np.array([self.entries[entry][0] for entry, _ in changes], np.int32)
        self.kernels.heap.count_plays(
            self.rows, 2, self.totals, self.heap, self.keys, self.sizes, self.outside,
            self.songs, self.all_songs.starts, self.all_songs.arena, charts, changed, counts, sign, len(changes),
        )  # fmt: skip

    def counts(self, chart: int) -> dict[int, int]:
        return {e: int(self.rows[e, 2]) for e, (of, _) in enumerate(self.entries) if of == chart}

    def key(self, entry: int, count: int) -> tuple[int, bytes]:
        return -count, self.ids[entry]

    def check(self, *, only_grew: bool = True) -> None:
        places = np.zeros(len(self.entries), np.int64)
        for chart, size in enumerate(self.sizes.tolist()):
            counts = self.counts(chart)
            assert self.totals[chart].tolist() == [sum(counts.values()), sum(count != 0 for count in counts.values())]
            held = self.heap[chart, :size].tolist()
            assert self.keys[chart, :size].tolist() == [counts[entry] for entry in held]
            for at in range(1, size):
                above, below = held[(at - 1) // 2], held[at]
                assert self.key(above, counts[above]) > self.key(below, counts[below]), "the worst is on top"
            places[held] = np.arange(1, size + 1)
            bound_count, bound = self.outside[chart].tolist()
            for entry, count in counts.items():
                if count > 0 and entry not in held:
                    assert bound, "somebody is outside, and the bound says nobody is"
                    assert self.key(entry, count) >= self.key(bound - 1, bound_count), "nobody stands before the bound"
            if only_grew:
                assert sorted(held) == sorted(best(counts, self.ids, self.heap.shape[1]))
                # So the heap always answers for certain.
                assert not bound or max(self.key(e, counts[e]) for e in held) < self.key(bound - 1, bound_count)
        assert self.rows[:, 3].tolist() == places.tolist()
        assert (self.rows[:, [0, 1, 4, 5]] == 77).all()


# --- Heaps ------------------------------------------------------------------------------------------------------------


@examples(250)
@given(data=st.data(), ids=st.permutations(IDS), size=st.integers(1, 6), charts=st.integers(1, 3))
def test_heaps_hold_the_best_after_every_batch(
    kernels: Kernels, data: st.DataObject, ids: list[str], size: int, charts: int
) -> None:
    songs = songs_of(kernels, ids)
    if charts == 1:
        entries = [(0, song) for song in range(len(ids))]
    else:
        pairs = st.tuples(st.integers(0, charts - 1), st.integers(0, len(ids) - 1))
        entries = data.draw(st.lists(pairs, unique=True, min_size=1, max_size=40))
    board = Board(kernels, songs, entries, size, alone=charts == 1)
    # Small counts make ties, and several changes of one entry in a batch are the rule.
    change = st.tuples(st.integers(0, len(entries) - 1), st.integers(1, 3))
    for batch in data.draw(st.lists(st.lists(change, max_size=25), max_size=8)):
        board.play(batch)
        board.check()


@examples(250)
@given(data=st.data(), ids=st.permutations(IDS), size=st.integers(1, 6), charts=st.integers(1, 3))
def test_what_counts_fall_to_leaves_the_bound_true(
    kernels: Kernels, data: st.DataObject, ids: list[str], size: int, charts: int
) -> None:
    songs = songs_of(kernels, ids)
    entries = [(song % charts, song) for song in range(len(ids))]
    board = Board(kernels, songs, entries, size, alone=charts == 1)
    change = st.tuples(st.integers(0, len(entries) - 1), st.integers(1, 3))
    known: list[tuple[int, int]] = []
    for batch, falls in data.draw(st.lists(st.tuples(st.lists(change, max_size=25), st.booleans()), max_size=8)):
        if falls:  # some of what was counted leaves again
            leaving = data.draw(st.lists(st.sampled_from(known), max_size=20)) if known else []
            leaving = [one for at, one in enumerate(leaving) if leaving[:at].count(one) < known.count(one)]
            for one in leaving:
                known.remove(one)
            board.play(leaving, -1)
        else:
            known += batch
            board.play(batch)
        board.check(only_grew=False)
    board.play(known, -1)
    board.check(only_grew=False)
    assert not board.totals.any()


def test_many_entries(kernels: Kernels) -> None:
    random = np.random.default_rng(11)
    songs = songs_of(kernels, [f"song {'é' * (i % 3)}{i}" for i in range(1000)])
    entries = [(int(chart), song) for song in range(1000) for chart in random.permutation(4)[:2]]
    board = Board(kernels, songs, entries, 100, alone=False)
    for _ in range(40):
        rows = kernels.sized(4000)
        changed = np.minimum(random.zipf(1.3, rows), len(entries)) - 1
        board.play(list(zip(changed.tolist(), random.integers(1, 3, rows).tolist(), strict=True)))
        board.check()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_ties_are_settled_by_id(kernels: Kernels, size: int) -> None:
    songs = songs_of(kernels, IDS)
    for order in (range(len(IDS)), reversed(range(len(IDS)))):
        board = Board(kernels, songs, [(0, song) for song in range(len(IDS))], size, alone=True)
        for song in order:
            board.play([(song, 1)])
            board.check()
        assert {songs.ids[song] for song in board.heap[0].tolist()} == set(sorted(songs.ids)[:size])


def test_all_entries_change_at_once(kernels: Kernels) -> None:
    songs = songs_of(kernels, IDS)
    board = Board(kernels, songs, [(0, song) for song in range(len(IDS))], 5, alone=True)
    every = list(range(len(IDS)))
    board.play([(song, 1 + song) for song in every])
    board.check()
    board.play([(song, 100 - 2 * song) for song in every])  # the order turns round
    board.check()
    board.play([(song, 3 * song) for song in reversed(every)])
    board.check()


def test_nothing_has_changed(kernels: Kernels) -> None:
    board = Board(kernels, songs_of(kernels, IDS), [(0, 0)], 3, alone=True)
    board.play([])
    board.check()


# --- Selection and places ---------------------------------------------------------------------------------------------

offers = st.dictionaries(
    st.integers(0, len(IDS) - 1), st.one_of(st.integers(-1, 3), st.just((1 << 63) - 1)), max_size=len(IDS)
)


@examples(200)
@given(data=st.data(), counts=offers, k=st.integers(0, len(IDS) + 2), shifted=st.booleans())
def test_select(kernels: Kernels, data: st.DataObject, counts: dict[int, int], k: int, shifted: bool) -> None:
    songs = songs_of(kernels, IDS)
    # With `shifted` entry e is of song e - 5.
    of_entry = np.array([0] * 5 + list(range(len(IDS))) if shifted else [], np.int32)
    first = 5 if shifted else 0
    ids = {entry + first: songs.ids[entry] for entry in counts}
    offered = {entry + first: count for entry, count in counts.items()}
    order = data.draw(st.permutations(list(offered)))
    entries, found = kernels.heap.select(
        of_entry,
        songs.starts,
        songs.arena,
        np.array(order, np.int32),
        np.array([offered[e] for e in order], np.int64),
        k,
    )
    assert entries.tolist() == best(offered, ids, k)
    assert found.tolist() == [offered[entry] for entry in entries.tolist()]


def test_select_among_many(kernels: Kernels) -> None:
    random = np.random.default_rng(13)
    rows = kernels.sized(20_000)
    texts = [f"{i % 7}{'é' * (i % 3)}{i}" for i in range(rows)]
    songs = songs_of(kernels, texts)
    counts = random.integers(0, 20, rows)
    ids = dict(enumerate(songs.ids))
    everything = np.arange(rows, dtype=np.int32)
    for k in (1, 2, 100, rows, rows + 1):
        entries, _ = kernels.heap.select(np.empty(0, np.int32), songs.starts, songs.arena, everything, counts, k)
        assert entries.tolist() == best(dict(enumerate(counts.tolist())), ids, k)
        last, _ = kernels.heap.select(
            np.empty(0, np.int32), songs.starts, songs.arena, everything, counts, k, backwards=True
        )
        assert last.tolist() == best(dict(enumerate(counts.tolist())), ids, rows)[::-1][:k]


@examples(200)
@given(counts=offers, place=st.sampled_from([*IDS, "a\x00", "aab", "éa", "unknown"]), count=st.integers(1, 3))
def test_compare_with(kernels: Kernels, counts: dict[int, int], place: str, count: int) -> None:
    songs = songs_of(kernels, IDS)
    sides = np.full(len(counts), 9, np.int8)
    song_id = place.encode()
    kernels.heap.compare_with(
        np.empty(0, np.int32), songs.starts, songs.arena,
        np.array(list(counts), np.int32), np.array(list(counts.values()), np.int64),
        song_id, len(song_id), count, sides, len(counts),
    )  # fmt: skip
    here = (-count, song_id)
    expected = [
        0 if c <= 0 or (-c, songs.ids[entry]) == here else 1 if (-c, songs.ids[entry]) < here else -1
        for entry, c in counts.items()
    ]
    assert sides.tolist() == expected


def test_rank_is_one_more_than_those_before(kernels: Kernels) -> None:
    songs = songs_of(kernels, IDS)
    counts = dict(enumerate([3, 1, 2, 2, 2, 1, 1, 3, 3, 1, 2, 1, 3, 2, 1, 1]))
    ids = dict(enumerate(songs.ids))
    of_entry = np.arange(len(IDS), dtype=np.int32)
    for rank, entry in enumerate(best(counts, ids, len(IDS)), 1):
        sides = np.empty(len(IDS), np.int8)
        kernels.heap.compare_with(
            of_entry, songs.starts, songs.arena, of_entry, np.array(list(counts.values()), np.int64),
            ids[entry], len(ids[entry]), counts[entry], sides, len(IDS),
        )  # fmt: skip
        assert np.count_nonzero(sides == 1) == rank - 1
        assert np.flatnonzero(sides == 0).tolist() == [entry]
