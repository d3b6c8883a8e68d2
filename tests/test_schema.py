"""The struct, the list of violations and the JSON schema of a contract agree on what an application may hold"""

import datetime as dt
import json
import subprocess
import sys

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import contracts_folder, load, parse
from finure.contracts.read import ApplicationReader, MalformedError, ViolationError, broken_rule, violations
from finure.contracts.schema import LARGEST, LONGEST, asked, example, json_schema, request_struct
from finure.core import FinureError

COLUMNS = {
    "ref": {"type": "text", "role": "id"},
    "applied": {"type": "date", "role": "event_time", "range": ["2007-01-01", "2011-12-31"]},
    "amount": {
        "type": "integer",
        "range": [500, 50000],
        "reason": "r",
        "unit": "USD",
        "description": "Amount applied for.",
    },
    "PAY 0": {"type": "integer", "range": [0, 8], "special": {-9: "no record", 96: "unknown"}, "reason": "r"},
    "class": {"type": "number", "range": [0.5, 9.25], "special": {-1: "none"}, "null": "allowed", "reason": "r"},
    "inside": {"type": "number", "range": [0, 100], "special": {98: "refused"}, "reason": "r"},
    "open": {"type": "number", "null": "allowed", "reason": "r"},
    "low_only": {"type": "integer", "range": [1, None], "null": "allowed", "reason": "r"},
    "home": {"type": "category", "levels": ["OWN", "RENT"], "reason": "r"},
    "code": {"type": "category", "levels": [1, 2, 3], "null": "allowed", "reason": "r"},
    "mixed": {"type": "integer", "levels": [0, 1], "special": {-8: "no"}, "null": "allowed", "reason": "r"},
    "flag": {"type": "boolean", "null": "allowed", "reason": "r"},
    "since": {"type": "date", "role": "input", "null": "allowed"},
    "seen": {"type": "time", "role": "input", "null": "allowed"},
    "at": {"type": "time", "role": "input", "range": ["2007-01-01T00:00:00Z", "2011-12-31T23:59:59Z"]},
    "story": {"type": "text", "role": "input", "null": "allowed"},
    "sex": {"type": "category", "levels": ["F", "M"], "role": "protected"},
    "grade": {"type": "category", "levels": ["A", "B"], "role": "lender"},
    "paid": {"type": "number", "role": "outcome"},
    "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
}
CONTRACT = parse({
    "contract": "test", "version": "1", "title": "Test", "reasons": {"r": {"category": "OTHER", "text": "Other"}},
    "columns": COLUMNS, "features": {"ratio": {"op": "ratio", "of": ["amount", "inside"], "reason": "r"}},
})  # fmt: skip
READER = ApplicationReader(CONTRACT)
VALIDATOR = jsonschema.Draft202012Validator(
    json_schema(CONTRACT), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
)

EDGES = [
    None, True, False, 0, 1, 2, 3, 8, 9, -1, -1.0, -9, -9.0, -8, 96, 96.5, 98, 499, 500, 500.0, 500.5, 50000, 50001,
    0.5, 0.49, 9.25, 9.26, -0.0, 1.0, 2.0, 1e300, -1e300, 10**40, LARGEST, LARGEST + 1, float(LARGEST),
    "OWN", "own", "RENT", "1", "", "A", "é" * LONGEST, "x" * (LONGEST + 1), "a: b", "\x00",
    "2007-01-01", "2006-12-31", "2011-12-31", "2012-01-01", "2011-02-29", "20110101", "2011-W01-1", "0000-01-01",
    "2011-01-01T00:00:00", "2011-01-01T00:00:00Z", "2011-01-01T00:00:00.5Z", "2011-12-31T23:59:59.000001Z",
    "2006-12-31T23:59:59Z", "2011-02-29T00:00:00Z", "2011-01-01T24:00:00Z", "2011-01-01T00:00:60Z", "2011-01-01T00:00Z",
    "2011-01-01T00:00:00z", "2011-01-01 00:00:00Z", "2011-01-01T00:00:00+00:00", "2011-01-01T00:00:00.1234567Z",
    "0000-01-01T00:00:00Z", [], {}, [1], {"a": 1},
]  # fmt: skip
VALUES = st.one_of(st.sampled_from(EDGES), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
NAMES = st.sampled_from([*COLUMNS, "ratio", "unknown", "Amount", ""])


def good(**changes) -> dict:
    "A valid application with some fields changed."
    return example(CONTRACT) | changes


def read(record: dict) -> dict:
    "What the reader makes of a record."
    return READER.read(json.dumps(record).encode())


def in_schema(record: dict) -> bool:
    "Whether the JSON schema allows a record; date ranges have no keyword in it."
    applied, at = record.get("applied"), record.get("at")
    late = isinstance(applied, str) and not "2007-01-01" <= applied <= "2011-12-31"
    late |= isinstance(at, str) and not "2007-01-01T00:00:00" <= at <= "2011-12-31T23:59:59Z"
    return VALIDATOR.is_valid(record) and not late


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.sets(st.sampled_from(list(asked(CONTRACT))), max_size=2))
def test_decoder_violations_and_schema_agree(changes, dropped):
    record = {k: v for k, v in good(**changes).items() if k not in dropped}
    found = violations(record, CONTRACT)
    assert in_schema(record) == (not found)
    if found:
        with pytest.raises(ViolationError) as error:
            read(record)
        assert error.value.violations == found
    else:
        assert read(record) == READER.read_slowly(json.dumps(record).encode())


@pytest.mark.parametrize("column", asked(CONTRACT))
def test_every_edge_in_every_column(column):
    validator = VALIDATOR.evolve(schema=VALIDATOR.schema["properties"][column])
    for value in EDGES:
        rule = broken_rule(value, CONTRACT.columns[column])
        dated = column in ("applied", "at") and isinstance(value, str) and rule == "range"  # no keyword for such ranges
        assert validator.is_valid(value) == (rule is None or dated), value


def test_struct_alone_refuses_what_it_can():
    decode = msgspec.json.Decoder(request_struct(CONTRACT)).decode
    for bad in (
        good(amount=499),
        good(home="BOAT"),
        good(story="x" * (LONGEST + 1)),
        good(sex="F"),
        good(amount="500"),
    ):
        with pytest.raises(msgspec.ValidationError):
            decode(json.dumps(bad).encode())


def test_all_violations_at_once():
    record = {
        "amount": 1,
        "PAY 0": -8,
        "home": None,
        "sex": "F",
        "grade": "A",
        "paid": 1,
        "bad": 0,
        "ratio": 1,
        "x": [1],
    }
    found = {v["field"]: v for v in violations(record, CONTRACT)}
    assert [(f, v["rule"]) for f, v in found.items()] == [
        ("amount", "range"), ("PAY 0", "range"), ("inside", "required"), ("home", "null"), ("at", "required"),
        ("sex", "not_asked"), ("grade", "not_asked"), ("paid", "not_asked"), ("bad", "not_asked"),
        ("ratio", "not_asked"), ("x", "unknown"),
    ]  # fmt: skip
    assert found["PAY 0"] == {
        "field": "PAY 0", "given": "a whole number", "rule": "range",
        "allowed": "a whole number from 0 to 8, or -9 (no record), or 96 (unknown)",
    }  # fmt: skip
    assert "protected" in found["sex"]["allowed"] and "F" not in found["sex"]["allowed"]


def test_columns_never_asked_for_are_nowhere_in_the_schema():
    text = json.dumps(json_schema(CONTRACT))
    assert not any(f'"{name}"' in text for name in ("sex", "grade", "paid", "bad", "ratio"))


def test_a_time_is_read_as_a_moment_on_the_fast_path():
    body = json.dumps(good(at="2011-01-01T10:20:30Z", seen="2011-01-01T10:20:30.250Z")).encode()
    slow, READER.read_slowly = READER.read_slowly, None
    try:
        got = READER.read(body)
    finally:
        READER.read_slowly = slow
    assert got["at"] == dt.datetime(2011, 1, 1, 10, 20, 30, tzinfo=dt.UTC)
    assert got["seen"].microsecond == 250_000
    assert msgspec.json.encode(got["at"]) == b'"2011-01-01T10:20:30Z"'
    twice = body[:-1] + b', "at": "2011-01-01T10:20:30Z"}'
    with pytest.raises(MalformedError, match="more than once"):
        READER.read(twice)


def test_times_are_written_in_one_way_in_a_contract():
    plain = {"contract": "t", "version": "1", "title": "T", "reasons": {"r": {"category": "OTHER", "text": "Other"}}}
    amount = {"type": "number", "reason": "r"}

    def contract(**column):
        return parse({**plain, "columns": {"amount": amount, "at": {"type": "time", "role": "event_time", **column}}})

    bound = dt.datetime(2011, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))  # as YAML gives a time without quotes
    assert contract(range=[bound, None]).columns["at"].range == ("2011-01-01T00:00:00Z", None)
    for wrong in ("2011-01-01", "2011-01-01T00:00:00", "2011-01-01T00:00:00.5Z", 5):
        with pytest.raises(FinureError, match="times like"):
            contract(range=[wrong, None])
    with pytest.raises(FinureError, match="a time cannot be a feature"):
        contract(role="feature", reason="r")


def test_values_come_back_typed():
    got = read(good(amount=5e3, code=2.0, since="2001-02-03", open=3))
    assert (
        got["amount"] == 5000 and type(got["amount"]) is int and type(got["code"]) is int and type(got["open"]) is float
    )
    assert got["since"] == dt.date(2001, 2, 3)


def test_absent_and_null():
    required = {name: value for name, value in good().items() if name in json_schema(CONTRACT)["required"]}
    assert read(required) == required | {"at": dt.datetime.fromisoformat(required["at"])}
    assert read(required | {"ref": None, "applied": None, "story": None})["story"] is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated"), (b"{", "truncated"), (b"{}x", "malformed"), (b'{"amount": NaN}', "malformed"),
        (b'{"amount": Infinity}', "malformed"), (b'{"home": "\xff"}', "UTF-8"), (b'{"home": "\\ud800"}', "truncated"),
        (b"[" * 100_000, "nested"), (b'{"x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "nested"),
        ("{}".encode("utf-16"), "malformed"), (b"\xef\xbb\xbf{}", "malformed"),
    ],
)  # fmt: skip
def test_malformed(body, says):
    with pytest.raises(MalformedError, match=says):
        READER.read(body)


@pytest.mark.parametrize("first", ["5000", "null", '"5000"'])
def test_a_field_given_twice_is_refused(first):
    text = json.dumps(good())[1:]
    with pytest.raises(MalformedError, match='"amount" is given more than once'):
        READER.read(f'{{"amount": {first}, {text}'.encode())
    optional = json.dumps({k: v for k, v in good().items() if k != "open"})[:-1]
    with pytest.raises(MalformedError, match='"open"'):
        READER.read((optional + ', "open": 1, "open": 1}').encode())
    assert READER.read(json.dumps(good(story='no: "open": 1, twice')).encode())["story"].startswith("no:")


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 400, "-" + "9" * 5000, "1e39"])
def test_numbers_beyond_all_limits_break_the_contract(number):
    body = json.dumps(good(amount="@", open="@")).replace('"@"', number).encode()
    with pytest.raises(ViolationError) as error:
        READER.read(body)
    assert [v["rule"] for v in error.value.violations] == ["range", "range"]
    assert all(len(v["given"]) <= 60 for v in error.value.violations)


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_not_an_object(body):
    with pytest.raises(ViolationError) as error:
        READER.read(body)
    assert error.value.violations[0]["rule"] == "type"


@pytest.mark.parametrize("path", sorted(contracts_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_the_example_of_every_contract_is_valid(path):
    contract = load(path)
    application = example(contract)
    assert violations(application, contract) == []
    assert ApplicationReader(contract).read(json.dumps(application).encode())
    jsonschema.Draft202012Validator(json_schema(contract)).validate(application)


def test_nothing_heavy_is_imported():
    code = "import finure.contracts.read, sys; print([m for m in ('pandas', 'sklearn', 'bentoml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
