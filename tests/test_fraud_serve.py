"""A real fraud service: killed under traffic it loses nothing; labels, batches, another model, replay"""

import http.client
import json
import threading
import time
import urllib.request
from contextlib import closing

import numpy as np
import paying
import pytest
from paying import FEEDBACK, event, sent
from serving import BATCH, JSON, PREDICT, SIMULATE, running

from finure.audit.log import open_store, read_records
from finure.audit.trail import replay
from finure.audit.verify import verify
from finure.serve.swap import point

LANES, ROWS = 3, 160  # worlds that know nothing of each other, each with the same payments


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return paying.bundle(tmp_path_factory.mktemp("model") / "v1")


def lane(number: int) -> list:
    "The payments of a world: the same features as in every other one."
    return [
        event._replace(**{name: getattr(event, name) * LANES + number for name in ("id", "customer", "terminal")})
        for event in map(paying.event, range(ROWS))
    ]


def send(connection, path, body, **headers):
    "Status and content of an answer."
    connection.request("POST", path, body, JSON | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def pay(port, payments, answers):
    "Sends payments one after the other until the service is gone; keeps what was answered."
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            for event in payments:
                status, answer = send(connection, PREDICT, sent(event))
                assert status == 200, answer
                answers[event.id] = answer
    except (OSError, http.client.HTTPException):
        return


def traffic(port) -> tuple[list[threading.Thread], dict]:
    "All worlds at once."
    answers = {}
    threads = [threading.Thread(target=pay, args=(port, lane(number), answers)) for number in range(LANES)]
    for thread in threads:
        thread.start()
    return threads, answers


def records(home, kind="decision") -> list[tuple[str, dict]]:
    "Id and content of the records of a home, from a log that is as it was written."
    with open_store(f"sqlite:///{home}/decisions.db") as store:
        assert verify(store) == []
        return [(record.id, json.loads(record.body)) for record in read_records(store) if record.kind == kind]


def test_killed_under_traffic_nothing_is_lost_and_nothing_counts_twice(bundle, tmp_path):
    with running(tmp_path, bundle) as (port, process):
        threads, before = traffic(port)
        while len(before) < LANES * ROWS // 2:
            time.sleep(0.005)
        process.kill()
        for thread in threads:
            thread.join()
    with running(tmp_path, bundle) as (port, _):
        threads, after = traffic(port)  # everything again, from the beginning
        for thread in threads:
            thread.join()
    assert len(before) < len(after) == LANES * ROWS
    decided = lambda answer: {**answer, "decision_id": None}
    assert all(decided(answer) == decided(after[key]) for key, answer in before.items())
    told, ids = {}, set()
    for id, record in records(tmp_path):
        key = json.loads(json.dumps(record["answer"]))["id"]
        assert told.setdefault(key, record["trace"]["features"]) == record["trace"]["features"]
        ids.add(id)
    assert ids >= {answer["decision_id"] for answer in (*before.values(), *after.values())}
    expected = paying.expected(slice(ROWS))
    for number in range(LANES):
        np.testing.assert_array_equal([told[event.id] for event in lane(number)], expected)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def port(home, bundle):
    "The port of a service that follows a file."
    point(home / "pointer", bundle)
    with running(home, bundle, follow=home / "pointer") as (port, _):
        yield port


@pytest.fixture
def connection(port):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        yield connection


def read(port, path) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_labels_are_recorded_and_known_to_what_comes_after(connection, home):
    for row in range(4):
        assert send(connection, PREDICT, sent(event(row), terminal_id=99))[0] == 200
    known = {"known_time": "2018-04-01T23:00:00Z"}
    labels = [{"transaction_id": event(row).id, "fraud": True} | known for row in range(3)]
    once = send(connection, FEEDBACK, json.dumps(labels[0]), **{"Idempotency-Key": "l-1"})
    again = send(connection, FEEDBACK, json.dumps(labels[0]), **{"Idempotency-Key": "l-1"})
    assert once == again == (200, {"feedback_id": once[1]["feedback_id"], "received": 1})
    assert send(connection, FEEDBACK, json.dumps(labels))[1]["received"] == 3
    for wrong, status in (
        (labels[0] | {"transaction_id": 10**9}, 404), ([labels[0], labels[0] | {"transaction_id": 10**9}], 404),
        (labels[0] | {"known_time": "2999-01-01T00:00:00Z"}, 422), ({"fraud": True}, 422), ([], 422),
    ):  # fmt: skip
        assert send(connection, FEEDBACK, json.dumps(wrong))[0] == status, wrong
    assert send(connection, FEEDBACK, b"{")[0] == 400
    kept = records(home, "feedback")
    assert [len(record["trace"]["known"]) for _, record in kept] == [1, 3]
    body = sent(event(10), transaction_id=10**6, terminal_id=99, event_time="2018-04-02T12:00:00Z")
    asked = send(connection, SIMULATE, body)[1]
    assert asked["simulated"] and "terminal_fraud" in [reason["code"] for reason in asked["reasons"]]
    assert send(connection, PREDICT, body)[1]["score"] == asked["score"]


def test_a_batch_refuses_the_rows_that_it_must_and_decides_the_others(connection):
    rows = [paying.raw(event(row)) for row in range(100, 104)]
    rows += [rows[0] | {"amount": 9.99}, rows[0] | {"transaction_id": 5000, "event_time": "2999-01-01T00:00:00Z"}]
    status, answer = send(connection, BATCH, json.dumps(rows))
    assert (status, answer["decided"]) == (200, 4)
    assert [(r["row"], r["violations"][0]["rule"]) for r in answer["rejects"]] == [(4, "conflict"), (5, "future")]
    status, problem = send(connection, PREDICT, json.dumps(rows[4]))
    assert (status, problem["violations"][0]["field"]) == (409, "transaction_id")


def test_another_model_takes_over_and_keeps_the_state(connection, port, home, tmp_path):
    assert send(connection, PREDICT, sent(event(200)))[1]["model"] == "finure-cards:1"
    other = paying.bundle(tmp_path / "v2", paying.learned(10), version="2")
    point(home / "pointer", other)
    until = time.monotonic() + 20
    while '"finure-cards:2"' not in read(port, "/metrics") and time.monotonic() < until:
        time.sleep(0.05)
    row = [json.loads(sent(event(200))) | {"transaction_id": 6000}]
    answer = send(connection, PREDICT, json.dumps(row[0]))[1]
    assert answer["model"] == "finure-cards:2"
    trace = next(record["trace"] for id, record in records(home) if id == answer["decision_id"])
    assert trace["features"][3] == 2  # payments of the customer within a day: this one and the one before


def test_every_decision_replays_while_the_service_holds_its_state(connection, port, home, bundle, tmp_path):
    large = sent(event(210), transaction_id=7000, amount=900.0)
    status, answer = send(connection, f"{PREDICT}?explain=true", large)
    assert (status, answer["reasons"][0]["code"]) == (200, "large_amount")
    bundles = {"1": bundle, "2": paying.bundle(tmp_path / "v2", paying.learned(10), version="2")}
    with open_store(f"sqlite:///{home}/decisions.db") as store:
        done = [replay(store, id, bundles[record["model"][-1]]) for id, record in records(home)]
    assert {one.verdict for one in done} == {"same"}, [one for one in done if one.verdict != "same"][:2]
    text = read(port, "/metrics")
    assert 'finure_rule_hits_total{rule="large_amount",mode="live"}' in text
    assert 'finure_reasons_total{code="large_amount"}' in text and 'finure_decisions_total{outcome="review"}' in text
    document = json.loads(read(port, "/openapi.json"))
    assert {"post"} == set(document["paths"][FEEDBACK])
    assert {"blocked_card", "own_history"} <= {reason["code"] for reason in json.loads(read(port, "/api/v1/reasons"))}
