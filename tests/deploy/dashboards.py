"""The dashboard's panels, and their expressions as Grafana would send them."""

from __future__ import annotations

import json
from typing import Any, Final

from tests.deploy.promql import DEPLOY

DASHBOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
PANELS: Final[list[dict[str, Any]]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions(rate_interval: str = "1m") -> list[tuple[str, str]]:
    """The title of its panel and the expression, with all clusters chosen, for each target."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", rate_interval).replace("$cluster", ".*"))
        for panel in PANELS
        for target in panel["targets"]
    ]
