"A run that was cut off, that is asked for again, or that would give a secret away"

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from finure.core import FinureError
from finure.run.door import How, run

DECLARED = """
data: str = "rows.csv"
fault: str = ""
token_env: str = ""
run_dir: str = ""
"""
FIT = """
import os
from pathlib import Path
from finure.run.stages import Stages

log = Path("log.txt")
Path(run_dir, "models").mkdir()
def fit():
    log.open("a").write("fit ")
    return {"auc": 0.7}
found = Stages(run_dir)("fit", fit)
"""
REST = """
log.open("a").write("rest ")
if fault == "once" and not Path("died").exists():
    Path("died").touch()
    os._exit(1)
print("told:", os.environ.get(token_env, "nothing"))
"""


@pytest.fixture
def house(tmp_path):
    "A checkout with a job that reads nothing but its data, and that dies once if it is told to."
    folder = tmp_path / "house" / "notebooks" / "credit"
    folder.mkdir(parents=True)
    declared = new_code_cell(DECLARED.strip(), metadata={"tags": ["parameters", "repeatable"]})
    cells = [declared, new_markdown_cell("## Fit"), *(new_code_cell(text.strip()) for text in (FIT, REST))]
    nbformat.write(new_notebook(cells=cells), folder / "40_train.ipynb")
    (tmp_path / "house" / "rows.csv").write_text("a\n1\n")
    return tmp_path / "house"


def start(house, how, **overrides):
    "A run with the data of the house."
    asked = {"data": str(house / "rows.csv")} | overrides
    return run("credit/40_train", None, asked, house.parent / "state", house / "notebooks", how)


def test_a_run_that_was_cut_off_goes_on_and_one_without_news_is_not_repeated(house, capsys):
    cut = start(house, How(retries=0), fault="once")
    assert (cut.status, cut.exit_code, len(cut.record["attempts"])) == ("failed", 1, 1)
    ended = start(house, How(resume=True), fault="once")
    assert (ended.status, ended.folder) == ("done", cut.folder)
    assert "goes on with run" in capsys.readouterr().err
    assert (house / "log.txt").read_text() == "fit rest rest "
    assert [tried["status"] for tried in ended.record["attempts"]] == ["failed", "done"]
    assert ended.record["started"] == cut.record["started"]
    again = start(house, How(repeat=False), fault="once")
    assert again.folder == ended.folder and again.exit_code == 0
    assert f"are those of run {ended.folder.name}; nothing was run" in capsys.readouterr().err
    assert len(list(ended.folder.parent.iterdir())) == 2  # the run and the lock
    assert not (ended.folder / "stages").exists() and list(ended.record["inputs"]["files"]) == ["data"]


def test_a_dead_kernel_is_tried_again_and_an_output_with_a_secret_is_refused(house, monkeypatch, capsys):
    hidden = "correct-horse-" + "battery"
    monkeypatch.setenv("OUR_MAIL", hidden)
    ended = start(house, How(retries=1), fault="once", token_env="OUR_MAIL")
    assert "trying again (1 of 1)" in capsys.readouterr().err
    assert (house / "log.txt").read_text() == "fit rest rest "  # the finished stage was not run again
    assert [(tried["error"] or {}).get("name") for tried in ended.record["attempts"]] == ["DeadKernelError", None]
    assert (ended.status, ended.exit_code, ended.record["error"]["name"]) == ("failed", 1, "SecretError")
    assert "notebook.ipynb: $OUR_MAIL" in ended.record["error"]["message"]
    kept = [path.read_text() for path in ended.folder.iterdir() if path.is_file()]
    assert len(kept) == 3 and not any(hidden in text for text in kept)
    assert any("told: [OUR_MAIL]" in text for text in kept)
    with pytest.raises(FinureError, match="not what it holds"):
        start(house, How(), token_env=hidden)


def test_what_makes_no_sense_is_refused():
    for wrong in ({"retries": -1}, {"timeout": 0}):
        with pytest.raises(FinureError, match="--retries is 0 or more, --timeout is more than 0"):
            How(**wrong)
