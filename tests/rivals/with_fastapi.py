"""A service as most tutorials write it: FastAPI, joblib, one data frame per request"""

import os

import joblib
import pandas as pd
from application import Application
from fastapi import FastAPI

app = FastAPI()
model = joblib.load(os.environ["RIVAL_MODEL"])
limit = float(os.environ["RIVAL_LIMIT"])


@app.get("/ready")
def ready() -> dict:
    "Whether requests are answered."
    return {"status": "ready"}


@app.post("/predict")
def predict(application: Application) -> dict:
    "The probability of default and the decision; no reasons, no record."
    risk = float(model.predict_proba(pd.DataFrame([application.model_dump()]))[0, 1])
    return {"id": application.application_id, "pd": risk, "decision": "decline" if risk > limit else "approve"}
