"""How many plays a second a producer, and a token, may send through this gateway.

Each has a bucket that fills at its rate, up to `rate_burst_seconds` of it. A batch passes when the bucket is not empty,
and takes all its plays out at once, so the bucket may owe: batches larger than a burst pass too, and the rate holds in
the long run. A stream whose batch may not pass waits and is read no further, which in the end its client feels; nothing
is lost. A single RecordPlays has nobody to wait for: it is refused, and told when to come again.

Buckets of producers are kept for the last `PRODUCERS_MAX`. Whoever takes a new producer_id for each batch escapes the
limit of producers, not that of the token: the first is for fairness among one's own, the second for others.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import RateLimitedError
from topk_grpc.rpc.access import Caller
from topk_grpc.rpc.refusals import LimitedLog

PRODUCERS_MAX: Final = 10_000
_WAIT_SECONDS: Final = (0.005, 1.0)  # a bucket that others empty meanwhile is looked at again


class Bucket:
    """What one may still send, plays; below 0 what it has sent too much."""

    __slots__ = ("_at", "_level", "_rate")

    def __init__(self, now: float, rate: float, burst_seconds: float) -> None:
        self._rate = rate
        self._level = rate * burst_seconds
        self._at = now

    def seconds_to_go(self, now: float, rate: float, burst_seconds: float) -> float:
        """Fills it up to now; how long until a batch may pass, 0 if it may."""
        self._rate = rate  # the tokens file may have changed it
        self._level = min(rate * burst_seconds, self._level + (now - self._at) * rate)
        self._at = now
        return 0.0 if self._level > 0 else (1 - self._level) / rate

    def take(self, plays: int) -> None:
        """Lets a batch pass."""
        self._level -= plays


class RateLimits:
    """The buckets of a gateway. Belongs to one event loop.

    Args:
        settings: the gateway's.
        clock: seconds, monotonic; for tests.
    """

    def __init__(self, settings: GatewaySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = settings.producer_plays_per_second
        self._burst_seconds = settings.rate_burst_seconds
        self._clock = clock
        self._producers: OrderedDict[bytes, Bucket] = OrderedDict()
        self._tokens: dict[str, Bucket] = {}
        self._log = LimitedLog("rate_limited")

    def concern(self, caller: Caller) -> bool:
        """Whether there is any limit to look at."""
        return bool(self._rate or caller.plays_per_second)

    async def wait(self, producer_id: bytes, caller: Caller, plays: int, leave: asyncio.Event) -> bool:
        """Returns when a batch of a stream may pass, and has been counted.

        Args:
            producer_id: the batch's.
            caller: whose stream it is.
            plays: of the batch.
            leave: set when the stream has to end.

        Returns:
            False if the stream has to end first: the batch has not been counted.
        """
        began = self._clock()
        held_by = ""
        low, high = _WAIT_SECONDS
        while True:
            seconds, limit = self._seconds_to_go(producer_id, caller)
            if not seconds:
                break
            held_by = held_by or limit
            try:
                async with asyncio.timeout(min(max(seconds, low), high)):
                    await leave.wait()
                return False
            except TimeoutError:
                continue
        self._take(producer_id, caller, plays)
        if held_by:
            metrics.BATCHES_DELAYED.labels(held_by).inc()
            metrics.PLAYS_DELAYED.labels(held_by).inc(plays)
            metrics.DELAY_SECONDS.labels(held_by).inc(self._clock() - began)
        return True

    def take(self, producer_id: bytes, caller: Caller, plays: int) -> None:
        """Counts a single batch.

        Raises:
            RateLimitedError: it may not pass yet.
        """
        seconds, limit = self._seconds_to_go(producer_id, caller)
        if seconds:
            metrics.CALLS_REFUSED.labels("RATE_LIMITED").inc()
            self._log.warning(limit=limit, token=caller.name, retry_after_ms=math.ceil(seconds * 1000))
            whose = f"the token {caller.name}" if limit == "token" else "the producer"
            raise RateLimitedError(
                f"{whose} has sent more plays than its rate allows: try again in {seconds:.1f} s (a stream waits by"
                " itself)",
                math.ceil(seconds * 1000),
            )
        self._take(producer_id, caller, plays)

    # --- Buckets ------------------------------------------------------------------------------------------------------

    def _seconds_to_go(self, producer_id: bytes, caller: Caller) -> tuple[float, str]:
        """How long the batch has to wait, and for which limit."""
        now = self._clock()
        waits = [
            (bucket.seconds_to_go(now, rate, self._burst_seconds), limit)
            for bucket, rate, limit in self._buckets(producer_id, caller, now)
        ]
        return max(waits, default=(0.0, ""))

    def _take(self, producer_id: bytes, caller: Caller, plays: int) -> None:
        for bucket, _, _ in self._buckets(producer_id, caller, self._clock()):
            bucket.take(plays)

    def _buckets(self, producer_id: bytes, caller: Caller, now: float) -> Iterator[tuple[Bucket, float, str]]:
        if self._rate:
            bucket = self._producers.pop(producer_id, None) or Bucket(now, self._rate, self._burst_seconds)
            self._producers[producer_id] = bucket  # the last used stands last
            if len(self._producers) > PRODUCERS_MAX:
                self._producers.popitem(last=False)
            yield bucket, self._rate, "producer"
        if caller.plays_per_second:
            found = self._tokens.get(caller.name)
            if found is None:
                found = self._tokens[caller.name] = Bucket(now, caller.plays_per_second, self._burst_seconds)
            yield found, caller.plays_per_second, "token"
