"Factors, summary and fidelity of one decision: only what really hurt, and never anything protected."

from types import SimpleNamespace

import numpy as np
import pytest
from explained import KINDS, applications, fitted, refused, scorer, train_pds

from finure.contracts.contract import load, parse
from finure.credit.fidelity import scorer_fidelity
from finure.explain.factors import IMPACTS, factor_table
from finure.explain.fidelity import FIDELITY_TEXTS
from finure.explain.reference import Levels, Reference, plain, read_reference
from finure.explain.summary import explain

COLUMNS = {
    "debt": {"type": "integer", "unit": "USD", "reason": "debt", "description": "Debt"},
    "late": {
        "type": "integer",
        "null": "allowed",
        "missing": "never late",
        "reason": "late",
        "description": "Last late",
    },
    "home": {"type": "category", "levels": ["own", "rent"], "reason": "home", "description": "Home"},
    "luck": {"type": "number", "reason": "luck", "description": "Luck"},
}
REASONS = {name: {"category": "OTHER", "text": f"The {name}"} for name in COLUMNS}
SMALL = parse({"contract": "small", "version": "1", "title": "Small", "reasons": REASONS, "columns": COLUMNS})


def planted(values):
    "Pushes toward denial: 6 and 1 by debt, 3 by being late at all, 1 by renting; luck is said to push and does not."
    debt, late, home, luck = values
    return [max(debt - 2, 0) * 1.0, -1.0 if late != late else 3.0, float(home), 2.0 if luck else 0.0]


PLANTED = SimpleNamespace(
    contract=SMALL, features=SimpleNamespace(names=list(COLUMNS), used=list(COLUMNS)), pushes=planted,
    risk=lambda values: sum(planted(values)[:3]),
)  # fmt: skip
REFERENCE = Reference(9, {
    "debt": Levels([0.0, 1.0, 2.0, 4.0], 0.0), "late": Levels([12.0, 60.0], 0.7), "home": Levels([0.0, 1.0], 0.0),
    "luck": Levels([0.0], 0.0),
}, {})  # fmt: skip


def test_planted_factors_with_their_levels_and_impacts():
    found = factor_table(PLANTED, REFERENCE, [8.0, 20.0, 1.0, 1.0])
    told = [(f.factor, f.value, f.level, f.impact, f.level_shown, f.reason["text"]) for f in found]
    assert told == [
        ("debt", 8, 2, "High", "2 USD", "The debt"),
        ("late", 20, None, "High", "never late", "The late"),
        ("home", "rent", "own", "Low", "own", "The home"),
    ]


def test_a_factor_that_does_not_lower_the_risk_is_not_listed():
    assert factor_table(PLANTED, REFERENCE, [2.0, np.nan, 0.0, 1.0]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_factor_of_simulated_applicants_really_hurt(kind):
    told = scorer(kind)
    levels, names, about = told.reference.features, told.features.names, told.contract.model_features()
    harmless, n = 0, 0
    for application in refused(kind)[:50]:
        values = told.features.online(application)
        pushes = dict(zip(told.features.used, told.pushes(values), strict=True))
        total, table = sum(p for p in pushes.values() if p > 0), factor_table(told, told.reference, values)
        assert table and [pushes[f.factor] for f in table] == sorted((pushes[f.factor] for f in table), reverse=True)
        for factor in table:
            at, share = names.index(factor.factor), pushes[factor.factor] / total
            assert factor.impact == next(name for name, least in IMPACTS.items() if share >= least)
            known = [*levels[factor.factor].values, *([np.nan] if levels[factor.factor].missing else [])]
            level = next(v for v in known if plain(v, about[factor.factor]) == factor.level)
            changed = [*values[:at], level, *values[at + 1 :]]
            assert told.risk(changed) < told.risk(values)
            harmless, n = harmless + (told.pushes(changed)[told.features.used.index(factor.factor)] <= 0), n + 1
    assert harmless > 0.99 * n


@pytest.mark.parametrize("kind", KINDS)
def test_an_explanation_is_always_the_same_and_names_nothing_protected(kind):
    told, contract = scorer(kind), load("simulated_bank")
    protected = contract.named("protected")
    assert protected and not set(protected) & (set(told.reference.columns) | set(told.reference.features))
    for application in refused(kind)[:6]:
        first = explain(told, told.reference, application)
        other = {name: "of no account" if name in protected else value for name, value in application.items()}
        assert explain(told, told.reference, other) == first
        assert first["summary"][0].startswith("The application is ")
        words = " ".join(first["summary"])
        assert not [name for name in protected if contract.columns[name].description in words]
        assert all(f["shown"] in words for f in first["factors"])


@pytest.mark.parametrize("kind", KINDS)
def test_stated_reasons_turn_decisions_and_others_do_not(kind):
    training, models = fitted()
    values = scorer(kind).features.batch(applications()[0])
    found = scorer_fidelity(scorer(kind), models[kind], training, train_pds(kind), values, {})
    assert set(found) == {name for name in FIDELITY_TEXTS if kind == "boosting" or "seed" not in name}
    assert found["reasons_turn"] > 0.8 and found["other_factors_turn"] < 0.3
    assert found["methods_agree"] > 0.6 and found["same_reasons_background"] > 0.85
    assert all(0 <= share <= 1 for share in found.values())


def test_a_bundle_without_a_reference_explains_nothing(tmp_path):
    assert read_reference(tmp_path) is None
