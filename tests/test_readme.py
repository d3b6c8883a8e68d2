"""The README, command by command, in a fresh copy of the checkout, and what must be true after it"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request

import pandas as pd
import pytest
from checkouts import ROOT, checkout, environment, reached, shell

from finure.pipeline import ask
from finure.run.records import all_runs

__all__ = ["checkout"]  # a fixture
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]


def test_the_readme_has_the_commands_that_are_tested():
    started = {c for c in COMMANDS if c}
    known = {c for group in (RUN, STARTED, EXAMPLES, ASKED, KEYS, [TRAIN, SCORE, VERIFY], ELSEWHERE) for c in group}
    assert started == known


ELSEWHERE = {"make test", "FINURE_DATA=/data/credit make run"}  # this run; `real` below
RUN = [
    "make run", "make sync", ".venv/bin/finure run credit/40_train -p candidate=scorecard",
    ".venv/bin/finure contract draft loans.csv --target defaulted",
    ".venv/bin/finure contract check loans loans.csv --out runs",
    ".venv/bin/finure pipeline -f params/loans.yaml",
    ".venv/bin/finure doctor", "make report-credit",
    ".venv/bin/finure contract show simulated_bank", ".venv/bin/finure registry ls",
    ".venv/bin/finure schedule print systemd", ".venv/bin/finure runs ls",
]  # fmt: skip
TRAIN = "make train-credit"  # the command that `make run` and the line above have run
STARTED = ["make lab", "make serve-credit"]
EXAMPLES = [
    ".venv/bin/finure contract example simulated_bank > runs/application.json",
    ".venv/bin/finure contract example simulated_bank --rows 1000 > runs/applications.csv",
]
ASKED = [
    "curl -s localhost:3000/api/v1/model",
    "curl -s localhost:3000/api/v1/predict -H 'content-type: application/json' -d @runs/application.json",
]

KEYS = [".venv/bin/finure keys create branch-portal --scope predict", ".venv/bin/finure keys ls"]
SCORE = ".venv/bin/finure score runs/applications.csv -o runs/decisions.parquet"
VERIFY = ".venv/bin/finure audit verify"


@pytest.mark.parametrize("command", RUN)
def test_command_of_the_readme(command, checkout):
    done = shell(command, checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr


def test_make_trains_by_the_same_door(checkout):
    assert ".venv/bin/finure run credit/40_train" in shell(TRAIN.replace("make", "make -n"), checkout).stdout


def test_lab_starts_and_runs_a_notebook_job(checkout):
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
        while not (found := re.search(r"(http://localhost:\d+)/lab\S*\?token=(\w+)", log.read_text())):
            assert time.monotonic() < until and process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        reached(found[0], process)  # it says where it runs before it listens
        assert b"JupyterLab" in urllib.request.urlopen(found[0], timeout=30).read()
        notebook_job(checkout, *found.groups())
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def notebook_job(checkout, url, token):
    "Trains on the loans by a job of JupyterLab, through its API."

    def ask(path: str, body: dict | None = None):
        "An answer of the scheduler."
        headers = {"Authorization": f"token {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/scheduler/{path}", data, headers)) as answer:
            return json.loads(answer.read() or b"null")

    (place,) = ask("runtime_environments")
    given = {"contract": '"loans"', "data": '"loans.csv"', "model_name": '"finure-lab"'}  # as Python writes them
    asked = {"name": "train", "input_uri": "notebooks/credit/40_train.ipynb", "output_formats": ["ipynb", "html"]}
    job = ask("jobs", asked | {"runtime_environment_name": place["name"], "parameters": given})["job_id"]
    until = time.monotonic() + 600
    while (state := ask(f"jobs/{job}"))["status"] not in ("COMPLETED", "FAILED"):
        assert time.monotonic() < until
        time.sleep(1)
    assert state["status"] == "COMPLETED", state["status_message"]
    ask(f"jobs/{job}/download_files")
    page = ""
    while "</html>" not in page:  # the file is there before it is whole
        assert time.monotonic() < until
        time.sleep(0.5)
        page = next((path.read_text() for path in checkout.glob("runs/jupyter/jobs/*/*.html")), "")
    assert "contract version 0-draft" in page


def test_serve_and_ask_with_curl(checkout):
    process = subprocess.Popen(
        ["make", "serve-credit"], cwd=checkout, env=environment(checkout), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        reached("http://localhost:3000/readyz", process)
        document = ask("http://localhost:3000", "/openapi.json")
        media = document["paths"]["/api/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
        assert shell(EXAMPLES[0], checkout).returncode == 0
        assert json.loads((checkout / "runs" / "application.json").read_text()) == media["example"]
        answers = [json.loads(shell(command, checkout).stdout) for command in ASKED]
        assert answers[0]["contract"]["name"] == "simulated_bank"
        assert answers[1]["decision"] in ("approve", "refer", "decline") and 300 <= answers[1]["score"] <= 850
        made, listed = (shell(command, checkout).stdout for command in KEYS)
        key = re.search(r"fk_\w+_[\w-]+", made)[0]
        assert "branch-portal" in listed and key not in listed
        keyed = ASKED[1].replace("-H", f"-H 'authorization: Bearer {key}' -H", 1)
        until = time.monotonic() + 30
        while "no-valid-key" not in shell(ASKED[1], checkout).stdout:
            assert time.monotonic() < until, "a key was made, and the service still answers without one"
            time.sleep(0.5)
        shown = shell(
            f".venv/bin/finure audit show {json.loads(shell(keyed, checkout).stdout)['decision_id']}", checkout
        )
        assert shown.returncode == 0 and "branch-portal" in shown.stdout, shown.stdout + shown.stderr
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_file_is_scored_and_the_log_holds(checkout):
    for command in (EXAMPLES[1], SCORE, VERIFY):
        done = shell(command, checkout)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(pd.read_parquet(checkout / "runs" / "decisions.parquet")) == 1000


def test_plain_papermill_takes_the_section_of_a_job_and_leaves_nothing_beside_it(checkout, tmp_path):
    folder = checkout / "notebooks" / "credit"
    before, listed = sorted(folder.iterdir()), shell(".venv/bin/finure registry ls", checkout).stdout
    command = f".venv/bin/papermill notebooks/credit/40_train.ipynb {tmp_path}/out.ipynb -f params/loans.yaml"
    done = shell(command, checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "contract version 0-draft" in (tmp_path / "out.ipynb").read_text()
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
