"""The metrics against answers worked by hand, against libraries, and against properties that must always hold."""

import json
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

import finure.metrics as metrics
from finure.core import FinureError
from finure.metrics import (
    Bins,
    ScoreScale,
    auc,
    average_precision,
    best_cutoff,
    binomial_test,
    bootstrap_ci,
    brier,
    csi,
    ece,
    equal_groups,
    evaluate,
    gini,
    grade_table,
    hosmer_lemeshow,
    information_value,
    jeffreys,
    ks,
    lift_table,
    profit_curve,
    psi,
    psi_test,
    psi_verdict,
    vintage_table,
    wilson,
)

RANKING = [auc, gini, ks, average_precision]
ALL = [*RANKING, brier, ece]


def _sample(n: int = 3000, seed: int = 0, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    "Outcomes and calibrated PDs with many ties."
    rng = np.random.default_rng(seed)
    p = rng.beta(2, 8, n).round(digits).clip(0.01, 0.99)
    return (rng.random(n) < p).astype(int), p


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    "A few outcomes of both kinds with scores that are often equal."
    n = draw(st.integers(2, 30))
    y = [0, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 2, max_size=n - 2))]
    p = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    return np.array(y), np.array(p) / 20


# --- ranking


@given(scored())
@settings(max_examples=40, deadline=None)
def test_auc_counts_pairs_and_ties_as_half(data):
    y, p = data
    gaps = p[y == 1][:, None] - p[y == 0][None, :]
    assert auc(y, p) == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    assert gini(y, p) == pytest.approx(2 * auc(y, p) - 1)


@given(scored())
@settings(max_examples=40, deadline=None)
def test_ks_is_the_two_sample_distance(data):
    y, p = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's p-value, which is not used here
        assert ks(y, p) == pytest.approx(stats.ks_2samp(p[y == 1], p[y == 0], method="asymp").statistic)


@given(scored(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_ranking_ignores_row_order_and_monotone_transforms(data, random):
    y, p = data
    order = list(range(y.size))
    random.shuffle(order)
    for metric in RANKING:
        assert metric(y[order], p[order]) == pytest.approx(metric(y, p))
        assert metric(y, np.exp(3 * p) - 7) == pytest.approx(metric(y, p))


def test_ks_with_one_score_is_zero_whatever_the_order():
    assert ks([1] * 5 + [0] * 5, [0.3] * 10) == 0


def test_known_ranking():
    y, p = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]
    assert (auc(y, p), gini(y, p), ks(y, p)) == (0.75, 0.5, 0.5)
    assert average_precision(y, p) == pytest.approx(5 / 6)
    assert auc([0, 1], [1, 0]) == 0 and ks([0, 1], [1, 0]) == 1  # KS is a distance: a reversed score has it, too


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("y", "p", "text"),
    [
        ([0, 1, 1], [0.1, 0.2], "3 outcomes but 2 scores"),
        ([0, 1], [0.1, np.nan], "p: 1 of 2 values are missing"),
        ([0, np.nan], [0.1, 0.2], "y: 1 of 2 values are missing"),
        ([1, 2], [0.1, 0.2], "recode the outcome"),
        ([], [], "at least one row"),
        ([[0, 1]], [[0.1, 0.2]], "one-dimensional"),
        (["good", "bad"], [0.1, 0.2], "y: not numbers"),
    ],
)
def test_wrong_input_is_named(metric, y, p, text):
    with pytest.raises(FinureError, match=text):
        metric(y, p)


@pytest.mark.parametrize("metric", RANKING)
def test_ranking_needs_both_outcomes(metric):
    with pytest.raises(FinureError, match="all 2 outcomes are 1"):
        metric([1, 1], [0.1, 0.2])


@pytest.mark.parametrize("metric", [brier, ece, hosmer_lemeshow])
def test_calibration_needs_probabilities(metric):
    with pytest.raises(FinureError, match="not points"):
        metric([0, 1], [600, 640])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_groups_keep_ties_together_and_order(values, n):
    p = np.array(values) / 8
    group = equal_groups(p, n)
    assert pd.Series(group).groupby(p).nunique().max() == 1
    assert (np.diff(group[np.argsort(p, kind="stable")]) >= 0).all()
    assert set(group) == set(range(group.max() + 1)) and group.max() < n


def test_lift_table_by_hand():
    table = lift_table([1, 1, 0, 1, 0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1], n=4)
    assert table["bad"].tolist() == [2, 1, 0, 0] and table["n"].tolist() == [2] * 4
    assert table["lift"].tolist() == pytest.approx([8 / 3, 4 / 3, 0, 0])
    assert table["cum_bad_share"].tolist() == pytest.approx([2 / 3, 1, 1, 1])
    with pytest.raises(FinureError, match="no bads"):
        lift_table([0, 0], [0.1, 0.2])


# --- calibration


def test_brier_and_ece_by_hand():
    assert brier([0, 1], [0.2, 0.6]) == pytest.approx(0.1)
    assert brier([0, 0], [0.2, 0.4]) == pytest.approx(0.1)  # one outcome is enough
    assert ece([0, 0, 1, 1], [0.1, 0.1, 0.7, 0.9], n=2) == pytest.approx(0.15)
    assert ece([0, 1] * 50, [0.5] * 100) == 0


def test_hosmer_lemeshow_degrees_of_freedom_and_value():
    y, p = _sample()
    out, fitted = hosmer_lemeshow(y, p), hosmer_lemeshow(y, p, in_sample=True)
    group = equal_groups(p)
    expected = sum(
        (y[group == g].sum() - p[group == g].sum()) ** 2
        / ((group == g).sum() * p[group == g].mean() * (1 - p[group == g].mean()))
        for g in range(group.max() + 1)
    )
    assert out.statistic == pytest.approx(expected) and fitted.statistic == out.statistic
    assert (out.df, fitted.df) == (group.max() + 1, group.max() - 1)
    assert out.p_value == pytest.approx(stats.chi2.sf(expected, out.df)) and fitted.p_value < out.p_value


def test_hosmer_lemeshow_holds_its_level_out_of_sample():
    p_values = [hosmer_lemeshow(*_sample(2000, seed, digits=6)).p_value for seed in range(100)]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


def test_hosmer_lemeshow_refuses_what_it_cannot_test():
    with pytest.raises(FinureError, match="too few to test"):
        hosmer_lemeshow([0, 1], [0.0, 1.0])


@pytest.mark.parametrize(("n", "bad", "p"), [(100, 0, 0.01), (100, 5, 0.02), (37, 37, 0.9), (1, 0, 0.5)])
def test_grade_tests_against_scipy(n, bad, p):
    exact = stats.binomtest(bad, n, p, alternative="greater").pvalue
    assert binomial_test(n, bad, p)[0] == pytest.approx(exact)
    posterior = stats.beta(bad + 0.5, n - bad + 0.5)
    assert jeffreys(n, bad, p)[0] == pytest.approx(posterior.cdf(p))


def test_grade_tests_by_hand_and_direction():
    assert binomial_test(3, 2, 0.1)[0] == pytest.approx(0.028)
    assert jeffreys(1, 1, 0.5)[0] == pytest.approx(0.5 - 1 / np.pi)
    p_values = jeffreys([100] * 3, [1, 5, 20], [0.05] * 3)
    assert p_values[0] > p_values[1] > p_values[2]  # more bads, stronger evidence that the PD is too low
    with pytest.raises(FinureError, match="one value of each per grade"):
        jeffreys([10, 10], [1], [0.1])


def test_grade_table():
    grade = pd.Series(
        pd.Categorical(["B"] * 100 + ["A"] * 50, categories=["B", "A", "C"], ordered=True), index=range(50, 200)
    )
    y = np.r_[np.repeat([1, 0], [30, 70]), np.repeat([1, 0], [1, 49])]
    table = grade_table(grade, y, np.repeat([0.1, 0.05], [100, 50]))
    assert table.index.tolist() == ["B", "A"]  # the order of the levels; no row for the empty C
    assert table["bad"].tolist() == [30, 1] and table["rate"].tolist() == [0.3, 0.02]
    assert table["verdict"].tolist() == ["PD too low", "in line"]
    assert table["jeffreys_p"].tolist() == pytest.approx(jeffreys([100, 50], [30, 1], [0.1, 0.05]))
    with pytest.raises(FinureError, match="1 grades for 2 outcomes"):
        grade_table(["A", None], [0, 1], [0.1, 0.2])


@pytest.mark.parametrize(("bad", "n"), [(0, 10), (3, 10), (10, 10), (41, 1000)])
def test_wilson_against_scipy(bad, n):
    expected = stats.binomtest(bad, n).proportion_ci(0.9, method="wilson")
    assert wilson(bad, n, level=0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_vintage_table():
    table = vintage_table(["2010-01-31", "2010-03-31", "2010-04-01", "2011-01-01"], [1, 0, 1, 0])
    assert [str(period) for period in table.index] == ["2010Q1", "2010Q2", "2011Q1"]
    assert table["n"].tolist() == [2, 1, 1] and table["rate"].tolist() == [0.5, 1, 0]
    assert (table["low"] <= table["rate"]).all() and (table["rate"] <= table["high"]).all()
    assert len(vintage_table(["2010-01-31", "2010-03-31"], [1, 0], by="M")) == 2
    with pytest.raises(FinureError, match="1 dates for 2 outcomes"):
        vintage_table(["2010-01-31", None], [1, 0])
    with pytest.raises(FinureError, match="by: 'W'"):
        vintage_table(["2010-01-31"], [1], by="W")


# --- intervals


@given(scored(), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_fast_draws_equal_the_metrics_on_the_drawn_rows(data, seed):
    from finure.metrics.confidence import _Weighted

    y, p = data
    rows = np.r_[0, 1, np.random.default_rng(seed).integers(0, y.size, y.size)]
    drawn = _Weighted(y, p)(rows)
    for name, metric in metrics.METRICS.items():
        if name != "ece":  # its groups are those of the whole sample
            assert drawn[name] == pytest.approx(metric(y[rows], p[rows]), abs=1e-12)


def test_evaluate_gives_the_metrics_with_intervals_around_them():
    y, p = _sample()
    found = evaluate(y, p, seed=3)
    assert list(found) == ["auc", "gini", "ks", "ap", "brier", "ece"]
    for name, metric in metrics.METRICS.items():
        value, low, high = found[name]
        assert value == metric(y, p) and low < value < high
    assert found == evaluate(y, p, seed=3) and found != evaluate(y, p, seed=4)
    assert bootstrap_ci(auc, y, p, seed=3) == found["auc"]


def test_bootstrap_width_is_that_of_delong():
    y, p = _sample(2000, digits=6)
    bads, goods = p[y == 1], p[y == 0]
    wins = (bads[:, None] > goods[None, :]).astype(float)
    error = np.sqrt(wins.mean(axis=1).var(ddof=1) / bads.size + wins.mean(axis=0).var(ddof=1) / goods.size)
    found = bootstrap_ci(auc, y, p, n=500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(5)
    truth = stats.norm.cdf(1 / np.sqrt(2))  # AUC of two normals one standard deviation apart
    y, inside = np.repeat([0, 1], [150, 100]), 0
    for seed in range(100):
        _, low, high = bootstrap_ci(auc, y, rng.normal(y, 1), n=200, seed=seed)
        inside += low <= truth <= high
    assert 88 <= inside <= 99


def test_any_function_can_have_an_interval():
    y, p = _sample(500)
    found = bootstrap_ci(lambda y, p: roc_auc_score(y, p), y, p, n=50)
    assert found == pytest.approx(bootstrap_ci(auc, y, p, n=50))
    rate = bootstrap_ci(lambda y, p: y.mean(), y, p)
    assert rate.low < y.mean() < rate.high


def test_bootstrap_with_one_bad_draws_again_and_with_none_says_so():
    y, p = np.r_[1, np.zeros(9)], np.arange(10) / 10
    assert np.isfinite(bootstrap_ci(ks, y, p)).all()
    assert np.isfinite(bootstrap_ci(brier, np.zeros(10), p)).all()
    with pytest.raises(FinureError, match="all 10 outcomes are 0"):
        bootstrap_ci(auc, np.zeros(10), p)
    with pytest.raises(FinureError, match="at least 2 draws"):
        bootstrap_ci(auc, y, p, n=1)


def test_intervals_are_fast():
    y, p = _sample(12_500, digits=6)
    started = time.process_time()
    evaluate(y, p, n_boot=200)
    assert time.process_time() - started < 2
    started = time.process_time()
    bootstrap_ci(auc, y, p, n=500)
    assert time.process_time() - started < 2


# --- stability

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


@given(COUNTS, st.data(), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_psi_is_a_symmetric_distance_of_shares(expected, data, times):
    same_size = st.lists(st.integers(0, 50), min_size=len(expected), max_size=len(expected)).filter(any)
    actual = data.draw(same_size)
    assert psi(expected, actual) >= -1e-12
    assert psi(expected, actual) == pytest.approx(psi(actual, expected))
    assert psi(expected, np.array(expected) * times) == pytest.approx(0, abs=1e-12)
    assert 0 <= psi_test(expected, actual).p_value <= 1


def test_psi_by_hand():
    assert psi([50, 50], [75, 25]) == pytest.approx(0.25 * np.log(3))
    e, a = np.array([50, 50]) / 100, np.array([100, 0.5]) / 100.5  # an empty bin counts half a row
    assert psi([50, 50], [100, 0]) == pytest.approx(((a - e) * np.log(a / e)).sum())
    assert psi([5, 5, 0], [7, 3, 0]) == psi([5, 5], [7, 3])  # a bin empty on both sides says nothing
    for wrong in ([1, -1], [0, 0], [1, np.nan], [1, 2, 3]):
        with pytest.raises(FinureError, match="actual"):
            psi([1, 2], wrong)


def test_psi_against_optbinning():
    from optbinning.binning.metrics import jeffrey  # what optbinning's monitoring calls PSI

    e, a = np.array([30, 50, 20]), np.array([25, 45, 30])
    assert psi(e, a) == pytest.approx(jeffrey(a / a.sum(), e / e.sum(), return_sum=True))


def test_psi_test_holds_its_level_and_knows_the_sample_size():
    rng = np.random.default_rng(0)
    share = [0.1] * 10
    found = [psi_test(rng.multinomial(5000, share), rng.multinomial(800, share)) for _ in range(1000)]
    assert 0.03 <= np.mean([test.p_value < 0.05 for test in found]) <= 0.07
    assert all((test.psi > test.limit) == (test.p_value < 0.05) for test in found)
    small, large = psi_test([100] * 2, [12, 8]), psi_test([100_000] * 2, [12_000, 8000])
    assert small.psi == pytest.approx(large.psi) and small.p_value > 0.2 and large.p_value < 1e-10
    assert psi_test([5], [9]) == (0, 1, 0)


def test_bins_of_numbers_are_frozen():
    bins = Bins.fit([1, 2, 3, 4, 5, 6, 7, 8, None, np.nan], n=4)
    assert bins.labels == ["up to 2", "(2, 4]", "(4, 6]", "above 6", "missing"]
    assert bins.expected == (2, 2, 2, 2, 2)
    assert bins.counts([-1e9, 2, 2.5, np.inf, None]).tolist() == [2, 1, 0, 1, 1]
    assert bins.counts(pd.Series([1, None], dtype="Int64", index=[7, 7])).tolist() == [1, 0, 0, 0, 1]
    with pytest.raises(FinureError, match="text now"):
        bins.counts(["high", "low"])


def test_bins_with_ties_and_constants():
    assert Bins.fit([0] * 90 + [1] * 10).expected == (90, 10, 0)
    assert Bins.fit([5] * 10).labels == ["any", "missing"]
    assert Bins.fit([np.nan] * 3).expected == (0, 3)
    assert Bins.fit(np.arange(1000)).expected == (100,) * 10 + (0,)


def test_bins_of_categories_have_a_place_for_the_unseen():
    bins = Bins.fit(["rent", "own", None, "own"])
    assert dict(zip(bins.labels, bins.expected, strict=True)) == {"own": 2, "rent": 1, "unseen": 0, "missing": 1}
    assert bins.counts(pd.Series(["boat", "own", None], dtype="category")).tolist() == [1, 0, 1, 1]
    coded = Bins.fit(pd.Series([2, 1, 2]).astype("category"))
    assert coded.kind == "category" and coded.counts([1.0, 2.0, np.nan, 3.0]).tolist() == [1, 1, 1, 1]
    assert Bins.fit([True, False, True]).labels == ["False", "True", "unseen", "missing"]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(100) / 7,
        np.array([1, 2, 3], dtype=np.int8),
        pd.Series([1, 2, None]).astype("category"),
        [True, False],
        ["a", None],
        [np.inf, 1.0, 2.0],
    ],
)
def test_bins_travel_as_json(values):
    bins = Bins.fit(values)
    text = json.dumps(bins.to_dict(), allow_nan=False)
    assert Bins.from_dict(json.loads(text)) == bins


def test_bins_refuse_dates():
    with pytest.raises(FinureError, match="are dates"):
        Bins.fit(pd.date_range("2020-01-01", periods=3))


def test_csi_finds_the_characteristic_that_moved():
    rng = np.random.default_rng(0)
    before = pd.DataFrame({"a": rng.normal(size=4000), "b": rng.normal(size=4000), "c": rng.choice(["x", "y"], 4000)})
    after = before.sample(1000, random_state=0).assign(b=lambda frame: frame["b"] + 1)
    bins = {name: Bins.fit(before[name]) for name in before}
    table = csi(bins, after)
    assert table.index[0] == "b"
    assert table["verdict"].to_dict() == {"b": "shift", "a": "stable", "c": "stable"}
    assert table.loc["b", "psi"] == psi(bins["b"].expected, bins["b"].counts(after["b"]))
    with pytest.raises(FinureError, match="^c: not in the new data"):
        csi(bins, after.drop(columns="c"))
    with pytest.raises(FinureError, match="^a: values: were numbers"):
        csi(bins, after.assign(a="text"))
    assert csi({}, after).columns.tolist() == ["psi", "p_value", "limit", "verdict"]


def test_verdicts_at_their_limits():
    assert [psi_verdict(value) for value in (0, 0.0999, 0.1, 0.25, 0.2501)] == [
        *("stable", "stable", "investigate", "investigate", "shift")
    ]


def test_information_value_against_optbinning():
    from optbinning.binning.metrics import jeffrey

    rng = np.random.default_rng(0)
    x = pd.Series(rng.normal(size=2000), index=rng.permutation(2000))
    y = (rng.random(2000) < 1 / (1 + np.exp(2 - x.to_numpy()))).astype(int)
    codes = Bins.fit(x).codes(x)
    goods, bads = np.bincount(codes[y == 0]), np.bincount(codes[y == 1])
    assert information_value(x, y) == pytest.approx(jeffrey(goods / goods.sum(), bads / bads.sum(), return_sum=True))
    assert information_value(y, y) > 0.5  # a leak
    assert information_value(rng.permutation(x), y) < 0.05
    with pytest.raises(FinureError, match="needs goods and bads"):
        information_value([1, 2], [0, 0])


# --- policy


def test_score_scale_known_answer():
    scale = ScoreScale(pdo=20, ref_score=600, ref_odds=50)
    assert (scale.factor, scale.offset) == pytest.approx((28.8539, 487.123), abs=1e-3)
    assert scale.points(np.array([1 / 51, 1 / 101])) == pytest.approx([600, 620])


@given(st.floats(1, 100), st.floats(0, 1000), st.floats(0.01, 1000), st.floats(1e-6, 1 - 1e-6))
@settings(max_examples=40, deadline=None)
def test_score_scale_round_trip_and_direction(pdo, ref_score, ref_odds, p):
    scale = ScoreScale(pdo, ref_score, ref_odds)
    assert scale.pd(scale.points(p)) == pytest.approx(p, rel=1e-6)
    assert scale.points(p / 2) > scale.points(p)


def test_score_scale_refuses():
    for p in (0, 1, np.nan, [0.5, 1.2]):
        with pytest.raises(FinureError, match="strictly between"):
            ScoreScale().points(p)
    with pytest.raises(FinureError, match="both must be above 0"):
        ScoreScale(pdo=0)


def test_profit_curve_by_hand_with_amounts_per_account():
    curve = profit_curve([0.2, 0.1, 0.2, 0.6], [1, 0, 0, 1], gain_good=[0, 100, 50, 0], loss_bad=[80, 0, 0, 300])
    assert curve["cutoff"].tolist() == [-np.inf, 0.1, 0.2, 0.6]
    assert curve["approval_rate"].tolist() == [0, 0.25, 0.75, 1]
    assert curve["bad_rate"].tolist()[1:] == pytest.approx([0, 1 / 3, 1 / 2]) and np.isnan(curve["bad_rate"][0])
    assert curve["profit"].tolist() == [0, 25, 17.5, -57.5]
    assert best_cutoff(curve)["cutoff"] == 0.1


def test_best_cutoff_approves_nobody_when_all_lose():
    assert best_cutoff(profit_curve([0.5, 0.6], [1, 1], 100, 100))["approval_rate"] == 0


def test_profit_refuses_wrong_amounts():
    with pytest.raises(FinureError, match="gain_good: has the shape"):
        profit_curve([0.1, 0.2], [0, 1], [1, 2, 3], 1)
    with pytest.raises(FinureError, match="loss_bad: holds missing or negative"):
        profit_curve([0.1, 0.2], [0, 1], 1, -1)


# --- names


def test_every_name_is_where_it_is_said_to_be():
    for names in metrics.HOMES.values():
        for name in names:
            assert getattr(metrics, name) is not None
    with pytest.raises(AttributeError, match="no 'acu'"):
        metrics.acu  # noqa: B018


def test_the_score_scale_loads_nothing_heavy():
    code = "import sys; from finure.metrics import ScoreScale; ScoreScale().points(0.1); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"pandas", "scipy", "sklearn", "matplotlib"} & set(loaded)
