"The one door for runs: parameters, exit codes, the lock, and what is left behind when a run is stopped."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from finure.core import FinureError, Settings
from finure.run.door import How, _result, run
from finure.run.jobs import parameters, parse_overrides
from finure.run.pages import index
from finure.run.records import holder, lock, read_record

DECLARED = """
n: int = 3
rate: float = 0.5
seconds: float = 0.0
outcome: str = "good"
since: str = "2010-01-01"
names: list = ["a"]
quick: bool = False
run_dir: str = ""
"""
WORK = """
import json, os, subprocess, sys, time, warnings
from pathlib import Path
from finure.core import GateError

if seconds:
    child = subprocess.Popen(["sleep", "60"])
    Path(run_dir, "part").write_text(f"{os.getpid()} {child.pid}")
    os.rename(Path(run_dir, "part"), Path(run_dir, "pids"))
    time.sleep(seconds)
warnings.warn("this will change", FutureWarning)
print("in", os.getcwd(), "n times two is", 2 * n)
told = {"python": sys.executable, "telemetry": os.environ["MLFLOW_DISABLE_TELEMETRY"]}
checks = [{"name": "AUC", "value": 0.66, "limit": 0.695, "rule": "min", "passed": False}]
result = {"summary": "Trained", "metrics": {"auc": 0.66}, "gate": {"passed": False, "checks": checks}, "status": "x"}
Path(run_dir, "result.json").write_text(json.dumps(result | told))
if outcome == "gate":
    raise GateError("AUC is too low")
if outcome == "fail":
    raise ValueError(f"no such column in {os.getcwd()}/data.csv")
if outcome == "die":
    os._exit(1)
"""


@pytest.fixture
def house(tmp_path):
    "A checkout with one job and one notebook that is none; the job asks for a kernel that does not exist."
    folder = tmp_path / "house" / "notebooks" / "credit"
    folder.mkdir(parents=True)
    cells = [
        new_markdown_cell("# Train"),
        new_code_cell(DECLARED.strip(), metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Fit the models"),
        new_code_cell(WORK.strip()),
    ]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "of-someone", "display_name": "Other"}})
    nbformat.write(notebook, folder / "40_train.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), folder / "10_eda.ipynb")
    return tmp_path / "house"


def start(house: Path, params_file=None, **overrides):
    "A run in this process; its state is outside of the checkout."
    home = house.parent / "state"
    return run("credit/40_train", params_file, overrides, home=home, notebooks=house / "notebooks")


def background(house: Path, **overrides) -> tuple[subprocess.Popen, Path, list[int]]:
    "A run in a process of its own, in the middle of its work; its folder; the processes it started."
    code = (
        "import sys, json\nfrom pathlib import Path\nfrom finure.run.door import run\nhouse = Path(sys.argv[1])\n"
        "ended = run('credit/40_train', None, json.loads(sys.argv[2]), house.parent / 'state', house / 'notebooks')\n"
        "sys.exit(ended.exit_code)"
    )
    words = [sys.executable, "-c", code, str(house), json.dumps({"seconds": 60.0} | overrides)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=house)
    until = time.monotonic() + 60
    while not (found := list(house.parent.glob("state/credit/train/*/pids"))):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, "the run did not come to its work"
        time.sleep(0.05)
    return process, found[0].parent, [int(pid) for pid in found[0].read_text().split()]


def lives(pid: int) -> bool:
    "Whether a process runs; one that only waits to be collected does not."
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    "Whether all of these processes end in time."
    until = time.monotonic() + seconds
    while any(lives(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(lives(pid) for pid in pids)


def test_a_run_leaves_notebook_page_and_record(house, capsys):
    params = house / "params" / "credit.yaml"
    params.parent.mkdir()
    params.write_text("train: {n: 20, rate: 1, since: 2011-07-01}\nreport: {other: 1}\n")
    ended = start(house, params, n=21)
    assert (ended.status, ended.exit_code) == ("done", 0)
    assert "42" in ended.page.read_text()
    record = json.loads((ended.folder / "run.json").read_text())
    assert record == ended.record
    assert record["params_file"] == "params/credit.yaml"
    values = {"n": 21, "rate": 1, "seconds": 0.0, "outcome": "good", "since": "2011-07-01", "names": ["a"]}
    assert record["parameters"] == values | {"quick": False}
    assert (record["summary"], record["status"], record["telemetry"]) == ("Trained", "done", "true")
    assert record["python"] == "$PREFIX/bin/" + Path(sys.executable).name  # not the kernel the notebook asks for
    assert record["started"] <= record["ended"] and "pid" not in record
    assert record["packages"]["papermill"] and record["git"] is None and record["who"] == Settings().who()
    log = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in log[:2]] == ["Train", "Fit the models"]
    assert len(log) == 3 and "done after" in log[2]


def test_a_failed_run_says_where_and_why_and_names_no_place_of_this_machine(house):
    ended = start(house, outcome="fail")
    assert (ended.status, ended.exit_code) == ("failed", 1)
    error = {"name": "ValueError", "message": "no such column in ./data.csv", "stage": "Fit the models"}
    assert ended.record["error"] == error
    kept = {path.name: path.read_text() for path in ended.folder.iterdir() if path.name != "result.json"}
    assert sorted(kept) == ["notebook.ipynb", "page.html", "run.json"]
    for name, text in kept.items():
        assert str(house.parent) not in text and sys.prefix not in text, name
    papermill = json.loads(kept["notebook.ipynb"])["metadata"]["papermill"]
    assert (papermill["input_path"], papermill["output_path"]) == ("credit/40_train.ipynb", "notebook.ipynb")
    html = kept["page.html"]
    assert "This run failed at “Fit the models”" in html and "no such column in ./data.csv" in html
    assert "\x1b" not in html


def test_a_gate_that_is_not_passed_is_exit_code_2(house):
    ended = start(house, outcome="gate")
    assert (ended.status, ended.exit_code, len(ended.record["attempts"])) == ("gate", 2, 1)
    html = ended.page.read_text()
    assert "did not pass its gate; nothing was registered" in html
    assert "AUC: 0.66, at least 0.695 is asked for; 0.035 away" in html


def test_a_kernel_that_dies_is_a_failed_run(house):
    ended = run(
        "credit/40_train", None, {"outcome": "die"}, house.parent / "state", house / "notebooks", How(retries=0)
    )
    assert (ended.status, ended.exit_code, ended.record["error"]["name"]) == ("failed", 1, "DeadKernelError")
    assert "This run failed" in ended.page.read_text()
    assert holder(ended.folder.parent) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_cleans_up_and_says_so(house, number, code):
    process, folder, pids = background(house)
    with pytest.raises(FinureError, match=f"already running: run {folder.name}, process {process.pid}, since 20"):
        start(house)
    assert read_record(folder)["status"] == "running"
    process.send_signal(number)
    log = process.communicate(timeout=20)[1]
    assert process.returncode == code, log
    assert "Traceback" not in log and "killed after" in log
    assert gone(pids, 1)
    record = read_record(folder)
    assert (record["status"], record["exit_code"]) == ("killed", code)
    assert "This run was stopped at “Fit the models”, before its end" in (folder / "page.html").read_text()
    assert signal.Signals(number).name in record["error"]["message"]
    assert ">stopped<" in (house.parent / "state" / "index.html").read_text()
    if number == signal.SIGTERM:
        assert start(house).status == "done"


def test_a_run_that_was_killed_hard_is_found_out(house):
    process, folder, pids = background(house)
    index(house.parent / "state")
    assert read_record(folder)["status"] == "running"  # a look at the runs leaves a living one alone
    process.kill()
    process.wait(timeout=20)
    process.stderr.close()
    assert read_record(folder)["status"] == "running"
    ended = start(house)
    assert ended.status == "done"
    record = read_record(folder)
    assert (record["status"], record["exit_code"]) == ("killed", 137) and "pid" not in record
    assert "This run was stopped" in (folder / "page.html").read_text()
    os.kill(pids[1], signal.SIGKILL)  # what the job itself started is not ours to find after a hard kill
    assert gone(pids, 5)


@pytest.mark.parametrize(
    ("job", "overrides", "message"),
    [
        ("credit/40_trian", {}, "did you mean 'credit/40_train'?"),
        ("../40_train", {}, "No job"),
        ("credit/10_eda", {}, "no cell has the tag 'parameters'"),
        ("credit/40_train", {"rat": 1.0}, "no parameter 'rat': did you mean 'rate'?"),
        ("credit/40_train", {"run_dir": "x"}, "no parameter 'run_dir'"),
        ("credit/40_train", {"rate": "1e-3"}, "write 0.001."),
        ("credit/40_train", {"n": 2.5}, "'n' is a whole number, not 2.5."),
        ("credit/40_train", {"n": True}, "'n' is a whole number, not True."),
        ("credit/40_train", {"outcome": 1}, "text .put it in quotes., not 1"),
        ("credit/40_train", {"quick": "maybe"}, "true or false, not 'maybe'"),
        ("credit/40_train", {"names": "a"}, "a list, not 'a'"),
        ("credit/40_train", {"n": None}, "leave the line out for the default 3."),
    ],
)
def test_what_is_asked_for_wrongly_never_starts(house, job, overrides, message):
    home = house.parent / "state"
    with pytest.raises(FinureError, match=message):
        run(job, None, overrides, home=home, notebooks=house / "notebooks")
    assert not home.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {n: 1}", "no section 'train': did you mean 'trian'?"),
        ("{}", "there is: none"),
        ("train: [1]", "section 'train' must map names to values"),
        ("train: {m: 1}", "no parameter 'm'"),
    ],
)
def test_a_params_file_that_does_not_fit_is_refused(house, tmp_path, text, message):
    path = tmp_path / "credit.yaml"
    path.write_text(text)
    with pytest.raises(FinureError, match=message):
        parameters(house / "notebooks" / "credit" / "40_train.ipynb", path)


def test_an_empty_section_means_the_defaults(house, tmp_path):
    path = tmp_path / "credit.yaml"
    path.write_text("train:\n")
    notebook = house / "notebooks" / "credit" / "40_train.ipynb"
    assert parameters(notebook, path) == parameters(notebook)


def test_single_values_are_read_as_yaml():
    texts = ["n=3", "rate=0.1", "name=a b", "names=[a, 2]", "on=false", "empty=", "url=x?a=b"]
    values = {"n": 3, "rate": 0.1, "name": "a b", "names": ["a", 2], "on": False, "empty": "", "url": "x?a=b"}
    assert parse_overrides(texts) == values
    for text in ("n", "=3", "n=[1"):
        with pytest.raises(FinureError):
            parse_overrides([text])


def test_a_lock_of_a_dead_process_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "run": "old"}')
    assert holder(tmp_path) is None
    with lock(tmp_path, "credit/40_train", "new"):
        assert holder(tmp_path)["run"] == "new"
    assert holder(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "result.json must be a mapping."),
        ("{", "result.json is not valid JSON"),
        ('{"gate": [1]}', "'gate' must be a mapping."),
        ('{"metrics": 1}', "'metrics' must be a mapping."),
        ('{"gate": {"checks": [1]}}', "the checks of 'gate' must be mappings."),
    ],
)
def test_a_result_of_the_wrong_form_is_refused(tmp_path, text, message):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(FinureError, match=message):
        _result(tmp_path)


def test_a_result_of_the_wrong_form_fails_the_run(house):
    notebook = house / "notebooks" / "credit" / "40_train.ipynb"
    content = nbformat.read(notebook, as_version=4)
    content.cells[-1].source = "from pathlib import Path\n_ = Path(run_dir, 'result.json').write_text('[1]')"
    nbformat.write(content, notebook)
    ended = run("credit/40_train", home=house / "runs", notebooks=house / "notebooks")
    assert (ended.status, ended.exit_code) == ("failed", 1)
    # With its state inside the checkout a run names its folder from there.
    metadata = json.loads((ended.folder / "notebook.ipynb").read_text())["metadata"]
    assert metadata["papermill"]["parameters"]["run_dir"] == f"runs/credit/train/{ended.folder.name}"
    assert "result.json must be a mapping" in ended.page.read_text()
