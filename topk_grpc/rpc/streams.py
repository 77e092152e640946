"""Reading a client's stream while being ready to leave it.

`server.stop(grace)` tells handlers nothing: a handler that only reads would be cut at the end of the grace, with
acknowledgements unsent. So it waits for the next message or the drain, whichever comes first. A read that is left
pending when the call ends fails with a traceback in the log: it is cancelled here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def messages(requests: AsyncIterator[T], drain: asyncio.Event) -> AsyncGenerator[T, None]:
    """The messages of a stream until the client ends it or `drain` is set; what comes later is left unread.

    Leave it with `contextlib.aclosing` where the loop over it can end early.

    Args:
        requests: the request iterator that gRPC hands to a handler.
        drain: set when the handler has to come to its end.
    """
    source = aiter(requests)
    draining = asyncio.ensure_future(drain.wait())
    read: asyncio.Future[T] | None = None
    try:
        while True:
            read = asyncio.ensure_future(anext(source))
            if not read.done():
                await asyncio.wait((read, draining), return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                return
            try:
                message = read.result()
            except StopAsyncIteration:
                return
            yield message
    finally:
        tasks = [task for task in (read, draining) if task is not None]
        for task in tasks:
            task.cancel()
        # Also those that are done: a read may have met the stream's end while this call was being cancelled.
        await asyncio.gather(*tasks, return_exceptions=True)
