"Age in its checked mode: no model, of either kind, by which anybody of 62 or more loses"

import numpy as np
import pandas as pd
import pytest
from explained import SCALE, trees

from finure.contracts.contract import load, parse, to_plain
from finure.core import FinureError
from finure.credit.decide import Scale
from finure.credit.model import Training, fit_scorecard
from finure.fairness.age import age_check, age_columns, agree_age
from finure.features import FeatureSet, TreeColumns

REASONS = {"age": {"category": "OTHER", "text": "Length of time at work"}}


def made(risk: int) -> tuple:
    "A contract with age as a feature, and applicants who go bad most often when young and from 65 on."
    about = {"reason": "age", "type": "integer"}
    columns = {"age": about | {"age": True, "unit": "years", "risk": risk}, "debt": about | {"risk": 1}}
    contract = parse({"contract": "c", "version": "1", "title": "t", "reasons": REASONS, "columns": columns})
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"age": rng.integers(18, 90, 6000), "debt": rng.integers(0, 50, 6000)})
    odds = -2 + 0.03 * rows["debt"] + 1.2 * (rows["age"] < 30) + 0.9 * (rows["age"] >= 65)
    return contract, rows, (rng.random(6000) < 1 / (1 + np.exp(-odds))).astype(int).to_numpy()


@pytest.mark.parametrize("kind", ["scorecard", "boosting"])
@pytest.mark.parametrize(("risk", "passed"), [(0, False), (-1, True)])
def test_a_model_by_which_the_old_lose_is_refused_and_a_sign_heals_it(kind, risk, passed):
    contract, rows, bad = made(risk)
    training = Training(contract, FeatureSet(contract).batch(rows), bad, np.ones(len(bad)), 0)
    if kind == "scorecard":
        card = fit_scorecard(training, Scale(**SCALE))
        check = age_check(lambda values: card.pds(values, ["age", "debt"]), contract, rows)
    else:
        model = trees(training)
        check = age_check(lambda values: model.pds(values, TreeColumns(contract)), contract, rows)
    assert check["passed"] is passed and (check["value"] <= 0) is passed
    assert passed or ("risk: -1" in check["advice"] and "`age`" in check["text"])


@pytest.mark.parametrize(
    ("name", "column"), [("german", "age_years"), ("taiwan", "AGE"), ("simulated_bank", "age_years")]
)
def test_age_is_off_by_default_and_must_be_asked_for(name, column):
    plain = to_plain(load(name))
    assert age_columns(load(name)) == [] and plain["columns"][column]["role"] == "protected"
    plain["columns"][column] |= {"role": "feature", "reason": next(iter(plain["reasons"]))}
    used = parse(plain)
    with pytest.raises(FinureError, match="age: checked"):
        agree_age(used, "")
    agree_age(used, "checked")
    del plain["columns"][column]["age"]
    with pytest.raises(FinureError, match="looks like the applicant's age"):
        parse(plain)
