"""Monitoring a million decisions with twenty features and outcomes: seconds, memory (make bench-monitor)"""

import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from finure.core import Settings, root
from finure.monitor.job import Asked, begin, draw, keep

ROWS, TRAINED = 1_000_000, 20_000
DECIDED = ["approve", "refer", "decline"]


def training_run(home: Path) -> tuple[Path, list[str]]:
    "The folder of a training run with a scorecard of twenty features."
    import explained

    folder = home / "credit" / "train" / "20230701T000000Z-aaaa"
    (folder / "models").mkdir(parents=True)
    scorer = explained.scorer("scorecard")
    explained.bundle("scorecard").rename(folder / "models" / "scorecard")
    path = folder / "models" / "scorecard" / "scorecard.json"
    names, card = scorer.features.names, json.loads(path.read_text())
    known = {one["feature"] for one in card["characteristics"]}
    empty = {"edges": [], "points": [0.0], "missing": 0.0, "special": {}, "reference": 0.0}
    card["characteristics"] += [empty | {"feature": name} for name in names if name not in known]
    path.write_text(json.dumps(card))
    training = explained.fitted()[0]
    rows = np.random.default_rng(0).integers(0, len(training.bad), TRAINED)
    scored = pd.DataFrame(training.values[rows], columns=names).assign(
        part=np.where(np.arange(TRAINED) % 4 == 0, "test", "train"), bad=training.bad[rows],
        pd_scorecard=scorer.model.pds(training.values[rows]),
    )  # fmt: skip
    scored.to_parquet(folder / "scored.parquet")
    metrics = {"auc": 0.77, "auc_lower_bound": 0.75, "auc_upper_bound": 0.79}
    told = {"model_name": "finure-bench", "candidate": "scorecard", "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(told))
    record = {
        "status": "done",
        "product": "credit",
        "started": "2023-07-01T00:00:00+00:00",
        "model_name": "finure-bench",
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder, names


def decisions(folder: Path, names: list[str], home: Path) -> tuple[Path, Path]:
    "An export of the log with a year of decisions, and a table of what became of them."
    rng, scored = np.random.default_rng(1), pd.read_parquet(folder / "scored.parquet")
    drawn = scored.iloc[rng.integers(0, TRAINED, ROWS)].reset_index(drop=True)
    time_of = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(
        np.sort(rng.integers(0, 366 * 86_400, ROWS)), unit="s"
    )
    answer = {
        "decision_id": np.arange(ROWS).astype(str), "at": time_of, "event_time": time_of, "model": "finure-bench:1",
        "decision": np.array(DECIDED)[(drawn["pd_scorecard"] > 0.1).to_numpy() * 2], "pd": drawn["pd_scorecard"],
        "reason_1": np.where(drawn["pd_scorecard"] > 0.1, "DTI", None), "request.application_id": np.arange(ROWS),
    }  # fmt: skip
    table = pd.DataFrame(answer | {f"feature.{name}": drawn[name] for name in names})
    table.to_parquet(home / "export.parquet", index=False)
    bad = (rng.random(ROWS) < drawn["pd_scorecard"]).astype(int)
    known = time_of.tz_localize(None).normalize() + pd.Timedelta(days=365)
    sex = np.where(rng.random(ROWS) < 0.5, "male", "female")
    protected = {"race_group": "white", "sex": sex, "marital": "married", "age_years": 40}
    given = {"application_id": np.arange(ROWS), "bad_12m": bad, "outcome_known_date": known}
    pd.DataFrame(given | protected).to_parquet(home / "outcomes.parquet", index=False)
    return home / "export.parquet", home / "outcomes.parquet"


def watch(folder: str, export: str, outcomes: str, home: str) -> None:
    "What a monitoring run does, in this process."
    start, cpu = time.perf_counter(), time.process_time()
    settings = Settings(home=Path(home))
    files = (export, outcomes, "finure-bench", folder, "", "", "2025-12-31")
    job = begin(Asked(*files, "params/monitor.yaml", "params/fairness.yaml", 0), settings)
    compared = time.perf_counter() - start
    out = Path(home) / "out"
    out.mkdir()
    keep(job, out)
    kept = time.perf_counter() - start
    draw(job, out, Path(home))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    page, figures = (out / "drift.html").stat().st_size / 1e6, len(job.watched.figures)
    print(f"{len(job.decided.frame):,} decisions x {len(job.decided.features)} features, {figures:,} figures")
    print(f"compared {compared:.1f} s, kept {kept - compared:.1f} s, drawn with Evidently {wall - kept:.1f} s")
    print(f"in all {wall:.1f} s ({cpu:.1f} s of CPU), {memory:.2f} GB at most, page {page:.1f} MB")


def main() -> None:
    "Makes the data, then watches in a process of its own, so that its memory is its own."
    import subprocess

    loop = min(_loop() for _ in range(5))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Python {platform.python_version()}, pandas {pd.__version__}, {os.cpu_count()} cores, load {load}")
    print(f"calibration {loop:.3f} s (a free core of this kind: about 0.04 s)")
    with tempfile.TemporaryDirectory() as home:
        folder, names = training_run(Path(home))
        files = decisions(folder, names, Path(home))
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", __file__, str(folder), *map(str, files), home]
        subprocess.run(command, cwd=root(), check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
        print(f"with the start of the process and its imports {time.perf_counter() - start:.1f} s")


def _loop() -> float:
    "Seconds that a plain loop takes."
    start = time.perf_counter()
    [None for i in range(1_000_000) if i * 2 < 0]
    return time.perf_counter() - start


if __name__ == "__main__":
    watch(*sys.argv[1:]) if len(sys.argv) > 1 else main()
