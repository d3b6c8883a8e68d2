import json

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from finure.contracts.check import check
from finure.contracts.contract import load
from finure.core import FinureError, root, sha256_file
from finure.simulate.bank import modelling_table, planted, simulate, write
from finure.simulate.outcomes import COEFFICIENTS, terms
from finure.simulate.policy import APPROVE, GRADES, REASONS, REFER, hard_rules, reasons
from finure.simulate.world import Bank

CONTRACT = yaml.safe_load((root() / "data" / "contracts" / "simulated_bank.yaml").read_text())


@pytest.fixture(scope="module")
def bank():
    return Bank(n=25_000)


@pytest.fixture(scope="module")
def tables(bank):
    return simulate(bank)


@pytest.fixture(scope="module")
def loans(tables):
    return modelling_table(tables)


@pytest.fixture(scope="module")
def plain():
    "The same bank with nothing planted."
    return simulate(Bank(n=25_000, drift=False, proxy=False, leak=False))


def psi(before, after, n=10):
    edges = np.unique(np.nanquantile(before, np.linspace(0, 1, n + 1)[1:-1]))
    e, a = (np.bincount(np.digitize(x.dropna(), edges), minlength=len(edges) + 1) / x.count() for x in (before, after))
    return float(((a - e) * np.log(a / e)).sum())


def approval_gap(tables):
    approved = tables["decisions"].decision == "approve"
    group = tables["applicants"].race_group.isin(["black", "hispanic"])
    return approved[group].mean() - approved[~group].mean()


# ---- the same seed gives the same bytes


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path):
    first = write(Bank(n=2_000, seed=3), tmp_path / "a")
    again = write(Bank(n=2_000, seed=3), tmp_path / "b")
    other = write(Bank(n=2_000, seed=4), tmp_path / "c")
    assert [f.name for f in first] == [f.name for f in again]
    assert [sha256_file(f) for f in first] == [sha256_file(f) for f in again]
    assert all(sha256_file(a) != sha256_file(b) for a, b in zip(first, other, strict=True))


def test_truth_file_says_what_is_planted(tmp_path):
    bank = Bank(n=500, seed=1, start="2020-03", months=12, leak=False)
    facts = json.loads(write(bank, tmp_path)[-1].read_text())
    assert facts == planted(bank)
    assert facts["drift"]["date"] == "2021-01-01" and facts["drift"]["on"]
    assert facts["proxy"]["column"] == "area_index" and facts["proxy"]["effect_on_risk"] == 0
    assert not facts["leak"]["on"]
    assert facts["risk"]["coefficients"] == COEFFICIENTS
    assert facts["settings"]["seed"] == 1


@pytest.mark.parametrize("setting", [{"n": 0}, {"months": 0}, {"start": "January"}])
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(FinureError, match=next(iter(setting))):
        Bank(**setting)


def test_a_small_and_short_bank_works():
    tables = simulate(Bank(n=1, months=1))
    assert len(tables["applications"]) == 1
    assert set(modelling_table(tables)) == set(CONTRACT["columns"])


# ---- a switch changes what it is meant to change, and nothing else


@pytest.mark.parametrize(
    ("switch", "same"),
    [
        ({"drift": False}, ["applicants", "macro"]),
        ({"proxy": False}, ["macro", "truth"]),
        ({"leak": False}, ["applicants", "applications", "decisions", "macro", "truth"]),
    ],
)
def test_a_switch_leaves_unrelated_tables_alone(switch, same):
    tables, switched = simulate(Bank(n=3_000)), simulate(Bank(n=3_000, **switch))
    for name in same:
        pd.testing.assert_frame_equal(tables[name], switched[name])
    for name in ("applications", "performance"):
        off = {"proxy": ["area_index"], "leak": ["contacts_12m"], "drift": []}[next(iter(switch))] + ["observed"]
        left, right = (t[name].drop(columns=off, errors="ignore") for t in (tables, switched))
        rows = ~tables["truth"].after_drift if "drift" in switch else slice(None)
        pd.testing.assert_frame_equal(left[rows], right[rows])


# ---- rates


def test_rates_are_those_of_a_consumer_lender(tables, loans):
    decided = tables["decisions"]
    assert 0.65 < (decided.decision == "approve").mean() < 0.85
    assert 0.08 < (decided.system_decision == "refer").mean() < 0.2
    assert len(loans) == decided.booked.sum()
    before = loans.application_date < Bank().drift_date
    assert 0.08 < loans.bad_12m[before].mean() < 0.12


def test_rejected_applications_would_have_done_worse(tables):
    bad = tables["performance"].bad_12m
    decision = tables["decisions"].decision
    assert bad[decision == "decline"].mean() > 2.5 * bad[decision == "approve"].mean()
    referred = tables["decisions"].system_decision == "refer"
    assert bad[referred & (decision == "decline")].mean() > bad[referred & (decision == "approve")].mean() + 0.02
    assert (tables["performance"].observed == tables["decisions"].booked).all()


def test_true_risk_separates_as_well_as_it_should(tables):
    booked = tables["decisions"].booked
    bad, pd_true = tables["performance"].bad_12m[booked], tables["truth"].true_pd[booked]
    assert 0.78 < roc_auc_score(bad, pd_true) < 0.83
    assert abs(bad.mean() - pd_true.mean()) < 0.005
    for _, rows in pd_true.groupby(pd.qcut(pd_true, 5), observed=True):
        assert abs(bad[rows.index].mean() - rows.mean()) < 4 * np.sqrt(rows.mean() / len(rows))


def test_lender_knows_less_than_the_truth(tables):
    booked = tables["decisions"].booked
    bad = tables["performance"].bad_12m[booked]
    grade = tables["decisions"].lender_grade[booked].map(ord)
    assert 0.62 < roc_auc_score(bad, grade) < 0.74


def test_a_long_delay_lies_between_application_and_outcome(loans):
    assert (loans.outcome_known_date == loans.application_date + pd.DateOffset(months=12)).all()
    assert loans.months_to_bad.notna().eq(loans.bad_12m == 1).all()


# ---- drift


def test_drift_is_visible_when_on_and_absent_when_off(tables, plain):
    after = tables["truth"].after_drift
    for column in ("annual_income", "utilisation"):
        on, off = (psi(t["applications"][column][~after], t["applications"][column][after]) for t in (tables, plain))
        assert on > 0.04, column
        assert off < 0.01, column
    channel = [(t["applications"].channel[after] == "online").mean() for t in (tables, plain)]
    assert channel[0] > 0.6 > 0.5 > channel[1]
    same = ks_2samp(plain["applications"].annual_income[~after], plain["applications"].annual_income[after])
    assert same.pvalue > 0.001


def test_drift_changes_the_relation_too(tables):
    a, after = tables["applications"], tables["truth"].after_drift
    slopes = []
    for rows in (~after, after):
        x, y = terms(a[rows])[["short_employment", "high_dti"]], tables["truth"].true_pd[rows]
        slopes.append(np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), np.log(y / (1 - y)), rcond=None)[0])
    assert slopes[1][0] < slopes[0][0] - 0.25
    assert slopes[1][1] > slopes[0][1] + 0.1


def test_drift_size_scales():
    once, twice = (simulate(Bank(n=5_000, drift_size=size)) for size in (1, 2))
    after = once["truth"].after_drift
    income = [t["applications"].annual_income[after].mean() for t in (once, twice)]
    assert income[1] < 0.92 * income[0]


# ---- proxy


def test_proxy_carries_the_group_and_only_when_on(tables, plain):
    def separates(t):
        return roc_auc_score(t["applicants"].race_group.isin(["black", "hispanic"]), t["applicants"].area_index)

    assert separates(tables) > 0.8
    assert abs(separates(plain) - 0.5) < 0.02


def test_proxy_costs_approvals_and_only_when_on(tables, plain):
    assert approval_gap(tables) < -0.05
    assert abs(approval_gap(plain)) < 0.015


def test_proxy_carries_no_risk_given_the_rest(tables):
    a, bad = tables["applications"], tables["performance"].bad_12m
    truth = tables["truth"].true_pd
    x = np.column_stack([np.log(truth / (1 - truth)), (a.area_index - a.area_index.mean()) / a.area_index.std()])
    slope = LogisticRegression(C=np.inf).fit(x, bad).coef_[0]
    assert abs(slope[0] - 1) < 0.06
    assert abs(slope[1]) < 0.05
    group = tables["applicants"].race_group.isin(["black", "hispanic"])
    assert abs(truth[group].mean() - truth[~group].mean()) < 0.01


# ---- leak


def test_leak_gives_the_answer_away_and_only_when_on(tables, plain):
    on, off = (roc_auc_score(t["performance"].bad_12m, t["performance"].contacts_12m) for t in (tables, plain))
    assert on > 0.95
    assert abs(off - 0.5) < 0.02


# ---- decisions and reasons


def test_decisions_follow_points_and_rules(tables):
    decided, broken = tables["decisions"], hard_rules(tables["applications"]).any(axis=1)
    approved = decided.system_decision == "approve"
    assert approved.equals((decided.points >= APPROVE) & ~broken)
    assert (decided.system_decision == "refer").equals(decided.points.between(REFER, APPROVE - 1) & ~broken)
    assert (decided.decision == decided.system_decision).equals(decided.system_decision != "refer")
    assert decided.booked[decided.decision == "decline"].sum() == 0
    assert decided.offered_rate.isna().equals(decided.decision == "decline")
    assert (decided.groupby("lender_grade").points.min()[lambda p: p.index != "E"] >= pd.Series(GRADES)[:-1]).all()


def test_every_denial_has_one_to_four_different_reasons(tables):
    decided = tables["decisions"]
    declined = decided.decision == "decline"
    why = decided[REASONS]
    assert why[~declined].isna().all(axis=None)
    assert why.reason_1[declined].notna().all()
    filled = why.notna().to_numpy()
    assert (filled[:, :-1] >= filled[:, 1:]).all()
    assert (why.nunique(axis=1) == filled.sum(axis=1)).all()
    known = {reason["category"] for reason in CONTRACT["reasons"].values()} | {"INCOMPLETE"}
    assert set(pd.unique(why.to_numpy().ravel())) - {None} <= known


def test_broken_rule_is_the_first_reason(tables):
    incomplete = ~tables["applications"].documents_complete
    assert incomplete.sum() > 200
    rules = hard_rules(tables["applications"])
    only = incomplete & (rules.sum(axis=1) == 1)
    assert (tables["decisions"].reason_1[only] == "INCOMPLETE").all()


def test_reasons_break_ties_in_one_order_and_keep_four():
    off = pd.DataFrame([[20.0] * 6, [0, 0, 3.0, 0, 0, 0]], columns=list("abcdef"))
    why = reasons(off, pd.Series([True, True]))
    assert why.loc[0].tolist() == list("abcd")
    assert why.loc[1].tolist() == ["c", None, None, None]


def test_underwriter_writes_about_what_a_person_saw(tables):
    decided = tables["decisions"]
    seen = (decided.decision == "decline") | (decided.system_decision == "refer")
    assert decided.note.notna().equals(seen)
    assert not decided.note.dropna().str.contains(r"[{}]|nan").any()
    late = decided[(decided.reason_1 == "LOW_SCORE_HISTORY")].note
    assert late.str.contains("late payments|payment record").all()


# ---- macro


def test_macro_is_published_after_its_month_and_used_as_known(tables):
    economy = tables["macro"]
    assert (economy.published > economy.period + pd.offsets.MonthEnd(0)).all()
    assert not economy.duplicated(["series", "period"]).any()
    approved = tables["decisions"].decision == "approve"
    a = tables["applications"][approved]
    rate = economy[economy.series == "policy_rate"]
    known = [rate[rate.published <= day].value.iloc[-1] for day in a.application_date.iloc[:200]]
    base = tables["decisions"].offered_rate[approved].iloc[:200] - (a.term_months.iloc[:200] - 24) / 36
    step = tables["decisions"].lender_grade[approved].iloc[:200].map({g: 2.4 * i for i, g in enumerate(GRADES)})
    np.testing.assert_allclose(base - step - 4.4, known, atol=0.006)


# ---- the contract


def test_modelling_table_has_the_contracts_columns_in_order(loans):
    assert list(loans) == list(CONTRACT["columns"])


@pytest.mark.parametrize("seed", [0, 7])
def test_every_row_satisfies_the_contract(seed):
    loans = modelling_table(simulate(Bank(n=20_000, seed=seed, drift_size=2)))
    for name, column in CONTRACT["columns"].items():
        values = loans[name]
        assert values.isna().any() == (column.get("null") == "allowed"), name
        values = values.dropna()
        if "levels" in column:
            assert set(values) == set(column["levels"]), name
        if "range" in column:
            amounts = values[~values.isin(list(column.get("special", {})))]
            assert amounts.between(*column["range"]).all(), name
            assert values.isin(list(column.get("special", {}))).any() == ("special" in column), name
        if column["type"] == "integer":
            assert (values == values.round()).all(), name
    assert loans.application_id.is_unique


def test_contract_check_rejects_no_simulated_row(loans):
    contract = load("simulated_bank")
    checked = check(loans, contract)
    assert len(checked.rejects) == 0
    assert len(checked.clean) == len(loans)


def test_contract_signs_agree_with_the_truth(tables):
    "One column at a time: riskier values have a higher true risk, all else as it is."
    a = tables["applications"].iloc[:2_000].copy()
    a["delinquencies_2y"] = a.delinquencies_2y.clip(upper=2)
    a["oldest_line_months"] = a.oldest_line_months.clip(lower=3)
    base = terms(a) @ pd.Series(COEFFICIENTS)
    steps = {"amount": 500, "annual_income": 2_000, "employment_years": 0.5, "residence_years": 1, "dti": 2}
    steps |= {"savings": 500, "utilisation": 3, "inquiries_6m": 1, "delinquencies_2y": 1, "months_since_delinquency": 3}
    steps |= {"oldest_line_months": 6, "public_records": 1, "term_months": 12}
    for name, step in steps.items():
        change = terms(a.assign(**{name: a[name] + step})) @ pd.Series(COEFFICIENTS) - base
        sign = CONTRACT["columns"][name]["risk"]
        assert (change * sign >= -1e-9).all() and (change * sign > 0).mean() > 0.05, name
    signed = {name for name, column in CONTRACT["columns"].items() if column.get("risk")}
    assert signed == set(steps) | {"income_check"}
