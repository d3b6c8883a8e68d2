"Principal reasons: the exactness of the contributions, and what an applicant is told."

import subprocess
import sys

import numpy as np
import pytest
import shap
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import Reason
from finure.core import FinureError, generator
from finure.explain.reasons import CATEGORIES, PrincipalReasons, check_texts, just_approved, shortfall
from finure.explain.trees import load_contributions, save_contributions, tree_contributions

CATALOGUE = {name: Reason("OTHER", f"Reason {name}") for name in "abcdef"}


def rows_of(n, width, missing, *names):
    rng = generator(2, *names)
    rows = rng.normal(size=(n, width))
    rows[:, ::2] = np.round(rows[:, ::2] * 2)  # values that sit on thresholds
    rows[rng.random(rows.shape) < missing] = np.nan
    return rows.astype(np.float32)


def fitted(rows, rounds=12, seed=0, **settings):
    filled = np.nan_to_num(rows, nan=0.7)
    odds = filled[:, 0] + filled[:, 1] * filled[:, 2] - 0.5 * filled[:, -1] - 1
    bad = generator(seed, "bad").random(len(rows)) < 1 / (1 + np.exp(-odds))
    settings = {"objective": "binary:logistic", "eta": 0.3, "nthread": 1, "seed": seed} | settings
    return xgb.train(settings, xgb.DMatrix(rows, bad), rounds)


def margins(booster, rows):
    return booster.predict(xgb.DMatrix(rows), output_margin=True)


def by_shap(booster, reference, rows):
    explainer = shap.TreeExplainer(booster, data=reference, feature_perturbation="interventional")
    return explainer.shap_values(rows, check_additivity=False)


@pytest.mark.parametrize("missing", [0.0, 0.15])
@pytest.mark.parametrize("depth", range(1, 7))
def test_contributions_equal_shap_and_add_up(depth, missing):
    rows = rows_of(1200, 9, missing, "rows", str(depth))
    booster = fitted(rows, seed=depth, max_depth=depth)
    reference, asked = rows[:80], rows[80:140]
    explained = tree_contributions(booster, reference)
    found = explained.batch(asked)
    assert np.abs(found - by_shap(booster, reference, asked)).max() < 1e-4
    everyone = explained.base + explained.batch(rows).sum(axis=1)
    assert np.abs(everyone - margins(booster, rows)).max() < 1e-4
    assert explained.base == pytest.approx(margins(booster, reference).mean(), abs=1e-4)


CASES = {  # features, the most of them on one path, settings
    "a feature again and again on one path": (2, 2, {"max_depth": 7}),
    "monotone": (6, 4, {"max_depth": 4, "monotone_constraints": (1, 0, 0, 0, 0, -1)}),
    "leaf-wise, sampled": (6, 6, {"grow_policy": "lossguide", "max_leaves": 25, "max_depth": 0, "subsample": 0.7}),
    "base score given": (6, 3, {"max_depth": 3, "base_score": 0.1}),
    "every value a candidate": (6, 4, {"max_depth": 4, "tree_method": "exact"}),
    "eight features on a path": (12, 8, {"max_depth": 8, "colsample_bynode": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
def test_contributions_equal_shap_for_unusual_models(case):
    width, most, settings = CASES[case]
    rows = rows_of(900, max(width, 3), 0.1, case)
    rows[:, width:] = np.nan  # nothing to split on
    booster = fitted(rows, rounds=8, **settings)
    explained = tree_contributions(booster, rows[:50])
    found = explained.batch(rows[50:90])
    assert max(table.shape[1] for table, *_ in explained.groups) == most
    assert np.abs(found - by_shap(booster, rows[:50], rows[50:90])).max() < 1e-4
    assert np.abs(explained.base + found.sum(axis=1) - margins(booster, rows[50:90])).max() < 1e-4


def test_parallel_trees_add_up():
    rows = rows_of(500, 5, 0.1, "forest")
    booster = fitted(rows, rounds=4, num_parallel_tree=3, subsample=0.5, max_depth=3)
    explained = tree_contributions(booster, rows[:50])
    assert np.abs(explained.base + explained.batch(rows).sum(axis=1) - margins(booster, rows)).max() < 1e-4


def test_values_at_the_edge():
    rows = rows_of(1000, 5, 0.1, "edge")
    booster = fitted(rows, max_depth=5)
    explained = tree_contributions(booster, rows[:100])
    thresholds = booster.trees_to_dataframe().query("Feature == 'f1'")["Split"].to_numpy(np.float32)
    edge = np.repeat(rows[:1], 3 * len(thresholds) + 3, axis=0)
    beside = [np.nextafter(thresholds, np.float32(side)) for side in (-np.inf, np.inf)]
    edge[:, 1] = np.concatenate([thresholds, *beside, [np.nan, 3e38, -3e38]])
    assert np.abs(explained.base + explained.batch(edge).sum(axis=1) - margins(booster, edge)).max() < 1e-4
    unknown = np.full((1, 5), np.nan, dtype=np.float32)
    assert explained.base + explained.batch(unknown).sum() == pytest.approx(margins(booster, unknown)[0], abs=1e-4)
    infinite = rows[0].copy()
    infinite[1] = np.inf
    large = np.where(np.isinf(infinite), 3e38, infinite)
    assert (explained.contributions(infinite) == explained.contributions(large)).all()


def test_a_model_without_splits_has_no_contributions():
    rows = rows_of(200, 3, 0.0, "none")
    booster = fitted(rows, max_depth=3, min_child_weight=1e9)
    explained = tree_contributions(booster, rows[:20])
    assert (explained.contributions(rows[0]) == 0).all()
    assert explained.base == pytest.approx(margins(booster, rows[:1])[0], abs=1e-5)


def test_the_file_gives_the_same_numbers(tmp_path):
    rows = rows_of(500, 6, 0.1, "file")
    explained = tree_contributions(fitted(rows, max_depth=4), rows[:100])
    save_contributions(explained, tmp_path / "contributions.npz")
    loaded = load_contributions(tmp_path / "contributions.npz")
    assert (loaded.batch(rows) == explained.batch(rows)).all()
    assert (loaded.base, loaded.width) == (explained.base, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["contributions.npz"]
    assert (loaded.batch(rows[:3])[1] == loaded.contributions(rows[1])).all()


def test_the_cost_does_not_grow_with_the_reference():
    rows = rows_of(3000, 6, 0.1, "size")
    booster = fitted(rows, max_depth=4)
    small, large = tree_contributions(booster, rows[:50]), tree_contributions(booster, rows)
    assert [table.shape for table, *_ in small.groups] == [table.shape for table, *_ in large.groups]


def test_models_that_the_tables_cannot_explain_are_refused():
    rows = rows_of(400, 12, 0.0, "refused")
    with pytest.raises(FinureError, match="binary:logistic"):
        tree_contributions(fitted(rows, objective="reg:squarederror"), rows[:10])
    with pytest.raises(FinureError, match="gbtree"):
        tree_contributions(fitted(rows, booster="dart"), rows[:10])
    with pytest.raises(FinureError, match="max_depth of at most 8"):
        tree_contributions(fitted(rows, rounds=20, max_depth=12, min_child_weight=0, colsample_bynode=0.2), rows[:10])
    with pytest.raises(FinureError, match="12 features"):
        tree_contributions(fitted(rows), rows[:10, :5])
    levels = xgb.DMatrix(np.abs(np.round(rows[:, :1])), rows[:, 0] > 0, feature_types=["c"], enable_categorical=True)
    with pytest.raises(FinureError, match="numeric features"):
        tree_contributions(xgb.train({"objective": "binary:logistic", "max_cat_to_onehot": 1}, levels, 3), rows[:9, :1])


def test_an_early_stopped_model_must_be_cut_first():
    rows = rows_of(600, 4, 0.0, "early")
    bad = generator(5, "noise").random(600) < 0.3
    train, check = xgb.DMatrix(rows[:300], bad[:300]), xgb.DMatrix(rows[300:], bad[300:])
    settings = {"objective": "binary:logistic", "max_depth": 4, "nthread": 1}
    watch = {"evals": [(check, "check")], "early_stopping_rounds": 5, "verbose_eval": False}
    booster = xgb.train(settings, train, 50, **watch)
    with pytest.raises(FinureError, match="stopped early"):
        tree_contributions(booster, rows[:50])
    best = booster[: booster.best_iteration + 1]
    explained = tree_contributions(best, rows[:50])
    assert np.abs(explained.base + explained.batch(rows).sum(axis=1) - margins(best, rows)).max() < 1e-4


def test_the_scoring_process_imports_nothing_heavy():
    heavy = "pandas xgboost shap numba sklearn matplotlib mlflow scipy"
    code = f"import sys, finure.explain.reasons, finure.explain.trees; print(set('{heavy}'.split()) & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def named(hurt, ids, min_share=0.05):
    "The ids of the principal reasons of one applicant, which must be those of a table."
    principal = PrincipalReasons(ids, CATALOGUE, min_share)
    one = principal.of(hurt)
    assert principal.table(np.array([hurt]))[0].tolist() == one + [-1] * (4 - len(one))
    return [principal.ids[at] for at in one]


def test_reasons_add_up_features_and_keep_what_hurts():
    hurt = [0.2, 0.2, 0.3, -0.5, 0.9, -0.1, 0.0]
    assert named(hurt, ["b", "b", "a", "c", "d", "e", "f"]) == ["d", "b", "a"]
    assert named([0.5, -0.6], ["a", "a"]) == []


def test_at_most_four_reasons_and_ties_in_the_order_of_the_catalogue():
    ids = ["f", "e", "d", "c", "b", "a"]
    assert named([1.0] * 6, ids) == ["a", "b", "c", "d"]
    nearly = [1.0, 1.0 + 1e-9, 0.1 + 0.2 + 0.7, 1.0, 1.0, 1.0 - 1e-12]
    assert named(nearly, ids) == ["a", "b", "c", "d"]
    assert named([1.0, 2.0], ["a", "f"]) == ["f", "a"]


def test_noise_is_not_a_principal_reason_but_the_largest_always_is():
    assert named([1.0, 0.051, 0.049], ["a", "b", "c"]) == ["a", "b"]
    assert named([2e-6], ["a"]) == ["a"]
    assert len(named([1.0, 0.049], ["a", "b"], min_share=0.0)) == 2


def test_a_catalogue_of_fewer_than_four_reasons():
    principal = PrincipalReasons(["b"], {name: CATALOGUE[name] for name in "ab"})
    assert principal.table(np.array([[1.0], [-1.0]])).tolist() == [[1, -1, -1, -1], [-1] * 4]


PUSHES = st.lists(
    st.lists(st.floats(-2, 2) | st.sampled_from([0.0, 1e-6, 0.5e-6, 1.0, 0.05]), min_size=9, max_size=9), min_size=1
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=9, max_size=9), PUSHES)
def test_a_table_names_the_reasons_of_one_applicant_at_a_time(ids, rows):
    principal = PrincipalReasons(ids, CATALOGUE)
    table = principal.table(np.array(rows))
    assert [[at for at in row if at >= 0] for row in table.tolist()] == [principal.of(row) for row in rows]


def test_reasons_that_cannot_be_right_are_refused():
    with pytest.raises(FinureError, match="'z'"):
        PrincipalReasons(["z"], CATALOGUE)
    principal = PrincipalReasons(["a", "b"], CATALOGUE)
    for ask in (principal.of, lambda hurt: principal.table(np.array([hurt]))):
        with pytest.raises(FinureError, match="not a number"):
            ask([1.0, float("nan")])
    with pytest.raises(ValueError, match="shorter|longer"):
        principal.of([1.0])


@pytest.mark.parametrize(
    "text",
    [
        "Credit score too low",
        "Low credit score",
        "Failed to achieve a qualifying score",
        "Score below our minimum",
        "You did not meet our internal standards",
        " ",
    ],
)
def test_a_text_that_names_no_factor_is_refused(text):
    with pytest.raises(FinureError, match="reasons.score.text"):
        check_texts({"score": Reason("OTHER", text)})


def test_ordinary_texts_pass():
    check_texts(CATALOGUE | {"history": Reason("THIN_FILE", "Limited credit experience")})


def test_the_categories_carry_the_public_codes():
    assert CATEGORIES["DTI"].form_c1 == (9,) and CATEGORIES["DTI"].hmda == 1
    assert CATEGORIES["INQUIRIES"].form_c1 == (22,) and CATEGORIES["INQUIRIES"].hmda == 3
    assert CATEGORIES["INCOMPLETE"].hmda == 7 and CATEGORIES["UNVERIFIABLE"].hmda == 6
    assert len(CATEGORIES) == 13


def test_the_reference_is_the_nearest_at_or_below_the_cutoff():
    risk = generator(3, "risk").random(1000)
    risk[7] = 0.4
    chosen = just_approved(risk, 0.4, n=50)
    assert chosen[0] == 7 and len(chosen) == 50
    assert risk[chosen].max() <= 0.4
    left = np.setdiff1d(np.flatnonzero(risk <= 0.4), chosen)
    assert risk[left].max() <= risk[chosen].min()
    assert (chosen == just_approved(risk, 0.4, n=50)).all()


def test_the_reference_of_a_small_portfolio_stays_near_the_cutoff():
    assert len(just_approved(np.linspace(0, 1, 101), 1.0)) == 21
    assert just_approved([np.nan, 0.2, 0.9], 0.5).tolist() == [1]
    with pytest.raises(FinureError, match="cut-off 0.1"):
        just_approved([0.3, np.nan], 0.1)


def test_points_lost_name_the_characteristics_furthest_below_the_reference():
    points = np.array([[50.0, 30, 20], [40, 40, 30], [10, 45, 20]])
    lost = shortfall(points[2].tolist(), points[:2].mean(axis=0).tolist())
    assert lost == [35.0, -10.0, 5.0]
    assert named(lost, ["a", "b", "c"]) == ["a", "c"]
