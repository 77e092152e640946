"""What a shard owns, gives away and is given: every step in every state, and random ones against a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc.engine.ownership import TRANSITIONS, Ownership, Part, Step
from topk_grpc.errors import MigrationError

SLOTS = 6


def in_state(part: Part | None) -> Ownership:
    ownership = Ownership(SLOTS)
    ownership.own([0, 1, 2])
    if part is Part.IMPORTED:
        ownership.take_in(1, [4, 5], "other", b"image")
    elif part is not None:
        ownership.freeze(1, [1, 2], "other")
        if part is Part.EXPORTED:
            ownership.export(1)
    return ownership


def take(ownership: Ownership, step: Step, migration_id: int = 1) -> None:
    match step:
        case Step.FREEZE:
            ownership.freeze(migration_id, [1, 2], "other")
        case Step.EXPORT:
            ownership.export(migration_id)
        case Step.IMPORT:
            ownership.take_in(migration_id, [4, 5], "other", b"image")
        case _:
            ownership.settle(migration_id, committed=step is Step.COMMIT)


OWNED: dict[tuple[Part | None, Step], set[int]] = {
    (None, Step.FREEZE): {0},
    (None, Step.IMPORT): {0, 1, 2},
    (Part.FROZEN, Step.EXPORT): {0},
    (Part.FROZEN, Step.COMMIT): {0},
    (Part.FROZEN, Step.ABORT): {0, 1, 2},
    (Part.EXPORTED, Step.EXPORT): {0},
    (Part.EXPORTED, Step.COMMIT): {0},
    (Part.EXPORTED, Step.ABORT): {0, 1, 2},
    (Part.IMPORTED, Step.COMMIT): {0, 1, 2, 4, 5},
    (Part.IMPORTED, Step.ABORT): {0, 1, 2},
}


@pytest.mark.parametrize(("part", "step"), [(part, step) for part in (None, *Part) for step in Step])
def test_every_step_in_every_state(part: Part | None, step: Step) -> None:
    ownership = in_state(part)
    before = ownership.owned.tolist()
    if (part, step) not in TRANSITIONS:
        with pytest.raises(MigrationError, match=f"cannot {step}"):
            take(ownership, step)
        assert ownership.owned.tolist() == before
        return
    take(ownership, step)
    held = ownership.held.get(1)
    assert (held.part if held else None) == TRANSITIONS[part, step]
    owned = OWNED[part, step]
    assert set(np.flatnonzero(ownership.owned).tolist()) == owned
    # What is frozen is still told of; once it is exported, nothing is, as the plays of all slots stand together.
    answered = owned | ({1, 2} if held and held.part is Part.FROZEN else set())
    answered = set() if held and held.part is Part.EXPORTED else answered
    assert set(np.flatnonzero(ownership.answered).tolist()) == answered
    gone = (held is not None and not held.incoming) or (step is Step.COMMIT and part is not Part.IMPORTED)
    going_to = {slot: ownership.going_to(slot) for slot in range(SLOTS) if ownership.going_to(slot)}
    assert going_to == ({1: "other", 2: "other"} if gone else {})


@pytest.mark.parametrize("slots", [[], [3], [0, 3], [2, 4]])
def test_only_what_is_owned_and_does_not_move_can_be_frozen(slots: list[int]) -> None:
    ownership = in_state(Part.FROZEN)
    with pytest.raises(MigrationError):
        ownership.freeze(2, slots, "other")
    with pytest.raises(MigrationError):
        ownership.freeze(2, [1], "third")


@pytest.mark.parametrize("slots", [[], [0], [4], [3, 5], [1]])
def test_only_what_is_neither_owned_nor_moves_can_come_in(slots: list[int]) -> None:
    ownership = in_state(Part.FROZEN)
    ownership.take_in(3, [4, 5], "other", b"")
    with pytest.raises(MigrationError):
        ownership.take_in(2, slots, "other", b"")


def test_a_slot_that_has_come_back_is_gone_to_nobody() -> None:
    ownership = in_state(Part.EXPORTED)
    ownership.settle(1, committed=True)
    ownership.take_in(2, [1, 2], "other", b"image")
    assert ownership.going_to(1) == "other"
    ownership.settle(2, committed=True)
    assert not ownership.going_to(1)
    assert ownership.image_bytes == 0


@given(st.lists(st.tuples(st.sampled_from(Step), st.integers(1, 3), st.sets(st.integers(0, SLOTS - 1))), max_size=20))
def test_a_snapshot_between_any_steps_changes_nothing(steps: list[tuple[Step, int, set[int]]]) -> None:
    ownership = in_state(None)
    for step, number, slots in steps:
        try:
            match step:
                case Step.FREEZE:
                    ownership.freeze(number, sorted(slots), f"to-{number}")
                case Step.IMPORT:
                    ownership.take_in(number, sorted(slots), f"from-{number}", bytes(slots))
                case _:
                    take(ownership, step, number)
        except MigrationError:
            continue
        meta, images = ownership.to_snapshot()
        again = Ownership.from_snapshot(SLOTS, json.loads(json.dumps(meta)), images)
        assert again.to_snapshot()[0] == meta
        assert [one.image for one in again.held.values()] == [one.image for one in ownership.held.values()]
        assert again.answered.tolist() == ownership.answered.tolist()
        assert [again.going_to(slot) for slot in range(SLOTS)] == [ownership.going_to(slot) for slot in range(SLOTS)]
        ownership = again


@pytest.mark.parametrize(
    "change",
    [
        {"owned": [SLOTS]},
        {"owned": [-1]},
        {"owned": None},
        {"held": [[1, "thawed", [0], "b"]]},
        {"held": [[2, "frozen", [0], "b"]]},
        {"held": [[1, "frozen", [SLOTS], "b"]]},
        {"held": [[1]]},
        {"gone_to": [[SLOTS, "b"]]},
    ],
)
def test_a_senseless_snapshot_is_refused(change: dict[str, object]) -> None:
    meta, images = in_state(Part.FROZEN).to_snapshot()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Ownership.from_snapshot(SLOTS, meta | change, images)
