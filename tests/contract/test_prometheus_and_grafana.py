"""Alert rules and the dashboard: their queries are PromQL, and every metric they name is one that /metrics has.

promtool, from Debian's package prometheus, looks too where it is installed.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support.http_app import CHAT, app_of, asking, request
from support.scripted_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "odmoe.json").read_text("utf-8"))
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
# What Prometheus itself says of whom it scrapes.
PROMETHEUS_OWN = {"up"}
# What the dashboard must show, whatever else it does.
SHOWN = {
    "forecast recall": "expert_activations_predicted",
    "load time": "expert_load_seconds",
    "stalls": "expert_stall_seconds",
    "slots": "expert_slots",
    "node state": "node_up",
    "first token": "time_to_first_token_seconds",
    "between tokens": "inter_token_latency_seconds",
    "queue": "num_requests_waiting",
}


@cache
def metrics() -> dict[str, set[str]]:
    """Name of each sample of a server that has answered something -> its labels."""
    app = app_of(ScriptedEngine.saying("four"))
    request(app, "POST", CHAT, json=asking())
    request(app, "GET", "/health")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(request(app, "GET", "/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> list[str]:
    dashboard = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [rule["expr"] for rule in RULES] + [expr.replace("$__rate_interval", "5m") for expr in dashboard]


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Every metric a query names, with the labels it is chosen by. Raises ValueError for what is no PromQL."""
    found = []

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
            child = getattr(node, name, None)
            for part in child if isinstance(child, list) else [child]:
                if part is not None:
                    walk(part)

    walk(promql_parser.parse(query))
    return found


def unknown(query: str) -> list[str]:
    """What the query asks for and no server tells."""
    complaints = []
    for name, labels in selectors(query):
        if name in PROMETHEUS_OWN:
            continue
        if name not in metrics():
            complaints.append(f"no metric {name}")
        elif extra := labels - metrics()[name] - {"instance", "job"}:
            complaints.append(f"{name} has no labels {sorted(extra)}")
    return complaints


@pytest.mark.parametrize("query", queries())
def test_every_query_asks_for_what_there_is(query: str) -> None:
    assert selectors(query)
    assert not unknown(query)


@pytest.mark.parametrize(
    "query",
    [
        "rate(odmoe:no_such_total[5m])",
        'sum(odmoe:node_up{colour="red"})',
        'up{job="odmoe"} and on (instance) odmoe:gone == 1',
        "histogram_quantile(0.95, sum by (le) (rate(odmoe:no_such_bucket[5m])))",
    ],
)
def test_a_query_for_what_is_not_there_is_found(query: str) -> None:
    assert unknown(query)


def test_a_query_that_is_none_is_found() -> None:
    with pytest.raises(ValueError, match=r"unclosed|unexpected|invalid"):
        selectors("rate(odmoe:failures_total[5m]")


def test_rules_say_what_they_mean() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"].endswith((".", ").", "says why."))


def test_the_dashboard_shows_what_matters() -> None:
    named = {name for query in queries()[len(RULES) :] for name, _ in selectors(query)}
    missing = {what for what, metric in SHOWN.items() if not any(metric in name for name in named)}
    assert not missing


def test_every_expert_metric_is_on_the_dashboard() -> None:
    named = {name for query in queries()[len(RULES) :] for name, _ in selectors(query)}
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics() if name.startswith("odmoe:expert_")}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named}
    left_out = {"odmoe:expert_broken_off_seconds_total"}  # its count is there
    assert ours - shown == left_out


def test_every_metric_the_page_explains_is_there() -> None:
    text = (PROMETHEUS / "README.md").read_text("utf-8")
    explained = set(re.findall(r"`(odmoe:\w+)`", text))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics()}
    assert explained
    assert explained <= families


def test_panels_do_not_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_scrape_takes_the_rules_and_a_key() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    assert [PROMETHEUS / name for name in config["rule_files"]] == [PROMETHEUS / "alerts.yml"]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "odmoe"
    assert job["authorization"]["credentials_file"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool (Debian's package prometheus) here")
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_has_no_complaints(check: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *check], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
