"""Producers' marks, against the sets of sequences that each slot has counted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples
from tests.kernels.test_strings import longest_run

UNTOUCHED, APPLY, DUPLICATE, NOT_OWNER = range(4)
SLOTS = 6
ALL = list(range(SLOTS))
SEQUENCE_MAX = (1 << 64) - 1


class NaiveMarks:
    """The rule, word by word: unseen and at most 64 below the highest counts, and so does anything above it."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], set[int]] = defaultdict(set)

    def decide(self, touched: list[int], owned: list[int], producer: int, sequence: int) -> list[int]:
        verdicts = [UNTOUCHED] * SLOTS
        for slot in touched:
            if slot not in owned:
                verdicts[slot] = NOT_OWNER
                continue
            seen = self.seen[producer, slot]
            if seen and (sequence in seen or sequence < max(seen) - 64):
                verdicts[slot] = DUPLICATE
            else:
                seen.add(sequence)
                verdicts[slot] = APPLY
        return verdicts

    def forget(self, producers: list[int]) -> None:
        for producer, slot in list(self.seen):
            if producer in producers:
                del self.seen[producer, slot]

    def __len__(self) -> int:
        return sum(1 for seen in self.seen.values() if seen)


def decide(table: Any, touched: list[int], owned: list[int], producer: int, sequence: int, slots: int = SLOTS) -> Any:
    verdicts, flags = np.zeros(slots, np.uint8), np.zeros(slots, np.uint8)
    verdicts[touched] = APPLY
    flags[owned] = 1
    occurred = table.decide(verdicts, flags, producer, sequence)
    assert occurred == sum(1 << verdict for verdict in set(verdicts.tolist()) - {UNTOUCHED})
    return verdicts.tolist()


steps = st.one_of(st.integers(-70, 70), st.sampled_from([0, 1, 1, 1, 2, 63, 64, 65, 66, 200, -1, -63, -64, -65, -66]))
slot_sets = st.one_of(st.just(ALL), st.lists(st.integers(0, SLOTS - 1), unique=True))
actions = st.one_of(
    st.tuples(st.just("batch"), st.integers(0, 2), steps, slot_sets, st.one_of(st.just(ALL), slot_sets)),
    st.tuples(st.just("batch"), st.just(0), steps, st.just(ALL), st.just(ALL)),
    st.tuples(st.just("forget"), st.lists(st.integers(0, 2), unique=True)),
    st.tuples(st.just("reload")),
)


@examples(250)
@given(actions=st.lists(actions, max_size=60), first=st.sampled_from([1, 1000, (1 << 63) - 100, SEQUENCE_MAX - 5000]))
def test_batches_in_any_order(kernels: Kernels, actions: list[Any], first: int) -> None:
    table, naive = kernels.marks.MarkTable(), NaiveMarks()
    sequence = [first] * 3
    for kind, *arguments in actions:
        if kind == "batch":
            producer, step, touched, owned = arguments
            sequence[producer] = max(1, min(SEQUENCE_MAX, sequence[producer] + step))
            expected = naive.decide(touched, owned, producer, sequence[producer])
            assert decide(table, touched, owned, producer, sequence[producer]) == expected
        elif kind == "forget":
            table.forget(np.array(arguments[0], np.uint64))
            naive.forget(arguments[0])
        else:
            table = kernels.marks.MarkTable.from_arrays(table.to_arrays())
        assert len(table) == len(naive)


@pytest.mark.parametrize("jump", [1, 2, 62, 63, 64, 65, 66, 127, 128, 1 << 40])
def test_jump_keeps_the_64_below(kernels: Kernels, jump: int) -> None:
    table, naive = kernels.marks.MarkTable(), NaiveMarks()
    order = [100, 99, 60, 37, 36, 35, 100 + jump, *range(100 + jump, 100 + jump - 70, -1), *range(30, 101)]
    for sequence in order:
        assert decide(table, [2], ALL, 7, sequence) == naive.decide([2], ALL, 7, sequence), sequence


@pytest.mark.parametrize(("behind", "verdict"), [(0, DUPLICATE), (1, APPLY), (63, APPLY), (64, APPLY), (65, DUPLICATE)])
def test_what_was_not_seen_counts_up_to_64_behind(kernels: Kernels, behind: int, verdict: int) -> None:
    table = kernels.marks.MarkTable()
    decide(table, [0], ALL, 1, 1000)
    assert decide(table, [0], ALL, 1, 1000 - behind)[0] == verdict
    assert decide(table, [0], ALL, 1, 1000 - behind)[0] == DUPLICATE


def test_each_slot_has_marks_of_its_own(kernels: Kernels) -> None:
    table = kernels.marks.MarkTable()
    decide(table, [0, 1], ALL, 1, 5)
    assert decide(table, [1, 2], [0, 2], 1, 5) == [0, NOT_OWNER, APPLY, 0, 0, 0]
    assert decide(table, ALL, ALL, 1, 5) == [DUPLICATE] * 3 + [APPLY] * 3
    assert decide(table, ALL, ALL, 2, 5) == [APPLY] * SLOTS


def test_slot_of_another_shard_sets_no_mark(kernels: Kernels) -> None:
    table = kernels.marks.MarkTable()
    assert decide(table, ALL, [], 1, 5) == [NOT_OWNER] * SLOTS
    assert len(table) == 0
    assert decide(table, ALL, ALL, 1, 5) == [APPLY] * SLOTS


def test_many_producers(kernels: Kernels) -> None:
    table, naive = kernels.marks.MarkTable(), NaiveMarks()
    producers = kernels.sized(6000)
    random = np.random.default_rng(7)
    for sequence in range(1, 4):
        for producer in random.permutation(producers).tolist():
            slot = producer % SLOTS
            assert decide(table, [slot], ALL, producer, sequence) == naive.decide([slot], ALL, producer, sequence)
    assert len(table) == producers
    table.forget(np.arange(0, producers, 2, dtype=np.uint64))
    assert len(table) == producers // 2
    again = kernels.marks.MarkTable.from_arrays(table.to_arrays())
    for producer in range(producers):
        verdict = APPLY if producer % 2 == 0 else DUPLICATE
        assert decide(again, [producer % SLOTS], ALL, producer, 3)[producer % SLOTS] == verdict
    assert table.memory_bytes >= 24 * len(table)


@pytest.mark.parametrize("slots", [1, 1024, 4096, 65_536])
def test_batch_that_touches_every_slot(kernels: Kernels, slots: int) -> None:
    table = kernels.marks.MarkTable()
    every = list(range(slots))
    for producer in (0, (1 << 32) - 1):
        assert set(decide(table, every, every, producer, 3, slots)) == {APPLY}
        assert set(decide(table, every, every, producer, 3, slots)) == {DUPLICATE}
        assert set(decide(table, every, every, producer, 2, slots)) == {APPLY}
    assert len(table) == 2 * slots


def test_empty_table(kernels: Kernels) -> None:
    table = kernels.marks.MarkTable.from_arrays(kernels.marks.MarkTable().to_arrays())
    table.forget(np.array([1], np.uint64))
    assert len(table) == 0
    assert decide(table, [3], ALL, 0, 1)[3] == APPLY


def test_snapshots_arrays_are_left_alone(kernels: Kernels) -> None:
    table = kernels.marks.MarkTable()
    decide(table, ALL, ALL, 1, 5)
    arrays = table.to_arrays()
    decide(table, ALL, ALL, 1, 6)
    assert arrays["highest"].tolist() == [5] * SLOTS
    assert decide(kernels.marks.MarkTable.from_arrays(arrays), ALL, ALL, 1, 6) == [APPLY] * SLOTS


@pytest.mark.parametrize("slot", [0, 1, 511, 1023])
def test_marks_of_one_slot_spread_over_the_table(kernels: Kernels, slot: int) -> None:
    rows = 4096
    marks = (np.arange(rows, dtype=np.uint64) << np.uint64(32)) + np.uint64(slot + 1)
    keys, highest, bitmaps = (np.zeros(2 * rows, np.uint64) for _ in range(3))
    kernels.marks.enter(marks, marks, marks, keys, highest, bitmaps)
    assert np.count_nonzero(keys) == rows
    assert longest_run(keys) < 200


@examples(60)
@given(hashes=st.lists(st.integers(0, SEQUENCE_MAX), max_size=30), slots=st.sampled_from([1, 2, 7, 1024]))
def test_slots_of_plays(kernels: Kernels, hashes: list[int], slots: int) -> None:
    found, verdicts = np.empty(len(hashes), np.int32), np.zeros(slots, np.uint8)
    kernels.marks.touch_slots(np.array(hashes, np.uint64), len(hashes), found, verdicts)
    assert found.tolist() == [one % slots for one in hashes]
    assert np.flatnonzero(verdicts).tolist() == sorted({one % slots for one in hashes})
    assert set(verdicts.tolist()) <= {UNTOUCHED, APPLY}


def test_verdicts_are_called_what_they_are_outside(kernels: Kernels) -> None:
    marks = kernels.marks
    assert (marks.UNTOUCHED, marks.APPLY, marks.DUPLICATE, marks.NOT_OWNER) == (UNTOUCHED, APPLY, DUPLICATE, NOT_OWNER)
