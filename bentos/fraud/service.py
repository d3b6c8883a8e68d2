"""The fraud service: finure's service core with the model bundle that is packed beside this file"""

from pathlib import Path

import bentoml

from finure.serve.bento import FastService


@bentoml.service(name="finure_fraud", service_class=FastService, workers=1)
class Fraud:
    "Decides on card payments; GET /docs describes how to ask."

    bundle = Path(__file__).parent / "bundle"
