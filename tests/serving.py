"""What the tests of the service share: a small scorer, its bundles, requests without a socket, a running server"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

SCORER = '''
"""A scorer for tests: declines large amounts"""

import json

from finure.bundle import Decided
from finure.contracts.contract import parse

TITLES = {"contract": "test", "version": "1", "title": "Test loans"}
REASONS = {"size": {"category": "OTHER", "text": "Amount too large"}}
COLUMNS = {
    "ref": {"type": "text", "role": "id"},
    "applied": {"type": "date", "role": "event_time"},
    "amount": {"type": "integer", "range": [500, 50000], "reason": "size"},
    "income": {"type": "number", "range": [0, 1000000], "reason": "size"},
    "months": {"type": "integer", "range": [0, 800], "special": {-9: "no record"}, "null": "allowed", "reason": "size"},
    "home": {"type": "category", "levels": ["OWN", "RENT"], "reason": "size"},
    "grade": {"type": "category", "levels": [1, 2, 3], "ordered": True, "null": "allowed", "reason": "size"},
    "insured": {"type": "boolean", "null": "allowed", "role": "input"},
    "since": {"type": "date", "range": ["1990-01-01", "2026-01-01"], "null": "allowed", "role": "input"},
    "story": {"type": "text", "role": "input", "null": "allowed"},
    "sex": {"type": "category", "levels": ["F", "M"], "role": "protected"},
}


class Scorer:
    answer_schema = {"pd": {"type": "number"}, "decision": {"enum": ["approve", "decline"]}}
    score_bounds = (100, 200)

    def __init__(self, bundle=None):
        facts = json.loads((bundle / "model.json").read_text()) if bundle else {"version": "7"}
        self.fault = facts.get("fault")
        name = "other" if self.fault == "contract" else "test"
        self.contract = parse(TITLES | {"contract": name, "reasons": REASONS, "columns": COLUMNS})
        self.info = {"name": "finure-test", "version": facts["version"], "metrics": {"auc": 0.7}}
        self.most = json.loads((bundle / "weights.json").read_text())["most"] if bundle else 10_000

    def decide(self, application, explain=False):
        if application.get("story") == "fail" or self.fault == "raises":
            raise KeyError(f"secret {application}")
        large = application["amount"] > self.most
        reasons = [{"code": "OTHER", "text": "Amount too large"}] if large or explain else []
        pd = float("nan") if self.fault == "nan" else application["amount"] / 3e5
        answer = {"pd": pd, "decision": "decline" if large else "approve", "reasons": reasons}
        return Decided(answer, {"features": {"amount": application["amount"]}})

    def decide_batch(self, applications):
        return [self.decide(application) for application in applications]


def load(bundle=None):
    return Scorer(bundle)
'''
MODULE = types.ModuleType("finure.served_in_tests")
exec(SCORER, MODULE.__dict__)
sys.modules[MODULE.__name__] = MODULE  # a bundle names it like any other module of finure

VALID = {
    "ref": "A-1", "applied": "2024-05-06", "amount": 30_000, "income": 52_000.5, "months": -9, "home": "RENT",
    "grade": 2, "insured": True, "since": "2001-02-03", "story": "a kitchen",
}  # fmt: skip
GOOD = json.dumps(VALID).encode()
JSON = {"content-type": "application/json"}
PREDICT, BATCH, SIMULATE = "/api/v1/predict", "/api/v1/batch-predict", "/api/v1/simulate"

LENDER = {"name": "Sample Lender", "address": ["1 First Street"], "phone": "555-0100"}
CREDITOR = {  # the file that FINURE_NOTICES names
    "creditor": LENDER, "reasons_office": LENDER, "agencies": ["ftc"], "credit": "a personal loan", "time_zone": "UTC",
    "contracts": ["simulated_bank", "simulated_denial"], "consumer_report": False, "score_used": False,
    "outside_information": False, "home_loans": ["simulated_denial"],
}  # fmt: skip


def body(**changes) -> bytes:
    "A valid application with some values of its own."
    return json.dumps(VALID | changes).encode()


def bundle(folder: Path, version="7", most=10_000, **facts) -> Path:
    "A bundle of the scorer; it declines amounts above `most`."
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"scorer": f"{MODULE.__name__}:load", "version": version} | facts))
    (folder / "weights.json").write_text(json.dumps({"most": most}))
    return folder


async def ask(app, path, body=None, headers=None, query=b"", caller=("127.0.0.1", 5), method=None):
    "Status, headers and body of one request, without a socket."
    sent, headers = [], JSON | (headers or {})
    scope = {
        "type": "http", "path": path, "method": method or ("GET" if body is None else "POST"), "query_string": query,
        "client": caller, "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body or b""}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], names, b"".join(message.get("body", b"") for message in sent[1:])


def call(*args, **kwargs):
    "`ask`, with an event loop of its own."
    return asyncio.run(ask(*args, **kwargs))


def problem(status, answer) -> dict:
    "The content of an answer that must be this problem."
    got, headers, content = answer
    assert (got, headers["content-type"]) == (status, "application/problem+json"), content
    told = json.loads(content)
    assert told["status"] == status and {"type", "title", "detail"} <= set(told)
    return told


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(folder: Path, served: Path, **settings):
    "A server process of a bundle: its port and the process; settings as FINURE_... without the prefix."
    port = free_port()
    given = {f"FINURE_{name.upper()}": str(value) for name, value in settings.items()}
    environment = os.environ | {"FINURE_HOME": str(folder), "OMP_NUM_THREADS": "1"} | given
    with (folder / "server.log").open("ab") as log:
        command = [sys.executable, __file__, str(served), str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_ready(process, port, folder / "server.log")
            yield port, process
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process, port, log):
    "Returns when the server answers."
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


async def killable(scope, receive, send):
    "The service for the test that kills it: a text sent to /decide is the reference of an application."
    if scope["type"] == "lifespan":
        from finure.core import Settings
        from finure.serve.service import service

        killable.app = service(Settings().bundle)
        return await killable.app(scope, receive, send)

    async def application():
        return {"type": "http.request", "body": body(ref=(await receive())["body"].decode())}

    key = dict(scope["headers"])[b"idempotency-key"].replace(b" ", b"-")
    scope = scope | {"path": PREDICT, "headers": [(b"content-type", b"application/json"), (b"idempotency-key", key)]}
    await killable.app(scope, application, send)


def main(served: str, port: str) -> None:
    "Serves a bundle as `finure serve` does, without BentoML around it."
    import signal

    import uvicorn

    from finure.core import Settings
    from finure.serve.connection import use_connections
    from finure.serve.logs import log_to_stderr
    from finure.serve.service import service

    log_to_stderr("INFO")
    use_connections()
    settings = Settings()
    app = service(Path(served), settings=settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once it has stopped
    uvicorn.run(app, host=settings.host, port=int(port), log_config=None, access_log=False, lifespan="on")


if __name__ == "__main__":
    main(*sys.argv[1:])
