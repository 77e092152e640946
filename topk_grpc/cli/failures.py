"""How a command says that it failed, and with which status.

0 it worked, 1 it failed, 2 the command line is wrong. A server that cannot start has a fourth: whoever starts it again
has to know whether that can help.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Final, Never

from topk_grpc.errors import CorruptError, ForeignDirectoryError, SettingError, StaleKernelError, VersionError

FAILED: Final = 1
USAGE: Final = 2
FINAL: Final = 3
"""A server's: starting it again cannot help before somebody has changed something."""

FINAL_ERRORS: Final = (CorruptError, ForeignDirectoryError, SettingError, StaleKernelError, VersionError)
"""What a server ends with `FINAL` for. A directory or port in use, or a full disk, may be free the next time."""


def fail(message: str, status: int = FAILED) -> Never:
    """Ends the process with one line on stderr; TOPK_DEBUG=1 adds the traceback of the error being handled."""
    if os.environ.get("TOPK_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(status)
