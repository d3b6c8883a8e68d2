"""Every notebook runs top to bottom: modules and stories here, jobs through the run door in the other tests"""

import json
import os
import re
from pathlib import Path

import nbdev.test
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path.relative_to(ROOT / "notebooks")
    for path in (ROOT / "notebooks").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts and '"parameters"' not in path.read_text()
)

SIMULATED = {  # long on real data: here they run without
    "credit/20_features.ipynb", "fraud/10_eda.ipynb", "fraud/34_benchmark.ipynb", "denial/10_eda.ipynb",
    "denial/34_benchmark.ipynb",
}  # fmt: skip


@pytest.fixture
def own_environment():
    "What a notebook sets in the environment does not reach the next test."
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_runs_top_to_bottom(notebook, own_environment):
    if notebook.as_posix() in SIMULATED:
        os.environ.pop("FINURE_DATA", None)
    passed, _ = nbdev.test.test_nb(ROOT / "notebooks" / notebook)
    assert passed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_is_of_a_readable_size(notebook):
    cells = json.loads((ROOT / "notebooks" / notebook).read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 60 and max(text.count("\n") for text in code) < 60
    assert not any(re.search(r"^[%!]|import \*", text, re.MULTILINE) for text in code if "#| export" in text)
