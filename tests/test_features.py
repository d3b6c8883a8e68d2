"""The batch and the online driver of every feature give the same number, whatever arrives"""

import datetime as dt
import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import contracts_folder, load, parse
from finure.core import FinureError
from finure.features import OPERATIONS, TEXT_OPERATIONS, FeatureSet, TreeColumns, read_text

REASONS = {"r": {"category": "OTHER", "text": "An example"}}
NUMBERS = ("a", "b", "coded", "whole", "flag", "kind", "level")
COLUMNS = {
    "on": {"type": "date", "role": "event_time"},
    "since": {"type": "date", "role": "input", "null": "allowed"},
    "a": {"type": "number", "reason": "r", "null": "allowed"},
    "b": {"type": "number", "role": "input", "null": "allowed"},
    "coded": {
        "type": "number",
        "reason": "r",
        "null": "allowed",
        "risk": -1,
        "special": {-9: "none", 96.5: "refused", 0: "x"},
    },
    "whole": {"type": "integer", "reason": "r", "null": "allowed", "special": {-1: "none"}},
    "flag": {"type": "boolean", "reason": "r", "null": "allowed"},
    "kind": {"type": "category", "levels": ["RENT", "OWN", "NA"], "reason": "r", "null": "allowed"},
    "level": {"type": "category", "levels": [3, 1, 2], "reason": "r", "null": "allowed"},
    "note": {"type": "text", "role": "input", "null": "allowed", "strip": "^added on [0-9/]+ >"},
    "sex": {"type": "category", "levels": ["F", "M"], "role": "protected"},
    "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
}


def make(features, columns=COLUMNS):
    "A contract with these derived features."
    plain = {"contract": "c", "version": "1", "title": "t", "reasons": REASONS, "columns": columns}
    return parse(plain | {"features": {name: {"reason": "r"} | part for name, part in features.items()}})


@st.composite
def contracts(draw):
    "A contract with up to eight features, later ones built on earlier ones, too."
    features, sources = {}, [*NUMBERS]
    for i in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from([*OPERATIONS, *TEXT_OPERATIONS]))
        if op in TEXT_OPERATIONS:
            of, extra = ["note"], {"words": draw(st.lists(st.sampled_from(["card", "cards", "my"]), max_size=3))}
        else:
            n = OPERATIONS[op].inputs or draw(st.integers(1, 5))
            of, extra = draw(st.lists(st.sampled_from(sources), min_size=n, max_size=n)), {}
            of = ["on", "since"] if op == "months_between" else of
        role = draw(st.sampled_from(["feature", "input"]))
        features[f"f{i}"] = {"op": op, "of": of, "role": role, "times": draw(st.sampled_from([1, 100, -0.1]))} | extra
        sources.append(f"f{i}")
    return make(features)


AMOUNTS = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, -9.0, 96.5, 0.1, 1e300, -1e300, 5e-324]), st.floats(-1e6, 1e6)
)
DAYS = st.dates(dt.date(1900, 1, 1), dt.date(2200, 1, 1))
ROWS = st.fixed_dictionaries(
    {
        "on": DAYS,
        "since": st.none() | DAYS,
        "a": AMOUNTS,
        "b": AMOUNTS,
        "coded": AMOUNTS,
        "whole": st.none() | st.integers(-2, 5),
        "flag": st.none() | st.booleans(),
        "kind": st.sampled_from([None, "RENT", "OWN", "NA"]),
        "level": st.sampled_from([None, 1, 2, 3]),
        "note": st.none()
        | st.text(max_size=12)
        | st.sampled_from(["", "added on 1/1/11 > Pay my CARDS<br/>", "it's <b>my</b> card"]),
    }
)


def frame_of(rows):
    "Rows as a clean frame: numbers float64, dates datetime64, the rest objects."
    frame = pd.DataFrame(rows, dtype=object)
    dates = dict.fromkeys(("on", "since"), "datetime64[ns]")
    return frame.astype(dates | dict.fromkeys(("a", "b", "coded", "whole", "flag"), "float64"))


@settings(max_examples=100, deadline=None)
@given(contracts(), st.lists(ROWS, min_size=1, max_size=6))
def test_batch_equals_online(contract, rows):
    features, trees = FeatureSet(contract), TreeColumns(contract)
    with np.errstate(all="ignore"):
        batch = features.batch(frame_of(rows))
        tree_batch = trees.batch(batch)
    assert batch.shape == (len(rows), len(features.names))
    assert tree_batch.shape[1] == len(trees.names) == len(trees.source) == len(trees.monotone)
    assert not np.isinf(tree_batch).any()
    for row, expected, tree_expected in zip(rows, batch, tree_batch, strict=True):
        online = features.online(row)
        np.testing.assert_array_equal(np.array(online, dtype=np.float64), expected)
        np.testing.assert_array_equal(np.float32(trees.online(online)), tree_expected)
        absent = {name: value for name, value in row.items() if value is not None}
        np.testing.assert_array_equal(features.online(absent), online)


@settings(max_examples=50, deadline=None)
@given(contracts(), st.lists(ROWS, min_size=1, max_size=4), st.data())
def test_a_feature_that_is_not_used_is_missing_and_changes_no_other(contract, rows, data):
    every = FeatureSet(contract)
    some = FeatureSet(contract, data.draw(st.lists(st.sampled_from(every.names), unique=True)))
    used = np.isin(every.names, some.used)
    with np.errstate(all="ignore"):
        batch = some.batch(frame_of(rows)[list(some.sources)] if some.sources else frame_of(rows))
    for row, found in zip(rows, batch, strict=True):
        np.testing.assert_array_equal(found, np.where(used, every.online(row), np.nan))
        np.testing.assert_array_equal(some.online({name: row[name] for name in some.sources}), found)


def test_a_contract_puts_no_text_of_its_own_into_the_compiled_driver():
    evil = "evil'); print('evil') #"
    columns = COLUMNS | {evil: {"type": "category", "levels": [evil, "b"], "reason": "r"}}
    part = {"op": "text_mentions", "of": ["note"], "words": [evil], "times": 1e300}
    features = FeatureSet(make({evil + "2": part, "e": {"op": "total", "of": [evil, "a"]}}, columns))
    assert not {"evil", "print", "1e"} & set(re.findall("[a-z0-9]+", features.source))
    assert features.online(ROW | {evil: "b"})[-1] == 7.0


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=[])) | st.text("aZ9' \n<>br/é\u0130\ud800", max_size=40))
def test_words_are_runs_of_letters_digits_and_apostrophes(text):
    read = read_text(text)
    assert read.words == re.findall("[a-z0-9']+", re.sub("<[^>]*>", " ", text).strip().lower())
    assert read.lower == read.clean.lower()


@pytest.mark.parametrize("path", sorted(contracts_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_own_contracts_make_feature_sets(path):
    features = FeatureSet(load(path))
    assert features.names == list(features.contract.model_features())
    empty = {
        name: pd.Series(dtype=object if c.type in ("text", "category") else float)
        for name, c in features.sources.items()
    }
    empty |= {name: pd.Series(dtype="datetime64[ns]") for name, c in features.sources.items() if c.type == "date"}
    assert features.batch(pd.DataFrame(empty)).shape == (0, len(features.names))


NAN = math.nan
ROW = {
    "on": dt.date(2024, 5, 1),
    "since": dt.date(2020, 5, 1),
    "a": 6.0,
    "b": 0.0,
    "coded": -9.0,
    "whole": 4,
    "flag": True,
    "kind": "OWN",
    "level": 1,
    "note": None,
}
KNOWN = {
    ("ratio", "a", "whole"): 1.5,
    ("ratio", "a", "b"): NAN,
    ("ratio", "a", "coded"): NAN,
    ("ratio", "b", "a"): 0.0,
    ("difference", "a", "whole"): 2.0,
    ("product", "a", "whole"): 24.0,
    ("product", "a", "coded"): NAN,
    ("months_between", "on", "since"): 1461 / (365.25 / 12),
    ("months_between", "since", "on"): -48.0,
    ("total", "a", "coded", "whole"): 10.0,
    ("total", "coded"): NAN,
    ("mean", "a", "coded", "whole"): 5.0,
    ("mean", "coded"): NAN,
    ("highest", "a", "coded", "whole"): 6.0,
    ("lowest", "a", "coded", "b"): 0.0,
    ("highest", "coded"): NAN,
    ("positives", "a", "b", "coded", "whole", "flag"): 3.0,
    ("positives", "coded"): 0.0,
    ("total", "flag", "kind", "level"): 3.0,
}


@pytest.mark.parametrize("call", KNOWN, ids="-".join)
def test_known_answers_of_operations(call):
    features = FeatureSet(make({"f": {"op": call[0], "of": call[1:]}}))
    np.testing.assert_array_equal(features.online(ROW)[-1], KNOWN[call])
    np.testing.assert_array_equal(features.batch(frame_of([ROW]))[0, -1], KNOWN[call])


def test_sums_are_plain_on_every_python():
    values = [1e16, 1.0, -1e16, 1.0]
    assert OPERATIONS["total"].online(*values) == OPERATIONS["total"].batch(*map(np.atleast_1d, values))[0] == 1.0
    assert OPERATIONS["mean"].online(*values) == 0.25


TEXTS = {
    "Pay off <br/>my CARDS, my card!": (1, 6, 19, 0, 2),
    "all small": (1, 2, 8, 1, 0),
    "": (0, 0, 0, 0, 0),
    "...": (0, 0, 0, 0, 0),
    "added on 1/1/11 > cards": (1, 1, 5, 1, 1),
    "<b></b>": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("text", TEXTS)
def test_known_answers_of_text_operations(text):
    parts = {op: {"op": op, "of": ["note"], "words": ["card", "cards"]} for op in TEXT_OPERATIONS}
    features = FeatureSet(make(parts))
    assert tuple(features.online(ROW | {"note": text})[-5:]) == TEXTS[text]
    assert read_text(text).words == [word.lower() for word in read_text(text).words]


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"op": "guess", "of": ["a"]}, "there is no operation `guess`. Known: ratio"),
        ({"op": "ratio", "of": ["a"]}, r"`ratio` takes 2 number\(s\), got a"),
        ({"op": "total", "of": ["a", "note"]}, r"`total` takes one or more number\(s\), got a, note"),
        ({"op": "text_words", "of": ["a"]}, "`text_words` takes one text column, got a"),
        ({"op": "text_words", "of": ["note", "note"]}, "`text_words` takes one text column"),
    ],
)
def test_an_operation_that_does_not_fit_is_named(part, why):
    with pytest.raises(FinureError, match=f"features.f: {why}"):
        FeatureSet(make({"f": part}))


@pytest.mark.parametrize("source", ["sex", "bad"])
def test_a_prohibited_or_later_column_never_comes_in(source):
    with pytest.raises(FinureError, match="known at application only"):
        make({"f": {"op": "total", "of": [source]}})
    features = FeatureSet(make({}))
    assert source not in features.sources
    assert features.online(ROW) == features.online(ROW | {"sex": "F", "bad": 1})


def test_codes_stand_apart_for_trees():
    contract = make({"f": {"op": "total", "of": ["coded"]}})
    features, trees = FeatureSet(contract), TreeColumns(contract)
    row = dict(zip(trees.names, trees.online(features.online(ROW)), strict=True))
    assert math.isnan(row["coded"])
    assert (row["coded__code"], row["whole"], row["whole__code"]) == (1, 4, 0)
    assert [features.names[i] for i in trees.source[-2:]] == ["coded", "whole"]
    assert dict(zip(trees.names, trees.monotone, strict=True))["coded"] == -1
    assert trees.monotone[-2:] == [0, 0]
    batch = features.batch(frame_of([ROW]))
    before = batch.copy()
    trees.batch(batch)
    np.testing.assert_array_equal(batch, before)


def test_the_online_driver_needs_no_pandas():
    code = "import sys, finure.features; print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
