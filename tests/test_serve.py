"""The service core answers everything it is sent on purpose, and a packed bento answers with the service core"""

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.bundle import load_scorer
from finure.contracts.schema import asked, example
from finure.core import FinureError, Settings, root
from finure.serve.app import App
from finure.serve.openapi import MAX_BATCH, MAX_BODY, MAX_ROWS
from finure.serve.pack import bento_folder, free_port, pack, serve_packed, serving_requirements

SCORER = '''
"""A scorer for tests: declines large amounts"""

import json

from finure.bundle import Decided
from finure.contracts.contract import parse

CONTRACT = {
    "contract": "test", "version": "1", "title": "Test loans",
    "reasons": {"size": {"category": "OTHER", "text": "Amount too large"}},
    "columns": {
        "ref": {"type": "text", "role": "id"},
        "applied": {"type": "date", "role": "event_time"},
        "amount": {"type": "integer", "range": [500, 50000], "reason": "size"},
        "PAY 0": {
            "type": "integer", "range": [0, 8], "special": {-9: "no record"}, "null": "allowed", "reason": "size",
        },
        "story": {"type": "text", "role": "input", "null": "allowed"},
        "sex": {"type": "category", "levels": ["F", "M"], "role": "protected"},
    },
}


class Scorer:
    contract = parse(CONTRACT)
    info = {"name": "finure-test", "version": "7", "metrics": {"auc": 0.7}}
    answer_schema = {"pd": {"type": "number"}, "decision": {"enum": ["approve", "decline"]}}
    score_bounds = (100, 200)

    def __init__(self, bundle=None):
        if bundle is not None:
            self.info = json.loads((bundle / "model.json").read_text())

    def decide(self, application, explain=False):
        if application.get("story") == "fail":
            raise KeyError(f"secret {application}")
        large = application["amount"] > 10_000
        reasons = [{"code": "OTHER", "text": "Amount too large"}] if large or explain else []
        answer = {"pd": application["amount"] / 3e5, "decision": "decline" if large else "approve", "reasons": reasons}
        return Decided(answer, {"features": [application["amount"]]})

    def decide_batch(self, applications):
        return [self.decide(application) for application in applications]


def load(bundle):
    return Scorer(bundle)
'''
namespace: dict = {}
exec(SCORER, namespace)
CONTRACT = namespace["Scorer"].contract
LOOP = asyncio.new_event_loop()
APP = App(namespace["Scorer"]())
GOOD = json.dumps(example(CONTRACT)).encode()
JSON = {"content-type": "application/json"}
PREDICT, BATCH = "/api/v1/predict", "/api/v1/batch-predict"


def call(path, body=None, headers=None, method=None, app=APP, chunks=None, query=b"", caller=None):
    "Status, headers and body of one request, without a socket."
    sent, headers = [], JSON if headers is None else headers
    scope = {
        "type": "http", "path": path, "method": method or ("GET" if body is None else "POST"), "query_string": query,
        "client": caller, "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    parts = list(chunks or [body or b""])
    messages = iter(
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
    )

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    LOOP.run_until_complete(app(scope, receive, send))
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], names, b"".join(message["body"] for message in sent[1:])


def problem(status, *args, **kwargs) -> dict:
    "The problem that a request is answered with."
    got, headers, body = call(*args, **kwargs)
    assert (got, headers["content-type"]) == (status, "application/problem+json"), body
    content = json.loads(body)
    assert content["status"] == status and {"type", "title", "detail"} <= set(content)
    return content


def test_a_decision():
    status, headers, body = call(PREDICT, b'{"ref": "A1", "applied": "2024-05-06", "amount": 30000}')
    assert (status, headers["content-type"]) == (200, "application/json")
    told = json.loads(body)
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}", told.pop("decision_id"))
    assert told == {
        "id": "A1", "event_time": "2024-05-06", "pd": 0.1, "decision": "decline",
        "reasons": [{"code": "OTHER", "text": "Amount too large"}], "model": "finure-test:7",
    }  # fmt: skip


def without_id(body):
    "An answer but for the name of its record."
    return {name: value for name, value in json.loads(body).items() if name != "decision_id"}


def test_the_same_application_gets_the_same_decision():
    first, second = (call(PREDICT, GOOD)[2] for _ in range(2))
    assert without_id(first) == without_id(second) and first != second


def test_what_if():
    told = json.loads(call("/api/v1/simulate", b'{"amount": 500}')[2])
    assert told["simulated"] is True and told["reasons"] and "decision_id" not in told
    assert not json.loads(call(PREDICT, b'{"amount": 500}')[2])["reasons"]
    assert json.loads(call(PREDICT, b'{"amount": 500}', query=b"explain=true")[2])["reasons"]
    for path, query in (
        (PREDICT, b"explain=1"),
        (PREDICT, b"x"),
        (BATCH, b"explain=true"),
        (PREDICT, b"explain=true&explain=true"),
    ):
        problem(400, path, GOOD, query=query)


def test_an_application_without_a_date_is_dated_today():
    told = json.loads(call(PREDICT, b'{"amount": 500}')[2])
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", told["event_time"]) and told["id"] is None


def test_request_ids_are_echoed_or_made():
    assert call(PREDICT, GOOD, JSON | {"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
    made = [call(PREDICT, GOOD, JSON | {"x-request-id": 'a" b'})[1]["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}", name) for name in made)


def test_violations_are_listed():
    found = problem(422, PREDICT, b'{"amount": 1, "sex": "F", "x": 1}')
    assert [(v["field"], v["rule"]) for v in found["violations"]] == [
        ("amount", "range"), ("sex", "not_asked"), ("x", "unknown"),
    ]  # fmt: skip
    many = problem(422, PREDICT, json.dumps({f"f{i}": 1 for i in range(500)}).encode())
    assert len(many["violations"]) == 100 and many["violations_found"] == 501


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{} {}", b"\xff", b'{"amount": NaN}', b"[" * 60_000, b'{"amount":1,"amount":1}']
)
def test_malformed_bodies(body):
    assert problem(400, PREDICT, body)["type"] == "urn:finure:problem:malformed-json"


def test_method_path_and_type():
    assert call(PREDICT, method="GET")[1]["allow"] == "POST"
    assert problem(405, "/metrics", b"", method="DELETE")["detail"] == "Use GET, HEAD."
    problem(404, "/api/v1/predict/", GOOD)
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=latin-1"},
                 JSON | {"content-encoding": "gzip"}):  # fmt: skip
        problem(415, PREDICT, GOOD, kind)
    assert call(PREDICT, GOOD, {"content-type": 'Application/JSON; charset="UTF-8"'})[0] == 200


def test_body_limits():
    large = b'{"story": "' + b"x" * MAX_BODY + b'"}'
    problem(413, PREDICT, large)
    problem(413, PREDICT, b"", JSON | {"content-length": str(MAX_BODY + 1)})
    problem(413, PREDICT, b"", JSON | {"content-length": "9" * 5000})
    problem(413, PREDICT, chunks=[b"x" * 40_000] * 3, method="POST")
    problem(413, BATCH, b"", JSON | {"content-length": str(MAX_BATCH + 1)})
    problem(413, BATCH, b"[" + b"1," * 2_000_001 + b"1]")
    assert call(PREDICT, method="POST", chunks=[GOOD[:5], b"", GOOD[5:]])[0] == 200


def test_a_body_that_does_not_arrive():
    app, parts, sent = App(namespace["Scorer"](), settings=Settings(deadline=0.05)), [b"{"], []

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": True}
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    LOOP.run_until_complete(app({"type": "http", "path": PREDICT, "method": "POST", "headers": headers}, receive, send))
    assert sent[0]["status"] == 408


def test_an_unexpected_error_is_logged_without_values(caplog):
    body = b'{"amount": 500, "story": "fail"}'
    with caplog.at_level(logging.ERROR, "finure.serve"):
        found = problem(500, PREDICT, body, JSON | {"x-request-id": "r-7"})
    assert "secret" not in json.dumps(found) + caplog.text
    facts = next(record.facts for record in caplog.records if record.message == "unexpected error")
    assert (facts["request_id"], facts["error"]) == ("r-7", "KeyError") and facts["places"].startswith("decide")


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"applications": rows}], ids=["list", "object"])
def test_batch(wrap):
    rows = [{"amount": 500, "ref": "a"}, {"amount": 1}, 5, {"amount": 20000, "ref": "b"}, {"amount": 500, "sex": "F"}]
    told = json.loads(call(BATCH, json.dumps(wrap(rows)).encode())[2])
    assert [(r["row"], r["id"], r["decision"]) for r in told["results"]] == [(0, "a", "approve"), (3, "b", "decline")]
    assert [(r["row"], r["violations"][0]["rule"]) for r in told["rejects"]] == [
        (1, "range"),
        (2, "type"),
        (4, "not_asked"),
    ]
    assert (told["rows"], told["decided"], told["rejected"]) == (5, 2, 3)


def test_batch_rows_equal_single_decisions():
    rows = [{"amount": 500 + i, "applied": "2024-01-01"} for i in range(250)]
    told = json.loads(call(BATCH, json.dumps(rows).encode())[2])
    alone = [without_id(call(PREDICT, json.dumps(row).encode())[2]) for row in rows]
    assert [{k: v for k, v in r.items() if k not in ("row", "decision_id")} for r in told["results"]] == alone


def test_batches_that_are_none():
    for body in (
        b"5",
        b"{}",
        b"[]",
        b'{"applications": {}}',
        b'{"applications": [], "x": 1}',
        b"[" + b"1," * MAX_ROWS + b"1]",
    ):
        problem(422, BATCH, body)
    for body in (b"", b"[{]", b"[1,]", b"[" * 100_000):
        problem(400, BATCH, body)
    told = json.loads(call(BATCH, b'[{"story": "\xff"}]')[2])
    assert told["rejects"][0]["violations"][0]["rule"] == "json"


def test_read_only_routes():
    model = json.loads(call("/api/v1/model")[2])
    assert model["version"] == "7" and [f["name"] for f in model["contract"]["fields"]] == list(asked(CONTRACT))
    assert json.loads(call("/api/v1/reasons")[2]) == [{"code": "OTHER", "name": "size", "text": "Amount too large"}]
    assert call("/livez")[0] == call("/readyz")[0] == 200
    assert call("/")[1]["location"] == "/docs"
    status, headers, body = call("/readyz", method="HEAD")
    assert (status, body) == (200, b"") and int(headers["content-length"]) > 0


def test_openapi_describes_what_is_answered():
    doc = json.loads(call("/openapi.json")[2])
    assert doc["openapi"] == "3.1.0"
    assert {path.partition("{")[0] for path in doc["paths"]} == {
        path for path in APP.routes if path.startswith("/api/")
    }

    def check(name: str, content: object):
        jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **doc}).validate(content)

    check("Application", json.loads(GOOD))
    check("Decision", json.loads(call(PREDICT, GOOD)[2]))
    check("Problem", problem(422, PREDICT, b"{}"))
    operation = doc["paths"][PREDICT]["post"]
    assert (
        call(PREDICT, json.dumps(operation["requestBody"]["content"]["application/json"]["example"]).encode())[0] == 200
    )
    assert {"400", "413", "415", "422", "500"} <= set(operation["responses"])
    batch = doc["paths"][BATCH]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    told = json.loads(call(BATCH, b"[" + GOOD + b", 1]")[2])
    jsonschema.Draft202012Validator({**batch, "components": doc["components"]}).validate(told)


def test_docs_work_offline():
    status, headers, page = call("/docs")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    files = re.findall(r'(?:src|href)="([^"]+)"', page.decode())
    assert len(files) == 3 and all(call(name)[0] == 200 for name in files)


def test_metrics_count_and_paths_make_no_series():
    app = App(namespace["Scorer"]())
    for i in range(50):
        call(f"/nothing/{i}", app=app)
    call(PREDICT, GOOD, app=app)
    call(BATCH, b'[{"amount": 20000}, {"amount": 1}]', app=app)
    text = call("/metrics", app=app)[2].decode()
    assert 'finure_requests_total{route="other",status="404"} 50' in text and "/nothing" not in text
    assert f'finure_requests_total{{route="{PREDICT}",status="200"}} 1' in text
    assert 'finure_decisions_total{outcome="approve"} 1' in text and 'outcome="decline"} 1' in text
    assert "finure_rejected_rows_total 1" in text
    assert 'finure_model_info{contract="test 1",model="finure-test:7"} 1' in text
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)*\})? [0-9.e+-]+', line), line


PIECES = st.sampled_from([
    b"{", b"}", b"[", b"]", b",", b":", b'"amount"', b'"PAY 0"', b'"applied"', b'"story"', b'"applications"', b"500",
    b"-9", b"1e999", b"NaN", b"null", b"true", b'"2024-01-01"', b'"\\ud800"', b'"\xff"', b'"x"', b"0", b"-",
    b".5", b" ", b"\x00", GOOD,
])  # fmt: skip
BODIES = st.one_of(
    st.lists(PIECES, max_size=12).map(b"".join),
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*CONTRACT.columns, "x"]) | st.text(max_size=3), inner, max_size=4)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=1500, deadline=None)
@given(BODIES)
def test_no_body_ends_in_a_server_error(body):
    for path in (PREDICT, BATCH):
        status, _, answer = call(path, body)
        assert status in (200, 400, 422)
        json.loads(answer)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["content-type", "content-length", "x-request-id", "content-encoding"]),
                       st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)),
       st.sampled_from(["GET", "POST", "PUT", "HEAD", "TRACE", "x"]),
       st.sampled_from([*APP.routes, "", "//", "/docs/../x"]))  # fmt: skip
def test_no_header_or_method_ends_in_a_server_error(headers, method, path):
    assert call(path, GOOD, headers, method)[0] < 500


# The bundle, the bento


def test_a_bundle_names_its_scorer(tmp_path, monkeypatch):
    def loading(content, **options):
        (tmp_path / "model.json").write_text(content)
        return load_scorer(tmp_path, **options)

    with pytest.raises(FinureError, match="expected JSON"):
        loading("[]")
    for evil in ("os:system", "finure_evil:load", "finure.core:__import__", "finure:..:x", "builtins:eval"):
        with pytest.raises(FinureError, match="is not a function of a module of `finure`"):
            loading(json.dumps({"scorer": evil}))
    with pytest.raises(FinureError, match="cannot be loaded"):
        loading('{"scorer": "finure.nothing:load"}')
    (tmp_path / "scorers_of_a_test.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    assert loading('{"scorer": "scorers_of_a_test:load"}', package="scorers_of_a_test").info["scorer"]


def test_requirements_of_serving_are_pinned_and_light():
    pinned = serving_requirements(root())
    names = set(re.findall(r"(?m)^([a-z0-9._-]+)==", pinned))
    assert {"bentoml", "msgspec", "numpy", "onnxruntime", "uvloop", "httptools", "pydantic-settings"} <= names
    assert not names & {"pandas", "scikit-learn", "xgboost", "mlflow", "shap", "evidently", "scipy", "nbdev"}
    assert pinned.count("--hash=sha256:") > len(names)


def test_packing_says_what_is_missing(tmp_path):
    with pytest.raises(FinureError, match="no model.json"):
        pack(tmp_path, "credit", "finure-test", "1", root())
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(FinureError, match="bentos/nothing/service.py"):
        pack(tmp_path, "nothing", "finure-test", "1", root())
    with pytest.raises(FinureError, match="pack it first"), serve_packed("finure-nothing:1"):
        pass


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FinureError, match="is in use"):
            free_port(taken.getsockname()[1])


@pytest.fixture(scope="module")
def bento(tmp_path_factory) -> str:
    "The tag of a bento packed from a copy of the checkout that holds the test's scorer."
    folder, patch = tmp_path_factory.mktemp("pack"), pytest.MonkeyPatch()
    for name in ("finure", "bentos"):
        shutil.copytree(root() / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(root() / name, folder / "checkout" / name)
    (folder / "checkout" / "finure" / "served_in_tests.py").write_text(SCORER)
    (folder / "bundle").mkdir()
    (folder / "bundle" / "model.json").write_text('{"scorer": "finure.served_in_tests:load"}')
    patch.setenv("FINURE_HOME", str(folder / "home"))
    yield pack(folder / "bundle", "credit", "finure-test", "7", folder / "checkout")
    patch.undo()


def test_a_packed_bento_holds_what_serving_needs_and_nothing_else(bento):
    code = bento_folder(bento) / "src"
    assert {path.name for path in code.iterdir()} == {
        "service.py", "bentofile.yaml", "requirements.txt", "finure", "bundle",
    }  # fmt: skip
    assert (code / "bundle" / "model.json").is_file()
    assert {path.suffix for path in (code / "finure").rglob("*") if path.is_file()} == {".py"}


def test_a_packed_bento_serves_with_the_service_core(bento):
    with serve_packed(bento) as address:
        request = urllib.request.Request(address + PREDICT, GOOD, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert without_id(answer.read()) == without_id(call(PREDICT, GOOD)[2])
        with urllib.request.urlopen(address + "/metrics", timeout=5) as answer:
            assert b'model="finure-test:7"' in answer.read()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(address + "/docs.json", timeout=5)
        assert error.value.headers["Content-Type"] == "application/problem+json"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address + "/livez", timeout=5)


def test_a_bundle_that_cannot_be_loaded_says_so(bento):
    broken = bento_folder(bento).with_name("broken")
    shutil.copytree(bento_folder(bento), broken)
    Path(broken, "src", "bundle", "model.json").write_text("{}")
    with (
        pytest.raises(FinureError, match="expected JSON with a field `scorer`"),
        serve_packed("finure-test:broken"),
    ):
        pass


def test_serving_imports_nothing_heavy():
    heavy = ("pandas", "sklearn", "scipy", "xgboost", "mlflow", "shap", "evidently", "matplotlib")
    code = f"import finure.serve.bento, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
