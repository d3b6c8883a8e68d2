"""An empty service of BentoML's: what starting costs before anything of ours is loaded"""

import bentoml


@bentoml.service(workers=1)
class Empty:
    "Says that it is there."

    @bentoml.api
    def ping(self) -> str:
        "A constant."
        return "here"
