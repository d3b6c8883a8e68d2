"""What the pipeline reaches on real data, and that every way to ask the model gives the same answer"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from checkouts import checkout, shell

from finure.contracts.check import good_bad
from finure.contracts.contract import load
from finure.credit.data import load_table, split_rows
from finure.pipeline import as_applications, ask
from finure.run.records import all_runs
from finure.serve.pack import serve_packed

__all__ = ["checkout"]  # a fixture
DATA = os.environ.get("FINURE_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="FINURE_DATA is not set")


LOADED = """
import mlflow, pandas as pd
mlflow.set_tracking_uri("sqlite:///" + HOME + "/mlflow.db")
model = mlflow.pyfunc.load_model("models:/finure-credit@challenger")
rows = pd.read_json(HOME + "/rows.json", convert_dates=False, orient="records")
for column in model.metadata.get_input_schema().inputs:
    if str(column.type) == "DataType.datetime":
        rows[column.name] = pd.to_datetime(rows[column.name])
    if str(column.type) == "DataType.double":
        rows[column.name] = rows[column.name].astype(float)
print(model.predict(rows).to_json(orient="records"))
"""


@pytest.fixture(scope="module")
def real(checkout, tmp_path_factory) -> Path:
    "The state folder of the pipeline on real data."
    home = tmp_path_factory.mktemp("real")
    done = shell("make run", checkout, DATA, home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (home / "said.txt").write_text(done.stdout)
    return home


@needs_data
def test_real_data_reaches_what_was_asked_for(real):
    record = next(record for record, folder in all_runs(real) if folder == trained(real))
    boosting, scorecard = record["compared"]["boosting"], record["compared"]["scorecard"]
    assert boosting["auc"] >= 0.695 and scorecard["auc"] >= 0.682
    assert boosting["ece"] <= 0.02 and scorecard["ece"] <= 0.02
    assert boosting["compiled_difference"] < 1e-6 and scorecard["compiled_difference"] < 1e-9
    said = (real / "said.txt").read_text()
    assert f"AUC {boosting['auc']:.4f}" in said and "registry ls" in said


@needs_data
def test_another_portfolio_needs_nothing_but_a_contract_and_params(checkout, real):
    command = ".venv/bin/finure run credit/40_train -f params/german.yaml -p register=false"
    done = shell(command, checkout, DATA, real)
    assert done.returncode == 0, done.stderr[-3000:]
    record = next(r for r, _ in all_runs(real) if r.get("portfolio") == "german")
    assert record["metrics"]["cross_validated_auc"] >= 0.785


@pytest.fixture(scope="module")
def test_rows(real) -> pd.DataFrame:
    "The clean test rows of the real pipeline."
    contract = load("lendingclub")
    clean = load_table("lendingclub_2007_2011", contract).clean
    split = split_rows(clean, contract, good_bad(clean, contract), "2010-12-31", "2011-07-01", "2011-12-31")
    return clean[split.test]


def trained(home: Path) -> Path:
    "The folder of the training run on LendingClub."
    runs = [(r, folder) for r, folder in all_runs(home) if r["job"] == "credit/40_train"]
    return next(folder for record, folder in runs if record.get("portfolio") == "lendingclub")


@needs_data
def test_http_gives_the_notebooks_score_for_every_test_row(real, test_rows, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(real))
    folder = trained(real)
    scored = pd.read_parquet(folder / "scored.parquet")
    expected = scored.loc[scored["part"] == "test", "pd_boosting"].to_numpy()
    applications = as_applications(test_rows, load("lendingclub"))
    assert len(applications) == len(expected) == 12_493
    with serve_packed("finure-credit:1") as url:
        got = []
        for start in range(0, len(applications), 5000):
            answer = ask(url, "/api/v1/batch-predict", {"applications": applications[start : start + 5000]})
            assert answer["rejected"] == 0
            got += [row["pd"] for row in answer["results"]]
        np.testing.assert_array_equal(got, expected)
        one = ask(url, "/api/v1/predict", applications[0])
        assert one["pd"] == expected[0]
        with pytest.raises(urllib.error.HTTPError, match="422"):
            body = json.dumps(applications[0] | {"term_months": 48}).encode()
            urllib.request.urlopen(
                urllib.request.Request(url + "/api/v1/predict", body, {"Content-Type": "application/json"})
            )


@needs_data
def test_another_program_loads_the_model_from_the_registry(real, test_rows, tmp_path):
    rows = as_applications(test_rows.head(50), load("lendingclub"))
    (real / "rows.json").write_text(json.dumps(rows))
    code = f"HOME = {str(real)!r}\n{LOADED}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    folder = trained(real)
    scored = pd.read_parquet(folder / "scored.parquet")
    expected = scored.loc[scored["part"] == "test", "pd_boosting"].to_numpy()[:50]
    np.testing.assert_allclose([answer["pd"] for answer in answers], expected, rtol=0, atol=1e-9)
    refused = [answer for answer in answers if answer["decision"] != "approve"]
    assert all(1 <= len(answer["reasons"].split("; ")) <= 4 for answer in refused)


@needs_data
def test_a_gate_that_is_not_passed_registers_nothing(checkout, real, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text("default: {min_auc: 0.99}\n")
    command = f".venv/bin/finure run credit/40_train -f params/german.yaml -p gates={gates} -p cross_validate=0"
    done = shell(command, checkout, DATA, real)
    assert done.returncode == 2, done.stdout + done.stderr
    record, folder = next((r, f) for r, f in all_runs(real) if r["status"] == "gate")
    assert "at least 0.99" in (folder / "page.html").read_text()
    listed = shell(".venv/bin/finure registry ls finure-credit-german", checkout, DATA, real).stdout
    assert record["run"] not in listed
