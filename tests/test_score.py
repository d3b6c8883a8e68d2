"""A file of applications is decided once, row by row, and a run that was killed ends as if it had not been"""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from finure import score as module
from finure.audit.log import open_store
from finure.audit.verify import verify
from finure.bundle import load_scorer
from finure.cli.main import app
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load
from finure.core import FinureError, Settings, sha256_file
from finure.credit.decide import Scale
from finure.credit.model import Training, fit_scorecard, fit_trees, policy, write_bundle
from finure.features import FeatureSet
from finure.score import Parts, rejects_of, score
from finure.simulate.bank import Bank, modelling_table, simulate

SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}
LIMITS = policy(gain_good=0.08, loss_bad=0.5, refer_from=0.8)
ANSWERS = ["pd", "score", "grade", "decision"]


@pytest.fixture(scope="module")
def table():
    return modelling_table(simulate(Bank(n=3_000, seed=5))).reset_index(drop=True)


@pytest.fixture(scope="module")
def bundles(table, tmp_path_factory):
    contract, folder = load("simulated_bank"), tmp_path_factory.mktemp("bundles")
    clean = check(table, contract).clean
    training = Training(contract, FeatureSet(contract).batch(clean), good_bad(clean, contract), np.ones(len(clean)), 0)
    card, trees = fit_scorecard(training, Scale(**SCALE)), fit_trees(training, {"eta": 0.5})
    pds = {"card": card.pds(training.values, list(contract.model_features())), "trees": trees.out_of_fold}
    for name, model in (("card", card), ("trees", trees)):
        write_bundle(folder / name, model, training, pds[name], LIMITS, SCALE, [0.5, 0.5], {"name": name})
    return folder


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path / "home")


def records(settings):
    "The records of runs over files."
    with open_store(settings.database()) as store:
        assert verify(store) == []
        return [json.loads(body) for (body,) in store.rows("SELECT body FROM records WHERE kind = 'scoring'")]


@pytest.mark.parametrize("model", ["card", "trees"])
@pytest.mark.parametrize(("given", "result"), [("a.csv", "o.parquet"), ("a.parquet", "o.csv"), ("a.csv.gz", "o.csv")])
def test_a_file_is_decided_as_its_applications_one_by_one(model, given, result, table, bundles, settings, tmp_path):
    if given.endswith(".parquet"):
        table.to_parquet(tmp_path / given)
    else:
        table.to_csv(tmp_path / given, index=False)
    done = score(tmp_path / given, tmp_path / result, bundles / model, settings=settings, rows=700)
    if result.endswith(".parquet"):
        got = pd.read_parquet(tmp_path / result)
    else:
        got = pd.read_csv(tmp_path / result, float_precision="round_trip")
    assert list(got) == ["id", "event_time", *ANSWERS, "reason_codes", "reasons", "model"]
    assert got["id"].tolist() == table["application_id"].tolist()
    assert pd.to_datetime(got["event_time"]).tolist() == table["application_date"].tolist()
    scorer = load_scorer(bundles / model)
    expected = scorer.decide_frame(table)
    pd.testing.assert_frame_equal(got[ANSWERS], expected[ANSWERS], check_dtype=False, rtol=0, atol=0)
    assert got["reasons"].fillna("").tolist() == expected["reasons"].tolist()
    assert (got["reason_codes"].fillna("") == "").tolist() == (expected["decision"] == "approve").tolist()
    assert set(got["model"]) == {f"{model}:none"}
    assert done.decided == done.rows == len(table) and done.rejected == 0
    assert done.decisions == expected["decision"].value_counts().to_dict()
    assert not Parts(tmp_path / result).folder.exists()


def test_reasons_of_all_if_asked(table, bundles, settings, tmp_path):
    table.head(300).to_parquet(tmp_path / "a.parquet")
    score(tmp_path / "a.parquet", tmp_path / "o.parquet", bundles / "card", explain=True, settings=settings)
    assert (pd.read_parquet(tmp_path / "o.parquet")["reasons"] != "").mean() > 0.9


def faulty(table):
    "A text table in which some rows are broken and some ids occur again, near and far."
    rows = table.head(1_000).astype(object).astype(str).replace("nan", "")
    rows.loc[3, "amount"], rows.loc[3, "purpose"], rows.loc[500, "annual_income"] = "secret-7", "yacht", ""
    rows.loc[10, "application_id"] = rows.loc[9, "application_id"]  # next to it
    rows.loc[900, "application_id"] = rows.loc[9, "application_id"]  # in another part
    rows.loc[901, "application_id"] = rows.loc[3, "application_id"] + ".0"  # of a row that was not decided
    rows.loc[902, "application_id"] = "nobody"
    return rows


def test_no_row_is_lost_and_an_id_is_decided_once(table, bundles, settings, tmp_path):
    rows = faulty(table)
    rows.to_csv(tmp_path / "a.csv", index=False)
    results = {}
    for size in (50, 333, 5_000):
        done = score(tmp_path / "a.csv", tmp_path / "o.csv", bundles / "card", settings=settings, rows=size)
        results[size] = (tmp_path / "o.csv").read_bytes(), rejects_of(tmp_path / "o.csv").read_bytes()
    assert len(set(results.values())) == 1  # wherever one part ends
    rejects = pd.read_csv(tmp_path / "o.rejects.csv", dtype=str, keep_default_na=False)
    assert rejects[["row", "field", "rule"]].to_numpy().tolist() == [
        ["3", "amount", "type"],
        ["3", "purpose", "levels"],
        ["10", "application_id", "twice"],
        ["500", "annual_income", "null"],
        ["900", "application_id", "twice"],
        ["902", "application_id", "type"],
    ]
    assert rejects["reason"].iloc[0] == "is not a whole number from 1000 to 40000"
    decided = pd.read_csv(tmp_path / "o.csv")
    assert len(decided) == done.decided == 995 and decided["id"].is_unique and done.rejected == 5
    assert int(rows.loc[3, "application_id"]) in decided["id"].tolist()
    assert done.rules[("application_id", "twice")] == 2
    for path in (tmp_path / "o.csv", tmp_path / "o.rejects.csv", tmp_path / "home" / "decisions.db"):
        assert b"secret-7" not in path.read_bytes() and b"yacht" not in path.read_bytes()


def test_the_run_is_recorded(table, bundles, settings, tmp_path):
    faulty(table).to_csv(tmp_path / "a.csv", index=False)
    done = score(tmp_path / "a.csv", tmp_path / "o.parquet", bundles / "trees", "m:3", settings=settings)
    (told,) = records(settings)
    assert told["input"] == "a.csv" and str(tmp_path) not in json.dumps(told)
    assert told["input_sha256"] == sha256_file(tmp_path / "a.csv")
    assert told["output_sha256"] == sha256_file(tmp_path / "o.parquet")
    assert told["rejects_sha256"] == sha256_file(tmp_path / "o.rejects.csv")
    assert (told["rows"], told["decided"], told["rejected"], told["model"]) == (1_000, 995, 5, "m:3")
    assert told["decisions"] == done.decisions and sum(done.decisions.values()) == 995
    assert told["contract"].startswith("simulated_bank ") and len(told["bundle"]) == 64


def test_without_id_and_date_rows_are_numbered_and_dated(table, bundles, settings, tmp_path):
    table.drop(columns=["application_id", "application_date"]).head(500).to_parquet(tmp_path / "a.parquet")
    score(tmp_path / "a.parquet", tmp_path / "o.parquet", bundles / "card", settings=settings, rows=200)
    got = pd.read_parquet(tmp_path / "o.parquet")
    assert got["row"].tolist() == list(range(500))
    assert len(set(got["event_time"])) == 1


RUN = """
import sys
from finure import score
score.score(sys.argv[1], sys.argv[2], sys.argv[3], rows=40)
"""


def test_killed_again_and_again_it_ends_the_same(table, bundles, settings, tmp_path, monkeypatch):
    faulty(table).to_csv(tmp_path / "a.csv", index=False)
    uninterrupted = score(tmp_path / "a.csv", tmp_path / "one.parquet", bundles / "card", settings=settings, rows=40)
    out = tmp_path / "two.parquet"
    parts, kills = Parts(out), 0
    command = [sys.executable, "-c", RUN, str(tmp_path / "a.csv"), str(out), str(bundles / "card")]
    monkeypatch.setenv("FINURE_HOME", str(tmp_path / "home"))
    for until in (2, 12):
        process = subprocess.Popen(command)
        while process.poll() is None and (not parts.folder.exists() or parts.whole() < until):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert kills == 2 and 12 <= parts.whole() < 25
    done = score(tmp_path / "a.csv", out, bundles / "card", settings=settings, rows=40)
    assert done.resumed >= 12 and done._replace(resumed=0) == uninterrupted
    assert out.read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert (tmp_path / "two.rejects.csv").read_bytes() == (tmp_path / "one.rejects.csv").read_bytes()
    assert len(records(settings)) == 2


def test_stopped_after_the_record_there_is_still_one(table, bundles, settings, tmp_path, monkeypatch):
    table.head(100).to_csv(tmp_path / "a.csv", index=False)
    arguments = tmp_path / "a.csv", tmp_path / "o.csv", bundles / "card"
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(*arguments, settings=settings)
    score(*arguments, settings=settings)
    assert len(records(settings)) == 1
    score(*arguments, settings=settings)  # another run, on purpose
    assert len(records(settings)) == 2


def test_what_changed_since_the_stop_is_named(table, bundles, settings, tmp_path):
    path, out = tmp_path / "a.csv", tmp_path / "o.csv"
    table.head(100).to_csv(path, index=False)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(path, out, bundles / "card", settings=settings, rows=50, progress=stop)
    for model, options, what in (("trees", {}, "model, bundle"), ("card", {"explain": True}, "explain")):
        with pytest.raises(FinureError, match=f"something changed: {what}. Start with --restart"):
            score(path, out, bundles / model, settings=settings, rows=50, **options)
    table.head(101).to_csv(path, index=False)
    with pytest.raises(FinureError, match="changed: input_sha256"):
        score(path, out, bundles / "card", settings=settings, rows=50)
    done = score(path, out, bundles / "card", restart=True, settings=settings, rows=50)
    assert (done.rows, done.resumed) == (101, 0)


def test_one_run_at_a_time(table, bundles, settings, tmp_path):
    table.head(10).to_csv(tmp_path / "a.csv", index=False)
    with Parts(tmp_path / "o.csv").held(), pytest.raises(FinureError, match="another run is writing"):
        score(tmp_path / "a.csv", tmp_path / "o.csv", bundles / "card", settings=settings)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", b"", "not a readable table"),
        ("a.csv", b"amount\n", "no row in it"),
        ("a.csv", b"amount\n1\n", "absent: "),
        ("a.csv", b"amount,b\n1,2\n1,2,3,4\n", "not a readable table"),
        ("a.csv.gz", b"garbage", "not a readable table"),
        ("a.parquet", b"garbage", "not a readable table"),
        ("a.xlsx", b"", "expected a .parquet or .csv"),
    ],
)
def test_what_is_no_table_of_applications_is_told(name, content, why, bundles, settings, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FinureError, match=why):
        score(tmp_path / name, tmp_path / "o.csv", bundles / "card", settings=settings)
    assert not (tmp_path / "o.csv").exists()


def test_results_that_cannot_be_are_refused(table, bundles, tmp_path):
    table.head(10).to_csv(tmp_path / "a.csv", index=False)
    for out, why in (("o.xlsx", "name it so"), ("a.csv", "take the place"), ("no/o.csv", "no such folder")):
        with pytest.raises(FinureError, match=why):
            score(tmp_path / "a.csv", tmp_path / out, bundles / "card")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_at_the_terminal(table, bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path / "home"))
    faulty(table).to_csv(tmp_path / "a.csv", index=False)
    arguments = ["score", str(tmp_path / "a.csv"), "-o", str(tmp_path / "o.csv"), "--bundle", str(bundles / "card")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "995" in done.output and "twice" in done.output and "o.rejects.csv" in done.output
    wrong = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "o.txt"), *arguments[4:]])
    assert isinstance(wrong.exception, FinureError)
