"""The fraud model's training run and report, end to end on a small simulated town: gate, registry, the same model"""

import json
import re

import numpy as np
import pandas as pd
import pytest

from finure.bundle import fingerprint, load_scorer
from finure.core import FinureError, Settings
from finure.fraud.data import simulated_table
from finure.fraud.tables import against_published, read_run
from finure.registry import BundleModel, bundle_of, signature, versions
from finure.run.compare import compare
from finure.run.door import run
from finure.run.records import find_one
from finure.run.swap import decided_rows, model_of
from finure.run.swap import tested_rows as rows_judged  # a name that pytest takes for no test
from finure.simulate.cards import Cards

TOWN = Cards(customers=500, terminals=1_000, days=80, compromised=0.8, leaked=1.0, radius=10)
LOOSE, STRICT = {"min_auc": 0.6, "max_psi": 0.25, "max_strongest_feature_auc": 0.95}, {"min_ap": 0.999}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A state folder of its own, for the kernels of the jobs too."
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINURE_HOME", str(folder))
        yield folder


def train(home, gates):
    "A training run on the town with its own gates."
    data, file = home / "town.parquet", home / "gates.yaml"
    if not data.exists():
        simulated_table(TOWN).to_parquet(data, index=False)
    file.write_text(json.dumps({"default": gates}))
    asked = {"data": str(data), "gates": str(file), "model_name": "finure-town", "test_days": 7, "folds": 1}
    return run("fraud/40_train", None, asked | {"boosting": {"rounds": 40}}, home=home)


@pytest.fixture(scope="module")
def trained(home):
    ended = train(home, LOOSE)
    assert ended.status == "done", ended.record["error"]
    return ended


def test_a_run_that_passed_is_registered_with_its_figures_and_its_rules(trained, home):
    settings = Settings(home=home)
    (version,) = versions("finure-town", settings)
    assert version["aliases"] == ["challenger"] and trained.record["registered"]["version"] == version["version"]
    assert version["metrics"]["ap"] == trained.record["metrics"]["ap"] > 0.4
    bundle = bundle_of("finure-town", "challenger", settings)
    assert fingerprint(bundle) == fingerprint(trained.folder / "model")
    scorer = load_scorer(bundle)
    assert (bundle / "rules" / "fraud_rules.yaml").is_file() and scorer.info["metrics"]["auc"] > 0.7
    told = signature(scorer.contract, scorer.answer_schema)
    assert [column.name for column in told.outputs] == ["probability", "score", "decision", "reasons"]
    with pytest.raises(FinureError, match="ask its service"):
        BundleModel(bundle).predict(pd.DataFrame())


def test_the_days_of_the_test_come_after_all_that_was_known(trained):
    read = read_run(str(trained.folder), "", trained.folder.parents[2])
    today, delay = pd.Timestamp(read.result["as_of"]), pd.Timedelta(days=7)
    assert (read.part("train")["event_time"] + delay <= read.part("calibrate")["event_time"].min()).all()
    assert (read.part("calibrate")["event_time"] + delay <= today).all()
    test = read.part("test")
    assert test["event_time"].min() >= today and test["event_time"].max() < today + delay
    week = read.part("calibrate")
    known = week.loc[(week["fraud"] == 1), "customer_id"]
    later = test.loc[test["event_time"] >= today + pd.Timedelta(days=1), "customer_id"]
    first_day = week.loc[(week["fraud"] == 1) & (week["event_time"] < today - delay), "customer_id"]
    assert len(known) and not set(first_day) & set(later)
    assert read.tested().fraud.sum() == test["fraud"].sum() > 10


def test_a_missed_gate_registers_nothing_and_the_same_data_give_the_same_model(trained, home):
    again = train(home, STRICT)
    assert (again.status, again.exit_code) == ("gate", 2)
    assert "ap" in again.record["error"]["message"] and "0.999" in again.record["error"]["message"]
    assert len(versions("finure-town", Settings(home=home))) == 1
    assert again.record["metrics"] == trained.record["metrics"]
    assert fingerprint(again.folder / "model") == fingerprint(trained.folder / "model")


def test_two_runs_are_compared_on_the_payments_of_the_newer_one(trained, home):
    run = find_one(trained.folder.name[-4:], home)
    told = {section.title: section for section in compare(run, run).sections}
    assert told["Swap set"].words.startswith("now approve: 0 (0.0%), no longer approve: 0")
    assert told["Swap set"].table["rows"].sum() == (len(rows_judged(run[1])))
    rows = rows_judged(run[1])
    decided = decided_rows(model_of(*run), rows)
    np.testing.assert_allclose(decided["risk"], rows["probability"], atol=1e-6)
    assert len(told["Reasons"].table) and told["Cut-off"].words.endswith("no difference.")


def test_the_report_is_small_offline_and_true_to_its_run(trained, home):
    ended = run("fraud/50_report", None, {"model_name": "finure-town"}, home=home)
    assert ended.status == "done", ended.record["error"]
    page, metrics = ended.page.read_text(), trained.record["metrics"]
    assert 100_000 < len(page.encode()) < 5_000_000 and "Traceback" not in page
    assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", page) and "<script" not in page
    assert page.count(trained.folder.name) > 10 and f"{metrics['predicted_to_observed']:.2f}" in page
    for head in ("Summary", "Where is fraud?", "What do people look at?", "The rules beside the model", "Limits of"):
        assert head in page
    assert ended.record["metrics"] == {name: metrics[name] for name in ("auc", "ap", "cp", "cost_share")}


def test_published_figures_stand_beside_ours_for_the_same_weeks_only():
    days = [int(np.datetime64(d, "D").astype(int)) for d in ("2018-08-15", "2018-08-08", "2018-08-01", "2018-07-25")]
    folds = [{"start": day, "auc": 0.9, "ap": 0.7 + i / 100, "cp": 0.3} for i, day in enumerate(days)]
    found = against_published("fraud_handbook_transactions", folds, 100)
    assert found["single split"].iloc[0, 2] == 0.73 and found["four weeks"].iloc[0, 2] == pytest.approx(0.715)
    assert list(against_published("fraud_handbook_transactions", folds[1:], 100)) == ["single split"]
    assert not against_published("fraud_handbook_transactions", folds, 50)
    assert not against_published("simulated_cards", folds, 100)
