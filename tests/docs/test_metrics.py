"""docs/metrics.md against the table of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from topk_grpc.metrics import REGISTRY, TABLE, Metric

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
TESTS = "".join(
    path.read_text()
    for folder in ("cluster", "security", "shard", "topology")
    for path in sorted((Path(__file__).parents[1] / folder).glob("*.py"))
)
ROLES = {"gateway", "shard", "controller"}


def _servers(row: Metric) -> str:
    return "every server" if set(row.servers) == ROLES else ", ".join(row.servers)


def _labels(row: Metric) -> str:
    return ", ".join(f"`{label}`" for label in row.labels)


def rows() -> str:
    return "".join(
        f"| `{row.name}` | {_servers(row)} | {row.kind} | {row.unit} | {_labels(row)} | {row.help} |\n" for row in TABLE
    )


def test_docs_name_every_metric() -> None:
    head = "| metric | of | kind | unit | labels | what it says |\n|---|---|---|---|---|---|\n"
    table = PAGE.partition("<!-- metrics: begin -->\n\n")[2].partition("\n<!-- metrics: end -->")[0]
    assert table == head + rows()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_metric_is_caused_by_a_test(row: Metric) -> None:
    assert row.name in TESTS


def test_names_are_as_prometheus_wants_them() -> None:
    known = {name for family in REGISTRY.collect() for name in (family.name, f"{family.name}_total")}
    for row in TABLE:
        assert row.name.startswith("topk_")
        assert row.servers
        assert set(row.servers) <= ROLES
        assert row.name in known
        assert row.name.endswith("_total") == (row.kind == "counter")
