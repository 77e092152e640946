"""Which slots a shard owns, which it gives away, and which are on their way to it.

What a migration is to one of its two shards, as a table of states and events:

    state \\ event   freeze    export     import     commit          abort
    (none)          frozen    ·          imported   ·               ·
    frozen          ·         exported   ·          (none) dropped  (none) owned on
    exported        ·         exported   ·          (none) dropped  (none) owned on
    imported        ·         ·          ·          (none) owned    (none) image dropped

Everything else is refused. `freeze`, `import` and the outcome are records of the log; that a frozen slot was exported
is not, so a shard that starts takes it for granted. Of a frozen slot no plays are taken; queries are answered from it
until it is exported, for from then on the target may count plays that this shard knows nothing of. The plays of an
exported slot stand among all others until the outcome is known, so what this shard would answer meanwhile, of whatever
slots, would hold plays that the target tells of as well: it answers for none. An outcome is never decided here: it is
what the topology says (migration/records.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import MigrationError


class Part(StrEnum):
    """How far a migration has come at one of its shards."""

    FROZEN = "frozen"
    EXPORTED = "exported"
    IMPORTED = "imported"


class Step(StrEnum):
    """What happens to a migration at one of its shards."""

    FREEZE = "freeze"
    EXPORT = "export"
    IMPORT = "import"
    COMMIT = "commit"
    ABORT = "abort"


TRANSITIONS: Final[Mapping[tuple[Part | None, Step], Part | None]] = MappingProxyType({
    (None, Step.FREEZE): Part.FROZEN,
    (None, Step.IMPORT): Part.IMPORTED,
    (Part.FROZEN, Step.EXPORT): Part.EXPORTED,
    (Part.EXPORTED, Step.EXPORT): Part.EXPORTED,
    **{(part, step): None for part in Part for step in (Step.COMMIT, Step.ABORT)},
})  # fmt: skip
"""What each step makes of each state; None: the shard has nothing to do with the migration, or no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A migration whose outcome this shard does not know yet.

    Attributes:
        migration_id: its number.
        part: how far it has come here.
        slots: ascending.
        other: the target, where the slots are given away; the source, where they come from.
        image: of the slots, where they come from another shard; empty otherwise.
    """

    migration_id: int
    part: Part
    slots: tuple[int, ...]
    other: str
    image: bytes = field(default=b"", repr=False)

    @property
    def incoming(self) -> bool:
        """Whether the slots are on their way to this shard."""
        return self.part is Part.IMPORTED


class Ownership:
    """The slots of one shard. One writer.

    Args:
        slots: of the cluster.

    Attributes:
        owned: uint8[slots], 1 where this shard takes plays of the slot.
        held: migrations without an outcome here, by number.
        gone_to: the shard that a slot was given to at last, for those that this one owned once.
    """

    def __init__(self, slots: int) -> None:
        self.owned: NDArray[np.uint8] = np.zeros(slots, np.uint8)
        self.held: dict[int, Held] = {}
        self.gone_to: dict[int, str] = {}

    def own(self, slots: Iterable[int]) -> None:
        """Takes plays of these slots from here on."""
        for slot in slots:
            self.owned[slot] = 1
            self.gone_to.pop(slot, None)

    @property
    def answered(self) -> NDArray[np.uint8]:
        """uint8[slots], 1 for those whose plays are what this shard's answers tell of, all of them and no others."""
        parts = {held.part for held in self.held.values()}
        if Part.EXPORTED in parts:
            return np.zeros_like(self.owned)
        answered = self.owned.copy()
        for held in self.held.values():
            if held.part is Part.FROZEN:
                answered[list(held.slots)] = 1
        return answered

    @property
    def image_bytes(self) -> int:
        """Bytes of all images that are held."""
        return sum(len(held.image) for held in list(self.held.values()))

    def going_to(self, slot: int) -> str:
        """The shard that a slot goes to or has gone to; empty where this one knows of none."""
        for held in self.held.values():
            if not held.incoming and slot in held.slots:
                return held.other
        return self.gone_to.get(slot, "")

    # --- Steps --------------------------------------------------------------------------------------------------------

    def check(self, migration_id: int, step: Step) -> Part | None:
        """What a step makes of a migration.

        Raises:
            MigrationError: its state does not allow the step.
        """
        held = self.held.get(migration_id)
        key = held.part if held else None, step
        if key not in TRANSITIONS:
            state = f"is {held.part} here" if held else "is nothing that this shard takes part in"
            raise MigrationError(f"migration {migration_id} {state}: it cannot {step}")
        return TRANSITIONS[key]

    def check_freeze(self, migration_id: int, slots: Sequence[int]) -> None:
        """Whether slots can be frozen.

        Raises:
            MigrationError: the migration is under way here, or this shard does not own all of the slots.
        """
        self.check(migration_id, Step.FREEZE)
        if not slots or not self.owned[list(slots)].all():
            raise MigrationError(f"migration {migration_id}: this shard does not own all of its slots, or moves some")

    def freeze(self, migration_id: int, slots: Sequence[int], target: str) -> None:
        """Takes no more plays of slots.

        Raises:
            MigrationError: as `check_freeze`.
        """
        self.check_freeze(migration_id, slots)
        self.owned[list(slots)] = 0
        self.held[migration_id] = Held(migration_id, Part.FROZEN, tuple(slots), target)

    def export(self, migration_id: int) -> tuple[int, ...]:
        """Answers no more queries, and says which slots are frozen.

        Raises:
            MigrationError: they are not frozen.
        """
        self.check(migration_id, Step.EXPORT)
        self.held[migration_id] = replace(self.held[migration_id], part=Part.EXPORTED)
        return self.held[migration_id].slots

    def assume_exported(self) -> None:
        """Takes any frozen slot for exported: whether it was is not remembered over a start."""
        for held in list(self.held.values()):
            if held.part is Part.FROZEN:
                self.export(held.migration_id)

    def check_import(self, migration_id: int, slots: Sequence[int]) -> None:
        """Whether the image of slots can be held.

        Raises:
            MigrationError: the migration is under way here, or this shard owns one of the slots or has them in another.
        """
        self.check(migration_id, Step.IMPORT)
        moving = {slot for held in self.held.values() for slot in held.slots}
        if not slots or self.owned[list(slots)].any() or moving & set(slots):
            raise MigrationError(f"migration {migration_id}: this shard owns one of its slots, or moves some")

    def take_in(self, migration_id: int, slots: Sequence[int], source: str, image: bytes) -> None:
        """Holds the image of slots.

        Raises:
            MigrationError: as `check_import`.
        """
        self.check_import(migration_id, slots)
        self.held[migration_id] = Held(migration_id, Part.IMPORTED, tuple(slots), source, image)

    def settle(self, migration_id: int, *, committed: bool) -> Held:
        """Ends a migration, and owns what follows from that.

        Returns:
            What it was. The caller counts its image or drops its slots, where it was committed.

        Raises:
            MigrationError: it is not under way here.
        """
        self.check(migration_id, Step.COMMIT if committed else Step.ABORT)
        held = self.held.pop(migration_id)
        if held.incoming == committed:
            self.own(held.slots)
        elif not held.incoming:
            self.gone_to.update(dict.fromkeys(held.slots, held.other))
        return held

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_snapshot(self) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
        """What JSON holds, and the images."""
        meta = {
            "owned": np.flatnonzero(self.owned).tolist(),
            "held": [[held.migration_id, held.part.value, list(held.slots), held.other] for held in self.held.values()],
            "gone_to": [[slot, shard] for slot, shard in self.gone_to.items()],
        }
        return meta, {f"{held.migration_id}": np.frombuffer(held.image, np.uint8) for held in self.held.values()}

    @classmethod
    def from_snapshot(cls, slots: int, meta: Mapping[str, Any], images: Mapping[str, NDArray[np.generic]]) -> Ownership:
        """The ownership that `to_snapshot` described.

        Raises:
            KeyError, TypeError, ValueError: something is missing from it, or of another kind.
        """
        ownership = cls(slots)

        def checked(slot: int) -> int:
            if not 0 <= slot < slots:
                raise ValueError(f"slot {slot} is none of the {slots} of the cluster")
            return int(slot)

        ownership.own(map(checked, meta["owned"]))
        for number, part, moving, other in meta["held"]:
            image = images[f"{number}"].tobytes()
            ownership.held[int(number)] = Held(int(number), Part(part), tuple(map(checked, moving)), str(other), image)
        ownership.gone_to = {checked(slot): str(shard) for slot, shard in meta["gone_to"]}
        return ownership
