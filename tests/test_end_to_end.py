"""The README, command by command, in a fresh copy of the checkout, and what must be true after it"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finure.contracts.check import good_bad
from finure.contracts.contract import load
from finure.credit.data import load_table, split_rows
from finure.pipeline import as_applications, ask
from finure.run.records import all_runs
from finure.serve.pack import serve_packed

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("FINURE_DATA")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
LONG = 900  # seconds
needs_data = pytest.mark.skipif(DATA is None, reason="FINURE_DATA is not set")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    "What git would clone, with this machine's .venv and a small portfolio of its own."
    place = tmp_path_factory.mktemp("clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    (place / ".venv").mkdir()
    (place / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (place / ".venv" / ".installed").touch()
    loans().to_csv(place / "loans.csv", index=False)
    return place


def loans() -> pd.DataFrame:
    "A lender's file that nobody has described: codes, missing values, text levels, awkward names."
    rng, n = np.random.default_rng(7), 4000
    late, use = rng.poisson(0.4, n).astype(float), rng.beta(2, 4, n)
    risk = -2.4 + 0.9 * late + 2.2 * use + rng.normal(0, 0.5, n)
    late[rng.random(n) < 0.02] = 98
    income = np.exp(rng.normal(8, 0.5, n)).round()
    return pd.DataFrame({
        "Unnamed: 0": np.arange(n), "Late30-59Days": late.astype(int), "limitUse": use,
        "MonthlyIncome": np.where(rng.random(n) < 0.2, np.nan, income),
        "oldestTrade": np.where(rng.random(n) < 0.1, -9, rng.integers(1, 400, n)),
        "housing": rng.choice(["rent", "own", "other"], n), "age": rng.integers(20, 80, n),
        "defaulted": np.where(rng.random(n) < 1 / (1 + np.exp(-risk)), "yes", "no"),
    })  # fmt: skip


def environment(checkout: Path, data: str | None = None) -> dict[str, str]:
    "As a user's: state in the copy, no data unless given; JupyterLab may run as whoever runs the tests."
    config = checkout / ".jupyter"
    config.mkdir(exist_ok=True)
    lab = {"allow_root": True, "open_browser": False, "port": 0}
    (config / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": lab}))
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("FINURE_", "MLFLOW_", "IN_TEST", "MAKE", "MFLAGS"))
    }
    return ours | {"JUPYTER_CONFIG_DIR": str(config)} | ({"FINURE_DATA": data} if data else {})


def shell(
    command: str, checkout: Path, data: str | None = None, home: Path | None = None
) -> subprocess.CompletedProcess:
    "Runs one command of the README."
    env = environment(checkout, data) | ({"FINURE_HOME": str(home)} if home else {})
    return subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=LONG,
        stdin=subprocess.DEVNULL,
    )


def reached(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    "Waits until something answers there."
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nothing answers at {url}")


def test_the_readme_has_the_commands_that_are_tested():
    started = {c for c in COMMANDS if c}
    known = {c for group in (RUN, STARTED, ASKED, ELSEWHERE) for c in group}
    assert started == known


ELSEWHERE = {"make test", "FINURE_DATA=/data/credit make run"}  # this run; `real` below
RUN = [
    "make run", "make sync", ".venv/bin/finure run credit/40_train -p candidate=scorecard",
    ".venv/bin/finure contract draft loans.csv --target defaulted",
    ".venv/bin/finure contract check loans loans.csv --out runs",
    ".venv/bin/finure pipeline -f params/loans.yaml",
    ".venv/bin/finure doctor", "make train-credit", "make report-credit",
    ".venv/bin/finure contract show simulated_bank", ".venv/bin/finure registry ls",
]  # fmt: skip
STARTED = ["make lab", "make serve-credit"]
ASKED = [
    "curl -s localhost:3000/api/v1/model",
    "curl -s localhost:3000/api/v1/predict -H 'content-type: application/json' -d @application.json",
]


@pytest.mark.parametrize("command", RUN)
def test_command_of_the_readme(command, checkout):
    done = shell(command, checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr


def test_lab_starts(checkout):
    log = checkout / "lab.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["make", "lab"],
            cwd=checkout,
            env=environment(checkout),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 90
        while not (found := re.search(r"http://localhost:\d+/lab\?token=\w+", log.read_text())):
            assert time.monotonic() < until and process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        assert b"JupyterLab" in urllib.request.urlopen(found[0], timeout=30).read()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_serve_and_ask_with_curl(checkout):
    process = subprocess.Popen(
        ["make", "serve-credit"], cwd=checkout, env=environment(checkout), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        reached("http://localhost:3000/readyz", process)
        document = ask("http://localhost:3000", "/openapi.json")
        media = document["paths"]["/api/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
        example = media.get("example") or document["components"]["schemas"]["Application"]["examples"][0]
        (checkout / "application.json").write_text(json.dumps(example))
        answers = [json.loads(shell(command, checkout).stdout) for command in ASKED]
        assert answers[0]["contract"]["name"] == "simulated_bank"
        assert answers[1]["decision"] in ("approve", "refer", "decline") and 300 <= answers[1]["score"] <= 850
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_job_runs_in_jupyter_and_leaves_nothing_beside_it(checkout, tmp_path):
    folder = checkout / "notebooks" / "credit"
    before, listed = sorted(folder.iterdir()), shell(".venv/bin/finure registry ls", checkout).stdout
    notebook = "notebooks/credit/40_train.ipynb"
    done = shell(f".venv/bin/jupyter nbconvert --to notebook --execute {notebook} --output-dir {tmp_path}", checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(folder.iterdir()) == before
    assert shell(".venv/bin/finure registry ls", checkout).stdout == listed


def test_pages_say_what_ran(checkout):
    runs = all_runs(checkout / "runs")
    assert {record["status"] for record, _ in runs} == {"done"}
    index = (checkout / "runs" / "index.html").read_text()
    for record, folder in runs:
        page = folder / "page.html"
        assert record["run"] in index and record["run"] in page.read_text()
        assert page.stat().st_size < 5_000_000
        assert str(checkout) not in page.read_text() + (folder / "notebook.ipynb").read_text()


def test_a_portfolio_of_ones_own_is_registered(checkout):
    done = shell(".venv/bin/finure registry ls finure-credit-loans", checkout)
    assert "loans 0-draft" in done.stdout and "challenger" in done.stdout


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
@pytest.mark.parametrize(("portfolio", "least"), [("taiwan", 0.784), ("german", 0.785)])
def test_other_portfolios_need_nothing_but_a_contract_and_params(portfolio, least, checkout, real):
    command = f".venv/bin/finure run credit/40_train -f params/{portfolio}.yaml -p register=false"
    done = shell(command, checkout, DATA, real)
    assert done.returncode == 0, done.stderr[-3000:]
    record = next(r for r, _ in all_runs(real) if r.get("portfolio") == portfolio)
    assert record["metrics"]["cross_validated_auc"] >= least


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


def test_a_stopped_run_says_so_and_the_next_one_works(checkout, tmp_path):
    home, command = tmp_path / "home", [".venv/bin/finure", "run", "credit/40_train"]
    env = environment(checkout) | {"FINURE_HOME": str(home)}
    first = subprocess.Popen(command, cwd=checkout, env=env, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "Both models" in line:
            break
    second = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert second.returncode == 1 and str(first.pid) in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    ((record, folder),) = all_runs(home)
    assert record["status"] == "killed" and "stopped" in (folder / "page.html").read_text()
    assert "no registered model" in shell(".venv/bin/finure registry ls", checkout, home=home).stdout.lower()
    small = "-p data=loans.csv -p contract=loans -p model_name=finure-credit-again"
    again = shell(f".venv/bin/finure run credit/40_train {small}", checkout, home=home)
    assert again.returncode == 0, again.stderr
