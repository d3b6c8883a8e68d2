"""What contradicts itself is refused, and every row of a stranger's file ends clean or rejected with a reason"""

import gzip
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from finure.contracts.check import check, good_bad, write_checked
from finure.contracts.contract import CATEGORIES, allowed, contracts_folder, dictionary, load, parse, to_plain
from finure.contracts.draft import draft, draft_file, special_codes, to_yaml, words
from finure.contracts.files import read_table
from finure.core import FinureError

REASONS = {"r": {"category": "OTHER", "text": "An example"}}
NUMBER = {"type": "number", "reason": "r"}
TARGET = {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1}
N = 400


def contract(columns=None, features=None, **other):
    "A contract with one number, and whatever else is asked for."
    plain = {"contract": "c", "version": "1", "title": "t", "reasons": REASONS, "features": features or {}}
    return parse(plain | {"columns": {"x": NUMBER} | (columns or {})} | other)


# The contract of a table


@pytest.mark.parametrize("path", sorted(contracts_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_own_contracts_survive_writing(path, tmp_path):
    ours = load(path)
    assert not ours.questions()
    assert parse(to_plain(ours)) == ours
    (tmp_path / "again.yaml").write_text(to_yaml(ours), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == ours
    assert load(path.stem) == ours
    assert [row["name"] for row in dictionary(ours)] == [*ours.columns, *ours.features]


FAULTS = {
    "a category needs `levels`": {"type": "category", "reason": "r"},
    "holds a level twice": {"type": "category", "levels": ["a", "a"], "reason": "r"},
    "all words or all whole numbers": {"type": "category", "levels": [0, 1, "X"], "reason": "r"},
    "a date has no `levels`": {"type": "date", "role": "input", "levels": ["2011-01-01"]},
    "the levels of an integer are whole numbers": {"type": "integer", "levels": ["a"], "reason": "r"},
    "needs levels in an order": {"type": "category", "levels": ["a", "b"], "risk": 1, "reason": "r"},
    "the target needs `bad`": {"type": "integer", "levels": [0, 1], "role": "target"},
    "`bad` is 2": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 2},
    "a text cannot be a feature": {"type": "text", "reason": "r"},
    "a feature needs a `reason`": {"type": "number"},
    "`mood` is not among": {"type": "number", "reason": "mood"},
    "`special` codes belong to numbers": {"type": "text", "role": "input", "special": {-9: "none"}},
    "a missing value is `null: allowed`": NUMBER | {"special": {float("nan"): "none"}},
    "belongs to numbers, dates and times": {"type": "text", "role": "input", "range": [0, 1]},
    "`range` must be dates": {"type": "date", "role": "input", "range": [0, 1]},
    "dates like 2011-12-31": {"type": "date", "role": "input", "range": ["soon", None]},
    "`range` must be numbers": NUMBER | {"range": ["0", "9"]},
    "`range` must be [low, high]": NUMBER | {"range": [5, 1]},
    "must be a regular expression": {"type": "text", "role": "input", "strip": "("},
    "the event_time must be a date": {"type": "number", "role": "event_time"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_column_that_contradicts_itself_is_named(fault):
    with pytest.raises(FinureError) as error:
        contract({"wrong": FAULTS[fault]})
    assert "columns.wrong: " in str(error.value)
    assert fault in str(error.value)


@pytest.mark.parametrize("role", ["target", "protected", "lender", "outcome", "id", "known_time", "ignore"])
def test_no_feature_from_what_is_not_known_or_not_allowed(role):
    date = {"type": "date"} if role == "known_time" else {"type": "integer", "bad": 1}
    with pytest.raises(FinureError, match=f"`late` is {role}"):
        contract({"late": date | {"role": role}}, {"leak": {"op": "total", "of": ["late"], "reason": "r"}})


@pytest.mark.parametrize("source", ["later", "itself", "nowhere"])
def test_a_feature_uses_columns_and_earlier_features_only(source):
    part = {"op": "total", "of": ["x"], "reason": "r"}
    with pytest.raises(FinureError, match=f"`{source}` is neither a column nor a feature derived before"):
        contract(features={"itself": part | {"of": [source]}, "later": part})


def test_all_faults_are_told_at_once():
    with pytest.raises(FinureError) as error:
        contract({"a": {"type": "text"}, "b": {"type": "category"}}, {"x": {"op": "total", "of": [], "reason": "no"}})
    for text in ("columns.a", "columns.b", "features.x: `of` names no column", "a column has this name", "`no` is not"):
        assert text in str(error.value)


def test_two_targets_and_no_features_are_refused():
    with pytest.raises(FinureError, match="bad, worse all have the role target"):
        contract({"bad": TARGET, "worse": TARGET})
    with pytest.raises(FinureError, match="no column has the role `feature`"):
        parse({"contract": "c", "version": "1", "title": "t", "columns": {"bad": TARGET}})
    with pytest.raises(FinureError, match="category `MOOD` is not one of"):
        contract(reasons=REASONS | {"mood": {"category": "MOOD", "text": "x"}})
    assert "OTHER" in CATEGORIES


@pytest.mark.parametrize("content", [None, [1], "text", {}, {"columns": None}, {"columns": {"x": 1}}])
def test_not_a_contract_at_all(content):
    with pytest.raises(FinureError, match="contract"):
        parse(content)


def test_unknown_keys_and_names_are_named(tmp_path):
    with pytest.raises(FinureError, match=r"columns.x: .*rnage"):
        contract({"x": NUMBER | {"rnage": [0, 1]}})
    with pytest.raises(FinureError, match="put them in quotes"):
        contract({True: NUMBER})
    with pytest.raises(FinureError, match="No contract `nosuch`. Known: .*german"):
        load("nosuch")
    (tmp_path / "twice.yaml").write_text("contract: c\ncolumns:\n  a: {type: number}\n  a: {type: text}\n")
    with pytest.raises(FinureError, match="line 4.*`a` is given twice"):
        load(tmp_path / "twice.yaml")


def test_yaml_dates_and_the_word_null_mean_what_they_say(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "contract: c\nversion: '1'\ntitle: t\nreasons: {r: {category: OTHER, text: t}}\ncolumns:\n"
        "  'on': {type: date, role: input, range: [2011-01-01, 2011-12-31], null: allowed}\n"
        "  x: {type: number, reason: r}\n"
    )
    on = load(tmp_path / "c.yaml").columns["on"]
    assert (on.range, on.null) == (("2011-01-01", "2011-12-31"), "allowed")
    assert allowed(on) == "a date (YYYY-MM-DD) from 2011-01-01 to 2011-12-31"


def test_the_contract_needs_no_pandas():
    code = "import sys, finure.contracts.contract as c; c.load('german'); print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Reading files


def write(path, text, encoding="utf-8"):
    "A file with this content."
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


LABELS = ["0", "1"] * (N // 2)


def column(values):
    "A CSV with one column and a target."
    return "x,bad\n" + "".join(f"{value},{label}\n" for value, label in zip(values, LABELS, strict=True))


BROKEN_GZ = bytearray(gzip.compress(column(range(N)).encode(), mtime=0))
BROKEN_GZ[40:60] = b"x" * 20


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "empty.csv": b"",
        "blank.csv": b"\n\n\n",
        "random.csv": np.random.default_rng(0).bytes(5000),
        "quote.csv": b'x,bad\n"unclosed,1\n1,0\n',
        "ragged.csv": b"x,bad\n1,0\n1,2,3,4\n",
        "wide.csv": b"x,bad\n9,1,0\n",
        "cut.csv.gz": gzip.compress(column(range(N)).encode(), mtime=0)[:100],
        "broken.csv.gz": bytes(BROKEN_GZ),
        "not.zip": b"PK\x03\x04garbage",
        "not.csv.xz": b"garbage",
        "not.csv.bz2": b"garbage",
        "not.parquet": b"garbage",
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unreadable_file_is_named(name, content, tmp_path):
    with pytest.raises(FinureError, match=name):
        read_table(write(tmp_path / name, content))


def test_a_picture_or_a_wrong_table_has_no_such_columns(tmp_path):
    path = write(tmp_path / "png.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(200))
    with pytest.raises(FinureError, match="no column `bad`"):
        draft_file(path, "bad", tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_delimiters_and_quotes(encoding, delimiter, tmp_path):
    rows = [["größe, in m; etwa", "name"], ["1,5", "Weiß; Müller|x"], ["2", 'say "hi"']]
    quoted = "\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    table = read_table(write(tmp_path / "t.csv", quoted, encoding))
    assert [list(table.columns), *table.to_numpy().tolist()] == rows


def test_packed_files_and_trailing_delimiters_are_read(tmp_path):
    assert len(read_table(write(tmp_path / "t.csv.gz", gzip.compress(b"a,b\n007,1\n")))) == 1
    table = read_table(write(tmp_path / "t.csv", "a,b\n007,1,\n008,2,\n"))
    assert table.to_dict("list") == {"a": ["007", "008"], "b": ["1", "2"]}


def test_a_file_without_a_header_in_contract_order(tmp_path):
    ours = contract({"bad": TARGET})
    path = write(tmp_path / "t.csv", "1.5,0\n2.5,1\nno,1\n")
    checked = check(read_table(path, list(ours.columns)), ours)
    assert checked.clean["x"].tolist() == [1.5, 2.5]
    assert checked.rejects["reject_reason"].tolist() == ["x: is not a number"]
    for text, found in (("1,1.5,0\n", 3), ("1.5\n", 1)):
        with pytest.raises(FinureError, match=f"{found} fields in the first line, 2 columns in the contract"):
            read_table(write(tmp_path / "t.csv", text), list(ours.columns))


# Checking


def test_absent_columns_fail_the_file_and_are_all_named():
    ours = contract({"i": {"type": "text", "role": "input"}, "bad": TARGET, "race": NUMBER | {"role": "protected"}})
    with pytest.raises(FinureError, match="2 column.* absent: i, bad") as error:
        check(pd.DataFrame({"x": [1]}), ours)
    assert "race" not in str(error.value)
    assert check(pd.DataFrame({"x": [1], "i": ["a"]}), ours, scoring=True).share() == 0


RULES = contract(
    {
        "id": {"type": "text", "role": "id"},
        "on": {"type": "date", "role": "event_time", "range": ["2007-01-01", "2011-12-31"]},
        "amount": {"type": "integer", "range": [0, 100], "special": {-9: "none"}, "reason": "r"},
        "code": {"type": "category", "levels": [1, 2], "reason": "r", "null": "allowed"},
        "flag": {"type": "boolean", "reason": "r"},
        "home": {"type": "category", "levels": ["RENT", "NA"], "reason": "r"},
        "dial": {"type": "integer", "levels": [0, 1], "special": {-8: "off"}, "reason": "r"},
        "bad": TARGET,
    }
)
GOOD = {
    "x": "1",
    "id": "a",
    "on": "2011-05",
    "amount": "3.0",
    "code": "1.0",
    "flag": "TRUE",
    "home": "NA",
    "dial": "-8",
    "bad": "0",
}


@pytest.mark.parametrize(
    "value", ["Infinity", "-inf", "1e999", "NaN", "?", "", "true", "1_0", "0x1F", "1,5", "٣x", "--1"]
)
def test_what_is_no_number_is_rejected(value):
    checked = check(pd.DataFrame([GOOD, GOOD | {"id": "b", "x": value}]), RULES)
    assert checked.rejects["reject_reason"].str.match("x: is (not a number|missing)").tolist() == [True]


BROKEN = [
    ("x", "", "x: is missing"),
    ("x", "abc", "x: is not a number"),
    ("on", "31.12.2011", "on: is not a date"),
    ("on", "2012-01-01", "on: is not a date (YYYY-MM-DD) from 2007-01-01 to 2011-12-31"),
    ("on", "9999-12-31", "on: "),
    ("amount", "3.5", "amount: is not a whole number from 0 to 100, or -9 (none)"),
    ("amount", "-8", "amount: is not"),
    ("amount", "101", "amount: is not"),
    ("code", "3", "code: is not one of 1, 2"),
    ("code", "inf", "code: is not one of"),
    ("code", "1.5", "code: is not one of"),
    ("flag", "Y", "flag: is not true or false"),
    ("home", "rent", "home: is not"),
    ("dial", "-9", "dial: is not one of 0, 1, or -8 (off)"),
    ("bad", "2", "bad: is not one of 0, 1"),
    ("bad", "?", "bad: is"),
]


@pytest.mark.parametrize(("name", "value", "reason"), BROKEN)
def test_each_broken_rule_is_told_by_column_and_rule(name, value, reason):
    checked = check(pd.DataFrame([GOOD, GOOD | {"id": "b", name: value}]), RULES)
    assert len(checked.clean) == 1
    assert checked.rejects["reject_reason"].iloc[0].startswith(reason)
    assert checked.violations[["column", "rows"]].to_numpy().tolist() == [[name, 1]]


def test_a_row_with_many_faults_tells_them_all_and_an_id_counts_once():
    rows = [GOOD, GOOD | {"amount": "x", "home": "TENT"}, GOOD | {"id": "b", " amount": "1"}]
    checked = check(pd.DataFrame(rows), RULES)
    assert [sorted(reason.split("; ")) for reason in checked.rejects["reject_reason"]] == [
        ["id: occurs more than once"],
        [
            "amount: is not a whole number from 0 to 100, or -9 (none)",
            "home: is not one of RENT, NA",
            "id: occurs more than once",
        ],
    ]
    assert checked.clean["home"].tolist() == ["NA"]


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_keep_their_columns(rows):
    checked = check(pd.DataFrame([GOOD]).head(rows), RULES)
    assert list(checked.clean) == list(RULES.columns)
    assert (len(checked.clean), checked.share()) == (rows, 0)


def test_moments_become_days_of_one_clock():
    frame = pd.DataFrame(
        [GOOD | {"id": "a", "on": "2011-05-01T23:30:00+00:00"}, GOOD | {"id": "b", "on": "2011-05-01"}]
    )
    assert check(frame, RULES).clean["on"].dt.strftime("%Y-%m-%d %H:%M").tolist() == [
        "2011-05-01 23:30",
        "2011-05-01 00:00",
    ]
    typed = frame.assign(on=np.array(["2011-05-01", "9999-01-01"], dtype="datetime64[us]"))
    assert check(typed, RULES).rejects["id"].tolist() == ["b"]


CELLS = st.one_of(
    st.sampled_from(
        ["", "NA", "?", "0", "1", "2", "-9", "1.0", "inf", "nan", "true", "RENT", "2011-01-01", "1e400", " 1 "]
    ),
    st.text(max_size=6),
    st.none(),
    st.integers(-10, 200),
    st.floats(),
    st.booleans(),
    st.dates(),
)


@settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    st.lists(
        st.fixed_dictionaries({name: st.one_of(st.just(good), CELLS) for name, good in GOOD.items()}),
        min_size=1,
        max_size=6,
    )
)
def test_no_row_is_lost_and_clean_rows_stay_clean(rows):
    checked = check(pd.DataFrame(rows, dtype=object), RULES)
    assert sorted([*checked.clean.index, *checked.rejects.index]) == list(range(len(rows)))
    for reason in checked.rejects["reject_reason"]:
        assert all(part.split(": ")[0] in RULES.columns for part in reason.split("; "))
    assert check(checked.clean, RULES).share() == 0


def test_clean_and_rejects_are_written(tmp_path):
    rows = [GOOD | {"id": str(i), "code": ["1", ""][i % 2]} for i in range(9)] + [GOOD | {"id": "z", "x": "ä"}]
    write_checked(check(pd.DataFrame(rows), RULES), tmp_path / "clean.parquet", tmp_path / "rejects.csv")
    assert check(read_table(tmp_path / "clean.parquet"), RULES).share() == 0
    assert read_table(tmp_path / "rejects.csv")[["id", "x", "reject_reason"]].to_numpy().tolist() == [
        ["z", "ä", "x: is not a number"]
    ]


def test_good_and_bad():
    ours = contract({"bad": TARGET})
    frame = pd.DataFrame({"x": [1, 2], "bad": [0.0, 1.0]})
    assert good_bad(frame, ours).tolist() == [0, 1]
    for rows, text in ((frame.head(1), "is good"), (frame.tail(1), "is bad"), (frame.head(0), "No row is left")):
        with pytest.raises(FinureError, match=text):
            good_bad(rows, ours)
    with pytest.raises(FinureError, match="no target"):
        good_bad(frame, contract())


# Drafting: portfolios that nobody has described


def drafted(path, target, tmp_path, **options):
    "Draft, write, load again, check: the contract and the checked file; every row ends on one side."
    out = tmp_path / "drafted.yaml"
    out.unlink(missing_ok=True)
    ours = draft_file(path, target, out, **options)
    assert load(out) == ours
    frame = read_table(path)
    checked = check(frame, ours)
    assert len(checked.clean) + len(checked.rejects) == len(frame)
    assert checked.rejects["reject_reason"].str.contains(": ").all()
    assert all(name in ours.columns for name in checked.violations["column"])
    assert good_bad(checked.clean, ours).mean() > 0
    return ours, checked


def give_me_credit(n):
    "Like the well-known competition file: an unnamed index, hyphens, 96 and 98 as codes, NA."
    rng = np.random.default_rng(0)
    late = lambda: rng.choice([0, 1, 2, 5, 13, 96, 98], n, p=[0.84, 0.1, 0.03, 0.01, 0.01, 0.005, 0.005])  # noqa: E731
    return pd.DataFrame(
        {
            "": np.arange(1, n + 1),
            "SeriousDlqin2yrs": (rng.random(n) < 0.067).astype(int),
            "RevolvingUtilizationOfUnsecuredLines": np.where(
                rng.random(n) < 0.01, 50_000 * rng.random(n), rng.random(n)
            ),
            "age": rng.integers(0, 100, n),
            "NumberOfTime30-59DaysPastDueNotWorse": late(),
            "DebtRatio": rng.exponential(300, n),
            "MonthlyIncome": np.where(rng.random(n) < 0.2, "NA", rng.integers(0, 20_000, n).astype(str)),
            "NumberOfOpenCreditLinesAndLoans": rng.poisson(8, n),
            "NumberOfTimes90DaysLate": late(),
            "NumberRealEstateLoansOrLines": rng.poisson(1, n),
            "NumberOfTime60-89DaysPastDueNotWorse": late(),
            "NumberOfDependents": rng.choice(["NA", "0", "1", "2", "9"], n),
        }
    )


def test_a_portfolio_like_give_me_some_credit(tmp_path):
    path = tmp_path / "gmsc.csv"
    give_me_credit(3000).to_csv(path, index=False)
    ours, checked = drafted(path, "SeriousDlqin2yrs", tmp_path)
    assert checked.share() == 0
    assert ours.columns["Unnamed: 0"].role == "id"
    assert ours.columns["age"].role == "protected"
    for name in (n for n in ours.columns if "Late" in n or "PastDue" in n):
        assert set(ours.columns[name].special) == {96, 98}
        assert ours.columns[name].range[1] < 96
    assert ours.columns["MonthlyIncome"].null == "allowed"
    assert ours.columns["RevolvingUtilizationOfUnsecuredLines"].range[1] >= 50_000
    assert ours.columns["SeriousDlqin2yrs"].bad == 1


def test_150_000_rows_are_drafted_and_checked(tmp_path):
    path, out = tmp_path / "big.csv", tmp_path / "big.yaml"
    give_me_credit(150_000).to_csv(path, index=False)
    ours = draft_file(path, "SeriousDlqin2yrs", out)
    assert check(read_table(path), ours).share() == 0


def test_a_portfolio_like_heloc(tmp_path):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({f"Num Trades, {i}%": rng.integers(0, 200, N) for i in range(22)})
    frame = frame.mask(rng.random(frame.shape) < 0.1, -7).mask(rng.random(frame.shape) < 0.1, -8)
    frame.loc[rng.random(N) < 0.05] = -9
    frame.insert(0, "RiskPerformance", rng.choice(["Good", "Bad"], N))
    frame.to_csv(tmp_path / "heloc.csv", index=False)
    ours, checked = drafted(tmp_path / "heloc.csv", "RiskPerformance", tmp_path)
    assert checked.share() == 0
    assert ours.columns["RiskPerformance"].bad == "Bad"
    assert len(ours.model_features()) == 22
    assert all(set(ours.columns[name].special) == {-9, -8, -7} for name in ours.model_features())
    assert all(ours.columns[name].range[0] == 0 for name in ours.model_features())


def test_a_portfolio_like_a_bank_campaign(tmp_path):
    rng = np.random.default_rng(2)
    kinds = [
        ["Y", "N"],
        ["true", "false"],
        ["admin.", "self-employed", 'blue-collar; "x"', ""],
        ["yes", "no", "unknown"],
    ]
    frame = pd.DataFrame({f"text {i}": rng.choice(kind, N) for i, kind in enumerate(kinds)})
    frame = frame.assign(
        balance=rng.normal(0, 900, N).round(2),
        born=[f"{d % 28 + 1:02d}.03.1980" for d in range(N)],
        opened=pd.date_range("2011-01-01", periods=N).strftime("%Y-%m-%d"),
        month=[f"2011-{i % 12 + 1:02d}" for i in range(N)],
        town=[f"town {i}" for i in range(N)],
        term=[f"{12 * (i % 12 + 1)} months" for i in range(N)],
        default=rng.choice(["yes", "no"], N, p=[0.2, 0.8]),
    )
    frame.to_csv(tmp_path / "bank.csv", index=False, sep=";", quoting=1)
    ours, checked = drafted(tmp_path / "bank.csv", "default", tmp_path)
    kinds = {name: (column.type, column.role) for name, column in ours.columns.items()}
    assert checked.share() == 0
    assert kinds["text 0"] == kinds["text 2"] == kinds["term"] == ("category", "feature")
    assert kinds["text 1"] == ("boolean", "feature")
    assert kinds["opened"] == kinds["month"] == ("date", "ignore")
    assert kinds["town"] == ("text", "ignore")
    assert kinds["balance"] == ("number", "feature")
    assert ours.columns["term"].levels[:2] == ("12 months", "24 months")
    assert ours.columns["text 2"].null == "allowed"
    assert ours.columns["default"].bad == "yes"


SHAPES = {
    "decimals": ([f" {i}.0 " for i in range(N)], "integer", 0),
    "negative": ([-i * 100.5 for i in range(N)], "number", 0),
    "huge": ([1.7e308 if i == 7 else i for i in range(N)], "number", 1),
    "tiny": ([5e-324 * (i % 2) for i in range(N)], "number", 0),
    "beyond float": ([10**19 + i * 10**4 for i in range(N)], "number", 0),
    "inf": (["inf" if i == 7 else i for i in range(N)], "integer", 1),
    "stray": (["n. a." if i == 7 else i for i in range(N)], "integer", 1),
    "sas": (["." if i % 9 else i for i in range(N)], "integer", 0),
    "two codes": ([-9 + i % 2 for i in range(N)], "integer", 0),
    "zero to one": ([i / N for i in range(N)], "number", 0),
    "last level": ([["0", "1", "2", "3+"][i % 4] for i in range(N)], "category", 0),
    "odd words": (
        [["=", "~", "- a", "yes", "#x", "a: b", "null ", "2011", "é\u2028", "'"][i % 10] for i in range(N)],
        "category",
        0,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_columns(shape, tmp_path):
    values, kind, rejected = SHAPES[shape]
    ours, checked = drafted(write(tmp_path / "t.csv", column(values)), "bad", tmp_path)
    assert (ours.columns["x"].type, ours.columns["x"].role) == (kind, "feature")
    assert len(checked.rejects) == rejected
    assert ours.columns["x"].question


def test_a_stray_word_is_shown_in_the_question(tmp_path):
    path = write(tmp_path / "t.csv", column(["n. a." if i == 7 else i for i in range(N)]))
    assert "'n. a.'" in drafted(path, "bad", tmp_path)[0].columns["x"].question


@pytest.mark.parametrize("values", [[""] * N, ["7"] * N, ["-9"] * N, [f"town {i}" for i in range(N)]])
def test_nothing_to_learn_from_is_said(values, tmp_path):
    with pytest.raises(FinureError, match="no column has the role `feature`"):
        drafted(write(tmp_path / "t.csv", column(values)), "bad", tmp_path)
    text = "y," + column(values).replace("\n", "\n1,").removesuffix("1,")
    path = write(
        tmp_path / "two.csv",
        "\n".join(f"{i % 50}{line[1:]}" if i else line for i, line in enumerate(text.splitlines())),
    )
    assert drafted(path, "bad", tmp_path)[0].columns["x"].role == "ignore"


def test_strange_names_and_duplicates(tmp_path):
    names = ["収入", "年齢", "%%%", "class", " loan amount ", "naïve-Ratio", "x", "x", "a" * 300, "null", "1", "yes"]
    head = ",".join([*names, "bad"])
    lines = "".join(",".join([*(str(i % 90 + j) for j in range(len(names))), LABELS[i]]) + "\n" for i in range(N))
    ours, checked = drafted(write(tmp_path / "t.csv", f"{head}\n{lines}"), "bad", tmp_path)
    assert checked.share() == 0
    assert set(names) | {"x.1"} == set(ours.columns) - {"bad"}
    texts = [ours.reasons[feature.reason].text for feature in ours.model_features().values()]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    assert words("収入") == "収入"


def test_200_columns(tmp_path):
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(rng.integers(0, 9, (N, 200)), columns=[f"c{i}" for i in range(200)]).assign(
        bad=rng.integers(0, 2, N)
    )
    frame.to_csv(tmp_path / "wide.csv", index=False)
    ours, checked = drafted(tmp_path / "wide.csv", "bad", tmp_path)
    assert (len(ours.model_features()), checked.share()) == (200, 0)


@pytest.mark.parametrize("first", [10**17, 10**5])
def test_an_identifier_keeps_every_digit(first, tmp_path):
    frame = pd.DataFrame({"loan_id": [f"{first + i:09d}" for i in range(N)], "x": range(N), "bad": LABELS})
    frame.to_csv(tmp_path / "t.csv", index=False)
    _, checked = drafted(tmp_path / "t.csv", "bad", tmp_path)
    assert checked.clean["loan_id"].tolist() == frame["loan_id"].tolist()


@pytest.mark.parametrize(
    "labels", [("0", "1.0"), ("Good", "Bad"), ("False", "True"), ("N", "Y"), ("paid", "charged off")]
)
def test_targets_in_many_spellings(labels, tmp_path):
    text = (
        "x,bad\n"
        + "".join(f"{i},{labels[i % 10 == 0]}\n" for i in range(N))
        + "".join(f"{i},{labels[0]}\n" for i in range(9))
    )
    ours, checked = drafted(write(tmp_path / "t.csv", text), "bad", tmp_path)
    assert good_bad(checked.clean, ours).sum() == N // 10
    chosen = draft(read_table(tmp_path / "t.csv"), "t", "bad", bad=labels[0])
    assert good_bad(checked.clean, chosen).sum() == N - N // 10 + 9
    assert not chosen.columns["bad"].question


def test_targets_that_cannot_be(tmp_path):
    rows = column(range(N))
    for text, why in ((rows + "1,2\n", "it has 3: 0, 1, 2"), ("x,bad\n", "it has 0"), ("x,bad\n1,1\n", "it has 1")):
        with pytest.raises(FinureError, match=why):
            draft_file(write(tmp_path / "t.csv", text), "bad", tmp_path / "c.yaml")
    ours, checked = drafted(write(tmp_path / "t.csv", rows + "1,\n2,NA\n"), "bad", tmp_path)
    assert checked.rejects["reject_reason"].tolist() == ["bad: is missing"] * 2
    with pytest.raises(FinureError, match="exists"):
        draft_file(tmp_path / "t.csv", "bad", tmp_path / "drafted.yaml")
    with pytest.raises(FinureError, match="`7` is not a value of `bad`; it has 0 and 1"):
        draft(read_table(tmp_path / "t.csv"), "t", "bad", bad="7")


def test_parquet_types(tmp_path):
    frame = pd.DataFrame(
        {
            "i": pd.Series(range(N)).astype("Int64").where(pd.Series(range(N)) > 9),
            "flag": [True, False] * (N // 2),
            "day": pd.date_range("2011-01-01", periods=N),
            "at": pd.date_range("2011-01-01", periods=N, freq="h", tz="Europe/Brussels"),
            "kind": pd.Categorical(["u", "v"] * (N // 2)),
            "bad": [0.0, 1.0] * (N // 2),
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    ours, checked = drafted(tmp_path / "t.parquet", "bad", tmp_path, bad="1")
    assert {name: column.type for name, column in ours.columns.items()} == {
        "i": "integer",
        "flag": "boolean",
        "day": "date",
        "at": "time",
        "kind": "category",
        "bad": "category",
    }
    assert checked.share() == 0


def test_codes():
    assert special_codes(np.array([0, 1, 98, 98.0])) == [98]
    assert special_codes(np.array([0, 1, 2, 999, 1200.0])) == []
    assert special_codes(np.array([-3, 0, 1, 2.0])) == []
    assert special_codes(np.array([-3.5, -3.5, 0, 1, 2.0])) == []
