"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Hears Ctrl-C, and so do the processes that tests start: the background jobs of a shell are born deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
