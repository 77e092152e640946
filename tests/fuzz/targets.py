"""All targets by name. Each module is imported when one of its targets is asked for: some make a shard first."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from tests.fuzz.harness import Target

MODULES: Final = {
    "wire": ("request", "append", "gateway", "split", "round_trip"),
    "tables": ("marks", "strings", "pairs"),
    "log": ("segment", "replay"),
    "texts": ("texts", "messages", "tokens", "topology", "format"),
    "snapshot": ("manifest", "column", "arrays", "store", "restore"),
    "engine": ("admission", "records"),
}
NAMES: Final = tuple(name for names in MODULES.values() for name in names)
GUIDED_BY: Final = {
    "log": ("topk_grpc.storage",),
    "texts": ("topk_grpc.model", "topk_grpc.engine", "topk_grpc.rpc", "topk_grpc.gateway", "topk_grpc.topology"),
    "snapshot": ("topk_grpc.storage", "topk_grpc.engine"),
    "engine": ("topk_grpc.engine",),
}
"""The packages whose branches guide a module's targets, besides those of the kernels."""


def module_of(name: str) -> str:
    """The module that a target stands in."""
    return next(module for module, names in MODULES.items() if name in names)


def load(name: str) -> Target:
    """The target of that name."""
    targets: tuple[Target, ...] = import_module(f"tests.fuzz.{module_of(name)}").TARGETS
    return next(target for target in targets if target.name == name)
