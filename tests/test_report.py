"The report of a training run: made end to end, whole, small and true to the run."

import json
import re

import numpy as np
import pandas as pd
import pytest

from finure.core import FinureError
from finure.credit.tables import (
    by_group,
    decisions,
    examples,
    explain,
    read_run,
)
from finure.report import find_run, html_table, registered_before
from finure.run.compare import compare, write_page
from finure.run.door import run
from finure.simulate.bank import modelling_table, simulate
from finure.simulate.world import Bank, releases
from finure.tables import reason_table

QUICK = {"max_depth": 2, "eta": 0.2}
STRESS = {"unemployment 2 points up": {"unemployment": 2.0}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home):
    data = home / "bank.csv"
    modelling_table(simulate(Bank(n=6000))).to_csv(data, index=False)
    loose = home / "gates.yaml"
    loose.write_text("default:\n  min_auc: 0.5\n  max_psi: 0.25\n")
    asked = {"data": str(data), "gates": str(loose), "register": False, "boosting": QUICK, "model_name": "finure-small"}
    ended = run("credit/40_train", None, asked, home=home)
    assert ended.status == "done", ended.record["error"]
    return ended


@pytest.fixture(scope="module")
def report(home, trained):
    macro = home / "macro.csv"
    releases(Bank()).to_csv(macro, index=False)
    asked = {"train_run": str(trained.folder), "model_name": "finure-small", "macro": str(macro), "stress": STRESS}
    ended = run("credit/50_report", None, asked, home=home)
    assert ended.status == "done", ended.record["error"]
    return ended


def test_the_page_is_small_and_offline(report):
    for name in ("page.html", "drift.html"):
        page = (report.folder / name).read_text()
        assert 100_000 < len(page.encode()) < 5_000_000
        assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", page)
    page = report.page.read_text()
    assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", page)
    assert "<script" not in page
    assert 'href="drift.html"' in page
    assert "Traceback" not in page and "<Figure" not in page and "import " not in page


def test_the_page_names_its_run_and_shows_its_figures(report, trained):
    page, metrics = report.page.read_text(), trained.record["metrics"]
    assert page.count(trained.folder.name) > 10
    assert trained.record["data"] in page
    assert f"{metrics['auc']:.4f} ({metrics['auc_lower_bound']:.4f} to {metrics['auc_upper_bound']:.4f})" in page
    assert f"its PSI is {metrics['psi']:.4f}" in page.replace("\n", " ")
    fair = json.loads((trained.folder / "fairness.json").read_text())
    assert fair["verdict"] == "measured" and "area_index (kept out)" in page
    assert f"{fair['air']['value']:.3f}" in page and trained.record["metrics"]["air"] == fair["air"]["value"]
    heads = ("Summary", "Is the PD right?", "Have the applications changed?", "Vintages", "Are groups treated alike?")
    for head in (*heads, "Limits of this report"):
        assert head in page
    assert "not legal advice" in page
    assert "unemployment 2 points up" in page and "with the figures that were out on the day" in page.replace("\n", " ")
    assert "Index of the neighbourhood" in page  # the data dictionary


def test_both_models_of_a_run_are_compared_on_one_page(trained, home, tmp_path):
    before, after = [(trained.record | {"candidate": kind}, trained.folder) for kind in ("scorecard", "boosting")]
    found = compare(before, after)
    told = {section.title: section for section in found.sections}
    read = read_run(trained.folder)
    moved = told["Swap set"].table.set_index(["before", "after"])["rows"]
    assert moved.sum() == len(read.part("test"))
    limit, part = read.scorer.facts["policy"]["approve_up_to"], read.part("test")
    now = ((part["pd_scorecard"] > limit) & (part["pd_boosting"] <= limit)).sum()
    assert now > 0 and told["Swap set"].words.startswith(f"now approve: {now} (")
    figures = told["Figures on the same rows"].table.set_index("figure")
    metrics = trained.record["compared"]
    assert figures.loc["auc", "before"].startswith(f"{metrics['scorecard']['auc']:.4f} (")
    assert figures.loc["auc, after less before", "after"].startswith(
        f"{metrics['boosting']['auc'] - metrics['scorecard']['auc']:+.4f} ("
    )
    assert set(told["Who they are"].table["feature"]) <= set(read.scorer.contract.model_features())
    page = write_page(found, tmp_path / "page.html").read_text()
    assert "Swap set" in page and str(now) in page and "<script" not in page and "http:" not in page


def test_the_result_repeats_the_figures_of_the_run(report, trained):
    result = json.loads((report.folder / "result.json").read_text())
    assert result["metrics"] == {name: trained.record["metrics"][name] for name in ("auc", "ks", "ece")}
    assert (result["train_run"], result["portfolio"]) == (trained.folder.name, "simulated_bank")
    assert report.record["summary"] == result["summary"]
    assert f"AUC {trained.record['metrics']['auc']:.4f}" in result["summary"]


def test_the_run_is_found_by_name_by_path_and_as_the_newest(home, trained):
    assert find_run(trained.folder.name, "", home) == trained.folder
    assert find_run(str(trained.folder), "", home) == trained.folder
    assert find_run("", "finure-small", home) == trained.folder
    with pytest.raises(FinureError, match="No finished training run of `other`"):
        find_run("", "other", home)
    with pytest.raises(FinureError, match=f"`20991231` is no training run.*{trained.folder.name}"):
        find_run("20991231", "", home)


def test_the_decisions_and_reasons_are_those_of_the_model(trained, home):
    read = read_run(trained.folder)
    decided = decisions(read)
    scores = decided.sort_values("pd")["score"].to_numpy()
    assert (np.diff(scores) <= 0).all() and scores.min() >= 300 and scores.max() <= 850
    assert by_group(decided, "decision", "decision")["applications"].sum() == len(read.part("test"))
    values = read.values[(read.scored["part"] == "test").to_numpy()]
    np.testing.assert_allclose(read.scorer.model.pds(values[:50]), decided["pd"][:50], atol=1e-6)
    explained = explain(read, decided, rows=40)
    assert len(explained.table) == min(40, (decided["decision"] != "approve").sum())
    assert explained.table["reasons"].map(len).between(1, 4).all()
    assert set(explained.table["decision"]) <= {"refer", "decline"}
    assert registered_before(read.result, read.record["started"], home) is None


def test_when_all_are_approved_there_are_no_reasons(trained):
    read = read_run(trained.folder)
    explained = explain(read, decisions(read).assign(decision="approve"))
    assert len(explained.table) == 0
    assert "no reasons to show" in explained.words
    assert len(reason_table(explained.table)) == len(examples(explained)) == 0


def test_a_table_escapes_what_it_shows():
    html = html_table(pd.DataFrame({"<a>": ["x & y"], "share": [0.5]}), {"share": ".0%"}, "run <1>")
    assert "&lt;a&gt;" in html and "x &amp; y" in html and "50%" in html and "run &lt;1&gt;" in html
