"""The credit service: finure's service core with the model bundle that is packed beside this file"""

import bentoml

from finure.serve.app import Scorer
from finure.serve.bento import FastService, packed_scorer


@bentoml.service(name="finure_credit", service_class=FastService, workers=1)
class Credit:
    "Decides credit applications; GET /docs describes how to ask."

    @staticmethod
    def scorer() -> Scorer:
        "The model to decide with; made in the serving process, once."
        return packed_scorer(__file__)
