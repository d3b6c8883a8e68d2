"""The alert rules fire on what they are for, and rules and dashboard ask for metrics that the service has"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from debian import program

from finure.core import root
from finure.serve.metrics import Histogram, Metrics

PLACE = root() / "bentos" / "monitoring"
RULES = yaml.safe_load((PLACE / "alerts.yml").read_text())
TESTS = sorted(path.name for path in PLACE.glob("*_test.yml"))
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def promtool() -> Path:
    "Prometheus' own checker, of Debian's package."
    if (found := program("prometheus", "usr/bin/promtool")) is None:
        pytest.skip("promtool is not here, and there is no apt to get it with")
    return found


def scraped() -> str:
    "What a service that has seen everything tells Prometheus."
    metrics = Metrics({"model": "m:1", "contract": "c 1"})
    metrics.scores, metrics.log = Histogram((1, 2)), lambda: {"queue": 0, "lag_seconds": 0.001, "up": 1.0}
    metrics.request("/api/v1/predict", 200, 0.001)
    metrics.decision({"decision": "decline", "reasons": [{"code": "DTI"}], "score": 1.5})
    return metrics.text()


def names(text: str) -> set[str]:
    "The service's metrics in a text."
    return set(re.findall(r"finure_[a-z_]+", text))


def test_the_rules_do_what_their_tests_say(promtool):
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", *TESTS]):
        done = subprocess.run([promtool, *command], cwd=PLACE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_of_the_rules_can_fail(promtool, tmp_path):
    shutil.copy(PLACE / "alerts_test.yml", tmp_path)
    (tmp_path / "alerts.yml").write_text(
        (PLACE / "alerts.yml").read_text().replace("finure_log_up == 0", "finure_log_up == 2")
    )
    assert subprocess.run([promtool, "test", "rules", "alerts_test.yml"], cwd=tmp_path, capture_output=True).returncode


def test_every_alert_is_seen_firing_and_says_what_to_do():
    tests = [test for name in TESTS for test in yaml.safe_load((PLACE / name).read_text())["tests"]]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == set(ALERTS)
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "action"} == set(rule["annotations"])


def test_prometheus_reads_the_metrics(promtool):
    done = subprocess.run([promtool, "check", "metrics"], input=scraped(), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_rules_and_dashboard_ask_for_metrics_that_there_are():
    there = names(scraped())
    dashboard = json.loads((PLACE / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [rule["expr"] for rule in ALERTS.values()]
    assert len(asked) > 25 and names(" ".join(asked)) <= there


def test_the_dashboard_is_laid_out():
    panels = json.loads((PLACE / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["targets"] and panel["title"])
