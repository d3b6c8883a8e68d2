"""A hundred thousand bodies that are almost right: each gets the answer it deserves; no value comes back"""

import asyncio
import json
import logging
import random
from collections import Counter

import pytest
from serving import BATCH, GOOD, MODULE, PREDICT, SIMULATE, VALID

from finure.contracts.read import violations
from finure.core import Settings
from finure.serve.app import App
from finure.serve.logs import JsonLines

MARK, NUMBER = "Zzmarker", 31_337  # values of applicants: never to be seen again
SEED = VALID | {"story": f"{MARK} of a kitchen", "amount": NUMBER, "income": 31_337.25}
SEED.pop("ref")  # the caller's own reference does come back
BODY = json.dumps(SEED).encode()
TOKENS = [
    b"1e400", b"-1e400", b"1e39", b"NaN", b"Infinity", b"-Infinity", b"-0", b"-0.0", b"0", b"00", b"0x10", b"1_000",
    b"+1", b".5", b"5.", b"1e5", b"9" * 25, b"9" * 400, b"1" + b"0" * 308, b"1e-400", b"9007199254740993", b"31337.0",
    b"3e4", b"18446744073709551616", b"-9", b"2", b"2.0", b"true", b"false", b"null", b"True", b"undefined", b"'x'",
    b'""', b'"OWN"', b'"own"', b'"30000"', b'"2024-02-30"', b'"2024-01-01"', b'"0000-01-01"', b'"9999-12-31"',
    b'"2024-01-01T00:00:00Z"', b'"1989-12-31"', b'"\\u0000"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\xff"',
    b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xe2\x82"', b'"\n"', b"\xef\xbb\xbf1", b"", b" ", b"/**/1", b"1 1",
    b"[]", b"{}", b"[1]", b'{"a": 1}', b"[" * 100 + b"]" * 100, b"[" * 2000 + b"]" * 2000,
    b'{"a":' * 1200 + b"1" + b"}" * 1200, b'"' + b"x" * 4000 + b'"', b'"' + b"x" * 4001 + b'"',
]  # fmt: skip
NAMES = [json.dumps(name).encode() for name in (*SEED, "sex", "x", "", "AMOUNT", "amount ", "__proto__", "\u0430mount")]
PAIRS = [(json.dumps(name).encode(), json.dumps(value).encode()) for name, value in SEED.items()]
KINDS = [
    b"", b"text/plain", b"application/jsonx", b"application/json; charset=latin-1", b"multipart/form-data; boundary=x",
    b"application/json; charset=utf-8", b"APPLICATION/JSON", b"application/json;", b"\xff\xfe", b"application/xml",
]  # fmt: skip
ODD = [
    (b"content-encoding", b"gzip"), (b"content-length", b"1e3"), (b"content-length", b"9" * 40), (b"expect", b"x"),
    (b"idempotency-key", b"\xff"), (b"idempotency-key", b"a b"), (b"x-request-id", b"\r\nx: y"), (b"accept", b"a/b"),
    (b"authorization", b"Bearer \xff_\xfe_"), (b"x-request-id", MARK.encode() * 20), (b"traceparent", b"00-zz-0-1"),
]  # fmt: skip
EXPECTED = {PREDICT: {200, 400, 413, 415, 422}, SIMULATE: {200, 400, 413, 415, 422}, BATCH: {200, 400, 413, 415, 422}}
CONTRACT = MODULE.load().contract
JSON = (b"content-type", b"application/json")


def other_value(draw: random.Random) -> bytes:
    "A body with one or a few values exchanged."
    pairs = list(PAIRS)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        i = draw.randrange(len(pairs))
        pairs[i] = (pairs[i][0], draw.choice(TOKENS) if draw.random() < 0.8 else draw.choice(PAIRS)[1])
    return b"{" + b",".join(name + b":" + value for name, value in pairs) + b"}"


def other_fields(draw: random.Random) -> bytes:
    "A body with fields left out, added, renamed or given twice, in any order."
    pairs = draw.sample(PAIRS, draw.randint(3, len(PAIRS)))
    for _ in range(draw.choice((0, 1, 1, 2))):
        pairs.insert(draw.randint(0, len(pairs)), (draw.choice(NAMES), draw.choice(TOKENS)))
    return b"{" + b", ".join(name + b": " + value for name, value in pairs) + b"}"


def other_bytes(draw: random.Random) -> bytes:
    "A body with some bytes changed, put in or taken out."
    body = bytearray(BODY)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(body))
        what = draw.random()
        if what < 0.5:
            body[at] = draw.randrange(256)
        elif what < 0.7:
            body[at] ^= 1 << draw.randrange(8)
        elif what < 0.85:
            del body[at : at + draw.choice((1, 1, 5))]
        else:
            body[at:at] = draw.choice((b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\0", b"0", b"\xc3"))
    return bytes(body)


def cut(draw: random.Random) -> bytes:
    "A part of a body, or more than one."
    a, b = sorted(draw.randrange(len(BODY) + 1) for _ in range(2))
    return draw.choice((BODY[:a], BODY[a:], BODY[:a] + BODY[b:], BODY + BODY[a:], BODY[:a] + BODY, b" " * a + BODY))


def pieces(draw: random.Random) -> bytes:
    "Tokens in a row."
    return b"".join(
        draw.choice((*NAMES, *TOKENS, b"{", b"}", b"[", b"]", b",", b":")) for _ in range(draw.randint(0, 9))
    )


MUTATIONS = (other_value, other_value, other_fields, other_fields, other_bytes, cut, pieces)


class Wire:
    "One request after the other, without a socket, at little cost each."

    def __init__(self, app):
        self.app, self.sent = app, []

    async def receive(self):
        return self.message

    async def send(self, message):
        self.sent.append(message)

    async def ask(self, path, body, headers=(JSON,), query=b""):
        "Status, media type and body of the answer."
        self.message, self.sent = {"type": "http.request", "body": body}, []
        scope = {"type": "http", "path": path, "method": "POST", "query_string": query, "headers": headers}
        await self.app(scope, self.receive, self.send)
        return self.sent[0]["status"], dict(self.sent[0]["headers"])[b"content-type"], self.sent[1]["body"]


def fields(body: bytes) -> set[str]:
    "The names of an object's fields, which an answer may repeat; its values it may not."
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {MARK} if body.count(b'":') else set()
    return set(found) if isinstance(found, dict) else set()


def keeps_the_contract(body: bytes) -> bool:
    "Whether a body is an application without a fault, by a slow way of its own."
    found = json.loads(body)
    return isinstance(found, dict) and not violations(found, CONTRACT) and _all_once(body)


def _all_once(body: bytes) -> bool:
    "Whether no name is given twice."
    names = []
    json.loads(body, object_pairs_hook=lambda pairs: names.extend(name for name, _ in pairs))
    return len(names) == len(set(names))


@pytest.fixture
def lines():
    "What the service logs meanwhile."
    seen, logger = [], logging.getLogger("finure")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(JsonLines().format(record)) if record.levelno >= logging.WARNING else None
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def check(path: str, sent: bytes, status: int, media: bytes, answer: bytes) -> None:
    "Holds an answer against what was sent."
    assert status in EXPECTED[path], (status, sent)
    if status == 200:
        assert media == b"application/json" and keeps_the_contract(sent), sent
    else:
        told = json.loads(answer)
        assert media == b"application/problem+json" and told["status"] == status, sent
        assert {"type", "title", "detail"} <= set(told), sent
    if MARK.encode() in answer or b"31337" in answer:
        assert any(MARK in name or "31337" in name for name in fields(sent)), (sent, answer)


async def fuzz(seed: int, n: int, path: str) -> Counter:
    "Sends mutations of a valid body; how many got which status."
    draw, wire, seen = random.Random(seed), Wire(App(MODULE.load(), settings=Settings(decision_log=False))), Counter()
    for _ in range(n):
        sent = draw.choice(MUTATIONS)(draw)
        status, media, answer = await wire.ask(path, sent)
        check(path, sent, status, media, answer)
        seen[status] += 1
    return seen


@pytest.mark.parametrize("path, n", [(PREDICT, 90_000), (SIMULATE, 10_000)])
def test_every_body_gets_the_answer_it_deserves(path, n, lines):
    seen = asyncio.run(fuzz(1, n, path))
    assert seen.total() == n and min(seen[status] for status in (200, 400, 422)) > n / 50
    assert not lines


def test_every_batch_gets_the_answer_it_deserves(lines):
    async def story():
        draw, wire, seen = random.Random(2), Wire(App(MODULE.load())), Counter()
        for _ in range(2_000):
            rows = [draw.choice(MUTATIONS)(draw) for _ in range(draw.randint(0, 4))]
            sent = b"[" + b",".join([*rows, BODY]) + b"]"
            status, media, answer = await wire.ask(BATCH, sent)
            assert status in EXPECTED[BATCH] and media in (b"application/json", b"application/problem+json"), sent
            told = json.loads(answer)
            if status == 200:
                assert told["decided"] == len(told["results"]) >= 1
                assert told["rows"] == told["decided"] + told["rejected"]
            seen[status] += 1
        return seen

    seen = asyncio.run(story())
    assert seen[200] > 500 and seen[400] > 200 and not lines


def test_odd_headers_and_queries_get_an_answer_on_purpose(lines):
    async def story():
        draw, wire, seen = random.Random(3), Wire(App(MODULE.load())), Counter()
        for _ in range(5_000):
            kind = draw.choice(KINDS) if draw.random() < 0.3 else b"application/json"
            headers = [(b"content-type", kind), *draw.sample(ODD, draw.choice((0, 0, 1, 2)))]
            query = draw.choice((b"", b"", b"explain=true", b"explain=yes", b"&&", b"\xff=1", b"a" * 5000))
            path = draw.choice((PREDICT, SIMULATE, BATCH))
            status, _, answer = await wire.ask(path, draw.choice((GOOD, BODY, b"[" + GOOD + b"]")), headers, query)
            assert status in EXPECTED[path] and (status == 200 or json.loads(answer)["status"] == status)
            seen[status] += 1
        return seen

    seen = asyncio.run(story())
    assert min(seen[status] for status in (200, 400, 413, 415)) > 100 and not lines


def test_no_value_is_logged_when_the_scorer_fails(lines):
    async def story():
        wire = Wire(App(MODULE.load()))
        wire.app.decider.scorer.fault = "raises"
        return await wire.ask(PREDICT, BODY)

    status, _, answer = asyncio.run(story())
    assert (
        status == 500 and lines and MARK not in "".join(lines) + answer.decode() and str(NUMBER) not in "".join(lines)
    )
