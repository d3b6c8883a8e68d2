"""A request that keeps an old version of a contract is read by the new one, or the difference is named"""

import datetime as dt
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import Contract, load, parse, to_plain
from finure.contracts.read import ApplicationReader, ViolationError
from finure.contracts.schema import example
from finure.contracts.versions import breaks

# What a client of version 1 of the transaction contract sends. It stays as it is when the contract changes.
VERSION_1 = (
    b'{"transaction_id": 17, "event_time": "2018-04-01T00:00:31Z", "customer_id": 596, "terminal_id": 3156,'
    b' "amount": 57.16}'
)


def changed(columns: dict, version: str = "2") -> Contract:
    "The transaction contract with some columns changed; None takes one out."
    plain = to_plain(load("card_transactions"))
    merged = {name: column for name, column in (plain["columns"] | columns).items() if column is not None}
    return parse(plain | {"version": version, "columns": merged})


def test_a_request_of_version_1_is_still_read():
    assert ApplicationReader(load("card_transactions")).read(VERSION_1) == {
        "transaction_id": 17, "event_time": dt.datetime(2018, 4, 1, 0, 0, 31, tzinfo=dt.UTC), "customer_id": 596,
        "terminal_id": 3156, "amount": 57.16,
    }  # fmt: skip


def test_time_and_id_may_be_left_to_the_service():
    record = json.loads(VERSION_1)
    del record["event_time"], record["transaction_id"]
    assert ApplicationReader(load("card_transactions")).read(json.dumps(record).encode()) == record


@pytest.mark.parametrize("name", ["fraud", "known_time", "scenario"])
def test_what_is_known_later_is_not_part_of_a_request(name):
    with pytest.raises(ViolationError) as error:
        ApplicationReader(load("card_transactions")).read(json.dumps(json.loads(VERSION_1) | {name: 1}).encode())
    assert [(v["field"], v["rule"]) for v in error.value.violations] == [(name, "not_asked")]


def test_an_optional_column_more_leaves_old_requests_alone():
    newer = changed({"channel": {"type": "category", "levels": ["chip", "online"], "role": "input", "null": "allowed"}})
    assert breaks(load("card_transactions"), newer) == []
    assert ApplicationReader(newer).read(VERSION_1)["amount"] == 57.16


AMOUNT = {"type": "number", "range": [0, 1_000_000], "role": "feature", "reason": "amount"}


@pytest.mark.parametrize(("columns", "says"), [
    ({"channel": {"type": "text", "role": "input"}}, "channel: is new and must be given"),
    ({"terminal_id": None}, "terminal_id: is no longer asked for"),
    ({"terminal_id": {"type": "integer", "role": "ignore"}}, "terminal_id: is no longer asked for"),
    ({"terminal_id": {"type": "text", "role": "input"}}, "terminal_id: was integer and is text"),
    ({"amount": AMOUNT | {"range": [0.01, 1_000_000]}}, "amount: has a narrower range"),
    ({"amount": AMOUNT | {"range": [0, 5_000]}}, "amount: has a narrower range"),
    ({"amount": AMOUNT | {"type": "integer"}}, "amount: was number and is integer"),
    ({"event_time": {"type": "date", "role": "event_time"}}, "event_time: was time and is date"),
    ({"event_time": {"type": "time", "role": "event_time", "range": ["2020-01-01T00:00:00Z", None]}},
     "event_time: has a narrower range"),
])  # fmt: skip
def test_a_change_that_breaks_callers_is_named(columns, says):
    assert breaks(load("card_transactions"), changed(columns)) == [says]


COLUMNS = st.sampled_from([
    {"type": "integer", "range": [0, 10]}, {"type": "integer", "range": [2, 8], "special": {-1: "none"}},
    {"type": "number", "range": [0, 10], "null": "allowed"}, {"type": "number", "range": [None, 9]},
    {"type": "integer", "levels": [0, 5]}, {"type": "category", "levels": [0, 5, 9]}, {"type": "number"},
    {"type": "category", "levels": ["A", "B"], "null": "allowed"}, {"type": "category", "levels": ["A"]},
    {"type": "boolean"}, {"type": "text", "role": "input"}, {"type": "date", "role": "input"},
    {"type": "date", "role": "input", "range": ["2011-01-01", None]}, {"type": "time", "role": "input"}, None,
])  # fmt: skip
VALUES = [None, -1, 0, 2, 5, 8, 9, 9.5, 10, 11, "A", "B", True, "2010-01-01", "2011-06-01", "2011-01-01T00:00:00Z"]


@settings(max_examples=300, deadline=None)
@given(COLUMNS, COLUMNS)
def test_whatever_the_old_version_reads_the_new_one_reads_unless_it_is_named(old, new):
    def contract(column):
        part = {} if column is None else {"x": {"reason": "r"} | column}
        base = {"base": {"type": "boolean", "reason": "r"}}
        head = {"contract": "c", "version": "1", "title": "T", "reasons": {"r": {"category": "OTHER", "text": "O"}}}
        return parse({**head, "columns": base | part})

    older, newer = contract(old), contract(new)

    def reads(agreed, record):
        try:
            ApplicationReader(agreed).read(json.dumps(record).encode())
        except ViolationError:
            return False
        return True

    records = [{"base": True}, *({"base": True, "x": value} for value in VALUES), example(older)]
    if not breaks(older, newer):
        assert all(reads(newer, record) for record in records if reads(older, record))
    elif old is not None and new is not None and old.get("range") is None is new.get("range"):
        assert breaks(older, newer)[0].startswith("x: ")
