"""Every answered decision has its record, a repeated request gets its first answer, and without a log there is none"""

import asyncio
import json
import os
import sqlite3
import time
from contextlib import closing, contextmanager

import pytest
from serving import BATCH, GOOD, MODULE, PREDICT, SIMULATE, ask, body, call, problem

from finure.audit.log import open_store, read_records
from finure.audit.verify import verify
from finure.audit.writer import DecisionLog
from finure.core import Settings
from finure.serve.app import App
from finure.serve.decider import read_record

DECISIONS = "/api/v1/decisions/"


@contextmanager
def serving(folder, scorer=None, **settings):
    "An application with a log of its own in a folder."
    settings = Settings(database_url=f"sqlite:///{folder}/decisions.db", **settings)
    log = DecisionLog(settings.database())
    try:
        yield App(scorer or MODULE.load(), "b" * 64, log, settings=settings)
    finally:
        log.close()


def recorded(folder) -> dict[str, bytes]:
    "The bodies of all decision records by id, from a log that is as it was written."
    with open_store(f"sqlite:///{folder}/decisions.db") as store:
        assert verify(store) == []
        return {record.id: record.body for record in read_records(store) if record.kind == "decision"}


def test_a_decision_is_recorded_with_its_request_trace_and_answer(tmp_path):
    sent = b'{ "amount": 700,"income":1e3,\n "home":"OWN", "story": "\xc3\xa9t\\u00e9 \\ud83d\\ude00"}'
    with serving(tmp_path) as app:
        status, headers, answer = call(app, PREDICT, sent, {"x-request-id": "r-1"})
        record = recorded(tmp_path)[json.loads(answer)["decision_id"]]
    assert status == 200 and b'"request":' + sent + b',"trace"' in record and record.endswith(answer + b"}")
    told = read_record(record)
    assert (bytes(told.request), bytes(told.answer)) == (sent, answer)
    assert json.loads(bytes(told.trace)) == {"features": {"amount": 700}}
    assert (told.route, told.request_id, told.client) == (PREDICT, "r-1", "")
    assert (told.model, told.bundle, told.contract) == ("finure-test:7", "b" * 64, "test 1")


def test_a_decision_can_be_looked_up(tmp_path):
    with serving(tmp_path) as app:
        answer = call(app, PREDICT, GOOD)[2]
        decision_id = json.loads(answer)["decision_id"]
        found = json.loads(call(app, DECISIONS + decision_id)[2])
        for other in ("", "x", "a/b", "%00", "\0", "é", "x" * 5000, decision_id + " ", app.log.head.chain):
            problem(404, call(app, DECISIONS + other))
        assert found["record"]["answer"] == json.loads(answer) and found["decision_id"] == decision_id
        with open_store(app.settings.database()) as store:
            store.execute("UPDATE records SET body = NULL WHERE id = ?", (decision_id,))
        problem(410, call(app, DECISIONS + decision_id))


def test_a_thousand_answers_at_once_have_a_thousand_records(tmp_path):
    async def all_of_them(app):
        return await asyncio.gather(*(ask(app, PREDICT, body(amount=500 + i)) for i in range(1000)))

    with serving(tmp_path, max_waiting=1000) as app:
        answers = [answer for _, _, answer in asyncio.run(all_of_them(app))]
        records = recorded(tmp_path)
    assert len(records) == len(set(answers)) == 1000
    assert all(records[json.loads(answer)["decision_id"]].endswith(answer + b"}") for answer in answers)


def test_every_decided_row_of_a_batch_has_its_record(tmp_path):
    rows = [body(amount=500 + i, ref=f"row {i}") for i in range(250)]
    rows[3:3] = [b'{"amount": 1}']
    with serving(tmp_path) as app:
        told = json.loads(call(app, BATCH, b"[" + b", ".join(rows) + b"]")[2])
        records = recorded(tmp_path)
    assert (told["decided"], told["rejected"]) == (250, 1) and len(records) == 250
    for result in told["results"]:
        record = read_record(records[result["decision_id"]])
        assert bytes(record.request) == rows[result.pop("row")] and json.loads(bytes(record.answer)) == result
        assert record.route == BATCH


def test_a_what_if_leaves_no_record(tmp_path):
    with serving(tmp_path) as app:
        assert call(app, SIMULATE, GOOD, {"idempotency-key": "k"})[0] == 200
        assert recorded(tmp_path) == {}


def test_what_is_refused_leaves_no_record(tmp_path):
    with serving(tmp_path) as app:
        for sent in (b"", b"{}", body(amount=1), body(story=5)):
            assert call(app, PREDICT, sent)[0] in (400, 422)
        assert call(app, PREDICT, body(story="fail"))[0] == 500
        assert recorded(tmp_path) == {}


# The same request again


@pytest.mark.parametrize("name", ["idempotency-key", "x-request-id"])
def test_the_same_request_again_gets_the_same_bytes(tmp_path, name):
    with serving(tmp_path) as app:
        first, again = (call(app, PREDICT, GOOD, {name: "order-1"}) for _ in range(2))
        assert first[2] == again[2] and "idempotent-replayed" not in first[1]
        assert again[1]["idempotent-replayed"] == "true"
        assert len(recorded(tmp_path)) == 1
        assert call(app, PREDICT, GOOD, {name: "order-2"})[2] != first[2]
        assert "finure_replayed_decisions_total 1" in app.metrics.text()
        assert 'finure_decisions_total{outcome="decline"} 2' in app.metrics.text()


def test_the_same_key_for_something_else_is_refused(tmp_path):
    key = {"idempotency-key": "order-1"}
    with serving(tmp_path) as app:
        first = call(app, PREDICT, GOOD, key)[2]
        for path, sent, query in ((PREDICT, GOOD + b" ", b""), (PREDICT, body(amount=501), b""),
                                  (PREDICT, GOOD, b"explain=true")):  # fmt: skip
            problem(409, call(app, path, sent, key, query))
        assert call(app, PREDICT, GOOD, key)[2] == first and len(recorded(tmp_path)) == 1


def test_an_idempotency_key_goes_before_a_request_id(tmp_path):
    with serving(tmp_path) as app:
        first = call(app, PREDICT, GOOD, {"idempotency-key": "k", "x-request-id": "a"})
        again = call(app, PREDICT, GOOD, {"idempotency-key": "k", "x-request-id": "b"})
        assert first[2] == again[2] and again[1]["x-request-id"] == "b"
        for bad in ("", "a b", "x" * 256, "\xe9"):
            problem(400, call(app, PREDICT, GOOD, {"idempotency-key": bad}))
        assert call(app, PREDICT, GOOD, {"idempotency-key": "x" * 255})[0] == 200
        assert call(app, PREDICT, GOOD, {"x-request-id": "not one of ours"})[0] == 200


def test_keys_of_other_clients_are_other_keys(tmp_path):
    from finure.serve.keys import Guard, create_key, read_keys

    with serving(tmp_path) as app:
        with open_store(app.settings.database()) as store:
            shown = [create_key(store, name, ["predict"])[1] for name in "ab"]
            app.guard = Guard(read_keys(store))
        mine, theirs = (
            call(app, PREDICT, GOOD, {"authorization": f"Bearer {one}", "idempotency-key": "1"})[2] for one in shown
        )
        assert mine != theirs and len(recorded(tmp_path)) == 2


def test_repetitions_that_come_together_are_one_decision(tmp_path):
    async def all_of_them(app):
        same = [ask(app, PREDICT, GOOD, {"idempotency-key": f"k{i % 5}"}) for i in range(100)]
        other = [ask(app, PREDICT, body(amount=501), {"idempotency-key": "k0"}) for _ in range(5)]
        return await asyncio.gather(*same, *other)

    with serving(tmp_path) as app:
        answers = asyncio.run(all_of_them(app))
        assert len({answer for _, _, answer in answers[:100]}) == len(recorded(tmp_path)) == 5
    assert {status for status, _, _ in answers[:100]} == {200} and {status for status, _, _ in answers[100:]} == {409}


def test_a_restart_forgets_no_key(tmp_path):
    key = {"idempotency-key": "order-1"}
    with serving(tmp_path) as app:
        first = call(app, PREDICT, GOOD, key)[2]
    scorer = MODULE.load()
    scorer.info = scorer.info | {"version": "8"}
    with serving(tmp_path, scorer) as app:
        assert call(app, PREDICT, GOOD, key)[2] == first
        problem(409, call(app, PREDICT, body(amount=501), key))
        assert len(recorded(tmp_path)) == 1


def test_a_batch_that_is_sent_again_gets_the_same_decisions(tmp_path):
    key, batch = {"idempotency-key": "night"}, b"[" + b",".join(body(amount=500 + i) for i in range(150)) + b",{}]"
    with serving(tmp_path) as app:
        first, again = (call(app, BATCH, batch, key)[2] for _ in range(2))
        assert (app.metrics.outcomes.total(), app.metrics.replayed_decisions) == (150, 150)
        assert first == again and len(recorded(tmp_path)) == 150
        problem(409, call(app, BATCH, b"[" + body(amount=9999) + b"]", key))
        assert len(recorded(tmp_path)) == 150


def test_keys_of_batches_and_of_single_requests_do_not_meet(tmp_path):
    with serving(tmp_path) as app:
        assert call(app, BATCH, b"[" + GOOD + b"]", {"idempotency-key": "night"})[0] == 200
        for key in ("night", "night#0", "night 0", "night/0", "night:0"):
            assert call(app, PREDICT, GOOD, {"x-request-id": "a", "idempotency-key": key})[0] in (200, 400), key


# When the log fails


def test_without_a_log_nothing_is_decided_until_it_is_back(tmp_path):
    with serving(tmp_path) as app:
        first = call(app, PREDICT, GOOD)[2]
        with closing(sqlite3.connect(tmp_path / "decisions.db", isolation_level=None)) as other:
            other.execute("ALTER TABLE heads RENAME TO gone")
        for path, sent in ((PREDICT, GOOD), (BATCH, b"[" + GOOD + b"]")) * 2:
            answer = call(app, path, sent)
            assert problem(503, answer)["type"] == "urn:finure:problem:log-unavailable"
            assert int(answer[1]["retry-after"]) >= 1
        assert problem(503, call(app, "/readyz")) and call(app, "/livez")[0] == 200
        assert call(app, SIMULATE, GOOD)[0] == 200
        assert "finure_log_up 0" in app.metrics.text() and 'outcome="decline"} 1' in app.metrics.text()
        with closing(sqlite3.connect(tmp_path / "decisions.db", isolation_level=None)) as other:
            other.execute("ALTER TABLE gone RENAME TO heads")
        until = time.monotonic() + 20
        while call(app, "/readyz")[0] != 200 and time.monotonic() < until:
            time.sleep(0.05)
        last = call(app, PREDICT, GOOD)[2]
    assert set(recorded(tmp_path)) == {json.loads(answer)["decision_id"] for answer in (first, last)}


def test_a_record_that_cannot_be_read_is_a_503(tmp_path):
    with serving(tmp_path) as app:
        decision_id = json.loads(call(app, PREDICT, GOOD)[2])["decision_id"]
        os.rename(tmp_path / "decisions.db", tmp_path / "elsewhere.db")
        answer = call(app, DECISIONS + decision_id)
        assert problem(503, answer) and answer[1]["retry-after"] == "1"
        assert not (tmp_path / "decisions.db").exists()
        os.rename(tmp_path / "elsewhere.db", tmp_path / "decisions.db")
        assert call(app, DECISIONS + decision_id)[0] == 200


def test_more_than_may_wait_is_refused_at_once(tmp_path):
    async def all_of_them(app):
        return await asyncio.gather(*(ask(app, PREDICT, GOOD) for _ in range(50)))

    with serving(tmp_path, max_waiting=8) as app:
        answers = asyncio.run(all_of_them(app))
        refused = [answer for answer in answers if answer[0] != 200]
        assert len(answers) - len(refused) == len(recorded(tmp_path)) == 8
        for answer in refused:
            assert problem(503, answer)["type"] == "urn:finure:problem:overloaded" and answer[1]["retry-after"] == "1"
        assert call(app, PREDICT, GOOD)[0] == 200


def test_every_status_of_these_tests_is_in_the_document(tmp_path):
    with serving(tmp_path) as app:
        paths = json.loads(call(app, "/openapi.json")[2])["paths"]
    decided = {"200", "400", "401", "403", "408", "409", "413", "415", "422", "429", "500", "503"}
    assert decided <= set(paths[PREDICT]["post"]["responses"]) and decided <= set(paths[BATCH]["post"]["responses"])
    assert decided - {"409"} <= set(paths[SIMULATE]["post"]["responses"])
    assert {"200", "404", "410", "503"} <= set(paths[DECISIONS + "{decision_id}"]["get"]["responses"])
