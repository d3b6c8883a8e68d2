"""The simulated cards: the habits and frauds of the settings, the truth apart, the same for the same seed"""

import time

import numpy as np
import pandas as pd
import pytest

from finure.core import FinureError
from finure.simulate.cards import COMPROMISED_DAYS, DAY, DRIFT, LARGE, LEAKED_DAYS, Cards, simulate_cards

TOWN = {"customers": 1_000, "terminals": 2_000, "days": 120, "compromised": 0.4, "leaked": 0.6, "radius": 10.0}


@pytest.fixture(scope="module")
def world():
    return simulate_cards(Cards(**TOWN))


@pytest.fixture(scope="module")
def whole(world):
    "Transactions with what only the simulator knows."
    table = world.transactions.merge(world.truth, validate="one_to_one")
    table["day"] = (table["event_time"] - pd.Timestamp("2018-04-01")).dt.days
    return table.merge(world.customers[["customer_id", "mean_amount"]])


def covered(table, periods, name):
    "Whether a payment happens while its terminal or card is compromised."
    inside = np.zeros(len(table), bool)
    for one, first, until in periods.itertuples(index=False):
        inside |= (table[name] == one) & (table["day"] >= first) & (table["day"] < until)
    return inside


def test_same_seed_same_tables_and_another_seed_differs():
    small = {**TOWN, "customers": 200, "terminals": 300, "days": 30}
    first, again, other = (simulate_cards(Cards(**small, seed=seed)) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(a, b)
    assert not first.transactions["amount"].head(100).equals(other.transactions["amount"].head(100))


def test_size_and_mix_are_those_of_the_handbook():
    started = time.process_time()
    world = simulate_cards(Cards())
    assert time.process_time() - started < 20
    table = world.transactions
    assert 1_700_000 < len(table) < 1_820_000  # 1,754,155 there
    assert 0.0075 < table["fraud"].mean() < 0.0095  # 0.0084 there
    count = world.truth["scenario"].value_counts()
    assert 0.75 < count[1] / 973 < 1.3 and 0.85 < count[2] / 9_077 < 1.15 and 0.8 < count[3] / 4_631 < 1.25
    assert len(world.compromised) == 366 and len(world.leaked) == 549


def test_a_lender_sees_payments_in_order_and_labels_late(world):
    table = world.transactions
    assert list(table) == [
        *["transaction_id", "event_time", "customer_id", "terminal_id", "amount", "fraud", "known_time"]
    ]
    assert (table["transaction_id"] == np.arange(len(table))).all() and table["event_time"].is_monotonic_increasing
    assert (table["known_time"] - table["event_time"] == pd.Timedelta(days=7)).all()
    assert table["event_time"].min() >= pd.Timestamp("2018-04-01")
    assert table["event_time"].max() < pd.Timestamp("2018-04-01") + pd.Timedelta(days=120)


def test_label_delay_has_a_floor_and_a_mean():
    table = simulate_cards(Cards(**TOWN, label_delay=2, label_spread=5)).transactions
    wait = (table["known_time"] - table["event_time"]).dt.total_seconds() / DAY
    assert wait.min() >= 2 and 6.9 < wait.mean() < 7.1 and wait.nunique() > 1_000


def test_payments_are_where_and_as_large_as_the_customer_is_used_to(world, whole):
    near = whole.merge(world.customers).merge(world.terminals, on="terminal_id", suffixes=("", "_t"))
    assert (np.hypot(near["x"] - near["x_t"], near["y"] - near["y_t"]) <= TOWN["radius"]).all()
    good = whole[whole["scenario"] == 0]
    times = good["amount"] / good["mean_amount"]
    assert 0.98 < times.mean() < 1.03 and 0.4 < times.std() < 0.55 and times.min() >= 0
    rate = whole.groupby("customer_id").size() / TOWN["days"]
    wanted = world.customers.set_index("customer_id")["rate"].reindex(rate.index)
    assert 0.95 < (rate / wanted)[wanted > 0.5].mean() < 0.99  # 3 % of the times of day fall outside of the day
    assert 11.9 < good["event_time"].dt.hour.mean() + 0.5 < 12.1


def test_each_fraud_is_what_it_is_said_to_be(world, whole):
    at, on = covered(whole, world.compromised, "terminal_id"), covered(whole, world.leaked, "customer_id")
    scenario = whole["scenario"]
    assert ((scenario == 1) == (whole["amount"] > LARGE) & ~at & (scenario != 3)).all()
    assert ((scenario == 2) == at & (scenario != 3)).all()
    assert on[scenario == 3].all() and 0.28 < (scenario[on] == 3).mean() < 0.39
    times = (whole["amount"] / whole["mean_amount"])[scenario == 3]
    assert 4.5 < times.mean() < 5.5
    assert (whole["fraud"] == (scenario > 0)).all()


def test_compromises_are_spread_over_the_days(world):
    assert len(world.compromised) == 48 and len(world.leaked) == 72
    assert (world.compromised["until_day"] - world.compromised["from_day"] == COMPROMISED_DAYS).all()
    assert (world.leaked["until_day"] - world.leaked["from_day"] == LEAKED_DAYS).all()
    assert world.compromised["from_day"].max() >= 117


def test_drift_changes_what_comes_after_its_day_and_nothing_else(world, whole):
    drifted = simulate_cards(Cards(**TOWN, drift_day=60))
    before, after = whole["day"] < 60, whole["day"] >= 60
    old, new = world.transactions, drifted.transactions
    pd.testing.assert_frame_equal(old[before], new[before])
    pd.testing.assert_frame_equal(old.drop(columns=["amount", "fraud"]), new.drop(columns=["amount", "fraud"]))
    good = after & (drifted.truth["scenario"] == 0) & (whole["scenario"] == 0)
    ratio = new["amount"][good & (old["amount"] > 20)] / old["amount"]
    assert abs(ratio - DRIFT["amounts"]).max() < 0.002
    stolen = after & (drifted.truth["scenario"] == 3)
    times = (new["amount"] / whole["mean_amount"])[stolen].mean()
    assert 2.2 < times < 2.8  # 1.25 x 2


@pytest.mark.parametrize("setting", [{"terminals": 0}, {"leaked": -1}, {"label_delay": -0.5}, {"start": "2018"}])
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(FinureError, match=next(iter(setting))):
        Cards(**setting)


def test_a_world_without_payments_is_a_world():
    world = simulate_cards(Cards(customers=1, terminals=1, days=1, radius=0))
    assert len(world.transactions) == 0
