"`finure runs`: what a person sees of the runs there are, and which of them may go"

import pytest
from typer.testing import CliRunner

from finure.cli.main import app
from finure.run.records import lock, write_record


@pytest.fixture
def home(tmp_path, monkeypatch):
    "Six runs of one job: the first is registered, the second is in progress again, the third is named by the registry."
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    monkeypatch.setattr("finure.registry.versions", lambda: [{"tags": {"run": "20260103T000000Z-0003"}}])
    for day in range(1, 7):
        folder = tmp_path / "credit" / "train" / f"2026010{day}T000000Z-000{day}"
        folder.mkdir(parents=True)
        record = {
            "run": folder.name, "job": "credit/40_train", "status": "done", "started": f"2026-01-0{day}T00:00:00",
            "seconds": 60 + day, "parameters": {"seed": day}, "metrics": {"auc": 0.7 + day / 100},
            "gate": {"checks": [{"name": "auc", "value": 0.7, "text": "auc 0.7, at least 0.6", "passed": True}]},
            "attempts": [{"started": "2026-01-01T00:00:00", "seconds": 61.0, "status": "done", "error": None}],
            "inputs": {"files": {"data": f"abc{day}"}, "code": "c", "key": "k"}, "summary": f"number {day}",
        }  # fmt: skip
        more = {"registered": {"name": "finure-credit", "version": "1"}} if day == 1 else {}
        write_record(folder, record | more | ({"status": "running"} if day == 2 else {}))
    return tmp_path


def said(*words: str) -> str:
    "What a command says; it ends well."
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.output


def test_runs_are_listed_newest_first_and_shown_whole(home):
    listed = said("runs", "ls", "credit", "--status", "done", "-n", "3")
    assert [listed.index(f"number {day}") for day in (6, 5, 4)] == sorted(
        listed.index(f"number {d}") for d in (6, 5, 4)
    )
    assert "number 3" not in listed and "no such run" in said("runs", "ls", "fraud")
    shown = said("runs", "show", "0001")
    for fact in ("parameters: seed", "figure: auc", "gate: auc", "attempt 1", "registered: version", "run.json"):
        assert fact in shown


def test_two_runs_are_compared_in_the_terminal_and_on_a_page(home):
    told = said("runs", "diff", "0004", "0005", "-o", str(home / "page.html"))
    page = (home / "page.html").read_text()
    for text in (told, page):
        assert "0.7400" in text and "0.7500" in text and "abc4" in text and "made no model" in text
    wrong = CliRunner().invoke(app, ["runs", "diff", "000", "0005"])
    assert wrong.exit_code == 1 and "No run is called '000'" in str(wrong.exception)


def test_old_runs_go_only_when_asked_and_never_those_that_are_needed(home):
    job = home / "credit" / "train"
    with lock(job, "credit/40_train", "20260102T000000Z-0002"):
        assert "1 runs" in said("runs", "gc", "--keep", "2")
        assert len(list(job.glob("*/run.json"))) == 6
        assert "1 runs removed" in said("runs", "gc", "--keep", "2", "--remove")
        left = sorted(path.name[-1] for path in job.glob("2026*"))
    assert left == ["1", "2", "3", "5", "6"]
    assert "number 4" not in (home / "index.html").read_text()


def test_the_run_that_a_monitor_compares_with_stays(home):
    for day, train in ((7, 3), (8, 4), (9, None)):  # the last one failed before it found what to compare with
        folder = home / "credit" / "monitor" / f"2026010{day}T000000Z-000{day}"
        folder.mkdir(parents=True)
        named = {"train_run": f"2026010{train}T000000Z-000{train}"} if train else {"status": "failed"}
        record = {"run": folder.name, "job": "credit/60_monitor", "status": "done", "started": f"2026-01-0{day}"}
        write_record(folder, record | named)
    said("runs", "gc", "--keep", "1", "--remove")
    left = sorted(path.name[-1] for path in (home / "credit" / "train").glob("2026*"))
    assert left == ["1", "3", "4", "6"]  # registered; named by the registry; watched; the newest
