"""The fraud model: fitting, calibration, limits by cost and by alert budget, the bundle, and what validation tells"""

import json

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import load
from finure.core import FinureError
from finure.explain.trees import load_contributions
from finure.fraud.data import Transactions, as_arrays, simulated_table
from finure.fraud.features import RICH, batch, table
from finure.fraud.model import (
    Calibration,
    Costs,
    Training,
    budget_limit,
    calibrate,
    cost,
    fit,
    learn,
    limits,
    margins,
    matrix,
    write_bundle,
)
from finure.fraud.protocol import evaluate_fold, fold_as_of, split
from finure.fraud.validate import budget_curve, caught_by_kind, detection, detection_summary
from finure.simulate.cards import Cards

CONTRACT = load("card_transactions")


@pytest.fixture(scope="module")
def payments():
    "Amounts and terminal risk, fraud where either says so."
    chance = np.random.default_rng(1)
    rows = np.column_stack([chance.gamma(2, 30, 4_000), chance.random(4_000) < 0.05]).astype(np.float32)
    rows[chance.random(4_000) < 0.02, 0] = np.nan
    fraud = ((np.nan_to_num(rows[:, 0]) > 220) | (rows[:, 1] > 0) & (chance.random(4_000) < 0.7)).astype(int)
    return rows, fraud


@pytest.fixture(scope="module")
def fitted(payments):
    rows, fraud = payments
    training = Training(("amount", "risk"), rows[:3000], fraud[:3000], seed=3)
    booster = fit(training, {"rounds": 15})
    return training, booster, margins(booster, rows[3000:]), fraud[3000:], np.nan_to_num(rows[3000:, 0])


def test_the_same_rows_and_seed_give_the_same_trees(fitted):
    training, booster = fitted[:2]
    again = fit(training, {"rounds": 15})
    other = fit(training._replace(seed=4), {"rounds": 15})
    assert again.save_raw("json") == booster.save_raw("json") != other.save_raw("json")


def test_a_sharp_edge_is_found_where_it_is():
    "One payment in a thousand is above the limit: 256 bins would cut elsewhere."
    amount = np.linspace(0, 250, 20_000, dtype=np.float32)[:, None]
    fraud = (amount[:, 0] > 249.75).astype(int)
    booster = fit(Training(("amount",), amount, fraud), {"rounds": 30})
    assert (margins(booster, amount)[fraud == 1].min() > margins(booster, amount)[fraud == 0]).mean() > 0.9995


def test_matrix_takes_rows_and_names_in_order():
    columns = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([4.0, 5.0, 6.0])}
    assert matrix(columns, ["b", "a"], np.array([2, 0])).tolist() == [[6, 3], [4, 1]]
    assert matrix(columns, ["b"], np.array([1])).dtype == np.float32


def test_unknown_settings_are_named():
    with pytest.raises(FinureError, match="unknown setting learning_rate"):
        fit(Training(("a",), np.zeros((2, 1)), np.array([0, 1])), {"learning_rate": 1})


def test_calibration_keeps_the_order_and_meets_the_rate(fitted):
    _, _, margin, fraud, _ = fitted
    calibration = calibrate(margin, fraud)
    probability = calibration.probability(margin)
    assert probability.mean() == pytest.approx(fraud.mean(), abs=1e-4)
    assert (np.argsort(probability, kind="stable") == np.argsort(margin, kind="stable")).all()


@pytest.mark.parametrize(("margin", "fraud", "says"), [
    (np.zeros(50), np.zeros(50), "0 frauds in 50"),
    (np.arange(40.0), (np.arange(40) < 20).astype(int), "not riskier"),
])  # fmt: skip
def test_days_that_do_not_say_enough_are_refused(margin, fraud, says):
    with pytest.raises(FinureError, match=says):
        calibrate(margin, fraud)


def test_cost_by_hand():
    p, fraud, amount = np.array([0.9, 0.6, 0.6, 0.2]), np.array([1, 1, 0, 1]), np.array([100.0, 50.0, 30.0, 10.0])
    costs = Costs(loss_share=0.5, good_blocked=20, review_cost=4, review_saves=0.8)
    assert cost(p, fraud, amount, 2, 2, costs) == 80
    assert cost(p, fraud, amount, 0.5, 0.9, costs) == pytest.approx(0.2 * 25 + 5 + 2 * 4)
    assert cost(p, fraud, amount, 0.5, 0.5, costs) == 5 + 20


def test_impossible_costs_are_refused():
    for wrong in ({"review_saves": 1.5}, {"good_blocked": 0}, {"loss_share": -1}, {"review_cost": 0}):
        with pytest.raises(FinureError, match="costs"):
            limits(np.array([0.1]), np.array([1]), np.array([1.0]), Costs(**wrong))


def test_limits_are_in_order_and_follow_the_costs(fitted):
    _, _, margin, fraud, amount = fitted
    p = calibrate(margin, fraud).probability(margin)
    usual = limits(p, fraud, amount, Costs())
    assert 0 < usual["review"] <= usual["block"] < 1
    dear = limits(p, fraud, amount, Costs(review_cost=1_000))
    assert dear["review"] == dear["block"]
    assert limits(p, fraud, amount, Costs(good_blocked=10_000))["block"] >= usual["block"]
    best = cost(p, fraud, amount, usual["review"], usual["block"], Costs())
    assert best <= cost(p, fraud, amount, 1, 1, Costs()) and best <= cost(p, fraud, amount, dear["block"], 1, Costs())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1_000))
def test_an_alert_budget_is_kept_and_used(k, seed):
    chance = np.random.default_rng(seed)
    day, card = chance.integers(0, 4, 60), chance.integers(0, 9, 60)
    p = chance.random(60).round(2)
    limit = budget_limit(p, day, card, k)

    def calls(limit):
        return len({(d, c) for d, c in zip(day[p >= limit].tolist(), card[p >= limit].tolist(), strict=True)})

    assert calls(limit) <= k * len(np.unique(day))
    lower = p[p < limit]
    assert not len(lower) or calls(lower.max()) > k * len(np.unique(day))


def test_a_review_limit_stays_above_the_budget(fitted):
    _, _, margin, fraud, amount = fitted
    p = calibrate(margin, fraud).probability(margin)
    free = limits(p, fraud, amount, Costs(review_cost=0.1))
    tight = limits(p, fraud, amount, Costs(review_cost=0.1), lowest=float(np.quantile(p, 0.99)))
    assert tight["review"] >= min(np.quantile(p, 0.99), tight["block"]) and tight["review"] >= free["review"]


def test_the_bundle_holds_plain_files_that_agree(fitted, tmp_path):
    training, booster, margin, fraud, _ = fitted
    rows = training.rows[:200]
    bundle = write_bundle(
        tmp_path / "b",
        booster,
        training,
        CONTRACT,
        Calibration(0.9, -0.1),
        {"review": 0.1, "block": 0.5},
        {"name": "n"},
    )
    about = json.loads((bundle / "model.json").read_text())
    assert about["scorer"] == "finure.fraud.decide:load_scorer" and about["features"] == ["amount", "risk"]
    assert about["calibration"] == {"slope": 0.9, "intercept": -0.1} and about["thresholds"]["block"] == 0.5
    assert load(bundle / "contract.yaml") == CONTRACT and about["contract_version"] == CONTRACT.version
    native = margins(booster, rows)
    compiled = onnxruntime.InferenceSession(bundle / "model.onnx").run(["probabilities"], {"X": rows})[0][:, 1]
    np.testing.assert_allclose(compiled, 1 / (1 + np.exp(-native)), atol=1e-6)
    explained = load_contributions(bundle / "contributions.npz")
    np.testing.assert_allclose(explained.base + explained.batch(rows).sum(axis=1), native, atol=1e-4)
    assert {p.suffix for p in bundle.iterdir()} == {".json", ".yaml", ".ubj", ".onnx", ".npz"}


def test_a_small_town_is_learned_from_the_payments_to_the_limits():
    "As of a day, with what was known on it; judged on the week after the newest known one."
    town = Cards(customers=800, terminals=1_500, days=90, compromised=0.8, leaked=1.0, radius=10)
    seen = as_arrays(simulated_table(town))
    columns, as_of = batch(table(*seen[:7])), int(seen.day[0]) + 76
    days = (seen.day, seen.customer_id, seen.fraud)
    names = [feature.name for feature in RICH]
    learned = learn(seen, columns, names, fold_as_of(*days, as_of), Costs(), k=20)
    last = split(*days, as_of - 21)
    rows = matrix(columns, names, last.test)
    found = evaluate_fold(*days, last, margins(learned.booster, rows), k=20)
    assert found.auc > 0.75 and found.ap > 0.45 and found.cp > 0.3 * found.cp_most
    probability = learned.calibration.probability(margins(learned.booster, rows))
    assert 0.5 < probability.sum() / seen.fraud[last.test].sum() < 2
    spent = [cost(probability, seen.fraud[last.test], seen.amount[last.test], *pair, Costs())
             for pair in ((learned.thresholds["review"], learned.thresholds["block"]), (1, 1))]  # fmt: skip
    assert spent[0] < 0.9 * spent[1]


# ---- validation


def made(hours, card, fraud, amount, scenario):
    "Payments of a test, by hand."
    n = len(hours)
    return Transactions(
        np.arange(n), np.datetime64("2018-04-01", "s") + np.array(hours) * np.timedelta64(3600, "s"), np.array(card),
        np.zeros(n, int), np.array(amount, float), np.array(fraud), np.zeros(n, "datetime64[s]"), np.array(scenario),
    )  # fmt: skip


CASE = made([0, 1, 5, 30, 31, 60], [1, 2, 1, 1, 2, 2], [1, 1, 0, 1, 1, 1], [10, 20, 99, 40, 80, 7], [3, 2, 0, 3, 2, 3])
SCORE = np.array([0.2, 0.1, 0.9, 0.8, 0.4, 0.7])


def test_an_alert_on_a_good_payment_finds_nothing():
    cards = detection(CASE, SCORE, 0.5).set_index("card")
    assert cards["hours"].to_dict() == {1: 30, 2: 59}
    assert cards["frauds_before"].to_dict() == {1: 1, 2: 2}
    assert cards["lost_before"].to_dict() == {1: 10, 2: 100}
    assert cards["kind"].to_dict() == {1: "leaked card", 2: "compromised terminal"}


def test_cards_never_found_count_as_lost():
    cards = detection(CASE, SCORE, 0.75).set_index("card")
    assert pd.isna(cards.loc[2, "found"]) and cards.loc[2, "lost_before"] == 107
    told = detection_summary(cards.reset_index(), (0, 48)).set_index("kind")
    assert told.loc["all", "within_48h"] == 0.5 and told.loc["compromised terminal", "within_48h"] == 0
    assert told.loc["all", "cards"] == 2


def test_kinds_are_counted_apart():
    table = caught_by_kind(CASE, SCORE, 0.5).set_index("kind")
    assert table["frauds"].to_dict() == {"compromised terminal": 2, "leaked card": 3}
    assert table["caught"].to_dict() == {"compromised terminal": 0, "leaked card": pytest.approx(2 / 3)}
    assert table.loc["leaked card", "amount_caught"] == pytest.approx(47 / 57)


def test_a_larger_budget_finds_no_fewer_cards():
    curve = budget_curve(CASE, SCORE, (1, 2, 3))
    assert curve["found"].is_monotonic_increasing
    assert (curve["precision"] <= curve["attainable"]).all() and curve["share_found"].iloc[-1] == 1
