"""Fairness: measures by hand, intervals that hold the truth, planted proxies and alternatives found, real rates"""

import json
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from finure.contracts.contract import load
from finure.core import FinureError
from finure.fairness.alternatives import Candidate, Terms, candidates, search, smallest_air
from finure.fairness.assess import air_check, assess, grouped, measures
from finure.fairness.measures import Judged, compare, rates, shares_test
from finure.fairness.profile import Attribute, Portfolio, group_of, intersection, load_portfolio
from finure.fairness.proxies import alone, area, binned, scan, together
from finure.fairness.shown import confirmed, fairness_words, measure_table, proxy_table
from finure.metrics import auc
from finure.simulate.applications import PROXY_GROUPS
from finure.simulate.bank import simulate
from finure.simulate.world import Bank

ROOT = Path(__file__).parents[1]
PARAMS = ROOT / "params" / "fairness.yaml"
PROFILE, BANK = load_portfolio(PARAMS, "simulated_bank")
SMALL = msgspec.structs.replace(PROFILE, least_rows=5, least_outcomes=2, draws=50)


def counts(**groups: tuple[int, int]) -> tuple[np.ndarray, pd.Series]:
    "Decisions by group: (applications, approved)."
    approved = np.concatenate([np.arange(n) < k for n, k in groups.values()])
    return approved, pd.Series(np.repeat(list(groups), [n for n, _ in groups.values()]), name="group")


def test_the_adverse_impact_ratio_by_hand():
    approved, groups = counts(ref=(200, 160), one=(100, 60), two=(50, 45), few=(99, 10))
    found = compare(Judged(approved), groups, "ref", msgspec.structs.replace(PROFILE, least_rows=50)).set_index("group")
    assert found["value"].round(9).to_dict() == {"few": round(10 / 99 / 0.8, 9), "one": 0.75, "two": 1.125}
    p = stats.chi2_contingency([[160, 40], [60, 40]], correction=False).pvalue
    assert found.loc["one", "p_value"] == pytest.approx(p) and found.loc["one", "verdict"] == "adverse"
    assert found.loc["one", "low"] < 0.75 < found.loc["one", "high"]
    assert found.loc["two", "verdict"] == "fine"
    strict = compare(Judged(approved), groups, "ref", PROFILE).set_index("group")
    assert strict.loc["few", "verdict"] == strict.loc["two", "verdict"] == "insufficient data"
    assert strict.loc[["few", "two"], ["value", "low", "high", "p_value"]].isna().all(axis=None)


def test_a_difference_that_chance_explains_is_inconclusive():
    approved, groups = counts(ref=(40, 20), other=(10, 3))
    row = compare(Judged(approved), groups, "ref", SMALL).iloc[0]
    assert row["value"] == pytest.approx(0.6) and row["verdict"] == "inconclusive" and row["test"] == "Fisher"
    assert row["p_value"] == pytest.approx(stats.fisher_exact([[3, 7], [20, 20]]).pvalue)
    assert shares_test(300, 1000, 500, 1000)[1] == "z"


def test_scores_opportunity_and_calibration_by_hand():
    score = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 1, 3, 5, 7, 2, 4])
    groups = pd.Series(["a"] * 8 + ["b"] * 6)
    bad = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0])
    judged = Judged(score > 3, score, np.full(14, 0.25), bad)
    found = compare(judged, groups, "a", SMALL).set_index(["group", "measure"])["value"]
    a, b = score[:8], score[8:]
    pooled = np.sqrt((7 * a.var(ddof=1) + 5 * b.var(ddof=1)) / 12)
    assert found["b", "smd"] == pytest.approx((b.mean() - a.mean()) / pooled)
    assert found["b", "opportunity"] == pytest.approx(3 / 4 - 5 / 6)  # of the good: 5, 7, 2, 4 against 3 to 8
    assert found["a", "calibration"] == pytest.approx(0.25 - 2 / 8)
    assert found["b", "calibration"] == pytest.approx(0.25 - 2 / 6)


def test_the_rates_are_those_of_plain_counting():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"a": rng.choice(["x", "y"], 400), "b": rng.choice(["u", None], 400)})
    approved, bad = rng.random(400) < 0.6, rng.integers(0, 2, 400)
    found = rates(Judged(approved, rng.normal(size=400), rng.random(400), bad), frame)
    rows = (frame["a"] == "x") & (frame["b"] == "u")
    assert found.loc[("x", "u"), "applications"] == rows.sum()
    assert found.loc[("x", "u"), "approved"] == pytest.approx(approved[rows].mean())
    assert found.loc[("x", "u"), "approved of good"] == pytest.approx(approved[rows & (bad == 0)].mean())
    assert found.loc[("x", "u"), "bad rate"] == pytest.approx(bad[rows].mean())


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    rng, n, inside = np.random.default_rng(0), 800, 0
    profile = msgspec.structs.replace(PROFILE, draws=120)
    for seed in range(100):
        member = rng.random(n) < 0.3
        approved = rng.random(n) < np.where(member, 0.45, 0.6)
        found = compare(Judged(approved), pd.Series(np.where(member, "b", "a")), "a", profile, seed).iloc[0]
        inside += found["low"] <= 0.75 <= found["high"]
    assert stats.binomtest(int(inside), 100, 0.95).pvalue > 0.01


def test_the_same_seed_gives_the_same_facts_and_another_seed_other_intervals():
    approved, groups = counts(ref=(200, 160), one=(150, 90))
    first, again, other = (compare(Judged(approved), groups, "ref", PROFILE, seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert first["value"].equals(other["value"]) and not first["low"].equals(other["low"])


def test_where_two_attributes_meet():
    "Women and the group are approved like everybody, women of the group are not."
    cells = {("w", "m"): (300, 210), ("w", "f"): (300, 240), ("b", "m"): (300, 240), ("b", "f"): (300, 150)}
    approved = np.concatenate([np.arange(n) < k for n, k in cells.values()])
    frame = pd.DataFrame(list(np.repeat(list(cells), 300, axis=0)), columns=["race", "sex"])
    both = {"race": Attribute(reference="w"), "sex": Attribute(reference="m")}
    portfolio = Portfolio(profile="us", attributes=both, intersections=[("race", "sex")])
    table, seen = measures(Judged(approved), grouped(frame, both), portfolio, PROFILE)
    found = table.set_index("group")["value"]
    assert found["b, f"] == pytest.approx(150 / 210) and found["w, f"] == pytest.approx(240 / 210)
    assert table.set_index("group").loc["b, f", "verdict"] == "adverse"
    assert len(seen) == 2 + 2 + 4
    assert intersection(pd.Series(["w", None]), pd.Series(["f", "f"])).tolist() == ["w, f", None]


def world(n: int, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, pd.Series]:
    "An area that knows the group and nothing of the risk, debt that knows the risk, noise; outcomes; groups."
    rng = np.random.default_rng(seed)
    member = rng.random(n) < 0.3
    frame = pd.DataFrame({"debt": rng.normal(size=n), "area": rng.normal(size=n) + 1.5 * member})
    frame["noise"] = rng.choice(["x", "y", None], n)
    bad = (rng.random(n) < 1 / (1 + np.exp(2 - 1.2 * frame["debt"]))).astype(int).to_numpy()
    return frame, bad, pd.Series(np.where(member, "other", "ref"))


def test_the_planted_proxy_is_found_and_innocent_features_are_not():
    frame, bad, groups = world(6000)
    _, use = together(frame, bad)
    table, whole = scan(frame, groups, "ref", use, PROFILE)
    assert table.set_index("feature")["verdict"].to_dict() == {"area": "proxy", "debt": "innocent", "noise": "innocent"}
    assert table["feature"].iloc[0] == "area"
    assert whole["other"] == pytest.approx(stats.norm.cdf(1.5 / np.sqrt(2)), abs=0.03)
    member = (groups == "other").to_numpy()
    assert alone(binned(frame["area"]), member)["iv"] > 1 > 0.02 > alone(binned(frame["debt"]), member)["iv"]
    assert area(member, frame["area"].round(1)) == pytest.approx(auc(member, frame["area"].round(1)))
    few = groups.where(np.arange(len(groups)) > 150, "few")
    rest, _ = scan(frame.head(250), few.head(250), "few", use, PROFILE)
    assert set(rest["verdict"]) == {"insufficient data"}


@pytest.mark.parametrize("planted", [True, False])
def test_the_proxy_of_the_simulated_bank_is_found_where_it_is_planted(planted):
    bank = Bank(n=6000, proxy=planted)
    tables = simulate(bank)
    people, asked = tables["applicants"], tables["applications"]
    features = asked[["annual_income", "dti", "utilisation", "purpose", "residence_years", "savings", "area_index"]]
    _, use = together(features, tables["performance"]["bad_12m"])
    table, _ = scan(features, people["race_group"], "white", use, PROFILE)
    named = table[table["verdict"] == "proxy"]
    found = set(zip(named["feature"], named["group"], strict=True))
    assert found == ({("area_index", group) for group in PROXY_GROUPS} if planted else set())
    assert table.loc[table["feature"] == "annual_income", "verdict"].eq("innocent").all()


def test_a_feature_that_earns_its_place_is_related_and_no_proxy():
    rng = np.random.default_rng(3)
    frame, bad, groups = world(6000)
    frame["history"] = frame["debt"] + 0.6 * (groups == "other") + 0.1 * rng.normal(size=6000)
    kept = frame[["history", "noise"]]
    table, _ = scan(kept, groups, "ref", together(kept, bad)[1], PROFILE)
    assert table.set_index("feature")["verdict"].to_dict() == {"history": "related", "noise": "innocent"}


def lender(n: int = 6000):
    "A lender whose past decisions counted the area; how candidates are fitted, and what they are measured by."
    from sklearn.linear_model import LogisticRegression

    frame, bad, groups = world(n, 5)
    rng, train = np.random.default_rng(6), np.arange(n) < n // 2
    z = frame["debt"] + 0.5 * frame["area"] - 2
    learned = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(int)
    terms = Terms(bad[~train], {"group": groups[~train].reset_index(drop=True)}, {"group": "ref"}, 0.1, 0.4)

    def fit(candidate: Candidate) -> np.ndarray:
        kept = [c for c in ("debt", "area") if c not in candidate.without]
        model = LogisticRegression(C=0.001 if candidate.setting == "tight" else 1.0)
        return model.fit(frame.loc[train, kept], learned[train]).predict_proba(frame.loc[~train, kept])[:, 1]

    return fit, terms


def test_the_search_finds_the_planted_alternative():
    fit, terms = lender()
    found = search(fit, candidates(["area"], ["tight"]), 0.7, terms, PROFILE)
    assert found["baseline"]["model"] == "as it is" and found["chosen"]["without"] == ["area"]
    assert found["chosen"]["air"] > 0.9 > 0.8 > found["baseline"]["air"] and found["chosen"]["front"]
    assert found["confirmed"]["chosen"]["air"] > found["confirmed"]["baseline"]["air"] + 0.1
    assert "“without area" in found["reason"] and found == search(
        fit, candidates(["area"], ["tight"]), 0.7, terms, PROFILE
    )
    assert json.loads(json.dumps(found)) == found
    front = [p for p in found["points"] if p["front"]]
    for point in found["points"]:
        beaten = any(f["auc"] >= point["auc"] and f["air"] >= point["air"] and f != point for f in front)
        assert point in front or beaten


def test_an_alternative_that_costs_too_much_is_not_chosen():
    fit, terms = lender()
    dear = terms._replace(bad=(fit(Candidate((), "as it is")) > 0.25).astype(int))  # here the area is the truth
    found = search(fit, candidates(["area"]), 0.7, dear, PROFILE)
    assert found["chosen"] == found["baseline"] or found["chosen"]["without"] == []
    assert all(not p["allowed"] for p in found["points"] if p["without"])
    few = msgspec.structs.replace(PROFILE, least_rows=10_000)
    assert "insufficient data" in search(fit, candidates(["area"]), 0.7, terms, few)["reason"]
    assert smallest_air(np.ones(3000, bool), terms, 10_000)[1] == "insufficient data"


def test_the_facts_say_when_there_is_nothing_to_measure_by():
    frame, bad, groups = world(2000)
    judged = Judged(bad == 0, bad=bad)
    nothing = assess(judged, frame, frame, load_portfolio(PARAMS, "lendingclub"))
    assert nothing["verdict"] == "insufficient data" and air_check(nothing, PROFILE) is None
    assert "insufficient data" in fairness_words(nothing) and confirmed(nothing) == ""
    rare = Portfolio(profile="us", attributes={"group": Attribute(reference="nobody")})
    facts = assess(judged, frame.assign(group=groups), frame, (PROFILE, rare))
    assert facts["air"] is None and json.loads(json.dumps(facts)) == facts


def test_the_gate_is_on_the_smallest_ratio():
    frame, bad, groups = world(4000)
    own = Portfolio(profile="us", attributes={"group": Attribute(reference="ref")})
    judged = Judged((frame["debt"] + 0.6 * frame["area"] < 0.8).to_numpy(), bad=bad)
    facts = assess(judged, frame.assign(group=groups), frame[["debt", "noise"]], (PROFILE, own), ["area"])
    check = air_check(facts, PROFILE)
    assert not check["passed"] and check["value"] == facts["air"]["value"] < 0.8 and "group: other" in check["text"]
    assert proxy_table(facts)["feature"].tolist() == ["area (kept out)"]
    assert measure_table(facts)["verdict"].iloc[0] == "adverse"


def test_a_wrong_file_is_refused_by_name(tmp_path):
    content = yaml.safe_load(PARAMS.read_text())
    for change, message in (
        (lambda c: c["portfolios"]["taiwan"].update(profile="mars"), "no profile `mars`"),
        (lambda c: c["portfolios"]["taiwan"].update(intersections=[["sex", "zip"]]), "intersections name zip"),
        (lambda c: c["profiles"]["us"]["gate"].update(missed="cry"), "cry"),
    ):
        wrong = yaml.safe_load(PARAMS.read_text())
        change(wrong)
        (tmp_path / "fairness.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(FinureError, match=message):
            load_portfolio(tmp_path / "fairness.yaml", "taiwan")
    assert all(law["source"] and law["date"] and law["says"] for law in content["profiles"]["us"]["laws"])
    with pytest.raises(FinureError, match="no column sex"):
        group_of(pd.DataFrame({"a": [1]}), "sex", Attribute(reference="male"))


def test_every_portfolio_names_columns_that_its_contract_protects():
    for name, portfolio in yaml.safe_load(PARAMS.read_text())["portfolios"].items():
        contract = load(name)
        _, found = load_portfolio(PARAMS, name)
        for attribute, about in found.attributes.items():
            for column in about.columns(attribute):
                assert contract.columns[column].role == "protected", f"{name}: {column} of {attribute}"
            if about.groups:
                assert about.reference in about.groups
        assert portfolio["profile"] == found.profile


@pytest.mark.skipif(os.environ.get("FINURE_DATA") is None, reason="FINURE_DATA is not set")
def test_group_approval_rates_on_national_hmda_data_are_the_published_ones():
    "Table of the source, of all applications of 2022 to 2024; the file is a random sample of them."
    published = {
        "White": 80.0, "Black": 64.29, "Hispanic": 71.11, "Asian": 79.40,
        "American Indian or Alaska Native": 63.92, "Native Hawaiian or Other Pacific Islander": 66.56,
    }  # fmt: skip
    sample = {"White": 79.86, "Black": 63.66, "Hispanic": 71.22, "Asian": 79.44}
    data = Path(os.environ["FINURE_DATA"]) / "hmda_2022_2024_us_sample.parquet"
    frame = pd.read_parquet(data, columns=["approved", "derived_race", "derived_ethnicity"])
    profile, portfolio = load_portfolio(PARAMS, "hmda_us")
    group = group_of(frame, "race_ethnicity", portfolio.attributes["race_ethnicity"])
    approved = frame["approved"].to_numpy() == 1
    seen = rates(Judged(approved), group.rename("group"))
    for name, rate in published.items():
        n, found = seen.loc[name, ["applications", "approved"]]
        assert abs(100 * found - rate) < 3.3 * 100 * np.sqrt(found * (1 - found) / n), name
        assert round(100 * found, 2) == sample.get(name, round(100 * found, 2))
    table = compare(Judged(approved), group, "White", msgspec.structs.replace(profile, draws=4)).set_index("group")
    assert table.loc[["Black", "Hispanic", "Asian"], "value"].round(2).tolist() == [0.8, 0.89, 0.99]
    assert re.match("adverse|concern", table.loc["Black", "verdict"])
