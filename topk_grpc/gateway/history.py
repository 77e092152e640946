"""Chart history: how each entry of a tumbling window's pane fared in the panes before it.

A pane's chart is the k best of that pane, the same k for all. Each pane is asked of the shards as any span of history
is, so a rank here is the rank that GetTopK gives for that pane. Only what the entries need is kept of each pane.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Final

from topk_grpc.errors import InvalidArgumentError, OutOfRangeError
from topk_grpc.gateway.queries import Queries
from topk_grpc.model import (
    Answer,
    Bounds,
    Certificate,
    ChartHistory,
    Entry,
    Finality,
    TumblingWindow,
    Window,
    format_time,
)

HISTORY_PANES_MAX: Final = 520
"""The most panes looked at: ten years of weeks."""

_AT_ONCE: Final = 8


def check_history(window: Window, panes: int) -> None:
    """Refuses a history that cannot be had; 0 panes are none.

    Raises:
        InvalidArgumentError: the window has no panes, or their number is out of range.
    """
    if not panes:
        return
    if not isinstance(window, TumblingWindow):
        raise InvalidArgumentError(f"{window} has no history: history_panes is for tumbling windows only")
    if not 2 <= panes <= HISTORY_PANES_MAX:
        raise InvalidArgumentError(
            f"history_panes is {panes}: ask for 2 to {HISTORY_PANES_MAX} panes, the one asked for included, or 0"
        )


async def with_history(
    queries: Queries, answer: Answer, k: int, chart: str, panes: int, *, allow_partial: bool
) -> Answer:
    """Adds to each entry of a pane how it fared in the panes before.

    Args:
        queries: asks the shards.
        answer: the pane's k best.
        k, chart: as they were asked for.
        panes: how many to look at, this one included; checked.
        allow_partial: go without shards that are down.

    Returns:
        The answer; its certificate is partial where that of one of the panes is.

    Raises:
        OutOfRangeError: a pane is so old that no tier cuts it; the message says how many can be had.
        UnavailableError: a shard does not answer, and `allow_partial` is not set.
    """
    bounds = answer.bounds
    assert bounds is not None
    ranks: dict[str, dict[int, int]] = {entry.song_id: {0: entry.rank} for entry in answer.entries}
    missing = set(answer.certificate.missing_shards)
    refused: dict[int, OutOfRangeError] = {}
    room = asyncio.Semaphore(_AT_ONCE)

    async def look_at(back: int) -> None:
        async with room:
            if refused:
                return
            try:
                pane = await queries.top_k_between(_pane(bounds, back), k, chart, allow_partial=allow_partial)
            except OutOfRangeError as error:
                refused[back] = error
                return
        missing.update(pane.certificate.missing_shards)
        for entry in pane.entries:
            if entry.song_id in ranks:
                ranks[entry.song_id][back] = entry.rank

    try:
        async with asyncio.TaskGroup() as group:
            for back in range(1, panes):
                group.create_task(look_at(back))
    except ExceptionGroup as errors:
        raise _first(errors) from None
    if refused:
        raise _too_far(_pane(bounds, min(refused)), min(refused), refused[min(refused)], panes)
    return dataclasses.replace(
        answer,
        certificate=_joined(answer, missing),
        entries=tuple(_with_ranks(entry, ranks[entry.song_id]) for entry in answer.entries),
    )


def _pane(bounds: Bounds, back: int) -> Bounds:
    """So many panes before the one given."""
    size_ms = bounds.end_ms - bounds.start_ms
    return Bounds(bounds.start_ms - back * size_ms, bounds.end_ms - back * size_ms)


def _with_ranks(entry: Entry, ranks: dict[int, int]) -> Entry:
    return dataclasses.replace(entry, history=ChartHistory(ranks.get(1), min(ranks.values()), len(ranks)))


def _joined(answer: Answer, missing: set[str]) -> Certificate:
    """The answer's certificate, partial where a pane's is."""
    if missing == set(answer.certificate.missing_shards):
        return answer.certificate
    return dataclasses.replace(
        answer.certificate,
        complete=False,
        missing_shards=tuple(sorted(missing)),
        finality=Finality.PRELIMINARY,
    )


def _too_far(pane: Bounds, back: int, error: OutOfRangeError, panes: int) -> OutOfRangeError:
    can = f"set history_panes to {back}" if back > 1 else "there is no history of this window"
    return OutOfRangeError(
        f"history_panes is {panes}, but the pane that lies {back} back, {format_time(pane.start_ms)} to"
        f" {format_time(pane.end_ms)}, cannot be cut exactly any more ({error}): {can}",
        error.start_ms,
        error.end_ms,
    )


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first
