"""What a server asks of the operating system and of the interpreter when it starts."""

from __future__ import annotations

import ctypes
import gc
import resource
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

_MMAP_BYTES: Final = 4 << 20
_TRIM_BYTES: Final = 32 << 20
_PAD_BYTES: Final = 4 << 20
_YOUNG_OBJECTS: Final = 10_000
"""A few hundred batches or queries under way have fewer: most are gone when the collector first looks."""


def prepare() -> None:
    """Takes all the file descriptors this process may have, keeps freed memory for the next message, and spares the
    collector what stays for good."""
    _raise_file_limit()
    _keep_freed_memory()
    _spare_the_collector()


def _raise_file_limit() -> None:
    """Each column of a mapped block holds a descriptor, each client one: the usual 1,024 are soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Lets malloc keep up to 32 MiB of what is freed, where it would give it back to the kernel.

    Messages are some 100 KB each. By default every one is mapped, touched page by page for the first time, and
    unmapped: a third of all page faults under load came from that. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in (
        (_M_MMAP_THRESHOLD, _MMAP_BYTES),
        (_M_TRIM_THRESHOLD, _TRIM_BYTES),
        (_M_TOP_PAD, _PAD_BYTES),
    ):
        mallopt(parameter, value)


def _spare_the_collector() -> None:
    """Leaves out of garbage collection what has been imported by now, and collects less often.

    A full collection looks at every object: at hundreds of thousands of the modules, which stay anyhow, while plays
    and queries wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
