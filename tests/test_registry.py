"""The registry: a bundle in, the same decisions out, and nothing half done"""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from finure.contracts.contract import parse
from finure.core import FinureError, Settings
from finure.credit.decide import ANSWER, Scale, load_scorer
from finure.credit.model import Training, fit_scorecard, policy, write_bundle
from finure.features import FeatureSet
from finure.registry import attach, bundle_of, client, find, register, signature, versions

CONTRACT = parse({
    "contract": "tiny", "version": "1", "title": "Tiny",
    "reasons": {"use": {"category": "UTILISATION", "text": "Proportion of limits in use"}},
    "columns": {
        "on": {"type": "date", "role": "event_time"},
        "use": {"type": "number", "range": [0, 1], "risk": 1, "reason": "use"},
        "count": {"type": "integer", "null": "allowed", "missing": "none", "risk": 1, "reason": "use"},
        "kind": {"type": "category", "levels": [1, 2], "reason": "use"},
        "home": {"type": "category", "levels": ["own", "rent"], "null": "allowed", "reason": "use"},
        "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
    },
})  # fmt: skip
SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}


def applications(n: int) -> pd.DataFrame:
    "Plain rows as another program would have them."
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "on": pd.Timestamp("2024-01-01"), "use": rng.random(n), "count": rng.choice([0, 1, 2, np.nan], n),
        "kind": rng.integers(1, 3, n), "home": rng.choice(["own", "rent", None], n),
    })  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    frame = applications(3000)
    bad = (np.random.default_rng(1).random(3000) < 0.4 * frame["use"]).to_numpy().astype(np.int8)
    training = Training(CONTRACT, FeatureSet(CONTRACT).batch(frame), bad, np.ones(3000), 0)
    card = fit_scorecard(training, Scale(**SCALE))
    pds, limits = card.pds(training.values, list(CONTRACT.model_features())), policy(0.1, 0.5, 0.8)
    folder = tmp_path_factory.mktemp("models") / "scorecard"
    return write_bundle(folder, card, training, pds, limits, SCALE, [0.5, 0.5], {"name": "tiny"})


@pytest.fixture(scope="module")
def registered(bundle, settings) -> dict:
    return register(bundle, "finure-tiny", {"seed": 0}, {"auc": 0.7}, {"run": "r1", "data": "d1"}, [], settings)


def test_a_version_is_found_by_alias_and_number(registered, settings):
    assert registered["version"] == "1"
    row = find("finure-tiny", "challenger", settings)
    assert row["version"] == "1" and row["tags"]["data"] == "d1" and row["metrics"]["auc"] == 0.7
    assert find("finure-tiny", "1", settings) == row == versions("finure-tiny", settings)[0]
    with pytest.raises(FinureError, match="Registered versions: 1"):
        find("finure-tiny", "champion", settings)
    with pytest.raises(FinureError, match="train one first"):
        find("nobody", "challenger", settings)


def test_the_registered_bundle_is_the_one_that_was_given(registered, bundle, settings):
    there = bundle_of("finure-tiny", "1", settings)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in bundle.iterdir()}


def test_another_process_loads_it_and_decides_the_same(registered, bundle, settings, tmp_path):
    rows = applications(20)
    rows.to_parquet(tmp_path / "rows.parquet")
    code = (
        f"import mlflow, pandas; mlflow.set_tracking_uri({settings.tracking()!r});"
        "m = mlflow.pyfunc.load_model('models:/finure-tiny@challenger');"
        f"print(m.predict(pandas.read_parquet({str(tmp_path / 'rows.parquet')!r})).to_json(orient='records'))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        load_scorer(bundle).decide_frame(rows).to_json(orient="records")
    )


def test_the_signature_is_the_contracts(registered, settings):
    import mlflow

    client(settings)
    wanted = signature(CONTRACT, ANSWER)
    assert mlflow.models.get_model_info("models:/finure-tiny/1").signature == wanted
    required = {column.name: column.required for column in wanted.inputs}
    assert required == {"on": False, "use": True, "count": False, "kind": True, "home": False}


def test_files_are_attached_later(registered, settings, tmp_path):
    (tmp_path / "page.html").write_text("the page")
    attach(registered["run_id"], [tmp_path / "page.html"], settings)
    assert "page.html" in [file.path for file in client(settings).list_artifacts(registered["run_id"])]


def test_a_second_version_takes_the_alias(registered, bundle, settings, monkeypatch):
    second = register(bundle, "finure-tiny", {}, {"auc": np.float64(0.8)}, {"run": "r2"}, [], settings)
    assert second["version"] == "2"
    assert [(v["version"], v["aliases"]) for v in versions("finure-tiny", settings)] == [
        ("2", ["challenger"]),
        ("1", []),
    ]
    asked, store = [], client(settings)
    monkeypatch.setattr(type(store), "get_run", lambda self, run_id: asked.append(run_id) or store_run(run_id))
    store_run = store._tracking_client.get_run
    assert find("finure-tiny", "1", settings)["metrics"] and asked == [registered["run_id"]]  # not of every version


def test_what_is_no_bundle_registers_nothing(settings, tmp_path):
    (tmp_path / "contract.yaml").write_text("contract: x\n")
    with pytest.raises(FinureError):
        register(tmp_path, "finure-broken", {}, {}, {}, [], settings)
    assert versions("finure-broken", settings) == []
