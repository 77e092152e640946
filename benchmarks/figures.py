"""Figures held against their targets, and the table that shows them."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from topk_grpc import kernels


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure has to reach."""

    relation: Literal[">=", "<="]
    value: float

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.value if self.relation == ">=" else value <= self.value


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what was measured.
        value: the median, or the percentile that the name says.
        unit: of the value.
        low, high: the least and the largest of the rounds; None where there was one.
        target: to be reached; None where the figure is only told.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    target: Target | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str, target: Target | None = None) -> Figure:
        """The median of the rounds' values, with their spread."""
        return cls(name, statistics.median(values), unit, min(values), max(values), target)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.target.met(self.value)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"met": self.met}


@dataclass(slots=True)
class Report:
    """What one benchmark found.

    Attributes:
        title: the benchmark's name.
        figures: the table's lines.
        notes: what a reader of the table has to know, a sentence each.
        details: everything measured, for `--json`.
    """

    title: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "title": self.title,
            "figures": [figure.as_json() for figure in self.figures],
            "notes": self.notes,
            "details": self.details,
        }


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def print_reports(reports: Sequence[Report], as_json: bool) -> None:
    """Prints one table of all figures, or one JSON object."""
    if as_json:
        print(json.dumps({"machine": machine(), "reports": [report.as_json() for report in reports]}))
        return
    console = Console() if sys.stdout.isatty() else Console(width=140)
    table = Table()
    table.add_column("figure")
    for name in ("median", "min … max", "unit", "target"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    table.add_column("")
    for report in reports:
        table.add_section()
        table.add_row(f"[bold]{report.title}[/bold]")
        for figure in report.figures:
            spread = (
                "" if figure.low is None or figure.high is None else f"{_number(figure.low)} … {_number(figure.high)}"
            )
            target = f"{figure.target.relation} {_number(figure.target.value)}" if figure.target else ""
            verdict = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[figure.met]
            table.add_row(f"  {figure.name}", _number(figure.value), spread, figure.unit, target, verdict)
    console.print(table)
    for report in reports:
        for note in report.notes:
            console.print(f"{report.title}: {note}", highlight=False, soft_wrap=True)
    for note in _machine_notes():
        console.print(note, highlight=False, soft_wrap=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processors": os.cpu_count(),
        "python": sys.version.partition(" ")[0],
        "kernels_compiled": kernels.compiled(),
        "load_average": os.getloadavg(),
    }


def _machine_notes() -> Iterator[str]:
    if not kernels.compiled():
        yield "The kernels are not compiled: these are figures of the slow form, which has no targets."
    yield f"Machine: {os.cpu_count()} processors, Python {sys.version.partition(' ')[0]}."


def percentiles(
    name: str, values_ms: Sequence[float], target_p50: Target | None = None, target_p99: Target | None = None
) -> list[Figure]:
    """Two figures, the 50th and 99th percentile of times in milliseconds."""
    cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
    return [
        Figure(f"{name}, p50", cuts[49], "ms", target=target_p50),
        Figure(f"{name}, p99", cuts[98], "ms", target=target_p99),
    ]
