"""The dashboard: well-formed, and asks only for what servers have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.dashboards import DASHBOARD, PANELS, expressions
from tests.deploy.promql import needs_prometheus, promtool, series_of, unknown
from topk_grpc.metrics import TABLE

UNITS = {"none", "s", "cps", "bytes", "Bps", "percentunit"}
NOT_SHOWN = {
    # Limits, which alerts compare with.
    *("topk_shard_pending_bytes_max", "topk_scans_max", "topk_memory_bytes_max", "topk_snapshot_log_bytes_max"),
    *("topk_snapshot_age_seconds_max", "topk_shards"),
    # Told by others that are shown.
    *("topk_plays_delayed_total", "topk_recovering", "topk_recovery_seconds"),
}


@needs_prometheus
def test_expressions_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:{number}", "expr": text} for number, (_, text) in enumerate(expressions())]
    path = tmp_path / "rules.json"  # which YAML reads
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_expressions_name_only_metrics_that_there_are(title: str, expression: str) -> None:
    assert not unknown(expression), title
    assert all("cluster" in labels for labels in series_of(expression).values())


def test_every_metric_is_shown_or_left_out_on_purpose() -> None:
    shown = {name for _, expression in expressions() for name in series_of(expression)}
    for row in TABLE:
        names = {row.name, f"{row.name}_bucket", f"{row.name}_sum"}
        assert bool(names & shown) != (row.name in NOT_SHOWN), row.name


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_have_units_and_legends() -> None:
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Shards", "Storage", "Windows and queries", "Moves", "Security"]
