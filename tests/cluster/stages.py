"""Every state that a migration can stand in, and how it gets there: from the tables of its record and of its shards.

A stage is a list of steps, and what they come to: the record in the topology, what the migration is to its source, and
what to its target. Shards act on an outcome as soon as they see it. So where one is not to have heard of it yet it is
stopped (SIGSTOP) before the outcome is decided, and gone on with after somebody was killed. There are two shards, A and
B: first only A is stopped, then B as well. A migration whose source hears first therefore goes from B to A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from topk_grpc.engine import ownership
from topk_grpc.engine.ownership import Part, Step
from topk_grpc.migration import records
from topk_grpc.migration.records import Event
from topk_grpc.model import MigrationState

BEGIN, FREEZE, EXPORT, IMPORT = "begin", "freeze", "export", "import"
COMMIT, ABORT = "commit", "abort"
TELL_SOURCE, TELL_TARGET, SETTLE = "tell source", "tell target", "settle"

State = tuple[MigrationState | None, Part | None, Part | None]
Transition = tuple[str, object, object]


@dataclass(frozen=True)
class Stage:
    """One state, of record, source and target.

    Attributes:
        name: what a reader may call it.
        steps: how it gets there.
        record, source, target: where it stands then.
    """

    name: str
    steps: tuple[str, ...]
    record: MigrationState | None
    source: Part | None = None
    target: Part | None = None

    @property
    def outcome(self) -> str:
        """COMMIT or ABORT; empty: nobody has decided."""
        return next((step for step in self.steps if step in {COMMIT, ABORT}), "")

    @property
    def waits_for(self) -> int:
        """How many of its two shards have not heard of the outcome; 0 where there is none."""
        return sum(part is not None for part in (self.source, self.target)) if self.outcome else 0

    @property
    def reverse(self) -> bool:
        """Whether it goes from B to A: the target is the one that has not heard of it."""
        return self.waits_for == 1 and self.target is not None


_COPIED: Final = (BEGIN, FREEZE, IMPORT)
_BOTH: Final = (TELL_TARGET, TELL_SOURCE)
_MOVING, _COMMITTED, _ABORTED = MigrationState.MOVING, MigrationState.COMMITTED, MigrationState.ABORTED

STAGES: Final = (
    Stage("begun", (BEGIN,), _MOVING),
    Stage("frozen", (BEGIN, FREEZE), _MOVING, Part.FROZEN),
    Stage("exported", (BEGIN, FREEZE, EXPORT), _MOVING, Part.EXPORTED),
    Stage("imported", (BEGIN, FREEZE, EXPORT, IMPORT), _MOVING, Part.EXPORTED, Part.IMPORTED),
    Stage("committed", (*_COPIED, COMMIT), _COMMITTED, Part.EXPORTED, Part.IMPORTED),
    Stage("committed, the target serves", (*_COPIED, COMMIT, TELL_TARGET), _COMMITTED, Part.EXPORTED),
    Stage("committed, the source has dropped", (*_COPIED, COMMIT, TELL_SOURCE), _COMMITTED, None, Part.IMPORTED),
    Stage("committed, both know", (*_COPIED, COMMIT, *_BOTH), _COMMITTED),
    Stage("committed and settled", (*_COPIED, COMMIT, *_BOTH, SETTLE), None),
    Stage("aborted before anything", (BEGIN, ABORT), _ABORTED),
    Stage("aborted, frozen", (BEGIN, FREEZE, ABORT), _ABORTED, Part.FROZEN),
    Stage("aborted, exported", (BEGIN, FREEZE, EXPORT, ABORT), _ABORTED, Part.EXPORTED),
    Stage("aborted, imported", (*_COPIED, ABORT), _ABORTED, Part.EXPORTED, Part.IMPORTED),
    Stage("aborted, the target has dropped", (*_COPIED, ABORT, TELL_TARGET), _ABORTED, Part.EXPORTED),
    Stage("aborted, the source serves on", (*_COPIED, ABORT, TELL_SOURCE), _ABORTED, None, Part.IMPORTED),
    Stage("aborted while frozen and settled", (BEGIN, FREEZE, ABORT, *_BOTH, SETTLE), None),
)


def run_on_tables(stage: Stage) -> tuple[State, list[Transition]]:
    """Where the tables say that a stage's steps lead, and which of their rows they take."""
    return _Tables().run(stage)


class _Tables:
    """A migration as the tables have it."""

    def __init__(self) -> None:
        self._record: MigrationState | None = None
        self._parts: dict[str, Part | None] = {"source": None, "target": None}
        self._taken: list[Transition] = []

    def run(self, stage: Stage) -> tuple[State, list[Transition]]:
        for step in stage.steps:
            for what, move in self._moves(step):
                self._take(what, move)
        return (self._record, self._parts["source"], self._parts["target"]), self._taken

    def _take(self, what: str, move: Event | Step) -> None:
        if isinstance(move, Event):
            self._taken.append(("record", self._record, move))
            self._record = records.TRANSITIONS[self._record, move]
        else:
            self._taken.append(("part", self._parts[what], move))
            self._parts[what] = ownership.TRANSITIONS[self._parts[what], move]

    def _moves(self, step: str) -> Iterator[tuple[str, Event | Step]]:
        match step:
            case "begin":
                yield "record", Event.BEGIN
            case "freeze":
                yield "source", Step.FREEZE
            case "export":
                yield "source", Step.EXPORT
            case "import":
                yield "source", Step.EXPORT
                yield "target", Step.IMPORT
            case "commit" | "abort":
                yield "record", Event(step)
            case "tell source" | "tell target":
                what = step.removeprefix("tell ")
                if self._parts[what] is not None:
                    yield what, Step.COMMIT if self._record is _COMMITTED else Step.ABORT
            case _:
                yield "record", Event.SETTLE
