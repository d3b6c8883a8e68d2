"""A service as BentoML's documentation writes it: `@bentoml.api`, a typed body, joblib, one data frame per request"""

import os

import bentoml
import joblib
import pandas as pd
from application import Application


@bentoml.service(workers=1)
class Rival:
    "The bank's model."

    def __init__(self) -> None:
        self.model = joblib.load(os.environ["RIVAL_MODEL"])
        self.limit = float(os.environ["RIVAL_LIMIT"])

    @bentoml.api
    def predict(self, application: Application, /) -> dict:
        "The probability of default and the decision; no reasons, no record."
        risk = float(self.model.predict_proba(pd.DataFrame([application.model_dump()]))[0, 1])
        return {"id": application.application_id, "pd": risk, "decision": "decline" if risk > self.limit else "approve"}
