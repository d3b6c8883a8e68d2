"""A fresh copy of the checkout for tests that use it as a newcomer would"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
LONG = 900  # seconds


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
