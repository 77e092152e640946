"""Both forms of every kernel: the compiled one, if there is one, and its `.py`, loaded under the same names."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, settings

import topk_grpc.kernels

DIRECTORY = Path(topk_grpc.kernels.__file__).parent
MODULES = (
    "hash",
    "wire",
    "encode",
    "split",
    "strings",
    "pairs",
    "marks",
    "counters",
    "heap",
    "sorting",
    "sessions",
)  # each after those it imports


@dataclass(frozen=True)
class Kernels:
    """The modules of one form. `Any`: two modules with the same functions have no common type."""

    form: str
    hash: Any
    wire: Any
    encode: Any
    split: Any
    strings: Any
    pairs: Any
    marks: Any
    counters: Any
    heap: Any
    sorting: Any
    sessions: Any

    def sized(self, rows: int) -> int:
        """How many rows a test with plenty of them takes: few where a row costs hundreds of times more."""
        return rows if self.form == "compiled" else max(1, rows // 20)


def _load_sources() -> dict[str, ModuleType]:
    """Runs the `.py` files as modules of their usual names, which then find each other, not the compiled ones."""
    names = {module: f"topk_grpc.kernels.{module}" for module in MODULES}
    usual = {name: sys.modules.pop(name, None) for name in names.values()}
    loaded: dict[str, ModuleType] = {}
    try:
        for module, name in names.items():
            loader = SourceFileLoader(name, str(DIRECTORY / f"{module}.py"))
            spec = spec_from_loader(name, loader)
            assert spec is not None
            loaded[module] = sys.modules[name] = module_from_spec(spec)
            loader.exec_module(loaded[module])
    finally:
        for name, before in usual.items():
            sys.modules.pop(name, None)
            if before is not None:
                sys.modules[name] = before
    return loaded


def _forms() -> list[Kernels]:
    forms = [Kernels("source", **_load_sources())]
    if topk_grpc.kernels.compiled():
        installed = {module: importlib.import_module(f"topk_grpc.kernels.{module}") for module in MODULES}
        forms.insert(0, Kernels("compiled", **installed))
    return forms


FORMS = _forms()


def examples(count: int) -> settings:
    """Settings of a property test. No deadline for an example: the cores may be busy with something else."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
