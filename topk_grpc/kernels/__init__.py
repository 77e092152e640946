"""The hot loops: plain functions over arrays, no I/O, no clock, no Python objects inside a loop.

Each module is Cython in pure-Python mode: the build compiles it to a machine-code module beside the `.py`; without a
compiler the `.py` itself runs, with the same results, hundreds of times slower. Compiled loops run with the GIL
released. Every kernel works on numpy arrays and buffers that its caller owns, sized and grown by the caller beforehand.

The build records a hash of each source it compiles. An edited `.py` beside an older compiled module would silently go
on running the old code, so that is refused at import.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from topk_grpc.errors import StaleKernelError

_HERE = Path(__file__).parent


def compiled() -> bool:
    """Whether the kernels run as machine code."""
    spec = find_spec("topk_grpc.kernels.hash")
    return spec is not None and spec.origin is not None and not spec.origin.endswith(".py")


def check_current(directory: Path = _HERE, sources: Path | None = None) -> None:
    """Compares the sources of compiled kernels with what they were compiled from.

    Args:
        directory: where the compiled kernels are.
        sources: where the sources are, if not beside them.

    Raises:
        StaleKernelError: a compiled kernel stands beside another source, or nobody recorded what it was made from.
    """
    built = {path.name.partition(".")[0] for path in directory.glob("*.so")}
    if not built:
        return
    record = directory / "_build_info.json"
    hashes = json.loads(record.read_text()) if record.exists() else {}
    for name in sorted(built):
        source = (sources or directory) / f"{name}.py"
        if not source.exists() or hashes.get(name) != hashlib.sha256(source.read_bytes()).hexdigest():
            raise StaleKernelError(
                f"the compiled kernel {name} in {directory} was not made from {source.name} as it stands there: "
                "build again with `pip install -e .` (`make install`), or delete the .so files to run uncompiled"
            )


def use_build(directory: Path) -> None:
    """Takes the compiled kernels from a build of its own, such as the sanitized one that fuzzing runs.

    To be called before any kernel is imported.

    Args:
        directory: of the compiled kernels and their `_build_info.json`.

    Raises:
        StaleKernelError: there are none, or they were compiled from other sources than those that stand here.
    """
    if not list(directory.glob("*.so")):
        raise StaleKernelError(f"there are no compiled kernels in {directory}: build them there first")
    check_current(directory, _HERE)
    __path__.insert(0, str(directory))


check_current()
