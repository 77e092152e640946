"""The values that all parts share: frozen, checked where they are made, free of I/O.

Times are int milliseconds since the Unix epoch, UTC; windows are half-open. What each window means stands in
docs/architecture.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Final, Literal

from topk_grpc.errors import InvalidArgumentError, WindowError

SLOTS_DEFAULT: Final = 1024
"""Slots of a cluster: fixed when it is created."""

RESOLUTION_MS_DEFAULT: Final = 1000
"""The cluster's time grain."""

COUNT_MAX: Final = 1 << 55
"""The largest count of one play, and the largest sum of a shard: 256 shards' sums still fit 64 signed bits."""

TIME_MS_MAX: Final = 1 << 60
"""The farthest instant from the epoch, 36 million years: sums of an instant and a size stay within 64 bits."""

_SIZE_MS_MAX: Final = 1 << 53

GLOBAL_CHART: Final = ""
"""The name of the chart that every play counts in."""

AsOf = int | datetime | Literal["latest"] | None
"""The instant a window is taken at.

Epoch milliseconds, a datetime (naive: UTC), `latest` (the newest play), or None (the gateway's clock).
"""


# --- Times and durations ----------------------------------------------------------------------------------------------

_UNITS: Final[Mapping[str, int]] = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"(\d{1,12})(ms|s|m|h|d)")
_EPOCH_MS: Final = re.compile(r"-?\d{1,18}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def parse_duration(text: str) -> int:
    """Reads `500ms`, `10s`, `15m`, `1h`, `7d`.

    Returns:
        Milliseconds.

    Raises:
        WindowError: it is none of these.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise WindowError(f"{text!r} is not a duration: write a whole number and a unit, as in 10s, 15m, 1h or 7d")
    return int(found[1]) * _UNITS[found[2]]


def format_duration(milliseconds: int) -> str:
    """Writes a duration in the largest unit that divides it; `parse_duration` reads it back."""
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS[unit] == 0:
            return f"{milliseconds // _UNITS[unit]}{unit}"
    return f"{milliseconds}ms"


def to_epoch_ms(moment: datetime) -> int:
    """Milliseconds since the epoch, rounded down; a naive datetime is UTC."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    delta = aware - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1000 + delta.microseconds // 1000


def parse_time(text: str) -> int:
    """Reads ISO 8601 (no offset means UTC) or epoch milliseconds.

    Raises:
        InvalidArgumentError: it is neither.
    """
    stripped = text.strip()
    if _EPOCH_MS.fullmatch(stripped):
        return int(stripped)
    try:
        return to_epoch_ms(datetime.fromisoformat(stripped))
    except ValueError as error:
        raise InvalidArgumentError(
            f"{text!r} is not a time: write ISO 8601, as in 2014-06-16T18:28:34Z, or milliseconds since the epoch"
        ) from error


def format_time(milliseconds: int) -> str:
    """ISO 8601 in UTC, with milliseconds where they are not zero; outside the years 1 to 9999 epoch milliseconds."""
    seconds, rest = divmod(milliseconds, 1000)
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{milliseconds} ms"
    return moment.strftime("%Y-%m-%dT%H:%M:%S") + (f".{rest:03d}Z" if rest else "Z")


def as_of_ms(as_of: AsOf | str) -> int | Literal["latest"] | None:
    """Brings what callers write for an instant to epoch milliseconds, `latest` or None."""
    match as_of:
        case None:
            return None
        case "latest":
            return "latest"
        case datetime():
            return to_epoch_ms(as_of)
        case str():
            return parse_time(as_of)
        case _:
            return as_of


# --- Windows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounds:
    """The half-open span [start_ms, end_ms) that a window counts."""

    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class GlobalWindow:
    """All plays ever recorded."""

    def __str__(self) -> str:
        return "global"


@dataclass(frozen=True, slots=True)
class TumblingWindow:
    """The pane [floor((T - offset) / size) * size + offset, + size) that holds T.

    Attributes:
        size_ms: a pane's length, above 0.
        offset_ms: shifts the grid; 0 <= offset_ms < size_ms, brought there modulo size.
    """

    size_ms: int
    offset_ms: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.size_ms <= _SIZE_MS_MAX:
            raise WindowError(f"a tumbling window's size is {self.size_ms} ms: it has to be above 0 and below 2^53")
        object.__setattr__(self, "offset_ms", self.offset_ms % self.size_ms)

    def __str__(self) -> str:
        offset = f"@{format_duration(self.offset_ms)}" if self.offset_ms else ""
        return f"tumbling:{format_duration(self.size_ms)}{offset}"


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """The last stretch of time before T: [E - size, E).

    Attributes:
        size_ms: its length, above 0.
        slide_ms: it moves in steps of this length, which divides the size: E = floor(T / slide) * slide. 0: it moves
            with every step of the resolution r and takes in the one that holds T: E = floor(T / r) * r + r.
    """

    size_ms: int
    slide_ms: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.size_ms <= _SIZE_MS_MAX:
            raise WindowError(f"a sliding window's size is {self.size_ms} ms: it has to be above 0 and below 2^53")
        if self.slide_ms < 0 or (self.slide_ms and self.size_ms % self.slide_ms):
            raise WindowError(
                f"a sliding window's slide is {self.slide_ms} ms: it has to divide its size of {self.size_ms} ms, or be"
                " left out"
            )

    def __str__(self) -> str:
        slide = f"/{format_duration(self.slide_ms)}" if self.slide_ms else ""
        return f"sliding:{format_duration(self.size_ms)}{slide}"


@dataclass(frozen=True, slots=True)
class SessionWindow:
    """Each entry's last session, if it is still open at T.

    Plays whose time buckets lie at most the gap apart form a session; it is open while its last one lies at most the
    gap before T's.

    Attributes:
        gap_ms: above 0.
    """

    gap_ms: int

    def __post_init__(self) -> None:
        if not 0 < self.gap_ms <= _SIZE_MS_MAX:
            raise WindowError(f"a session window's gap is {self.gap_ms} ms: it has to be above 0 and below 2^53")

    def __str__(self) -> str:
        return f"session:{format_duration(self.gap_ms)}"


@dataclass(frozen=True, slots=True)
class RangeWindow:
    """The span [start, end) of history, wherever T lies."""

    start_ms: int
    end_ms: int

    def __post_init__(self) -> None:
        if self.end_ms <= self.start_ms:
            raise WindowError(
                f"a range ends at {format_time(self.end_ms)}, not after its start at {format_time(self.start_ms)}:"
                " write range:START..END, END exclusive"
            )
        if max(abs(self.start_ms), abs(self.end_ms)) > TIME_MS_MAX:
            raise WindowError(f"{self} lies out of all reason: give milliseconds since the Unix epoch")

    def __str__(self) -> str:
        return f"range:{_time_text(self.start_ms)}..{_time_text(self.end_ms)}"


def _time_text(milliseconds: int) -> str:
    """What `parse_time` reads back."""
    text = format_time(milliseconds)
    return str(milliseconds) if " " in text else text


Window = GlobalWindow | TumblingWindow | SlidingWindow | SessionWindow | RangeWindow

_FORMS: Final = (
    "global, tumbling:SIZE[@OFFSET] (tumbling:1d, tumbling:7d@4d), sliding:SIZE[/SLIDE] (sliding:10m/1m, sliding:10m), "
    "session:GAP (session:15m) or range:START..END (range:2026-11-01..2026-11-08)"
)


def parse_window(text: str) -> Window:
    """Reads a window's text form; `str()` of the result writes it again.

    Raises:
        WindowError: it is none of the known forms.
    """
    kind, colon, rest = text.strip().partition(":")
    match kind:
        case "global" if not colon:
            return GlobalWindow()
        case "tumbling":
            size, at, offset = rest.partition("@")
            return TumblingWindow(parse_duration(size), parse_duration(offset) if at else 0)
        case "sliding":
            size, slash, slide = rest.partition("/")
            slide_ms = parse_duration(slide) if slash else 0
            if slash and not slide_ms:
                raise WindowError(f"{text!r} has a slide of 0: leave it out for a window that moves with its plays")
            return SlidingWindow(parse_duration(size), slide_ms)
        case "session":
            return SessionWindow(parse_duration(rest))
        case "range" if ".." in rest:
            start, _, end = rest.partition("..")
            try:
                return RangeWindow(parse_time(start), parse_time(end))
            except WindowError:
                raise
            except InvalidArgumentError as error:
                raise WindowError(f"{text!r} is not a range: {error}") from error
        case _:
            raise WindowError(f"{text!r} is not a window: write {_FORMS}")


# --- Plays and answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Play:
    """One event. `count` plays at once if the caller counted beforehand; `charts` besides the global one.

    A negative count is a correction: it takes plays back from the time bucket and all the charts named, or is rejected.
    """

    song_id: str
    played_at_ms: int
    count: int = 1
    charts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A play that was not counted.

    Attributes:
        index: its place in the batch, from 0.
        reason: a word for programs, listed at `RejectedPlay` in protos/topk/v1/play.proto.
        message: a sentence for people.
        sequence: the batch's number.
        play: the play, where the client still knows it.
    """

    index: int
    reason: str
    message: str
    sequence: int = 0
    play: Play | None = None


@dataclass(frozen=True, slots=True)
class BatchAck:
    """The durable acknowledgement of one batch."""

    sequence: int
    accepted: int
    duplicate: bool
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, slots=True)
class ChartHistory:
    """How a song fared in the panes of a tumbling window before. On a pane's chart is who ranks at most k there.

    Attributes:
        previous_rank: in the pane before; None where it was not on that chart.
        peak_rank: the best in the panes looked at, this one included.
        panes_on_chart: on how many of their charts it was, this one included.
    """

    previous_rank: int | None
    peak_rank: int
    panes_on_chart: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A ranked song.

    Attributes:
        rank: from 1.
        song_id, count: the song and its plays.
        share: of all plays of the window and chart.
        session: only in session windows: from its session's first time bucket to the end of the last so far.
        history: only where it was asked for.
    """

    rank: int
    song_id: str
    count: int
    share: float = 0.0
    session: Bounds | None = None
    history: ChartHistory | None = None


class Finality(Enum):
    """Whether later plays are to be expected."""

    PRELIMINARY = "PRELIMINARY"
    FINAL = "FINAL"


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far an answer can be trusted; the fields are explained in protos/topk/v1/query.proto.

    `distinct_songs` is None where it is unknown.
    """

    complete: bool
    missing_shards: tuple[str, ...]
    epoch: int
    watermark_ms: int
    finality: Finality
    total_plays: int
    distinct_songs: int | None
    other_plays: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The k best of a window. `bounds` is None for the global one."""

    bounds: Bounds | None
    certificate: Certificate
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class SongStanding:
    """Where one song stands. `rank` is None where it has no plays in the window; the rest is as in `Entry`."""

    song_id: str
    count: int
    rank: int | None
    above: tuple[Entry, ...] = ()
    below: tuple[Entry, ...] = ()
    share: float = 0.0
    session: Bounds | None = None


@dataclass(frozen=True, slots=True)
class SongsAnswer:
    """The songs asked for, in the order asked."""

    bounds: Bounds | None
    certificate: Certificate
    songs: tuple[SongStanding, ...]


@dataclass(frozen=True, slots=True)
class ChartSummary:
    """A chart and what it holds, over all time. `distinct_songs` is None where it is unknown."""

    chart: str
    total_plays: int
    distinct_songs: int | None


# --- The cluster ------------------------------------------------------------------------------------------------------

CONTROLLER: Final = "leader.controller"
"""The name of the controllers' office, and of who holds it; no shard can have it."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What is fixed when a cluster is created. The partitioner is one of ring/partitioners.py, by its name."""

    slots: int = SLOTS_DEFAULT
    partitioner: str = "ring"
    resolution_ms: int = RESOLUTION_MS_DEFAULT


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as the topology knows it.

    Attributes:
        shard_id: its stable name.
        address: HOST:PORT it is reached at now; empty before its first start.
        directory_id: the identity of the data directory that holds its plays; empty before its first start. A shard
            that comes up with another one has lost its data, and is refused.
        draining: it is to own nothing; its slots are moved to the others.
    """

    shard_id: str
    address: str = ""
    directory_id: str = ""
    draining: bool = False


class MigrationState(StrEnum):
    """How far a migration has come. Its shards learn its outcome from here, and nowhere else."""

    MOVING = "moving"
    """Undecided: the source owns the slots, and may have frozen them."""
    COMMITTED = "committed"
    """The target owns the slots; a shard may not have heard of it yet."""
    ABORTED = "aborted"
    """The source owns the slots on; a shard may not have heard of it yet."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Slots on their way from one shard to another, as the topology records it.

    Attributes:
        migration_id: from 1, never used again in a cluster.
        source, target: shard ids.
        slots: ascending.
        state: how far it has come. A record goes when both shards have logged the outcome.
    """

    migration_id: int
    source: str
    target: str
    slots: tuple[int, ...]
    state: MigrationState = MigrationState.MOVING


@dataclass(frozen=True, slots=True)
class Topology:
    """Who owns what. Every change raises the epoch.

    Attributes:
        shards: by shard_id, ascending.
        owners: the owner's index in `shards` for each slot.
        secret: what the cluster's own parts prove themselves to each other with. Whoever knows it is one of them: it
            goes nowhere but into the topology store and the metadata of internal calls.
        migrations: those under way, by migration_id, ascending. A slot is in one of them at the most.
        next_migration_id: of the next one.
        paused: no new migration begins.
        wanted: the plan that migrations carry out, in the form of `owners`; empty: things are to stay as they are.
        moved_slots: how many slots have moved since the cluster was made; one that has moved twice counts twice.
        longest_stall_ms: the longest that plays of a slot had to wait since that plan was made, as coordinators saw it.
    """

    cluster_id: str
    epoch: int
    settings: ClusterSettings
    shards: tuple[ShardInfo, ...]
    owners: tuple[int, ...] = field(repr=False)
    secret: str = field(default="", repr=False)
    migrations: tuple[Migration, ...] = ()
    next_migration_id: int = 1
    paused: bool = False
    wanted: tuple[int, ...] = field(default=(), repr=False)
    moved_slots: int = 0
    longest_stall_ms: int = 0

    def shard(self, shard_id: str) -> ShardInfo | None:
        """The shard of that name, or None."""
        return next((shard for shard in self.shards if shard.shard_id == shard_id), None)

    def migration(self, migration_id: int) -> Migration | None:
        """The migration of that number, or None: it has not begun, or both its shards have logged its outcome."""
        return next((one for one in self.migrations if one.migration_id == migration_id), None)

    def slots_of(self, shard_id: str) -> tuple[int, ...]:
        """The slots that the shard of that name owns, ascending."""
        return tuple(slot for slot, owner in enumerate(self.owners) if self.shards[owner].shard_id == shard_id)
