"""Sessions carried forward play by play, against a list of plays."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples

ENTRIES, GAP, FINEST, SETTLED, END = 3, 4, 5, 10, 60
LOW = END - 1 - GAP

plays_of_batches = st.lists(
    st.lists(st.tuples(st.integers(0, ENTRIES - 1), st.integers(0, END + 5), st.integers(1, 3)), max_size=8), max_size=6
)


def last_session(buckets: dict[int, int]) -> tuple[int, int, int] | None:
    """First bucket, last bucket and plays of the last session."""
    left = sorted(buckets)
    if not left:
        return None
    session = [left.pop()]
    while left and session[-1] - left[-1] <= GAP:
        session.append(left.pop())
    return session[-1], session[0], sum(buckets[bucket] for bucket in session)


def column(values: Any, kind: Any = np.int64) -> Any:
    return np.array(list(values), kind)


@examples(300)
@given(batches=plays_of_batches, in_order=st.booleans())
def test_what_is_clear_is_right_and_what_is_not_is_named(
    kernels: Kernels, batches: list[list[tuple[int, int, int]]], in_order: bool
) -> None:
    starts, lasts, plays, priors = (np.zeros(ENTRIES, np.int64) for _ in range(4))
    open_plays = np.zeros(ENTRIES, np.int64)
    joined: list[dict[int, int]] = [{} for _ in range(ENTRIES)]
    unclear: set[int] = set()
    if in_order:
        flat = sorted((play for batch in batches for play in batch), key=lambda play: play[1])
        batches = [flat[at : at + 4] for at in range(0, len(flat), 4)]
    for batch in batches:
        rows = len(batch)
        changed, deltas, left = np.zeros(rows, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int32)
        results = np.zeros(2, np.int64)
        kernels.sessions.carry_forward(
            starts, lasts, plays, priors, column((e for e, _, _ in batch), np.int32), column(b for _, b, _ in batch),
            column(c for _, _, c in batch), FINEST, SETTLED, LOW, END, GAP, changed, deltas, left, results, rows,
        )  # fmt: skip
        for entry, bucket, count in batch:
            if FINEST <= bucket < END:
                joined[entry][bucket] = joined[entry].get(bucket, 0) + count
        for entry, delta in zip(changed[: results[0]].tolist(), deltas[: results[0]].tolist(), strict=True):
            open_plays[entry] += delta
        unclear |= set(left[: results[1]].tolist())
        for entry in set(range(ENTRIES)) - unclear:
            expected = last_session(joined[entry])
            if plays[entry]:
                assert expected == (starts[entry], lasts[entry], plays[entry])
            else:
                assert expected is None or expected[1] < SETTLED, "nothing is known of what ended before that"
            assert open_plays[entry] == (plays[entry] if lasts[entry] >= LOW else 0)
            if plays[entry]:
                assert not any(priors[entry] < bucket < starts[entry] for bucket in joined[entry])
        if in_order:  # then only plays that may touch what is not kept are unclear
            assert all(min(joined[entry]) - GAP < SETTLED for entry in unclear)


def test_plays_taken_back_from_a_session_are_left_to_the_caller(kernels: Kernels) -> None:
    starts, lasts, plays, priors = column([20, 20]), column([30, 30]), column([5, 5]), column([9, 9])
    left, results = np.zeros(3, np.int32), np.zeros(2, np.int64)
    kernels.sessions.carry_forward(
        starts, lasts, plays, priors, column([0, 1, 1], np.int32), column([25, 10, 2]), column([-1, -1, -1]),
        FINEST, SETTLED, LOW, END, GAP, np.zeros(3, np.int32), np.zeros(3, np.int64), left, results, 3,
    )  # fmt: skip
    assert results.tolist() == [0, 1]
    assert left[0] == 0
    assert plays.tolist() == [5, 5]


def test_a_late_play_prolongs_a_session_at_its_beginning_unless_it_may_join_another(kernels: Kernels) -> None:
    starts, lasts, plays, priors = (np.zeros(1, np.int64) for _ in range(4))

    def take(*buckets: int) -> bool:
        rows = len(buckets)
        left, results = np.zeros(rows, np.int32), np.zeros(2, np.int64)
        kernels.sessions.carry_forward(
            starts, lasts, plays, priors, np.zeros(rows, np.int32), column(buckets), np.ones(rows, np.int64),
            FINEST, SETTLED, LOW, END, GAP, np.zeros(rows, np.int32), np.zeros(rows, np.int64), left, results, rows,
        )  # fmt: skip
        return not results[1]

    assert take(20, 40, 38, 36)
    assert (starts[0], lasts[0], plays[0]) == (36, 40, 3)
    assert take(28)  # of another session, in between
    assert take(33)
    assert (starts[0], plays[0]) == (33, 4)
    assert not take(32)  # the play at 28 is near
    assert (starts[0], plays[0]) == (33, 4)
