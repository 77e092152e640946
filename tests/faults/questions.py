"""Those who ask, all the time, and hold every answer against the ledger.

An answer has to be true whatever is broken; no answer is excused by the weather only. A query that was not to be
partial is complete; one that was names the shards that are away, and only those.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from tests.faults import verdict
from tests.faults.ledger import CHARTS, HOUR, NAMES, NOW_SONGS, PAST_HOURS, SECOND, Ledger, between
from tests.faults.traffic import now_ms
from tests.faults.weather import Weather
from tests.oracle import bounds_of
from topk_grpc import TopKClient
from topk_grpc.errors import ResourceExhaustedError, TopKError, UnavailableError
from topk_grpc.model import (
    Answer,
    Certificate,
    Entry,
    GlobalWindow,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
)

QUERY_DEADLINE_SECONDS: Final = 8.0


@dataclass
class Asked:
    """What came of the queries so far.

    Attributes:
        answers: that were held against the ledger, by kind.
        partial: those of them that left shards out.
        refusals: errors, by class.
        answered_at: the time (monotonic) of the last whole answer of each gateway.
    """

    answers: Counter[str] = field(default_factory=Counter)
    partial: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    answered_at: dict[str, float] = field(default_factory=dict)


class Asker:
    """Asks one gateway, or all of them.

    Args:
        gateways: those that may answer.
        everybody: all processes of the cluster: a query may fail for the weather of each.
        owners: which shard has which songs; None: that changes, and nobody can tell what a partial answer lacks.
    """

    def __init__(
        self,
        gateways: Sequence[str],
        everybody: Sequence[str],
        target: list[str],
        ledger: Ledger,
        owners: verdict.Owners | None,
        weather: Weather,
        asked: Asked,
        finding: Callable[[str], None],
        seed: int,
    ) -> None:
        self._gateways = gateways
        self._everybody = everybody
        self._target = target
        self._ledger, self._owners, self._weather = ledger, owners, weather
        self._asked = asked
        self._finding = finding
        self._chance = random.Random(seed)

    def client(self) -> TopKClient:
        return TopKClient(self._target, deadline_seconds=QUERY_DEADLINE_SECONDS)

    async def run(self, until: asyncio.Event) -> None:
        async with self.client() as client:
            while not until.is_set():
                await self.ask(client)
                await asyncio.sleep(self._chance.uniform(0.05, 0.3))

    # --- One question -------------------------------------------------------------------------------------------------

    def _window(self, at_ms: int) -> Window:
        size = self._chance.choice((5, 30, 60, 300)) * SECOND
        past_ms = self._ledger.grids["past"].first_ms
        match self._chance.randrange(7):
            case 0 | 1:
                return GlobalWindow()
            case 2:
                return TumblingWindow(size, self._chance.choice((0, 2)) * SECOND)
            case 3:
                return SlidingWindow(2 * size, size)
            case 4:
                return SlidingWindow(size)
            case 5:
                return SessionWindow(size)
            case _:
                if self._chance.random() < 0.5:
                    start = past_ms + self._chance.randrange(PAST_HOURS) * HOUR
                    return RangeWindow(start, start + self._chance.randrange(1, 6) * HOUR)
                start = at_ms // SECOND * SECOND - self._chance.randrange(600) * SECOND
                return RangeWindow(start, start + size)

    async def ask(self, client: TopKClient) -> None:
        """Asks one question at random and judges what comes."""
        chance, ledger = self._chance, self._ledger
        at_ms = now_ms()
        window, chart, partial = self._window(at_ms), chance.choice(CHARTS), chance.random() < 0.25
        bounds = bounds_of(window, at_ms, SECOND)
        as_of = None if bounds is None else at_ms
        k = chance.choice((1, 10, 100, 10_000))
        names = chance.sample(NAMES[:NOW_SONGS] if bounds else NAMES, 5)
        songs = chance.random() < 0.3 and not isinstance(window, SessionWindow)
        began = time.monotonic()
        before = ledger.moment(chart, bounds)
        try:
            answer: Any
            if songs:
                answer = await client.songs(
                    names, window, chart=chart, as_of=as_of, neighbours=2, allow_partial=partial
                )
            else:
                answer = await client.top_k(window, k, chart=chart, as_of=as_of, allow_partial=partial)
        except (UnavailableError, ResourceExhaustedError) as error:
            self._refused(error, began)
            return
        except TopKError as error:
            self._finding(f"{window} of {chart!r} was refused: {error!r}")
            return
        truth = between(before, ledger.moment(chart, bounds))
        problems = list(self._coverage(answer.certificate, began, partial))
        missing = answer.certificate.missing_shards
        if missing:
            truth = verdict.of_some(truth, self._owners.without(missing) if self._owners else None)
        if answer.bounds != bounds:
            problems.append(f"its bounds are {answer.bounds}, and ought to be {bounds}")
        if isinstance(window, SessionWindow):
            problems += verdict.order_of(answer.entries)
        elif songs:
            if not missing:
                problems += verdict.songs(answer, names, truth)
        else:
            problems += verdict.top_k(answer, k, truth)
        self._judge(f"{'songs' if songs else 'top_k'} {window} of {chart!r} at {at_ms}, k {k}", problems)
        self._asked.answers["songs" if songs else str(window).partition(":")[0]] += 1
        if missing:
            self._asked.partial += 1
        elif len(self._gateways) == 1:
            self._asked.answered_at[self._gateways[0]] = time.monotonic()

    def _judge(self, what: str, problems: Iterable[str]) -> None:
        for problem in problems:
            self._finding(f"{'+'.join(self._gateways)} answered {what}: {problem}")

    def _coverage(self, said: Certificate, began: float, partial: bool) -> Iterable[str]:
        if said.complete == bool(said.missing_shards):
            yield f"complete is {said.complete}, and missing_shards {said.missing_shards}"
        if said.missing_shards and not partial:
            yield f"{said.missing_shards} are missing, though the answer had to be whole"
        for shard in said.missing_shards:
            if shard not in self._everybody:
                yield f"there is no shard {shard}"
            elif not self._weather.excuses(self._who_excuses(shard), began):
                yield f"{shard} is missing, though nothing is wrong with it"

    def _who_excuses(self, missing: str) -> Sequence[str]:
        """Whose weather makes up for a shard that is missing; where slots move, its slots may hang on another one."""
        return [missing, *self._gateways] if self._owners else self._everybody

    def _refused(self, error: TopKError, began: float) -> None:
        self._asked.refusals[type(error).__name__] += 1
        if not self._weather.excuses(self._everybody, began):
            self._finding(f"{'+'.join(self._gateways)} failed to answer, though nothing is broken: {error!r}")

    # --- Watching -----------------------------------------------------------------------------------------------------

    async def watch(self, until: asyncio.Event, window: str, chart: str, k: int, last: dict[str, Answer]) -> None:
        """Follows a list; each one has to be what the changes make of the one before.

        Args:
            last: holds the newest list, by window.
        """
        entries: tuple[Entry, ...] = ()
        while not until.is_set():
            try:
                async with self.client() as client, aclosing(client.watch(window, k, chart=chart)) as updates:
                    entries = ()
                    stopping = asyncio.ensure_future(until.wait())
                    try:
                        while True:
                            coming = asyncio.ensure_future(anext(updates))
                            await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
                            if not coming.done():
                                coming.cancel()
                                await asyncio.gather(coming, return_exceptions=True)
                                return
                            update = coming.result()
                            sent = self._ledger.moment(chart, update.answer.bounds).sent
                            self._judge(f"a watch of {window}", verdict.watched(update, entries, sent))
                            self._asked.answers["watch"] += 1
                            entries, last[window] = update.answer.entries, update.answer
                    finally:
                        stopping.cancel()
            except UnavailableError as error:  # the first list did not come in time
                self._asked.refusals[f"watch {type(error).__name__}"] += 1
            except TopKError as error:
                self._finding(f"a watch of {window} ended: {error!r}")
                return
