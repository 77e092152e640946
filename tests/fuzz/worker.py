"""One target under libFuzzer: `python -P -m tests.fuzz.worker TARGET KERNELS [libFuzzer's arguments]`. `run` starts it.

Guidance comes from two sides: the kernels are compiled with coverage counters, and atheris counts the branches of the
Python code that a target is about (`targets.GUIDED_BY`). The harness and its oracles are not counted.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import atheris

from tests.fuzz import targets
from tests.fuzz.harness import watch_unraisable


def main() -> None:
    name, kernels, *arguments = sys.argv[1:]
    guided_by = targets.GUIDED_BY.get(targets.module_of(name))
    with atheris.instrument_imports(include=list(guided_by)) if guided_by else nullcontext():
        import topk_grpc.kernels

        topk_grpc.kernels.use_build(Path(kernels))
        target = targets.load(name)
    corpus = Path(arguments[-2])  # libFuzzer writes to the first of the two, too
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    watch_unraisable()
    atheris.Setup([sys.argv[0], f"-max_len={target.bytes_max}", *arguments], target)
    atheris.Fuzz()


main()
