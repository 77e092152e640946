"""What holds for all tests."""

from __future__ import annotations

import os
import signal

# Processes are started by exec. gRPC reads this when it is imported, as `topk` has it too: with its preparations for
# fork, a child that is forked while gRPC's own threads run may abort before it gets to exec.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_configure() -> None:
    """Hears Ctrl-C, and so do the processes that tests start: the background jobs of a shell are born deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
