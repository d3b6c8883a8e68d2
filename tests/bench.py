"""Timings of simulating, checking, fitting, scoring and reasons, with their conditions: `make bench`"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from finure.bundle import load_scorer
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load
from finure.credit.decide import Scale
from finure.credit.model import Training, fit_scorecard, fit_trees, policy, write_bundle
from finure.features import FeatureSet
from finure.simulate.bank import Bank, modelling_table, simulate

SEED, N = 0, 100_000
SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}


def timed(work: Callable[[], object], runs: int) -> list[float]:
    "Seconds of several runs."
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    "Prints one row per measurement: rows, median, lowest and highest time, and the rate."
    out, table = Console(soft_wrap=True), Table("what", "rows", "median s", "lowest", "highest", "rows/s")

    def measure(what: str, rows: int, work: Callable[[], object], runs: int = 5) -> None:
        seconds = timed(work, runs)
        middle = statistics.median(seconds)
        shown = [f"{value:.4g}" for value in (middle, min(seconds), max(seconds))]
        table.add_row(what, f"{rows:,}", *shown, f"{rows / middle:,.0f}")

    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    out.print(f"Python {platform.python_version()}, {machine}, seed {SEED}")
    measure("simulate the bank", N, lambda: simulate(Bank(n=N, seed=SEED)), 3)
    contract, raw = load("simulated_bank"), modelling_table(simulate(Bank(n=N, seed=SEED)))
    measure("check against the contract", len(raw), lambda: check(raw, contract), 3)
    clean = check(raw, contract).clean
    features = FeatureSet(contract)
    measure("features, batch", len(clean), lambda: features.batch(clean))
    values, bad = features.batch(clean), good_bad(clean, contract)
    training = Training(contract, values, bad, np.ones(len(bad)), SEED)
    measure("fit the scorecard", len(bad), lambda: fit_scorecard(training, Scale(**SCALE)), 1)
    measure("fit the boosted trees", len(bad), lambda: fit_trees(training), 1)
    with tempfile.TemporaryDirectory() as folder:
        _score(Path(folder), training, clean, measure)
    out.print(table)


def _score(folder: Path, training: Training, clean, measure: Callable) -> None:
    "Scoring and reasons of both models."
    names, limits = list(training.contract.model_features()), policy(0.08, 0.55, 0.8)
    card, trees = fit_scorecard(training, Scale(**SCALE)), fit_trees(training)
    fitted = {"scorecard": (card, card.pds(training.values, names)), "boosting": (trees, trees.out_of_fold)}
    applications = clean.head(1000).astype(object).where(clean.head(1000).notna(), None).to_dict("records")
    for kind, (model, pds) in fitted.items():
        write_bundle(folder / kind, model, training, pds, limits, SCALE, [0.5, 0.5], {"name": kind})
        scorer = load_scorer(folder / kind)
        measure(f"{kind}: PD, batch", len(training.values), lambda s=scorer: s.model.pds(training.values))
        measure(f"{kind}: decide, one by one", 1000, lambda s=scorer: [s.decide(a) for a in applications])
        rows = training.values[:1000].tolist()
        measure(f"{kind}: PD only, one by one", 1000, lambda s=scorer, r=rows: [s.model.pd(row) for row in r])
        measure(f"{kind}: reasons, one by one", 1000, lambda s=scorer, r=rows: [s.reasons(row) for row in r])


if __name__ == "__main__":
    main()
