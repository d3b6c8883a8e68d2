"The economy as it was known on a day, and what the report says would happen if it turned"

import numpy as np
import pandas as pd
import pytest

from finure.contracts.contract import parse
from finure.core import FinureError, Settings
from finure.credit.data import load_table, simulated_macro
from finure.credit.stress import fit_relation, scenario_table, stress_test
from finure.macro import as_of, load_macro, with_macro
from finure.run.inputs import files_of
from finure.simulate.world import REVISED, Bank, releases

ECONOMY = releases(Bank())
DAYS = pd.Series(pd.date_range("2019-11-01", "2025-03-01", freq="29D"))
TIMED = parse({
    "contract": "c", "version": "1", "title": "t", "reasons": {"a": {"category": "OTHER", "text": "An example"}},
    "columns": {
        "on": {"type": "date", "role": "event_time"}, "x": {"type": "number", "reason": "a"},
        "unemployment": {"type": "number", "reason": "a", "null": "allowed"},
        "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
    },
})  # fmt: skip


def by_hand(table, day):
    "The newest figures of a day, the slow way: cut, then the latest period, then its latest vintage."
    out = table[table["published"] <= day].sort_values(["period", "published"]).groupby("series")["value"].last()
    return out.reindex(sorted(set(table["series"])))


def test_every_value_is_the_one_that_was_out_on_the_day():
    found = as_of(ECONOMY.sample(frac=1, random_state=0), DAYS)
    slow = pd.DataFrame([by_hand(ECONOMY, day) for day in DAYS], index=DAYS.index)
    pd.testing.assert_frame_equal(found, slow, check_names=False)
    assert found.iloc[0].isna().all() and found.iloc[-1].notna().all()


@pytest.mark.parametrize("day", ["2021-02-10", "2022-06-30", "2023-11-11"])
def test_nothing_published_later_changes_a_value(day):
    day = pd.Timestamp(day)
    past, future = DAYS[day >= DAYS], ECONOMY["published"] > day
    changed = ECONOMY.assign(value=ECONOMY["value"].where(~future, -1e9))
    expected = as_of(ECONOMY, past)
    pd.testing.assert_frame_equal(as_of(changed, past), expected)
    pd.testing.assert_frame_equal(as_of(ECONOMY[~future], past), expected)


def test_a_first_figure_counts_until_its_correction_is_out():
    rows = ECONOMY[ECONOMY["series"] == "unemployment"].groupby("period")
    first, last = rows.first(), rows.last()
    assert set(REVISED) == {"unemployment", "house_price_index"} and (first["value"] != last["value"]).mean() > 0.5
    found = as_of(ECONOMY, first["published"].reset_index(drop=True))["unemployment"]
    np.testing.assert_array_equal(found, first["value"])


def test_order_index_and_moments_of_the_dates():
    shuffled = DAYS.sample(frac=1, random_state=1) + pd.Timedelta(hours=23)
    pd.testing.assert_frame_equal(as_of(ECONOMY, shuffled).sort_index(), as_of(ECONOMY, DAYS))
    gap = as_of(ECONOMY, pd.Series([pd.NaT, DAYS.iloc[-1]], index=[7, 3]))
    assert gap.index.tolist() == [7, 3] and gap.loc[7].isna().all() and gap.loc[3].notna().all()


def test_a_correction_of_an_older_figure_on_the_day_of_a_newer_one():
    rows = [("2024-01-01", "2024-02-10", 1.0), ("2024-01-01", "2024-03-10", 2.0), ("2024-02-01", "2024-03-10", 3.0)]
    table = pd.DataFrame(rows, columns=["period", "published", "value"]).assign(series="s")
    table = table.astype({"period": "datetime64[ns]", "published": "datetime64[ns]"})
    assert as_of(table.iloc[::-1], pd.Series(pd.to_datetime(["2024-03-09", "2024-03-10"])))["s"].tolist() == [1.0, 3.0]


def written(table, path):
    table.to_csv(path, index=False)
    return str(path)


def test_a_table_that_cannot_be_trusted_is_refused(tmp_path):
    good = ECONOMY.head(3)
    assert len(load_macro(written(good, tmp_path / "good.csv"))) == 3
    twice = written(pd.concat([good, good.head(1).assign(value=9)]), tmp_path / "twice.csv")
    early = written(good.assign(published="2019-01-01"), tmp_path / "early.csv")
    gone = written(good.assign(value=[1, "n/a", 2]), tmp_path / "gone.csv")
    for path, said in ((twice, "two values on one day"), (early, "before its period"), (gone, "value: is missing")):
        with pytest.raises(FinureError, match=said):
            load_macro(path)


def test_the_economy_of_the_simulated_bank_is_had_by_name(tmp_path):
    found = load_macro("simulated_macro", Settings(home=tmp_path))
    pd.testing.assert_frame_equal(found, simulated_macro(), check_dtype=False)


@pytest.mark.parametrize("header", [True, False])
def test_training_rows_get_the_figure_of_their_day(tmp_path, header):
    rows = pd.DataFrame({"on": DAYS.dt.strftime("%Y-%m-%d"), "x": 1.0, "bad": 0})
    data, macro = tmp_path / "rows.csv", written(ECONOMY, tmp_path / "macro.csv")
    rows.to_csv(data, index=False, header=header)
    clean = load_table(str(data), TIMED, header, macro=macro).clean
    np.testing.assert_array_equal(clean["unemployment"], as_of(ECONOMY, DAYS)["unemployment"])
    with pytest.raises(FinureError, match="that the data lacks"):
        with_macro(rows.assign(unemployment=1.0), TIMED, ECONOMY)
    with pytest.raises(FinureError, match="names no day"):
        columns = {name: column for name, column in TIMED.columns.items() if name != "on"}
        with_macro(rows, type(TIMED)(contract="c", version="1", title="t", columns=columns), ECONOMY)


def test_a_run_depends_on_every_data_set_that_it_names(tmp_path):
    names = {name: str(tmp_path / f"{name}.csv") for name in ("data", "rejected", "macro")}
    for name, path in names.items():
        (tmp_path / path).write_text(name)
    assert set(files_of(names, tmp_path)) == set(names)


def book(seed, effect, shock, months=30, each=80):
    "PDs, outcomes, unemployment and months of a made-up book; every month has a luck of its own besides."
    rng = np.random.default_rng(seed)
    level = np.repeat(5 + np.cumsum(rng.normal(0, 0.5, months)), each)
    luck = np.repeat(rng.normal(0, shock, months), each)
    pds = rng.beta(2, 8, months * each)
    z = np.log(pds / (1 - pds)) + effect * (level - 5) + luck
    bad = (rng.random(len(z)) < 1 / (1 + np.exp(-z))).astype(int)
    return pds, bad, pd.DataFrame({"unemployment": level}), np.repeat(np.arange(months), each)


def test_the_relation_is_found_and_its_interval_counts_months_and_not_loans():
    inside = []
    for seed in range(40, 70):
        _, low, high = fit_relation(*book(seed, 0.3, 0.4)).shift({"unemployment": 1.0})
        inside.append((low < 0.3 < high, high - low))
    covered, width = np.mean(inside, axis=0)
    assert covered > 0.85
    pds, bad, economy, month = book(0, 0.3, 0.4)
    as_if_alone = fit_relation(pds, bad, economy, np.arange(len(bad))).shift({"unemployment": 1.0})
    assert width > 1.5 * (as_if_alone[2] - as_if_alone[1])


def test_a_scenario_moves_all_pds_and_the_loss_with_them():
    pds, bad, economy, month = book(1, 0.5, 0.0)
    relation = fit_relation(pds, bad, economy, month)
    table = scenario_table(pds, relation, {"up": {"unemployment": 2.0}, "down": {"unemployment": -2.0}}, 0.4)
    rates, z = table["expected bad rate"], np.log(pds / (1 - pds))
    assert rates[2] < rates[0] == pds.mean() < rates[1]
    assert rates[1] == pytest.approx((1 / (1 + np.exp(-z - 2 * relation.slope[0]))).mean(), abs=1e-6)
    np.testing.assert_allclose(table["expected loss"], 0.4 * rates)
    low, high = (float(part) / 100 for part in table.iloc[1, 2].replace("%", "").split(" to "))
    assert low < rates[1] < high


def test_the_report_says_why_there_is_no_scenario(tmp_path):
    pds, bad, _, month = book(2, 0.0, 0.0)
    days = pd.Timestamp("2021-03-15") + pd.to_timedelta(30 * month, "D")
    scored = pd.DataFrame({"pd_candidate": pds, "bad": bad, "event_time": days})
    macro, stress = written(ECONOMY, tmp_path / "macro.csv"), {"two": {"unemployment": 2.0}}
    found = stress_test(scored, pds, macro, stress, 0.5)
    assert len(found.table) == 2 and "with the figures that were out on the day" in found.words
    told = {
        "No economic data was given": stress_test(scored, pds, "", stress, 0.5),
        "names no day of the application": stress_test(scored.drop(columns="event_time"), pds, macro, stress, 0.5),
        "nothing to put to the test": stress_test(scored, pds[:0], macro, stress, 0.5),
        "12 are asked for": stress_test(scored.head(400), pds, macro, stress, 0.5),
    }
    for words, stressed in told.items():
        assert stressed.table is None and words in stressed.words
    with pytest.raises(FinureError, match="no series oil. It has: house_price_index"):
        stress_test(scored, pds, macro, {"shock": {"oil": 50.0}}, 0.5)
