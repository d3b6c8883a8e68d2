"""The credit models: signs, reasons, parity and determinism, on a small simulated bank"""

import datetime as dt
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import yaml
from serving import CREDITOR, PREDICT, call

from finure.audit.writer import DecisionLog
from finure.bundle import load_scorer
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load
from finure.contracts.schema import asked
from finure.core import FinureError, Settings
from finure.credit.data import split_rows
from finure.credit.decide import Scale
from finure.credit.model import (
    Training,
    bin_feature,
    fit_scorecard,
    fit_trees,
    grades,
    policy,
    recency_weight,
    write_bundle,
)  # fmt: skip
from finure.credit.validate import decided, figures, information_table, largest_difference
from finure.features import FeatureSet, TreeColumns
from finure.notices.render import read_notice
from finure.serve.app import App
from finure.simulate.bank import Bank, modelling_table, simulate
from finure.tables import reason_table

SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}
LIMITS = policy(gain_good=0.08, loss_bad=0.5, refer_from=0.8)
SHARES = [0.4, 0.3, 0.2, 0.1]


@pytest.fixture(scope="module")
def contract():
    return load("simulated_bank")


@pytest.fixture(scope="module")
def rows(contract):
    "Clean rows, their outcome and their split."
    clean = check(modelling_table(simulate(Bank(n=9000, seed=3))), contract).clean
    bad = good_bad(clean, contract)
    return clean, bad, split_rows(clean, contract, bad, test_from="2023-01-01", test_to="2023-06-30")


@pytest.fixture(scope="module")
def training(contract, rows):
    clean, bad, split = rows
    values = FeatureSet(contract).batch(clean[split.train])
    return Training(contract, values, bad[split.train], np.ones(split.train.sum()), seed=0)


@pytest.fixture(scope="module")
def fitted(training):
    return {"scorecard": fit_scorecard(training, Scale(**SCALE)), "boosting": fit_trees(training)}


def train_pds(kind, fitted, training):
    "The PD of the training rows."
    names = list(training.contract.model_features())
    return fitted[kind].pds(training.values, names) if kind == "scorecard" else fitted[kind].out_of_fold


@pytest.fixture(scope="module")
def scorers(fitted, training, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for kind, model in fitted.items():
        pds = train_pds(kind, fitted, training)
        write_bundle(folder / kind, model, training, pds, LIMITS, SCALE, SHARES, {"name": "small"})
    return {kind: load_scorer(folder / kind) for kind in fitted}


KINDS = pytest.mark.parametrize("kind", ["scorecard", "boosting"])


@KINDS
def test_compiled_and_native_agree_on_every_row(kind, scorers, fitted, training, rows, contract):
    values = FeatureSet(contract).batch(rows[0])
    assert largest_difference(scorers[kind], fitted[kind], values) < (1e-12 if kind == "scorecard" else 1e-6)


def as_applications(frame):
    "Clean rows as a service gets them."
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


@KINDS
def test_one_by_one_is_the_batch_to_the_last_bit(kind, scorers, rows):
    frame, scorer = rows[0].head(2000), scorers[kind]
    applications = as_applications(frame)
    one_by_one = [scorer.decide(application) for application in applications]
    np.testing.assert_equal(one_by_one, scorer.decide_batch(applications))
    answers = [decided.answer for decided in one_by_one]
    shown = pd.DataFrame(answers, index=frame.index)
    shown["reasons"] = ["; ".join(reason["text"] for reason in answer["reasons"]) for answer in answers]
    pd.testing.assert_frame_equal(scorer.decide_frame(frame), shown, check_exact=True)
    assert {"approve", "refer", "decline"} == set(shown["decision"])


@KINDS
def test_the_trace_holds_the_features_the_model_used(kind, scorers, rows, contract):
    scorer, application = scorers[kind], as_applications(rows[0].head(1))[0]
    answer, trace, _ = scorer.decide(application)
    every = FeatureSet(contract).online(application)
    used = set(scorer.features.used)
    expected = [v if name in used else math.nan for name, v in zip(contract.model_features(), every, strict=True)]
    np.testing.assert_array_equal(trace["features"], expected)
    assert scorer.model.pd(scorer.model.read(trace["features"])) == answer["pd"]
    assert kind == "scorecard" or used == set(contract.model_features())


@KINDS
def test_reasons_are_given_where_they_are_due_or_asked_for(kind, scorers, rows):
    for application in as_applications(rows[0].head(200)):
        due, asked = scorers[kind].decide(application).answer, scorers[kind].decide(application, explain=True).answer
        assert bool(due["reasons"]) == (due["decision"] != "approve")
        assert asked["reasons"] or asked["decision"] == "approve"
        assert due == asked | {"reasons": due["reasons"]}


def test_threads_that_share_a_scorer_do_not_mix_applications(scorers, rows):
    scorer, applications = scorers["boosting"], as_applications(rows[0].head(400))
    expected = [scorer.decide(application) for application in applications]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            np.testing.assert_equal(list(pool.map(scorer.decide, applications)), expected)


def test_scores_of_a_table_are_those_of_one(scorers):
    pds = np.concatenate([np.random.default_rng(0).random(2000), [0.0, 1.0, 1e-12, 1 - 1e-12, 0.5]])
    for scale in (scorers["scorecard"].scale, Scale(20, 600, 50, 0, 1000)):
        assert scale.shown_table(pds).tolist() == [scale.shown(pd) for pd in pds.tolist()]


@KINDS
def test_risk_moves_in_the_contracts_direction_only(kind, scorers, contract, rows):
    values = FeatureSet(contract).batch(rows[0])
    base = values[np.random.default_rng(0).choice(len(values), 200, replace=False)]
    for i, (name, about) in enumerate(contract.model_features().items()):
        if not about.risk:
            continue
        codes = list(getattr(about, "special", {}))
        amounts = values[:, i][~np.isnan(values[:, i]) & ~np.isin(values[:, i], codes)]
        pds = []
        for at in np.quantile(amounts, [0, 0.2, 0.4, 0.6, 0.8, 1]):
            moved = base.copy()
            moved[:, i] = at
            pds.append(scorers[kind].model.pds(moved))
        steps = np.diff(pds, axis=0) * about.risk
        assert steps.min() > -1e-9, name


@KINDS
def test_reasons_are_due_hurt_and_are_at_most_four(kind, scorers, contract, rows):
    values = FeatureSet(contract).batch(rows[0])
    table, scorer = decided(scorers[kind], values), scorers[kind]
    refused = table["decision"] != "approve"
    assert refused.any() and (~refused).any()
    assert table.loc[~refused, "reasons"].map(len).eq(0).all()
    assert table.loc[refused, "reasons"].map(len).between(1, 4).all()
    texts = {reason.text: name for name, reason in contract.reasons.items()}
    of = list(contract.model_features().values())
    for row in np.flatnonzero(refused)[:50]:
        hurt = scorer.model.hurt(scorer.model.read(values[row].tolist()))
        np.testing.assert_array_equal(scorer.model.hurts(values[[row]])[0], hurt)
        totals = {}
        for i, push in zip(scorer.model.features, hurt, strict=True):
            totals[of[i].reason] = totals.get(of[i].reason, 0.0) + push
        given = [totals[texts[text]] for text in table["reasons"][row]]
        assert min(given) > 0 and given == sorted(given, reverse=True)
        assert given[0] == pytest.approx(max(totals.values()))
    assert reason_table(table)["first"].sum() == pytest.approx(1)


def test_contributions_add_up_to_the_distance_from_the_cut_off(scorers, contract, rows):
    scorer, values = scorers["boosting"], FeatureSet(contract).batch(rows[0])[:50]
    for row in values.tolist():
        seen = scorer.model.read(row)
        log_odds = math.log((p := scorer.model.pd(seen)) / (1 - p))
        base = scorer.model.intercept + scorer.model.slope * scorer.model.tables.base
        assert sum(scorer.model.hurt(seen)) + base == pytest.approx(log_odds, abs=1e-4)


def test_the_same_run_gives_the_same_model(training, fitted, tmp_path):
    again = {"scorecard": fit_scorecard(training, Scale(**SCALE)), "boosting": fit_trees(training)}
    for kind in again:
        for name, models in (("a", fitted), ("b", again)):
            pds = train_pds(kind, models, training)
            write_bundle(tmp_path / name / kind, models[kind], training, pds, LIMITS, SCALE, SHARES, {"name": "small"})
        for file in sorted((tmp_path / "a" / kind).iterdir()):
            if file.suffix != ".npz":  # a zip holds the time it was written
                assert file.read_bytes() == (tmp_path / "b" / kind / file.name).read_bytes(), file.name


def test_grades_and_decisions_follow_the_pd(scorers, rows, contract):
    table = decided(scorers["boosting"], FeatureSet(contract).batch(rows[0])).sort_values("pd")
    assert table["grade"].is_monotonic_increasing and table["score"].is_monotonic_decreasing
    assert table["score"].between(300, 850).all()
    assert (table.loc[table["decision"] == "approve", "pd"] <= LIMITS["approve_up_to"]).all()
    assert (table.loc[table["decision"] == "decline", "pd"] > LIMITS["decline_above"]).all()


def test_bins_set_by_a_person_are_kept(training, contract):
    card = fit_scorecard(training, Scale(**SCALE), {"dti": [20, 40]})
    assert next(b for b in card.binned if b.feature == "dti").edges == [20, 40]
    with pytest.raises(FinureError, match="no feature utilization"):
        fit_scorecard(training, Scale(**SCALE), {"utilization": [0.3]})


def test_missing_and_special_values_have_bins_of_their_own(contract):
    rng = np.random.default_rng(0)
    name, about = next((n, c) for n, c in contract.columns.items() if c.special and c.role == "feature")
    values = rng.integers(0, 300, 3000).astype(float)
    values[:300], values[300:600] = np.nan, list(about.special)[0]
    bad = (rng.random(3000) < np.where(np.isnan(values), 0.5, 0.1)).astype(np.int8)
    binned = bin_feature(name, about, values, bad)
    at = binned.index(values)
    assert set(at[:300]) == {len(binned.woe) - 1} and len(set(at[300:600])) == 1
    assert set(at[:600]).isdisjoint(at[600:]) and binned.woe[-1] < -1


def test_a_level_never_seen_still_has_points(training):
    about = training.contract.columns["purpose"]
    i = list(training.contract.model_features()).index("purpose")
    values = np.where(training.values[:, i] == 0, 1, training.values[:, i])
    binned = bin_feature("purpose", about, values, training.bad)
    assert binned.index(np.array([0.0]))[0] >= 0


def test_figures_and_information(training, contract, scorers, rows):
    clean, bad, split = rows
    pds = scorers["scorecard"].model.pds(FeatureSet(contract).batch(clean))
    found = figures(bad[split.test], pds[split.test], pds[split.train], seed=0)
    assert found["auc_lower_bound"] < found["auc"] < found["auc_upper_bound"] and found["psi"] < 0.25
    table = information_table(training.values, training.bad, contract)
    assert set(table["feature"]) == set(contract.model_features()) and table["iv"].is_monotonic_decreasing


def test_recency_and_policy_refuse_nonsense():
    assert recency_weight(np.array([0.0, 6.0]), 6.0).tolist() == [1.0, 0.5]
    with pytest.raises(FinureError, match="gain_good"):
        policy(gain_good=0, loss_bad=1, refer_from=0.8)
    with pytest.raises(FinureError, match="add up to 1"):
        grades(np.array([0.1, 0.2]), [0.5, 0.4])


def test_a_damaged_bundle_is_refused_in_words(scorers, tmp_path):
    (tmp_path / "model.json").write_text(
        json.dumps({"scorer": "finure.credit.decide:load_scorer", "kind": "scorecard"})
    )
    with pytest.raises(FinureError, match="contract.yaml: no such file"):
        load_scorer(tmp_path)


def test_a_frame_that_breaks_the_contract_is_refused_in_words(scorers, rows):
    frame = rows[0].head(3).assign(purpose=["car", "yacht", "car"])
    with pytest.raises(FinureError, match="purpose"):
        scorers["scorecard"].decide_frame(frame)


def test_tree_columns_have_the_contracts_signs(training):
    columns = TreeColumns(training.contract)
    signs = {name: about.risk for name, about in training.contract.model_features().items()}
    assert dict(zip(columns.names, columns.monotone, strict=False)).items() >= signs.items()
    assert isinstance(columns.batch(training.values), np.ndarray) and pd.notna(columns.monotone).all()


@KINDS
def test_a_declined_application_gets_its_notice(kind, scorers, rows, contract, tmp_path):
    (tmp_path / "notices.yaml").write_text(yaml.safe_dump(CREDITOR))
    settings = Settings(database_url=f"sqlite:///{tmp_path}/decisions.db", notices=tmp_path / "notices.yaml")
    frame = rows[0].head(500)
    row = frame[(scorers[kind].decide_frame(frame)["decision"] == "decline").to_numpy()].iloc[0]
    application = {name: None if pd.isna(row[name]) else row[name] for name in asked(contract)}
    application |= {"application_date": str(dt.datetime.now(dt.UTC).date())}
    log = DecisionLog(settings.database_url)
    app = App(scorers[kind], "its checksum", log, settings=settings)
    answer = json.loads(call(app, PREDICT, json.dumps(application, default=lambda value: value.item()).encode())[2])
    case = json.dumps({"applicant": {"name": "Pat Doe", "address": ["3 Third Street"]}}).encode()
    status, _, page = call(app, f"/api/v1/notices/{answer['decision_id']}", case, {"accept": "text/html"})
    log.close()
    facts, text = read_notice(page)
    assert (status, answer["decision"]) == (200, "decline")
    assert [(one.code, one.text) for one in facts.reasons] == [(one["code"], one["text"]) for one in answer["reasons"]]
    assert facts.reasons and all(one.text in text for one in facts.reasons)
    assert not re.search(rf"\b{answer['score']}\b", text)
