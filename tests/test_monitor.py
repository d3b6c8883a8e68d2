"""Watching a model on the simulated bank: what is planted is found, what is not is not; outcomes, groups, retraining"""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import explained
import msgspec
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from finure.audit.export import export
from finure.audit.log import open_store
from finure.audit.writer import DecisionLog, Entry
from finure.bundle import fingerprint
from finure.cli.main import app
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load, to_plain
from finure.core import FinureError, Settings, root
from finure.fairness.profile import load_portfolio
from finure.metrics import evaluate
from finure.monitor.decisions import Decided, read_decisions
from finure.monitor.findings import drifted_since, first_alarm
from finure.monitor.migration import migrate, read_scored
from finure.monitor.outcomes import outcomes_in, outcomes_in_log, protected_rows, with_outcomes
from finure.monitor.reference import read_reference, run_in_charge
from finure.monitor.retrain import advise
from finure.monitor.rules import load_rules
from finure.monitor.watch import facts_of, watch, write_watched
from finure.simulate.bank import modelling_table, simulate
from finure.simulate.world import Bank

RULES = root() / "params" / "monitor.yaml"
CONTRACT = load("simulated_bank")
MONTHLY = load_rules(RULES, "simulated_bank")
QUARTERLY = msgspec.structs.replace(MONTHLY, period="quarter", least_rows=100, least_labels=100, least_bad=8)


def loans(**settings) -> pd.DataFrame:
    "Booked loans of a bank."
    return modelling_table(simulate(Bank(**settings)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home) -> Path:
    "The folder of a training run: a scorecard, the rows of a steady bank, and the figures on its later ones."
    folder = home / "credit" / "train" / "20230701T000000Z-aaaa"
    (folder / "models").mkdir(parents=True)
    scorer = explained.scorer("scorecard")
    shutil.copytree(explained.bundle("scorecard"), folder / "models" / "scorecard")
    clean = check(loans(n=12_000, seed=77, drift=False).query("application_date < '2023-07-01'"), CONTRACT).clean
    values, bad = scorer.features.batch(clean), good_bad(clean, CONTRACT)
    later = (clean["application_date"] >= "2022-07-01").to_numpy()
    pds = scorer.model.pds(values)
    scored = pd.DataFrame(values, columns=scorer.features.names).assign(
        part=np.where(later, "test", "train"), bad=bad, event_time=clean["application_date"], pd_scorecard=pds
    )
    scored.to_parquet(folder / "scored.parquet")
    figures = {}
    for name, found in evaluate(bad[later], pds[later], n_boot=50).items():
        figures |= {name: found.value, f"{name}_lower_bound": found.low, f"{name}_upper_bound": found.high}
    told = {"model_name": "finure-small", "candidate": "scorecard", "metrics": figures, "reject_share": 0.0}
    (folder / "result.json").write_text(json.dumps(told))
    record = {"status": "done", "product": "credit", "job": "credit/40_train", "started": "2023-07-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(record | {"model_name": "finure-small", "run": folder.name}))
    return folder


@pytest.fixture(scope="module")
def reference(trained):
    return read_reference(trained)


@pytest.fixture(scope="module")
def drifting(home):
    "Decisions on a bank whose applicants change on 1 July 2023, and the file they came from."
    path = home / "loans.parquet"
    loans(n=15_000, seed=3).to_parquet(path)
    return read_decisions(str(path), explained.scorer("scorecard"), since="2022-07-01"), path


def watched(reference, decided, rules=MONTHLY, as_of="2024-12-31"):
    return watch(reference, decided, rules, outcomes_in(decided.table, CONTRACT), as_of)


def part(decided: Decided, rows: np.ndarray) -> Decided:
    "Some of the decisions."
    frame, table = decided.frame[rows].reset_index(drop=True), decided.table[rows].reset_index(drop=True)
    return decided._replace(frame=frame, table=table)


# drift


def test_the_planted_drift_is_found_within_two_months(reference, drifting):
    found = watched(reference, drifting[0])
    alarm = first_alarm(found.findings)
    assert alarm.period in ("2023-07", "2023-08")
    assert drifted_since(found.findings) == "2023-07"
    assert {one.what for one in found.findings if one.signal == "feature"} >= {"utilisation"}
    assert not [one for one in found.findings if one.period < "2023-07" and one.severity == "alarm"]


def test_twenty_steady_banks_raise_no_more_than_one_alarm(reference, home):
    alarms = 0
    for seed in range(100, 104):
        path = home / "steady.parquet"
        loans(n=12_000, seed=seed, drift=False).to_parquet(path)
        decided = read_decisions(str(path), explained.scorer("scorecard"), since="2022-01-01")
        for k in range(5):
            found = watched(reference, part(decided, np.arange(len(decided.frame)) % 5 == k), QUARTERLY)
            assert found.periods.rows.min() > QUARTERLY.least_rows and len(found.periods.names) == 8
            assert found.vintages["enough"].any()
            alarms += any(one.severity == "alarm" for one in found.findings)
    assert alarms <= 1


def test_the_same_parts_of_a_drifting_bank_are_found_within_two_quarters(reference, drifting):
    decided = drifting[0]
    for k in range(3):
        found = watched(reference, part(decided, np.arange(len(decided.frame)) % 3 == k), QUARTERLY)
        assert first_alarm(found.findings).period in ("2023Q3", "2023Q4")


# the reference


def test_the_reference_is_frozen(reference, trained):
    scored = pd.read_parquet(trained / "scored.parquet")
    assert reference.rows == (scored["part"] == "train").sum()
    assert set(reference.features) == set(explained.scorer("scorecard").features.used)
    assert sum(reference.decisions.values()) == (scored["part"] == "test").sum()
    kept = (trained / "reference.json").read_bytes()
    scored.iloc[:500].to_parquet(trained / "scored.parquet")
    assert read_reference(trained) == reference and (trained / "reference.json").read_bytes() == kept
    scored.to_parquet(trained / "scored.parquet")


def test_the_run_in_charge_is_found(trained, home):
    assert run_in_charge(trained.name, "finure-small", Settings(home=home)) == trained
    assert run_in_charge("", "finure-small", Settings(home=home)) == trained


# data quality


def test_missing_new_outside_and_rejects_are_found(reference, drifting, home):
    raw = pd.read_parquet(drifting[1]).query("'2022-07-01' <= application_date < '2022-10-01'").reset_index(drop=True)
    rng = np.random.default_rng(0)
    raw["savings"] = raw["savings"].where(rng.random(len(raw)) > 0.4)
    raw["dti"] = raw["dti"].where(rng.random(len(raw)) > 0.15, 400.0)  # the contract ends at 100
    raw.to_parquet(home / "broken.parquet")
    decided = read_decisions(str(home / "broken.parquet"), explained.scorer("scorecard"))
    shifted = decided.frame.assign(annual_income=decided.frame["annual_income"] * 100)
    found = watched(reference, decided._replace(frame=shifted))
    by = {(one.signal, one.what) for one in found.findings}
    assert ("missing", "savings") in by and ("rejects", "") in by
    assert ("outside", "annual_income") in by and ("missing", "dti") not in by
    facts = facts_of(found, reference, decided, MONTHLY)
    assert facts["rejects"] == len(raw) - len(decided.frame) == sum(row["rows"] for row in facts["broken"])
    unseen = decided._replace(frame=decided.frame.assign(housing=7.0))
    assert ("unseen", "housing") in {(one.signal, one.what) for one in watched(reference, unseen).findings}


# outcomes


def test_outcomes_count_when_they_are_known_and_vintages_when_they_are_mature(reference, drifting):
    decided = drifting[0]
    early, late = (watched(reference, decided, as_of=day) for day in ("2023-09-15", "2024-12-31"))
    table = early.vintages.set_index("period")
    assert table.loc["2022-07", ["outcomes", "mature"]].tolist() == [table.loc["2022-07", "decisions"], True]
    assert (
        not table.loc["2022-09", "mature"] and 0 < table.loc["2022-09", "outcomes"] < table.loc["2022-09", "decisions"]
    )
    assert table.loc["2022-11", "outcomes"] == 0
    assert late.vintages["mature"].all() and late.vintages["auc"].between(0.6, 0.9).all()
    assert not [one for one in early.findings if one.signal == "calibration" and one.period > "2022-08"]


def test_a_model_that_is_wrong_is_found_by_its_outcomes(reference, drifting):
    decided = drifting[0]
    outcomes = outcomes_in(decided.table, CONTRACT)
    rng = np.random.default_rng(0)
    more = outcomes.assign(bad=np.maximum(outcomes["bad"], rng.random(len(outcomes)) < 0.1))
    found = watch(reference, decided, QUARTERLY, more, "2024-12-31")
    assert {"calibration", "performance"} <= {one.signal for one in found.findings}


def test_a_group_that_falls_behind_is_found(reference, drifting):
    agreed, decided = load_portfolio(root() / "params" / "fairness.yaml", "simulated_bank"), drifting[0]
    known = msgspec.structs.replace(reference, groups={"sex: female": (1.0, 0.03)})
    protected = protected_rows(decided, None, CONTRACT, agreed[1])
    steady = watch(known, decided, QUARTERLY, None, "", protected, agreed)
    assert not [one for one in steady.findings if one.signal == "fairness"]
    hit = (protected["sex"] == "female").to_numpy() & (np.random.default_rng(0).random(len(protected)) < 0.4)
    worse = decided._replace(frame=decided.frame.assign(decision=np.where(hit, "decline", decided.frame["decision"])))
    found = watch(known, worse, QUARTERLY, None, "", protected, agreed)
    assert {one.what for one in found.findings if one.signal == "fairness"} == {"sex: female"}


# the log


@pytest.fixture(scope="module")
def log(home, drifting):
    "A decision log of three hundred decisions, with feedback on the first hundred."
    scorer, bundle = explained.scorer("scorecard"), home / "credit" / "train" / "20230701T000000Z-aaaa" / "models"
    checksum, url = fingerprint(bundle / "scorecard"), f"sqlite:///{home}/decisions.db"
    clean = check(pd.read_parquet(drifting[1]).tail(300), CONTRACT).clean
    writer, told = DecisionLog(url), {"features": scorer.features.names, "columns": to_plain(CONTRACT)["columns"]}
    writer.append(Entry("model", "m", 1, json.dumps(told | {"bundle": checksum, "model": "finure-small:1"}).encode()))
    wanted = ["application_id", "application_date", *CONTRACT.named("feature")]
    dated = clean[wanted].assign(application_date=clean["application_date"].dt.strftime("%Y-%m-%d"))
    asked = json.loads(dated.to_json(orient="records"))
    for k, (request, answer) in enumerate(zip(asked, scorer.decide_batch(clean.to_dict("records")), strict=True)):
        features = [None if v != v else v for v in answer.trace["features"]]
        body = {"model": "finure-small:1", "bundle": checksum, "request": request, "trace": {"features": features}}
        body |= {"answer": answer.answer | {"event_time": request["application_date"]}}
        writer.append(Entry("decision", f"d-{k}", 10 + k, json.dumps(body).encode()))
    labels = [{"application_id": int(a["application_id"]), "bad_12m": k % 2} for k, a in enumerate(asked[:100])]
    body = {"request": labels, "trace": {"known": [1_735_000_000] * len(labels)}}
    writer.append(Entry("feedback", "f-1", 999, json.dumps(body).encode()))
    writer.close()
    return url, clean


def test_the_log_its_export_and_the_file_say_the_same(log, home, monkeypatch):
    url, clean = log
    monkeypatch.setenv("FINURE_DATABASE_URL", url)
    scorer = explained.scorer("scorecard")
    here = read_decisions("log", scorer, "finure-small")
    with open_store(url) as store:
        export(store, home / "export.parquet")
        labels = outcomes_in_log(store, CONTRACT)
    there = read_decisions(str(home / "export.parquet"), scorer, "finure-small:1")
    clean.to_parquet(home / "asked.parquet")
    file = read_decisions(str(home / "asked.parquet"), scorer)
    order = lambda decided: decided.frame.sort_values("id")[["id", "time", "risk", *decided.features]].reset_index(
        drop=True
    )
    for other in (there, file):
        pd.testing.assert_frame_equal(order(here), order(other), check_dtype=False, atol=1e-12)
    assert here.rejects is None and set(here.frame["reason"].dropna()) == set(file.frame["reason"].dropna())
    assert np.isfinite(with_outcomes(here, labels, pd.Timestamp("2025-01-01"))).sum() == 100
    assert np.isfinite(with_outcomes(here, labels, pd.Timestamp("2024-01-01"))).sum() == 0
    with pytest.raises(FinureError, match="no decision of other"):
        read_decisions("log", scorer, "other")


# the job


@pytest.fixture(scope="module")
def job(home, drifting, trained):
    "What `finure monitor credit` leaves: the folder of its run, and its page."
    given = {"decisions": drifting[1], "since": "2023-01-01", "as_of": "2024-12-31", "model_name": "finure-small"}
    given |= {"outcomes": "", "train_run": trained, "pictures": "false"}
    told = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINURE_HOME", str(home))
        done = CliRunner().invoke(app, ["monitor", "credit", *told])
    assert done.exit_code == 0 and "utilisation" in done.output, done.output
    (page,) = (home / "credit" / "monitor").glob("*/page.html")
    return page.parent, page.read_text()


def test_the_job_leaves_a_page_and_facts(job):
    folder, page = job
    facts = json.loads((folder / "monitor.json").read_text())
    assert facts["since"] == "2023-07" and facts["newest"] == "2023-12" and facts["decisions"] > 3000
    result = json.loads((folder / "result.json").read_text())
    assert result["standing"] == facts["standing"] and result["metrics"]["alarms"] >= 1
    assert "utilisation" in page and "alarm" in page and "judged" in page and "race_group: black" in page
    assert {"time", "risk", "bad", "utilisation"} <= set(pd.read_parquet(folder / "labelled.parquet"))


def test_jobs_of_all_products_share_their_cells():
    code = []
    for product in ("credit", "fraud", "denial"):
        cells = json.loads((root() / f"notebooks/{product}/60_monitor.ipynb").read_text())["cells"]
        code.append(["".join(c["source"]) for c in cells if c["cell_type"] == "code" and not c["metadata"].get("tags")])
    assert code[0] == code[2] and set(code[1]) <= {text.replace("    group_table,\n", "") for text in code[0]} | set(
        code[0]
    )


# training again


def test_training_again_needs_a_signal_time_and_something_to_learn(job, home):
    day = lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC)
    advice = advise("credit", home, RULES, now=day("2023-07-05"))
    assert [check.met for check in advice.checks] == [True, False, True] and not advice.train
    advice = advise("credit", home, RULES, if_worth_it=True, now=day("2024-12-31"))
    assert [check.name for check in advice.checks] == ["signal", "cool-down", "new outcomes", "worth it"]
    assert "AUC" in advice.checks[-1].text and advice.monitor == job[0]
    with pytest.raises(FinureError, match="fraud was never monitored here"):
        advise("fraud", home, RULES)


def test_the_commands_tell_what_they_would_do(job, home, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(home))
    done = CliRunner().invoke(app, ["retrain", "credit", "--dry-run"])
    assert done.exit_code == 0 and "utilisation" in done.stdout and "credit/40_train would be started" in done.stdout


# the book


def test_the_book_tells_who_crossed_a_band(home, drifting):
    rows = pd.DataFrame({"id": range(6), "pd": [0.1] * 6, "grade": list("AABBCC"), "decision": "approve"})
    rows.to_parquet(home / "before.parquet")
    rows.assign(grade=list("ABBADC"), pd=[0.1, 0.3, 0.1, 0.05, 0.6, 0.1]).to_parquet(home / "now.parquet")
    moved = migrate(read_scored(home / "before.parquet"), read_scored(home / "now.parquet"))
    assert moved.worse["id"].tolist() == ["4", "1"] and (moved.better, moved.same) == (1, 3)
    assert moved.matrix.to_numpy().sum() == moved.compared == 6


def test_what_is_kept_of_a_watch_can_be_read_without_pandas(reference, drifting, tmp_path):
    found = watched(reference, drifting[0])
    write_watched(tmp_path, facts_of(found, reference, drifting[0], MONTHLY), found, drifting[0])
    facts = json.loads((tmp_path / "monitor.json").read_text())
    assert {row["signal"] for row in facts["figures"]} >= {"score", "feature", "missing", "calibration", "decisions"}
    assert all(row["value"] is not None for row in facts["figures"])
