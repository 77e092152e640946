"""A watch on the client's side: one list kept up to date over any number of streams.

Every end of a stream means the same: open another with the last resume_token. What comes then are the changes since, or
the whole list again where the server does not know the token; either way the caller is told what differs from the list
it saw last. Only a status that would be the same the next time is raised (retries.py), and, as long as not one list has
come, that nobody answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import grpc

from topk_grpc.changes import WatchUpdate, apply, diff
from topk_grpc.client.backoff import Backoff
from topk_grpc.client.retries import retry_after_seconds
from topk_grpc.errors import InvalidArgumentError, TopKError, UnauthenticatedError, UnavailableError
from topk_grpc.model import Answer, Entry
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert, steps
from topk_grpc.rpc.connection import Connection, Metadata
from topk_grpc.rpc.status import from_rpc_error

if TYPE_CHECKING:
    WatchCall = grpc.aio.UnaryStreamCall[pb.WatchTopKRequest, pb.WatchTopKResponse]

Interrupted = Callable[[TopKError], None]
"""Is told why there is nothing to be heard of a watch for now."""


class Watching:
    """One watch; iterate over `updates` once."""

    def __init__(
        self,
        open_call: Callable[[Metadata], WatchCall],
        request: pb.WatchTopKRequest,
        connection: Connection,
        *,
        first_seconds: float,
        random: Callable[[], float],
        closed: Callable[[], bool],
        on_interrupted: Interrupted | None,
    ) -> None:
        """Opens nothing yet.

        Args:
            open_call: calls WatchTopK with the request as it is then, and the metadata given.
            request: what to watch.
            connection: has the token.
            first_seconds: how long the first list may take.
            random: draws evenly from [0, 1).
            closed: whether the client was closed, which ends the watch.
            on_interrupted: is called with each stream's failure.
        """
        self._open_call = open_call
        self._request = request
        self._connection = connection
        self._first_seconds = first_seconds
        self._closed = closed
        self._on_interrupted = on_interrupted
        self._backoff = Backoff(random)
        self._entries: tuple[Entry, ...] = ()
        self._number: int | None = None

    async def updates(self) -> AsyncGenerator[WatchUpdate, None]:
        """The list, now and whenever it changes, until the generator or the client is closed.

        Raises:
            UnavailableError: no list came for first_seconds after the start.
            TopKError: the cluster refuses the watch for good.
        """
        until = asyncio.get_running_loop().time() + self._first_seconds
        retried = False  # with another token, since the last list
        while not self._closed():
            shown = self._connection.metadata()
            call = self._open_call(shown)
            try:
                while (update := await self._next(call, until)) is not None:
                    self._backoff.reset()
                    retried = False
                    yield update
                least_seconds = 0.0  # it ended with OK, as streams of a draining server do
            except grpc.aio.AioRpcError as error:
                asked = retry_after_seconds(error)
                failure = from_rpc_error(error)
                if isinstance(failure, UnauthenticatedError) and not retried:
                    retried = self._connection.has_other(shown)
                    asked = 0.0 if retried else None
                if asked is None:
                    raise failure from error
                if self._number is None and asyncio.get_running_loop().time() + asked >= until:
                    raise _silence(self._first_seconds, failure) from error
                if self._on_interrupted is not None:
                    self._on_interrupted(failure)
                least_seconds = asked
            except _ForgetError:
                self._request.resume_token = ""
                least_seconds = 0.0
            finally:
                call.cancel()
            await asyncio.sleep(self._backoff.next_seconds(least_seconds))

    async def _next(self, call: WatchCall, until: float) -> WatchUpdate | None:
        """The next update of a stream; None at its end.

        Raises:
            AioRpcError: it did not end with OK.
        """
        try:
            async with asyncio.timeout_at(until if self._number is None else None):
                message = await call.read()
        except TimeoutError as error:
            raise _silence(self._first_seconds, None) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed() and (task is None or not task.cancelling()):
                return None  # the channel went, and cancelled the call: not us
            raise
        return self._take(message) if isinstance(message, pb.WatchTopKResponse) else None  # grpc.aio.EOF

    def _take(self, message: pb.WatchTopKResponse) -> WatchUpdate:
        """Brings the list up to date.

        Raises:
            _ForgetError: the step does not belong to the list: only the whole one helps.
        """
        certificate = convert.certificate_from_pb(message.certificate)
        reset = False
        if message.WhichOneof("step") == "snapshot":
            reset = message.snapshot.reset
            entries = steps.entries_from_snapshot(message.snapshot)
            changes = diff(self._entries, entries)
        else:
            if message.changes.previous_number != self._number:
                raise _ForgetError
            try:
                changes = steps.changes_from_pb(message.changes)
                entries = apply(self._entries, changes, certificate.total_plays)
            except InvalidArgumentError as error:
                raise _ForgetError from error
        self._entries, self._number = entries, message.number
        self._request.resume_token = message.resume_token
        return WatchUpdate(Answer(steps.bounds_from_step(message), certificate, entries), changes, self._number, reset)


def _silence(seconds: float, why: TopKError | None) -> UnavailableError:
    return UnavailableError(f"nothing came for {seconds:g} s after the watch began" if why is None else str(why))


class _ForgetError(Exception):
    """The server's changes and our list do not fit each other."""
