"""The alerts: each is valid, is tested both ways, has its section in the docs, and asks for what servers have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import DEPLOY, needs_prometheus, promtool, series_of, unknown

PROMETHEUS = DEPLOY / "prometheus"
OPERATIONS = (Path(__file__).parents[2] / "docs/operations.md").read_text()
FIRING = 'count by (alertname) (ALERTS{alertstate="firing"})'

RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}
TESTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]


def minutes(duration: str) -> int:
    found = re.fullmatch(r"(\d+)m", duration)
    assert found, duration
    return int(found[1])


def firing(check: dict[str, Any]) -> set[str]:
    """The alerts that a check expects to fire; all others it expects to be silent."""
    assert check["expr"] == FIRING
    return {re.fullmatch(r'\{alertname="(\w+)"\}', sample["labels"])[1] for sample in check["exp_samples"]}  # type: ignore[index]


@needs_prometheus
def test_rules_are_valid() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", PROMETHEUS / "alerts.yaml")


@needs_prometheus
def test_alerts_fire_and_stay_silent_as_their_tests_say() -> None:
    promtool("test", "rules", "alerts_test.yaml", cwd=PROMETHEUS)


@needs_prometheus
def test_the_example_is_a_configuration() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "config", PROMETHEUS / "prometheus.yaml")


@pytest.mark.parametrize("name", RULES)
def test_every_alert_is_tested_both_ways(name: str) -> None:
    own = [test for test in TESTS if test["name"] == name]
    assert len(own) == 1
    checks = own[0]["promql_expr_test"]
    assert {frozenset(firing(check)) for check in checks} == {frozenset({name}), frozenset()}
    patience = minutes(RULES[name].get("for", "0m"))
    first = min(minutes(check["eval_time"]) for check in checks if firing(check))
    assert first >= patience
    named = {series["series"].partition("{")[0] for series in own[0]["input_series"]}
    assert series_of(RULES[name]["expr"]).keys() <= named


@pytest.mark.parametrize("name", RULES)
def test_no_alert_fires_at_a_healthy_cluster(name: str) -> None:
    healthy = TESTS[0]
    assert healthy["name"] == "nothing fires at a healthy cluster"
    assert all(not firing(check) for check in healthy["promql_expr_test"])
    named = {series["series"].partition("{")[0] for series in healthy["input_series"]}
    assert series_of(RULES[name]["expr"]).keys() <= named
    patience = minutes(RULES[name].get("for", "0m"))
    assert patience < max(minutes(check["eval_time"]) for check in healthy["promql_expr_test"])


@pytest.mark.parametrize("name", RULES)
def test_alerts_name_only_metrics_that_there_are(name: str) -> None:
    assert not unknown(RULES[name]["expr"])


@pytest.mark.parametrize("name", RULES)
def test_alerts_say_what_to_do(name: str) -> None:
    rule = RULES[name]
    assert re.fullmatch(r"Topk[A-Z][A-Za-z]+", name)
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert notes["description"].endswith(".")
    assert notes["runbook_url"].endswith(f"/docs/operations.md#{name.lower()}")
    section = OPERATIONS.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    assert "\nLook at: " in section
    assert "\nDo: " in section


def test_operations_describes_no_alert_that_is_gone() -> None:
    described = re.findall(r"^### (Topk\w+)$", OPERATIONS, re.MULTILINE)
    assert described == list(RULES)


def test_unknown_names_are_found() -> None:
    assert unknown("sum by (reason) (rate(topk_plays_rejected_total[5m])) > 0") == []
    assert unknown('up{job=~"topk.*"} == 0 and on (instance) topk_gone') == ["topk_gone"]
    assert unknown("rate(topk_ack_seconds[5m])") == ["topk_ack_seconds"]
    assert unknown('topk_calls_failed_total{color="red"}') == ["topk_calls_failed_total{color}"]
    assert unknown("sum by (shard) (topk_ready)") == ["shard"]
