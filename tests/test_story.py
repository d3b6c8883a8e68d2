"""The life of a model, small: trained, promoted, watched, challenged, promoted again, rolled back and accounted for"""

import json
import zipfile

import pytest

from finure.run.door import run

GATES = """
default: {min_auc: 0.55, max_ece: 0.2}  # a few thousand loans: the limits of the real portfolios are not for them
promotion: {max_different_answers: 0, max_unanswered: 0, max_p99_ms: 5000}
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    (folder / "gates.yaml").write_text(GATES)
    asked = {
        "n": 32_000, "drift_size": 3.0, "period": "quarter", "gates": str(folder / "gates.yaml"), "refit": False,
    }  # fmt: skip
    return run("credit/70_story", None, asked, folder / "home")


def test_the_story_ends_well_and_says_what_happened(told):
    assert told.exit_code == 0, told.record["error"]
    record = told.record
    assert (record["since"], record["planted"]) == ("2019Q3", "2019-07-01")
    assert {"score", "feature", "calibration"} <= set(record["alarms"])
    assert record["verdict"]["verdict"] == "promote" and record["shadowed"] >= record["verdict"]["outcomes"] > 500
    assert [line["in charge"] for line in record["in_charge"]] == ["nobody", "version 1", "version 2", "version 1"]


def test_both_versions_decided_and_every_decision_is_in_the_log(told):
    by_version = told.record["decisions"]
    assert set(by_version) == {"finure-credit:1", "finure-credit:2"} and min(by_version.values()) > 100
    page = told.page.read_text()
    assert f"{sum(by_version.values()):,}" in page and "all are as they were written" in page
    assert page.count("same: the same decision, reasons and features") == 2


def test_the_evidence_of_the_second_version_is_complete(told):
    with zipfile.ZipFile(told.folder / "home" / "evidence.zip") as pack:
        names = set(pack.namelist())
        lines = [json.loads(line)["change"] for line in pack.read("ledger/ledger.jsonl").decode().splitlines()]
    assert {"card/card.html", "validation/page.html", "fairness/fairness.html", "notices/notices.html"} <= names
    assert [line["how"] for line in lines] == ["registered", "promoted", "registered", "promoted", "rolled back"]


def test_the_page_tells_every_command_and_nothing_of_the_machine(told):
    page = told.page.read_text()
    listed = page[page.index("Everything that was typed") :]
    assert listed.count("finure ") >= told.record["metrics"]["commands"]
    for word in ("registry promote", "challenge report", "registry rollback", "audit replay", "evidence"):
        assert word in listed
    assert str(told.folder) not in page and "\x1b" not in page
