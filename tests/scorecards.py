"What the tests of the registry's life share: a scorecard written by hand, ready to decide, and a record like a run's"

import json
from pathlib import Path

import yaml

CONTRACT = {
    "contract": "tiny", "version": "1", "title": "Tiny loans", "description": "Loans for tests.",
    "reasons": {
        "use": {"category": "UTILISATION", "text": "Proportion of limits in use"},
        "income": {"category": "INCOME", "text": "Income insufficient for amount of credit requested"},
    },
    "columns": {
        "ref": {"type": "text", "role": "id"},
        "on": {"type": "date", "role": "event_time"},
        "use": {"type": "number", "range": [0, 1], "risk": 1, "reason": "use"},
        "income": {"type": "integer", "range": [0, 1000], "risk": -1, "reason": "income"},
        "sex": {"type": "category", "levels": ["F", "M"], "role": "protected"},
        "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
    },
}  # fmt: skip
FACTS = {
    "scorer": "finure.credit.decide:load_scorer", "kind": "scorecard", "contract": "tiny", "contract_version": "1",
    "scale": {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0},
    "policy": {"approve_up_to": 0.08, "decline_above": 0.1},
    "grades": [{"grade": "A", "below": 0.05}, {"grade": "B", "below": None}],
    "name": "finure-tiny", "training_rows": 900, "test_rows": 300,
}  # fmt: skip
METRICS = {"auc": 0.71, "auc_lower_bound": 0.69, "auc_upper_bound": 0.73, "psi": 0.01, "reasons_turn": 0.9}


def characteristic(feature: str, edges: list, points: list) -> dict:
    "A feature of the points table."
    return {
        "feature": feature,
        "edges": edges,
        "points": points,
        "missing": points[0],
        "special": {},
        "reference": 310.0,
    }


def scorecard(folder: Path, best: float = 330.0) -> Path:
    "A bundle; `best` points make it another one."
    folder.mkdir(parents=True)
    table = [characteristic("use", [0.1, 0.5], [best, 290.0, 250.0]), characteristic("income", [200.0], [270.0, 320.0])]
    (folder / "scorecard.json").write_text(json.dumps({"characteristics": table, "regression": {}}))
    (folder / "contract.yaml").write_text(yaml.safe_dump(CONTRACT, sort_keys=False))
    (folder / "model.json").write_text(json.dumps(FACTS))
    return folder


def record(folder: Path, passed: bool = True, **more) -> list[Path]:
    "The files that a run keeps with its model."
    folder.mkdir(parents=True, exist_ok=True)
    limit = 0.7 if passed else 0.8
    check = {"name": "auc", "value": 0.71, "limit": limit, "rule": "min", "text": f"auc 0.71, at least {limit}"}
    result = {
        "summary": "AUC 0.71", "candidate": "scorecard", "metrics": METRICS, "split": "By date.", "reject_share": 0.0,
        "gate": {"passed": passed, "checks": [check | {"passed": passed}]},
    }  # fmt: skip
    files = {
        "result.json": json.dumps(result | more), "page.html": "<h1>The run</h1>", "gates.yaml": "default: {}\n",
        "run.json": json.dumps({"run": "r1", "job": "credit/40_train"}), "notebook.ipynb": "{}",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(content)
    return [folder / name for name in files]
