"""Prometheus' own tools, and what an expression names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from topk_grpc.metrics import TABLE

DEPLOY: Final = Path(__file__).parents[2] / "deploy"

needs_prometheus: Final = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="promtool or prometheus is missing (Debian: apt-get install prometheus)",
)

SCRAPED: Final = frozenset({"job", "instance", "cluster"})
"""Labels that Prometheus gives to all series, by its configuration."""

_PROCESS: Final = ("process_open_fds", "process_max_fds", "process_resident_memory_bytes", "process_cpu_seconds_total")
_SUFFIXES: Final = {"histogram": ("_bucket", "_sum", "_count")}
_WORDS: Final = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan"})
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"' + r"|'(?:[^'\\]|\\.)*'")
_CLAUSE: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR: Final = re.compile(r"([A-Za-z_:][\w:]*)?\s*\{([^}]*)\}")
_NAME: Final = re.compile(r"(?<![\w.$:])([A-Za-z_:][\w:]*)(?!\s*\()(?![\w:])")


def known_series() -> Mapping[str, frozenset[str]]:
    """Every name that an expression may use, with its own labels."""
    known = {name: frozenset[str]() for name in ("up", *_PROCESS)}
    for row in TABLE:
        for suffix in _SUFFIXES.get(row.kind, ("",)):
            known[row.name + suffix] = frozenset(row.labels) | ({"le"} if suffix == "_bucket" else set())
    return known


def series_of(expression: str) -> dict[str, set[str]]:
    """The series that an expression names, each with the labels that it is selected by."""
    bare = _STRING.sub('""', expression)
    named: dict[str, set[str]] = {}
    for name, labels in _SELECTOR.findall(bare):
        assert name, f"a selector without a name: {expression}"
        named.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", labels))
    rest = re.sub(r"\[[^\]]*\]", "", _CLAUSE.sub("", re.sub(r"\{[^}]*\}", "", bare)))
    for name in _NAME.findall(rest):
        if name.lower() not in _WORDS and not re.fullmatch(r"\d+[a-z]+", name):
            named.setdefault(name, set())
    return named


def labels_of(expression: str) -> set[str]:
    """The labels that it groups and matches by."""
    return {label for clause in _CLAUSE.findall(_STRING.sub('""', expression)) for label in re.findall(r"\w+", clause)}


def unknown(expression: str) -> list[str]:
    """What an expression names that no server has."""
    known = known_series()
    series = series_of(expression)
    assert series, f"it names no series: {expression}"
    problems = [name for name in series if name not in known]
    own = SCRAPED.union(*(known.get(name, frozenset()) for name in series))
    problems += [
        f"{name}{{{label}}}"
        for name, labels in series.items()
        for label in labels - known.get(name, frozenset()) - SCRAPED
    ]
    return problems + sorted(labels_of(expression) - own)


def promtool(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Runs promtool, which has to be content; returns what it prints."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
