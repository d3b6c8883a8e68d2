"""The bank's models as a data scientist hands them over: scikit-learn pipelines that take a pandas frame of raw fields

Nothing here comes from finure: a rival's server loads these classes, pandas, scikit-learn and, for the trees, xgboost.
They do as little as they can to come to the same probability: pandas reads the fields, the rest is numpy.
"""

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin


class Fields(TransformerMixin, BaseEstimator):
    "Raw fields to numbers: levels to their position, and two ratios."

    def __init__(self, names: list[str], levels: dict[str, list], ratios: dict[str, list[str]]):
        self.names, self.levels, self.ratios = names, levels, ratios
        self.positions = {name: {level: i for i, level in enumerate(known)} for name, known in levels.items()}

    def fit(self, frame: pd.DataFrame, bad: object = None) -> "Fields":
        "Nothing is learnt."
        return self

    def transform(self, frame: pd.DataFrame) -> np.ndarray:
        "A matrix of floats."
        return np.column_stack([self._column(frame, name).to_numpy(dtype="float64") for name in self.names])

    def _column(self, frame: pd.DataFrame, name: str) -> pd.Series:
        "One column."
        if name in self.ratios:
            above, below = self.ratios[name]
            return frame[above] / frame[below]
        return frame[name].map(self.positions[name]) if name in self.positions else frame[name]


class Evidence(TransformerMixin, BaseEstimator):
    "Numbers to weights of evidence."

    def __init__(self, bins: list[dict]):  # index, edges, woe (one more than edges), missing, special
        self.bins = bins

    def fit(self, values: np.ndarray, bad: object = None) -> "Evidence":
        "Nothing is learnt: the bins are given."
        return self

    def transform(self, values: np.ndarray) -> np.ndarray:
        "One column per characteristic."
        return np.column_stack([self._column(values[:, b["index"]], b) for b in self.bins])

    @staticmethod
    def _column(values: np.ndarray, b: dict) -> np.ndarray:
        "The weight of evidence of each value."
        woe = np.array(b["woe"])[np.searchsorted(b["edges"], values, side="right").clip(0, len(b["edges"]))]
        for code, special in b["special"].items():
            woe[values == code] = special
        woe[np.isnan(values)] = b["missing"]
        return woe


class Codes(TransformerMixin, BaseEstimator):
    "Values that are codes, moved to columns of their own for the trees."

    def __init__(self, codes: dict[int, list[float]]):  # by position of the feature
        self.codes = codes

    def fit(self, values: np.ndarray, bad: object = None) -> "Codes":
        "Nothing is learnt."
        return self

    def transform(self, values: np.ndarray) -> np.ndarray:
        "The matrix with one more column per feature that has codes."
        values, positions = values.copy(), []
        for i, codes in self.codes.items():
            at = sum((k + 1) * (values[:, i] == code) for k, code in enumerate(codes))
            values[at > 0, i] = np.nan
            positions.append(at)
        return np.column_stack([values, *positions]).astype("float32")


class Calibrated(ClassifierMixin, BaseEstimator):
    "A fitted classifier whose log-odds are straightened."

    def __init__(self, model: object, slope: float, intercept: float):
        self.model, self.slope, self.intercept = model, slope, intercept

    def fit(self, values: np.ndarray, bad: object = None) -> "Calibrated":
        "Fitted already."
        return self

    def __sklearn_is_fitted__(self) -> bool:
        "Always."
        return True

    def predict_proba(self, values: np.ndarray) -> np.ndarray:
        "Probabilities of good and bad."
        raw = self.model.predict_proba(values)[:, 1].astype(float).clip(1e-7, 1 - 1e-7)
        bad = 1 / (1 + np.exp(-(self.intercept + self.slope * np.log(raw / (1 - raw)))))
        return np.column_stack([1 - bad, bad])
