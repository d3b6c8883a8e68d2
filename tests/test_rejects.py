"Declined applications: what is inferred of them, by which method, and that nothing inferred ever judges"

import numpy as np
import pandas as pd
import pytest

from finure.contracts.check import check, good_bad
from finure.contracts.contract import load, parse
from finure.core import FinureError, Settings
from finure.credit.data import split_rows
from finure.credit.decide import Scale
from finure.credit.model import Training, fit_scorecard, fit_trees
from finure.credit.rejects import MOST_WEIGHT, learn_from, load_declined, to_learn_from, worse
from finure.data import locate
from finure.features import FeatureSet
from finure.simulate.bank import DECLINED, declined_table, modelling_table, simulate
from finure.simulate.world import Bank

SCALE = Scale(pdo=40.0, ref_score=600.0, ref_odds=10.0)
TOY = parse({
    "contract": "toy", "version": "1", "title": "t", "reasons": {"a": {"category": "OTHER", "text": "An example"}},
    "columns": {
        "x": {"type": "number", "reason": "a", "risk": 1}, "z": {"type": "number", "reason": "a"},
        "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
    },
})  # fmt: skip
NAMES = ["x", "z"]


class World:
    "Applications whose truth is known: the riskier by x, the rarer granted; the declined are `factor` times worse."

    def __init__(self, factor=1.0, n=4000, seed=0):
        rng = np.random.default_rng(seed)
        self.values = rng.integers(-1, 2, (n, 2)).astype(float)
        self.granted = rng.random(n) < 1 / (1 + np.exp(1.5 * self.values[:, 0]))
        odds = np.exp(-1.5 + self.values[:, 0] + 0.5 * self.values[:, 1]) * np.where(self.granted, 1, factor)
        self.true = odds / (1 + odds)
        bad = (rng.random(n) < self.true).astype(np.int8)
        self.training = Training(TOY, self.values[self.granted], bad[self.granted], np.ones(self.granted.sum()), seed)
        self.declined = self.values[~self.granted]
        self.known = fit_scorecard(self.training, SCALE)

    def learn(self, method, factor=1.0):
        ones = np.ones(len(self.declined))
        return learn_from(self.training, self.declined, ones, method, factor, known=self.known)

    def bias(self, method, factor=1.0):
        "The mean PD less the truth: of all applications, of the declined."
        off = fit_scorecard(self.learn(method, factor), SCALE).pds(self.values, NAMES) - self.true
        return off.mean(), off[~self.granted].mean()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def mean_world():
    return World(factor=3.0)


@pytest.fixture(scope="module")
def bank():
    "The loans of a small bank, and whom it declined."
    contract, tables = load("simulated_bank"), simulate(Bank(n=3000, seed=2))
    return contract, check(modelling_table(tables), contract).clean, declined_table(tables)


def test_none_changes_nothing(world):
    assert world.learn("none") is world.training


@pytest.mark.parametrize("method", ["reweighting", "parcelling", "fuzzy"])
def test_the_rows_with_an_outcome_stay_as_they_are_and_come_first(world, method):
    learned = world.learn(method)
    np.testing.assert_array_equal(learned.observed().values, world.training.values)
    np.testing.assert_array_equal(learned.observed().bad, world.training.bad)
    assert learned.inferred == {"reweighting": 0, "parcelling": 1, "fuzzy": 2}[method] * len(world.declined)
    again = world.learn(method)
    np.testing.assert_array_equal(learned.bad, again.bad)
    np.testing.assert_array_equal(learned.weight, again.weight)


def test_reweighted_loans_stand_for_all_applications(world):
    learned, plain = world.learn("reweighting"), world.training
    weight, x = learned.weight, plain.values[:, 0]
    assert abs(np.average(x, weights=weight) - world.values[:, 0].mean()) < 0.1 < -x.mean()
    assert weight.max() / weight.min() <= MOST_WEIGHT + 1e-9
    assert weight.sum() == pytest.approx(plain.weight.sum())
    among = plain.weight * np.where(x > 0, 0.5, 1.0)  # a weight that the rows had before stays in it
    both = learn_from(plain._replace(weight=among), world.declined, np.ones(len(world.declined)), "reweighting")
    assert np.corrcoef(both.weight / among, weight)[0, 1] > 0.9


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_parcels_hold_the_bad_rate_of_their_band_times_the_factor(world, factor):
    learned, n = world.learn("parcelling", factor), len(world.declined)
    expected = worse(world.known.pds(world.declined, NAMES), factor).mean()
    assert learned.bad[-n:].mean() == pytest.approx(expected, abs=0.03)
    assert (learned.weight[-n:] == 1).all()


def test_fuzzy_rows_are_each_application_twice_with_the_weight_of_one(world):
    learned, n = world.learn("fuzzy", 2.0), len(world.declined)
    bad, good = learned.weight[-2 * n : -n], learned.weight[-n:]
    np.testing.assert_allclose(bad + good, 1)
    np.testing.assert_allclose(bad / good, 2 * (pds := world.known.pds(world.declined, NAMES)) / (1 - pds))
    assert learned.bad[-2 * n : -n].all() and not learned.bad[-n:].any()
    np.testing.assert_array_equal(learned.values[-2 * n : -n], world.declined)


def test_fuzzy_with_a_factor_of_one_repeats_the_scorecard(world):
    again = fit_scorecard(world.learn("fuzzy"), SCALE)
    before, after = (card.pds(world.declined, NAMES) for card in (world.known, again))
    assert np.abs(after - before).max() < 0.005


def test_only_a_factor_that_is_right_cures_and_one_that_is_wrong_harms(world, mean_world):
    without, repeated, right = (mean_world.bias(*way) for way in (("none",), ("fuzzy", 1.0), ("fuzzy", 3.0)))
    assert max(without) < -0.1 and repeated == pytest.approx(without, abs=0.01)
    assert abs(right[0]) < 0.03 and abs(right[1]) < 0.5 * abs(without[1])
    assert mean_world.bias("parcelling", 3.0) == pytest.approx(right, abs=0.03)
    assert max(mean_world.bias("reweighting")) < -0.1  # they are worse than they look: no weight can tell
    assert abs(world.bias("none")[0]) < 0.03 and min(world.bias("fuzzy", 3.0)) > 0.05


def test_bins_go_by_outcomes_that_happened(world):
    card = fit_scorecard(world.learn("parcelling", 5.0), SCALE)
    for before, after in zip(world.known.binned, card.binned, strict=True):
        assert before.edges == after.edges and before.woe.tolist() == after.woe.tolist()


def test_no_inferred_row_is_in_a_fold_that_judges(world, monkeypatch):
    import finure.credit.model as model

    judged, plain = [], model.StratifiedKFold.split
    monkeypatch.setattr(model, "MOST_ROUNDS", 50)
    monkeypatch.setattr(
        model.StratifiedKFold, "split", lambda self, x, y: (judged.append((len(x), y)), plain(self, x, y))[1]
    )
    learned = world.learn("fuzzy", 2.0)
    trees = fit_trees(learned)
    ((n, outcomes),) = judged
    assert n == len(world.training.bad) == len(trees.out_of_fold)
    np.testing.assert_array_equal(outcomes, world.training.bad)
    assert trees.out_of_fold.mean() == pytest.approx(world.training.bad.mean(), abs=0.01)  # calibrated on what happened
    np.testing.assert_array_equal(fit_trees(world.training).out_of_fold, fit_trees(world.learn("none")).out_of_fold)


def test_the_declined_of_the_simulated_bank_are_had_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("finure.credit.data.Bank", lambda n: Bank(n=1500))
    settings, contract = Settings(home=tmp_path), load("simulated_bank")
    checked = load_declined("simulated_declined", contract, settings)
    assert len(checked.clean) > 200 and not len(checked.rejects)
    assert list(pd.read_parquet(locate("simulated_declined", settings))) == DECLINED
    later = contract.named("target", "outcome", "lender", "known_time")
    assert not set(later) & set(checked.clean) and set(DECLINED) == set(contract.columns) - set(later)


def test_a_table_that_is_not_of_declined_applications_is_refused(bank, tmp_path):
    contract, loans, _ = bank
    loans.head(5).to_csv(tmp_path / "loans.csv", index=False)
    with pytest.raises(FinureError, match="holds outcomes \\(bad_12m\\)"):
        load_declined(str(tmp_path / "loans.csv"), contract)
    loans.head(5)[["amount"]].to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(FinureError, match="are absent"):
        load_declined(str(tmp_path / "short.csv"), contract)
    with pytest.raises(FinureError, match="name the table"):
        load_declined("", contract)


def test_only_declined_of_the_training_days_and_none_with_an_outcome(bank):
    contract, loans, refused = bank
    split = split_rows(loans, contract, good_bad(loans, contract), test_from="2023-01-01")
    declined = check(refused, contract, scoring=True).clean
    chosen = to_learn_from(declined, loans, contract, split.train)
    days = loans.loc[split.train, "application_date"]
    assert 0 < len(chosen) < len(declined) and chosen["application_date"].between(days.min(), days.max()).all()
    assert chosen["application_date"].max() < loans.loc[split.test, "application_date"].min()
    test_row = loans[split.test].head(1)
    with pytest.raises(FinureError, match=f"also in the data, such as {test_row['application_id'].iloc[0]:.0f}\\."):
        to_learn_from(pd.concat([declined, test_row]), loans, contract, split.train)
    with pytest.raises(FinureError, match="application_date is absent"):
        to_learn_from(declined.drop(columns="application_date"), loans, contract, split.train)
    with pytest.raises(FinureError, match="no declined application"):
        to_learn_from(declined.tail(1), loans, contract, split.train)
    assert len(FeatureSet(contract).batch(chosen)) == len(chosen)


def test_what_is_not_known_is_named(world):
    with pytest.raises(FinureError, match="`parceling` must be one of none, reweighting, parcelling, fuzzy"):
        world.learn("parceling")
    with pytest.raises(FinureError, match="reject_factor: -1"):
        world.learn("fuzzy", -1)
