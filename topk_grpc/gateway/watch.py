"""The watch hub: one evaluation per distinct query, however many watch it.

Theory of operation. A query is what a WatchTopKRequest asks, but for its resume_token. While anybody watches it, one
task evaluates it every `watch_interval_seconds`, by the same code as GetTopK, and where the answer differs from the
last one it becomes the next numbered *version*. (Differs: entries, bounds, totals, finality, completeness. The
watermark and the epoch alone make no version.) Evaluating anew is what makes a watch exact: windows move and empty by
time alone, and late plays and corrections reach back, so there is no stream of events that a list could be kept up to
date from; and a query on a standing window costs O(k).

- A watcher remembers only the number it was sent last. When it can be written to again it gets one step from there to
  the newest version: a slow reader skips versions, and nothing queues up for it.
- The last versions are kept, within `watch_history_entries_max`. A step begins at a version that is kept; where it is
  not any more, the watcher gets the whole list with `reset`.
- A resume_token names an evaluation, by an id that no other has, and a version. So the token of another query or
  another gateway, or from before a restart, is unknown by itself, and numbers of two evaluations are never mixed up.
- The first step that a stream gets comes of an evaluation that began after the stream did, which is not waited for
  long: whatever was acknowledged before is in it, as in a GetTopK at that moment.
- When the last watcher leaves, evaluating stops at once. The versions stay for `watch_linger_seconds`: a watcher that
  comes back gets the changes since.
- An error ends the streams of all that watch, with its status. (A shard that is away for moments is none: the scatter
  waits for it up to `query_seconds`.) The versions stay, as after the last watcher.
- Messages are made once for all watchers that are at the same version.

The evaluations stand in evaluation.py; here is who watches which. Everything runs on the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from topk_grpc.config import GatewaySettings
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError
from topk_grpc.gateway.evaluation import Evaluation, Watcher
from topk_grpc.gateway.queries import Queries
from topk_grpc.model import Window
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert


@dataclass(frozen=True, slots=True)
class WatchQuery:
    """What is watched."""

    window: Window
    k: int
    chart: str
    latest: bool
    allow_partial: bool


def watch_query_from_pb(request: pb.WatchTopKRequest) -> WatchQuery:
    """Reads what a request asks to watch.

    Raises:
        InvalidArgumentError: it names no window that makes sense.
    """
    window = convert.window_from_pb(request.window if request.HasField("window") else None)
    return WatchQuery(window, request.k, request.chart, request.latest, request.allow_partial)


class WatchHub:
    """All watches of a gateway.

    Args:
        settings: the gateway's.
        queries: evaluates.
        drain: set when the streams have to come to their end.
    """

    def __init__(self, settings: GatewaySettings, queries: Queries, drain: asyncio.Event) -> None:
        self._settings = settings
        self._queries = queries
        self._drain = drain
        self._evaluations: dict[WatchQuery, Evaluation] = {}
        self._watchers: set[Watcher] = set()
        self._draining: asyncio.Task[None] | None = None

    @property
    def watchers(self) -> int:
        """Streams that watch. From any thread."""
        return len(self._watchers)

    @property
    def watched(self) -> int:
        """Different queries that they watch. From any thread."""
        return sum(1 for evaluation in list(self._evaluations.values()) if evaluation.watchers)

    async def follow(self, query: WatchQuery, resume_token: str) -> AsyncGenerator[pb.WatchTopKResponse, None]:
        """The steps of one stream: as many as it is read, from where the token says to the present, and on.

        Leave it with `contextlib.aclosing`. It ends when the server drains, or the stream is as old as streams get.

        Args:
            query: what to watch.
            resume_token: of the last step that the watcher got, from whatever gateway; empty if it got none.

        Raises:
            InvalidArgumentError: k or the window is out of range.
            ResourceExhaustedError: too many streams, or too many different queries.
            UnavailableError: a shard does not answer, and `allow_partial` is not set.
        """
        if not 1 <= query.k <= self._settings.watch_k_max:
            raise InvalidArgumentError(
                f"k is {query.k}: watch 1 to {self._settings.watch_k_max} entries (GetTopK takes more)"
            )
        if len(self._watchers) >= self._settings.watches_max:
            raise ResourceExhaustedError(
                f"{len(self._watchers)} streams watch at this gateway, as many as may (--watches-max): try another one"
            )
        if self._draining is None:
            self._draining = asyncio.create_task(self._leave_on_drain(), name="topk watch drain")
        evaluation = self._evaluation(query)
        watcher = Watcher()
        self._watchers.add(watcher)
        age_seconds = self._settings.stream_age_seconds * random.uniform(0.9, 1.0)
        timer = asyncio.get_running_loop().call_later(age_seconds, watcher.leave)
        has = evaluation.knows(resume_token) if resume_token else None
        told = False
        try:
            evaluation.join(watcher)
            while not (watcher.leaving or self._drain.is_set()):
                if watcher.failure is not None:
                    raise watcher.failure.with_traceback(None)  # one object for all who watch
                watcher.wake.clear()
                step = None if told and has == evaluation.newest_number else evaluation.step_for(watcher, has)
                if step is None:
                    await watcher.wake.wait()
                    continue
                has, told = step.number, True
                yield step
        finally:
            timer.cancel()
            self._watchers.discard(watcher)
            evaluation.leave(watcher)
            self._linger(query, evaluation)

    async def close(self) -> None:
        """Ends what runs; streams have to have ended."""
        tasks = [] if self._draining is None else [self._draining]
        for task in tasks:
            task.cancel()
        for evaluation in self._evaluations.values():
            if evaluation.idle_timer is not None:
                evaluation.idle_timer.cancel()
        self._evaluations.clear()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave_on_drain(self) -> None:
        await self._drain.wait()
        for watcher in self._watchers:
            watcher.leave()

    # --- Evaluations --------------------------------------------------------------------------------------------------

    def _evaluation(self, query: WatchQuery) -> Evaluation:
        found = self._evaluations.get(query)
        if found is None:
            self._make_room()
            as_of: Literal["latest"] | None = "latest" if query.latest else None
            found = self._evaluations[query] = Evaluation(
                lambda: self._queries.top_k(
                    query.window, query.k, query.chart, as_of, allow_partial=query.allow_partial
                ),
                self._settings.watch_interval_seconds,
                lambda: self._settings.watch_history_entries_max // max(1, len(self._evaluations)),
            )
        if found.idle_timer is not None:
            found.idle_timer.cancel()
            found.idle_timer = None
        return found

    def _make_room(self) -> None:
        """Forgets the query that has been left alone the longest, if there are as many as may be."""
        if len(self._evaluations) < self._settings.watch_queries_max:
            return
        idle = [
            (evaluation.idle_timer.when(), query)
            for query, evaluation in self._evaluations.items()
            if evaluation.idle_timer is not None
        ]
        if not idle:
            raise ResourceExhaustedError(
                f"{len(self._evaluations)} different queries are watched at this gateway, as many as may"
                " (--watch-queries-max): watch one of them, or try another gateway"
            )
        _, longest = min(idle, key=lambda each: each[0])
        self._forget(longest)

    def _linger(self, query: WatchQuery, evaluation: Evaluation) -> None:
        """Forgets a query some time after its last watcher has left."""
        if evaluation.watchers or self._evaluations.get(query) is not evaluation:
            return
        if not evaluation.newest_number:
            self._forget(query)  # it never had an answer: there is nothing to come back for
        elif evaluation.idle_timer is None:
            evaluation.idle_timer = asyncio.get_running_loop().call_later(
                self._settings.watch_linger_seconds, self._forget, query
            )

    def _forget(self, query: WatchQuery) -> None:
        evaluation = self._evaluations.pop(query)
        if evaluation.idle_timer is not None:
            evaluation.idle_timer.cancel()
