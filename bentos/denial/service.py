"""The denial service: finure's service core with the model bundle that is packed beside this file"""

from pathlib import Path

import bentoml

from finure.serve.bento import FastService


@bentoml.service(name="finure_denial", service_class=FastService, workers=1)
class Denial:
    "Decides on applications and says why they would be denied; GET /docs describes how to ask."

    bundle = Path(__file__).parent / "bundle"
