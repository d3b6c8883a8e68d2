"""The project as a whole: what the package, the lock and the documents promise together"""

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from papermill import inspect_notebook

import finure
from finure.contracts.contract import load
from finure.explain.reference import read_products
from finure.features import FeatureSet

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def tracked() -> list[Path]:
    "The files git knows."
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in names.decode().split("\0") if name and (ROOT / name).is_file()]


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "notebooks", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "finure").mkdir()
    (tmp_path / "finure" / "__init__.py").write_text(f'__version__ = "{finure.__version__}"\n')
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)

    def modules(folder: Path) -> dict[str, str]:
        "Every module by name, but for the file nbdev keeps for itself."
        found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}
        return {name: text for name, text in found.items() if name != "_modidx.py"}

    assert modules(tmp_path / "finure") == modules(ROOT / "finure")


def test_notebooks_are_clean():
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        tags = [tag for cell in notebook["cells"] for tag in cell["metadata"].get("tags", [])]
        assert "injected-parameters" not in tags, f"{path.name} is the output of a run"
        assert notebook["cells"][0]["cell_type"] == "markdown", f"{path.name} does not begin with its title"
        assert path.stat().st_size < 400_000, f"{path.name} holds too much output"
        text = path.read_text()
        assert "<<<<<<<" not in text and ">>>>>>>" not in text, f"{path.name} holds a conflict"


def test_modules_and_training_jobs_carry_no_outputs():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        exports = any("default_exp" in "".join(cell["source"]) for cell in cells)
        if exports or re.match(r"\d0_(train|report|monitor)", path.name):
            assert not any(cell.get("outputs") for cell in cells), f"{path.name} carries outputs"


JOBS = {"train": "40_train", "report": "50_report", "monitor": "60_monitor", "story": "70_story"}
PRODUCT = {
    "fraud": "fraud",
    "simulated_cards": "fraud",
    "denial": "denial",
    "simulated_denial": "denial",
}  # of a params file; the others are credit's


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_params_files_are_understood_by_their_jobs(path):
    content = yaml.safe_load(path.read_text())
    if path.stem == "gates":
        contracts = {p.stem for p in (ROOT / "data" / "contracts").glob("*.yaml")}
        assert set(content) - {"default", "promotion"} <= contracts
        return
    if path.stem == "products":
        assert all(read_products(path, load(contract)) for contract in content)
        return
    if path.stem in ("fraud_rules", "notices", "fairness", "schedule", "monitor", "alerts", "challenge"):
        return  # no job's parameters: tests/test_fraud_rules.py, test_notices.py, ... read them
    for section, values in content.items():
        known = inspect_notebook(str(ROOT / "notebooks" / PRODUCT.get(path.stem, "credit") / f"{JOBS[section]}.ipynb"))
        assert set(values) <= set(known), f"{path.name}: {section}"


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "contracts").glob("*.yaml")), ids=lambda p: p.stem)
def test_contracts_hold_together(path):
    contract = load(path)
    assert contract.contract == path.stem
    FeatureSet(contract)
    used = {about.reason for about in contract.model_features().values()}
    assert used == set(contract.reasons), "a reason that no feature stands for, or the other way round"


def test_requirements_are_locked_with_hashes_and_without_addresses():
    locked = {m.lower() for m in re.findall(r"^([A-Za-z0-9._-]+)==", LOCK, re.MULTILINE)}
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [*PYPROJECT["project"]["dependencies"], *(r for group in extras.values() for r in group)]
    for requirement in map(Requirement, wanted):
        assert requirement.name.lower() in locked, f"{requirement.name} is not in requirements.lock; run `make lock`"
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", LOCK, re.MULTILINE))
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement
    assert "://" not in LOCK
    assert not re.search(r"^-", LOCK, re.MULTILINE), "an option, such as the address of an index"
    assert LOCK.count("--hash=sha256:") > len(locked)


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert "-r requirements.lock" in pip and "--require-hashes" in pip
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert Requirement("python" + PYPROJECT["project"]["requires-python"]).specifier.contains(python.partition("=")[2])


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert settings["DEFAULT"]["version"] == finure.__version__


def test_only_the_agreed_names_stand_at_the_top():
    agreed = {
        "notebooks", "finure", "bentos", "data", "params", "tests", "settings.ini", "environment.yml", "Makefile",
        "README.md", "pyproject.toml", "requirements.lock", "LICENSE",
    }  # fmt: skip
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= agreed


def test_no_data_and_no_machine_in_the_repository():
    suffixes = {".parquet", ".csv", ".pkl", ".pickle", ".db", ".sqlite", ".onnx", ".joblib"}
    for path in tracked():
        assert path.suffix not in suffixes, path
        if path.suffix in {".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".ini"} and path != Path(__file__):
            assert not re.search(r"(?<![\w.])/(Users|root|work)/", path.read_text()), path


HEAVY = ("pandas", "mlflow", "shap", "evidently", "xgboost", "sklearn", "matplotlib", "nbdev", "fastcore", "IPython")


def test_the_serving_process_stays_small():
    code = f"import sys, finure.credit.decide, finure.serve.bento; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exported_modules_do_not_need_the_notebook_tools():
    for path in (ROOT / "finure").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore|IPython)", path.read_text(), re.MULTILINE), path
