"""Timings of simulating, checking, fitting, deciding and reasons, one thread, with their conditions: `make bench`"""

import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xgboost as xgb
from rich.console import Console
from rich.table import Table

from finure.bundle import load_scorer
from finure.contracts.check import check, good_bad
from finure.contracts.contract import REQUEST_ROLES, Contract, load
from finure.core import FinureError, Settings
from finure.credit.data import load_table
from finure.credit.decide import CreditScorer, Scale
from finure.credit.model import BOOSTING, FittedTrees, Training, fit_scorecard, fit_trees, policy, write_bundle
from finure.features import FeatureSet, TreeColumns
from finure.score import score
from finure.simulate.bank import Bank, modelling_table, simulate

SEED, N = 0, 100_000
SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}
LIMITS = policy(0.08, 0.55, 0.8)
PORTFOLIOS = {"simulated_bank": None, "lendingclub": "lendingclub_2007_2011", "taiwan": "taiwan_credit_card_default"}
APPLICATIONS = 3_000  # distinct ones, decided one by one
TRAINED_ON, EXPLAINED = 20_000, 1_000  # rows
FILE = 300_000  # rows of a file that `finure score` works on


def main() -> None:
    "Prints the conditions and four tables."
    out = Console(soft_wrap=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    out.print(f"Python {platform.python_version()}, {machine}, seed {SEED}")
    clean = research(out)
    single = Table("contract", "model", "features", "approved", "refused", "reasons alone", "used", title=(
        f"One application, microseconds of wall time: median over {APPLICATIONS:,} distinct applications"))  # fmt: skip
    whole = Table("contract", "model", "features", "decided, none refused", "reasons of refused rows",
                  "features and decisions as they come", "of these refused", title=(
        "A table: rows per second of one core's time"))  # fmt: skip
    files = Table("model", "file", "rows", "seconds", "rows/s", title="`finure score` on a file, one core's time")
    for name, data in PORTFOLIOS.items():
        contract = load(name)
        try:
            rows = clean if data is None else load_table(data, contract).clean
        except FinureError as error:
            out.print(f"{name} left out: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for model, scorer in scorers(contract, rows, Path(folder)):
                single.add_row(name, model, *one_by_one(scorer, rows))
                whole.add_row(name, model, *by_table(scorer, rows))
            if data is None:
                for row in by_file(contract, rows, Path(folder)):
                    files.add_row(*row)
    out.print(single, whole, files)


def research(out: Console) -> pd.DataFrame:
    "Times what happens before there is a model; gives the simulated bank's clean rows."
    table = Table("what", "rows", "median s", "lowest", "highest", "rows/s", title="Research, wall time")

    def measure(what: str, rows: int, work: Callable[[], object], runs: int = 5) -> None:
        seconds = timed(work, runs, time.perf_counter)
        middle = statistics.median(seconds)
        shown = [f"{value:.4g}" for value in (middle, min(seconds), max(seconds))]
        table.add_row(what, f"{rows:,}", *shown, f"{rows / middle:,.0f}")

    measure("simulate the bank", N, lambda: simulate(Bank(n=N, seed=SEED)), 3)
    contract, raw = load("simulated_bank"), modelling_table(simulate(Bank(n=N, seed=SEED)))
    measure("check against the contract", len(raw), lambda: check(raw, contract), 3)
    clean = check(raw, contract).clean
    training = training_rows(contract, clean)
    measure("fit the scorecard", len(training.bad), lambda: fit_scorecard(training, Scale(**SCALE)), 1)
    measure("fit the boosted trees", len(training.bad), lambda: fit_trees(training), 1)
    out.print(table)
    return clean


def timed(work: Callable[[], object], runs: int, clock: Callable[[], float]) -> list[float]:
    "Seconds of several runs."
    seconds = []
    for _ in range(runs):
        started = clock()
        work()
        seconds.append(clock() - started)
    return seconds


def training_rows(contract: Contract, clean: pd.DataFrame) -> Training:
    "Rows to train on: speed is measured here, not skill."
    rows = clean.sample(min(TRAINED_ON, len(clean)), random_state=SEED)
    bad = good_bad(rows, contract)
    return Training(contract, FeatureSet(contract).batch(rows), bad, np.ones(len(bad)), SEED)


def scorers(contract: Contract, clean: pd.DataFrame, folder: Path) -> Iterable[tuple[str, CreditScorer]]:
    "A scorecard, and boosted trees of the sizes that are usual, each loaded from its bundle."
    training = training_rows(contract, clean)
    card = fit_scorecard(training, Scale(**SCALE))
    models = {"scorecard": (card, card.pds(training.values, list(contract.model_features())))}
    for rounds, depth in ((100, 6), (300, 6), (400, 3)):
        trees = grow(training, rounds, depth)
        models[f"{rounds} trees, depth {depth}"] = trees, trees.out_of_fold
    for name, (model, pds) in models.items():
        yield name, load_scorer(write_bundle(folder / name, model, training, pds, LIMITS, SCALE, [0.5, 0.5], {}))


def grow(training: Training, rounds: int, depth: int) -> FittedTrees:
    "Trees of a given number and depth."
    columns = TreeColumns(training.contract)
    settings = BOOSTING | {"max_depth": depth, "objective": "binary:logistic", "nthread": 1, "seed": SEED}
    rows = columns.batch(training.values)
    settings["monotone_constraints"] = tuple(columns.monotone)
    booster = xgb.train(settings, xgb.DMatrix(rows, training.bad), rounds)
    return FittedTrees(booster, rounds, 1.0, 0.0, booster.predict(xgb.DMatrix(rows)).astype(float))


def applications(contract: Contract, clean: pd.DataFrame) -> list[dict]:
    "Applications as the service reads them: plain values, dates as dates."
    rows = clean.sample(min(APPLICATIONS, len(clean)), random_state=SEED)
    rows = rows[[name for name in contract.named(*REQUEST_ROLES) if name in rows]]
    columns = {}
    for name, column in rows.items():
        values = column.dt.date if contract.columns[name].type == "date" else column
        columns[name] = values.astype(object).where(column.notna(), None)
    return pd.DataFrame(columns).to_dict("records")


def one_by_one(scorer: CreditScorer, clean: pd.DataFrame) -> list[str]:
    "Median microseconds of the features, of a decision that approves and of one that does not, and of reasons alone."
    asked = applications(scorer.contract, clean)
    approved = [a for a in asked if scorer.decide(a).answer["decision"] == "approve"]
    refused = [a for a in asked if scorer.decide(a).answer["decision"] != "approve"]
    seen = [scorer.model.read(scorer.features.online(a)) for a in refused]
    gc.collect()
    gc.freeze()
    work = {scorer.features.online: asked, scorer.decide: approved}
    medians = [median_us(do, items) for do, items in work.items()]
    medians += [median_us(scorer.decide, refused), median_us(lambda s: scorer.principal.of(scorer.model.hurt(s)), seen)]
    return [*(f"{value:.1f}" for value in medians), str(len(scorer.features.used))]


def median_us(do: Callable, items: Sequence) -> float:
    "The median time of one call in microseconds; the best of three passes, for a machine that does other things, too."
    passes = []
    for _ in range(3):
        took = []
        for item in items:
            started = time.perf_counter_ns()
            do(item)
            took.append(time.perf_counter_ns() - started)
        passes.append(statistics.median(took))
    return min(passes) / 1000


def by_table(scorer: CreditScorer, clean: pd.DataFrame) -> list[str]:
    "Rows per second of one core's time: of each part, and of a table as it comes."
    rows = clean.head(TRAINED_ON)
    values = scorer.features.batch(rows)
    decision = scorer.bands.table(scorer.model.pds(values))[1]
    most = len(rows) if scorer.facts["kind"] == "scorecard" else EXPLAINED
    approved, refused = values[decision == "approve"], values[decision != "approve"][:most]
    rates = [
        rate(scorer.features.batch, rows),
        rate(scorer.decide_table, approved),
        rate(lambda part: scorer.principal.table(scorer.model.hurts(part)), refused),
        rate(lambda part: scorer.decide_table(scorer.features.batch(part)), rows.head(most)),
    ]
    return [*(f"{value:,.0f}" for value in rates), f"{np.mean(decision[:most] != 'approve'):.0%}"]


def by_file(contract: Contract, clean: pd.DataFrame, folder: Path) -> Iterable[list[str]]:
    "Time for files of applications, from reading them to the record in the log."
    rows = clean[[name for name in contract.named(*REQUEST_ROLES) if name in clean]]
    rows = pd.concat([rows] * -(-FILE // len(rows)), ignore_index=True).head(FILE)
    rows[contract.one("id")] = np.arange(FILE) + 1_000_001
    rows.to_parquet(folder / "rows.parquet")
    rows.to_csv(folder / "rows.csv", index=False)
    for model in ("scorecard", "100 trees, depth 6"):
        for source in ("rows.parquet", "rows.csv"):
            asked = folder / source, folder / "out.parquet", folder / model
            seconds = min(timed(lambda: score(*asked, settings=Settings(home=folder)), 2, time.process_time))  # noqa: B023
            yield [model, source, f"{FILE:,}", f"{seconds:.1f}", f"{FILE / seconds:,.0f}"]


def rate(do: Callable, rows: Sequence) -> float:
    "Rows per second of this thread's time, the best of five."
    return len(rows) / min(timed(lambda: do(rows), 5, time.thread_time))


if __name__ == "__main__":
    main()
