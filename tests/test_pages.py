"The pages: readable without code, without any other host, and true about what went wrong."

import json
import os
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from finure.core import FinureError
from finure.run.pages import MAX_BYTES, banner_of, index, page, render
from finure.run.records import lock, read_record, write_record

RECORD = {
    "run": "20261121T053000Z-1a2b",
    "product": "credit",
    "job": "credit/50_report",
    "status": "done",
    "started": "2026-11-21T05:30:00+00:00",
    "seconds": 12.3,
    "exit_code": 0,
    "params_file": "params/credit.yaml",
    "parameters": {"n": 1},
}


def made(home, run="r1", job="credit/50_report", cells=(), **more):
    "The folder of a run that has ended."
    folder = home / job.split("/")[0] / job.rpartition("_")[2] / run
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=list(cells)), folder / "notebook.ipynb")
    write_record(folder, RECORD | {"run": run, "job": job, "product": job.split("/")[0]} | more)
    return folder


def html_output(html):
    return new_code_cell(outputs=[new_output("display_data", data={"text/html": html})])


def test_a_page_loads_and_runs_nothing(tmp_path):
    foreign = (
        "<script src='https://cdn.example.org/a.js'></script><script>fetch('https://example.org')</script>"
        "<link rel='stylesheet' href='https://example.org/a.css'><iframe srcdoc='x'></iframe>"
        "<table><tr><td>7</td></tr></table>"
        "<style>@import url(https://example.org/b.css); td { color: red }</style><img alt='p' src='https://example.org/p.png'>"
    )
    cells = [new_markdown_cell("# Title\n\n$x$ ![pic](https://example.org/q.png)"), html_output(foreign)]
    cells.append(new_code_cell(outputs=[new_output("display_data", data={"application/javascript": "alert(1)"})]))
    text = page(made(tmp_path, cells=cells)).read_text()
    assert "<td>7</td>" in text and "td { color: red }" in text
    assert "example.org" not in text and "<script" not in text and "iframe" not in text and "alert(1)" not in text
    assert "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text


def test_a_page_shows_results_and_no_code(tmp_path):
    outputs = [
        new_output("stream", name="stdout", text="a figure: 42"),
        new_output("stream", name="stderr", text="\x1b[31mFutureWarning\x1b[0m: old <b>"),
    ]
    cells = [
        new_markdown_cell("# Quality"),
        new_code_cell("secret_code()", outputs=outputs),
        new_code_cell("more_code()"),
    ]
    text = page(made(tmp_path, cells=cells)).read_text()
    assert "Quality</h1>" in text and "a figure: 42" in text
    assert "secret_code" not in text and "more_code" not in text
    assert re.search(r"<details><summary>Messages of the program</summary><pre>FutureWarning: old &lt;b&gt;", text)


def test_an_error_is_a_box_with_plain_text(tmp_path):
    error = new_output(
        "error", ename="ValueError", evalue="<bad> value", traceback=["\x1b[0;31mValueError\x1b[0m: line 1"]
    )
    note = new_markdown_cell("An Exception was encountered", metadata={"tags": ["papermill-error-cell-tag"]})
    failed = {"status": "failed", "error": {"name": "ValueError", "message": "<bad> value", "stage": "Fit"}}
    text = page(made(tmp_path, cells=[note, new_code_cell(outputs=[error])], **failed)).read_text()
    assert '<div class="error"><strong>ValueError</strong><p>&lt;bad&gt; value</p>' in text
    assert "\x1b" not in text and "[0;31m" not in text and "An Exception was encountered" not in text
    assert text.index("This run failed at “Fit”") < text.index('<div class="error">')


def test_a_page_stays_small(tmp_path):
    big = new_output("display_data", data={"image/png": "A" * 4_000_000})
    other = new_output("display_data", data={"image/png": "B" * 3_000_000})
    folder = made(tmp_path, cells=[new_code_cell(outputs=[big, other])])
    path = page(folder)
    assert 3_000_000 < path.stat().st_size < MAX_BYTES
    assert "An output of 4.0 MB is left out" in path.read_text()


def test_half_a_notebook_still_makes_a_page(tmp_path):
    folder = made(tmp_path, status="killed", error={"message": "It got the signal SIGTERM."})
    (folder / "notebook.ipynb").write_text('{"cells": [')
    text = page(folder).read_text()
    assert "This run was stopped, before its end" in text and "It got the signal SIGTERM." in text
    (folder / "notebook.ipynb").unlink()
    assert "ended before a notebook was written" in page(folder).read_text()


def test_a_gate_names_each_check_that_did_not_pass():
    checks = [
        {"name": "ECE", "value": 0.031, "limit": 0.02, "rule": "max", "passed": False},
        {"name": "AUC", "value": 0.71, "limit": 0.695, "rule": "min", "passed": True},
        {"name": "IV", "text": "IV of grade is unexplained", "passed": False},
    ]
    banner = banner_of({"status": "gate", "gate": {"checks": checks}, "error": {"message": "not passed"}})
    assert banner["points"] == ["ECE: 0.031, at most 0.02 is asked for; 0.011 away", "IV of grade is unexplained"]
    assert banner_of({"status": "gate", "error": {"message": "AUC 0.6 is too low"}})["text"] == "AUC 0.6 is too low"
    assert banner_of({"status": "done"}) is None


def test_a_story_is_rendered_without_a_record(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Who applies")]), tmp_path / "story.ipynb")
    text = render(tmp_path / "story.ipynb", tmp_path / "story.html", "Who applies").read_text()
    assert "<title>Who applies</title>" in text and "Who applies</h1>" in text and "run.json" not in text


def test_the_list_is_newest_first_and_leads_everywhere(tmp_path):
    metrics = {"auc": 0.70123, "ks": 0.31, "other": "x"}
    old = made(tmp_path, "r1", started="2026-11-20T05:30:00+00:00", summary="old report")
    train = made(tmp_path, "r2", "credit/40_train", started="2026-11-21T06:00:00+00:00", metrics=metrics)
    new = made(tmp_path, "r3", started="2026-11-21T07:00:00+00:00", summary="new report")
    other = made(tmp_path, "r4", params_file="params/taiwan.yaml", started="2026-11-19T07:00:00+00:00", seconds=75)
    broken = made(tmp_path, "r5", status="failed", started="2026-11-21T08:00:00+00:00", error={"message": "no\nmore"})
    for folder in (old, train, new, other):
        page(folder)
    path = index(tmp_path)
    text = path.read_text()
    top, _, rows = text.partition("All runs, newest first")
    assert re.findall(r'class="sub">(r\d)<', rows) == ["r5", "r3", "r2", "r1", "r4"]
    assert re.findall(r'href="([^"]+)"', top) == ["credit/report/r3/page.html", "credit/report/r4/page.html"]
    assert "AUC 0.7012" in rows and "KS 0.3100" in rows and "1 min 15 s" in rows and "<td>no</td>" in rows
    links = re.findall(r'href="([^"]+)"', text)
    assert all((path.parent / link).is_file() for link in links)
    assert "credit/report/r5/page.html" not in links and f"{broken.relative_to(tmp_path)}/run.json" in links
    back = re.search(r'href="([^"]+)">all runs', (new / "page.html").read_text()).group(1)
    assert (new / back).resolve() == path.resolve()


def test_the_list_escapes_what_runs_say(tmp_path):
    made(tmp_path, summary="<img src=x onerror=alert(1)>", job="credit/50_report", status="<i>")
    text = index(tmp_path).read_text()
    assert "<img" not in text and "<i>" not in text and "&lt;img" in text


@pytest.mark.parametrize("damage", ["{", "[]", '"text"'])
def test_a_damaged_record_does_not_stop_the_list(tmp_path, damage):
    made(tmp_path, "good")
    (made(tmp_path, "bad") / "run.json").write_text(damage)
    assert "good" in index(tmp_path).read_text()
    with pytest.raises(FinureError, match="bad: run.json"):
        read_record(tmp_path / "credit" / "report" / "bad")


def test_odd_figures_do_not_stop_the_list(tmp_path):
    made(tmp_path, metrics={"auc": None, "ks": "high", "ece": float("nan")}, seconds=None)
    made(tmp_path, "r2", started=None)
    assert "credit/50_report" in index(tmp_path).read_text()


def test_the_list_of_no_runs(tmp_path):
    text = index(tmp_path / "new").read_text()
    assert "No run yet" in text and "0 runs" in text


def test_a_run_is_alive_while_its_lock_is_held(tmp_path):
    folder = made(tmp_path, status="running", pid=os.getpid())
    with lock(folder.parent, "credit/50_report", "r1"):
        index(tmp_path)
        assert json.loads((folder / "run.json").read_text())["status"] == "running"
    text = index(tmp_path).read_text()
    record = read_record(folder)
    assert (record["status"], record["exit_code"]) == ("killed", 137)
    assert ">stopped<" in text and (folder / "page.html").is_file()
