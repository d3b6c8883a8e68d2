"""Transactions of whatever origin come out under the contract's names, in the order of time"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finure.contracts.check import check
from finure.contracts.contract import load
from finure.core import Settings
from finure.fraud.data import HANDBOOK, NAMES, SIMULATED_CARDS, as_arrays, load_table, plain_names, simulated_table
from finure.simulate.cards import Cards

CONTRACT = load("card_transactions")
SMALL = Cards(customers=100, terminals=200, days=40, compromised=0.3, leaked=0.3, radius=15)
FILE = Path(os.environ.get("FINURE_DATA", ""), "fraud_handbook_transactions.parquet")


def handbook_like(table):
    "A table with the handbook's names."
    back = {plain: name for name, plain in NAMES.items()}
    return table.drop(columns="known_time").rename(columns=back).assign(TX_TIME_SECONDS=0, TX_TIME_DAYS=0)


def test_no_simulated_row_breaks_the_contract():
    table = simulated_table(SMALL)
    checked = check(table, CONTRACT)
    assert len(checked.rejects) == 0 and len(checked.clean) == len(table) > 3_000
    assert list(table) == list(CONTRACT.columns)


def test_the_handbooks_names_become_ours_with_a_week_of_delay(tmp_path):
    table = simulated_table(SMALL)
    handbook_like(table).sample(frac=1, random_state=0).to_parquet(tmp_path / "h.parquet")
    clean = load_table(str(tmp_path / "h.parquet"), CONTRACT).clean
    pd.testing.assert_frame_equal(clean, check(table, CONTRACT).clean)
    assert (plain_names(handbook_like(table))["known_time"] - table["event_time"] == pd.Timedelta(days=7)).all()


def test_the_simulated_cards_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr("finure.fraud.data.FIFTH", SMALL)
    monkeypatch.setattr("finure.fraud.data.simulated_table", lambda: simulated_table(SMALL))
    settings = Settings(home=tmp_path)
    first = load_table(SIMULATED_CARDS, CONTRACT, settings).clean
    written = (tmp_path / "data" / "simulated_cards.parquet").stat().st_mtime_ns
    again = load_table(SIMULATED_CARDS, CONTRACT, settings).clean
    pd.testing.assert_frame_equal(first, again)
    assert (tmp_path / "data" / "simulated_cards.parquet").stat().st_mtime_ns == written


def test_arrays_hold_what_the_table_holds():
    table = simulated_table(SMALL)
    arrays = as_arrays(check(table, CONTRACT).clean)
    assert arrays.event_time.dtype == "datetime64[s]" and arrays.customer_id.dtype == np.int64
    assert (arrays.amount == table["amount"]).all() and (arrays.scenario == table["scenario"]).all()
    assert arrays.day[0] == (pd.Timestamp("2018-04-01") - pd.Timestamp("1970-01-01")).days
    assert (as_arrays(check(table.drop(columns="scenario"), CONTRACT).clean).scenario == -1).all()


def test_bad_rows_are_rejected_with_their_reason(tmp_path):
    table = simulated_table(SMALL).head(5).astype({"amount": object, "event_time": str})
    table.loc[1, "amount"], table.loc[2, "event_time"], table.loc[3, "transaction_id"] = -1, "yesterday", 0
    table.to_csv(tmp_path / "t.csv", index=False)
    checked = load_table(str(tmp_path / "t.csv"), CONTRACT)
    assert checked.clean["transaction_id"].tolist() == [4]
    assert checked.rejects["reject_reason"].str.split(":").str[0].tolist() == [
        *["transaction_id", "amount", "event_time", "transaction_id"]
    ]


@pytest.mark.skipif(not FILE.is_file(), reason="needs the handbook's transactions (FINURE_DATA)")
def test_the_handbooks_table_is_the_published_one(tmp_path):
    checked = load_table(HANDBOOK, CONTRACT, Settings(home=tmp_path))
    clean = checked.clean
    assert len(checked.rejects) == 0 and (len(clean), int(clean["fraud"].sum())) == (1_754_155, 14_681)
    part = clean[clean["event_time"].between("2018-06-11", "2018-09-15", inclusive="left")]
    assert (len(part), int(part["fraud"].sum())) == (919_767, 8_195)
