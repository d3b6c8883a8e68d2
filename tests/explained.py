"What the tests of explanations share: small scorers of both kinds on the simulated bank, with their reference"

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import xgboost as xgb

from finure.bundle import load_scorer
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load
from finure.core import root
from finure.credit.decide import Scale
from finure.credit.model import FittedTrees, Training, fit_scorecard, policy, tree_parameters, write_bundle
from finure.explain.reasons import just_approved
from finure.explain.reference import make_reference, read_products, write_reference
from finure.features import FeatureSet, TreeColumns
from finure.simulate.bank import Bank, modelling_table, simulate

KINDS = ("scorecard", "boosting")
SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}
LIMITS = policy(gain_good=0.08, loss_bad=0.5, refer_from=0.8)
ROUNDS = 60
KEPT = tempfile.TemporaryDirectory()


@cache
def applications() -> list[dict]:
    "Applications as a service gets them, the clean rows they came from, and their outcome."
    contract = load("simulated_bank")
    clean = check(modelling_table(simulate(Bank(n=4000, seed=5))), contract).clean
    return clean, good_bad(clean, contract), clean.astype(object).where(clean.notna(), None).to_dict("records")


def trees(training: Training) -> FittedTrees:
    "Few trees, calibrated by nothing: quick, and monotone like any others."
    rows = TreeColumns(training.contract).batch(training.values)
    booster = xgb.train(tree_parameters(training), xgb.DMatrix(rows, training.bad), ROUNDS)
    return FittedTrees(booster, ROUNDS, 1.0, 0.0, booster.predict(xgb.DMatrix(rows)).astype(float))


@cache
def fitted() -> tuple[Training, dict]:
    "The training rows, and both models."
    clean, bad, _ = applications()
    contract = load("simulated_bank")
    training = Training(contract, FeatureSet(contract).batch(clean), bad, np.ones(len(bad)), seed=0)
    return training, {"scorecard": fit_scorecard(training, Scale(**SCALE)), "boosting": trees(training)}


def train_pds(kind: str) -> np.ndarray:
    "The PD of the training rows."
    training, models = fitted()
    names = list(training.contract.model_features())
    return models[kind].pds(training.values, names) if kind == "scorecard" else models[kind].out_of_fold


@cache
def bundle(kind: str) -> Path:
    "A bundle with its reference."
    training, models = fitted()
    made = write_bundle(
        Path(KEPT.name, kind), models[kind], training, train_pds(kind), LIMITS, SCALE, [0.5, 0.5], {"name": "small"}
    )
    near = applications()[0].iloc[just_approved(train_pds(kind), LIMITS["approve_up_to"])]
    offered = read_products(root() / "params" / "products.yaml", training.contract)
    write_reference(make_reference(load_scorer(made).features, near, offered), made)
    return made


@cache
def scorer(kind: str):
    "The scorer of the bundle."
    return load_scorer(bundle(kind))


@cache
def refused(kind: str) -> list[dict]:
    "Applications that are not approved."
    return [a for a in applications()[2] if scorer(kind).decide(a).answer["decision"] != "approve"]
