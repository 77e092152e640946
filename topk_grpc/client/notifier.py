"""Wakes whoever waits for a state that changes often."""

from __future__ import annotations

import asyncio


class Notifier:
    """Every waiter wakes at the next `notify` and looks for itself whether its condition holds."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all that wait now, and none that come later."""
        # set() resolves the waiters' futures at once; cleared again, the event makes the next ones wait.
        self._event.set()
        self._event.clear()

    async def wait(self) -> None:
        """Returns after the next `notify`."""
        await self._event.wait()
