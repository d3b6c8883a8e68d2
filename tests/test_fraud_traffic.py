"""Simulated payments for a running fraud service: what is sent, what comes back, and what goes wrong"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from serving import free_port, running
from typer.testing import CliRunner

from finure.cli.main import app
from finure.contracts.contract import load
from finure.core import FinureError, root
from finure.fraud.backtest import History, decide, policy, read_model
from finure.fraud.data import as_arrays, simulated_table
from finure.fraud.features import batch, table
from finure.fraud.model import Costs, learn, write_bundle
from finure.fraud.protocol import fold_as_of
from finure.fraud.traffic import confusion, month, payments, traffic
from finure.simulate.cards import LARGE, Cards

RULES = root() / "params" / "fraud_rules.yaml"


@pytest.mark.parametrize(("count", "share"), [(3, 0.5), (1000, 0.25), (5000, 0.05), (400, 1.0), (400, 0.0)])
def test_the_share_of_fraud_is_exact(count, share):
    drawn = payments(count, share, seed=5)
    kinds = drawn["scenario"].value_counts()
    assert len(drawn) == count and (drawn["scenario"] > 0).sum() == round(share * count)
    assert drawn["event_time"].is_monotonic_increasing
    assert (drawn["amount"][drawn["scenario"] == 1] > LARGE).all()
    if count >= 1000:
        assert {kinds[2], kinds[3]} == {round(share * count) // 3}


def test_a_month_lies_in_the_past_with_its_hours_and_weekdays():
    now, drawn = 1.75e9 + 12_345.678, payments(500, 0.25, seed=2)
    made = month(500, 0.25, seed=2, now=now).table
    moved = made["event_time"] - drawn["event_time"]
    assert set(moved) == {moved.iloc[0]} and moved.iloc[0] % pd.Timedelta(days=7) == pd.Timedelta(0)
    assert pd.Timedelta(0) <= pd.Timestamp(now, unit="s") - made["event_time"].max() < pd.Timedelta(days=7)
    again = month(500, 0.25, seed=2, now=now + 1)
    assert not set(again.table["transaction_id"]) & set(made["transaction_id"])
    assert not set(again.table["customer_id"]) & set(made["customer_id"])
    assert max(again.table[key].max() for key in ("transaction_id", "customer_id", "terminal_id")) < 2**53
    assert (again.table["amount"] == made["amount"]).all()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A small model of some simulated weeks."
    cards = Cards(customers=200, terminals=100, days=60, compromised=0.4, leaked=0.6, radius=30, seed=3)
    seen = as_arrays(simulated_table(cards))
    fold = fold_as_of(seen.day, seen.customer_id, seen.fraud, int(seen.day[0]) + 45)
    columns, names = batch(table(*seen[:7])), ("amount", "customer_times_mean_30d", "terminal_risk_30d")
    learned = learn(seen, columns, names, fold, Costs(), 10, {"rounds": 10})
    folder = tmp_path_factory.mktemp("model") / "bundle"
    return write_bundle(
        folder, *learned[:2], load("card_transactions"), *learned[2:], {"name": "small", "version": "4"}, RULES
    )


@pytest.fixture(scope="module")
def service(bundle, tmp_path_factory):
    "The address of a running fraud service."
    with running(tmp_path_factory.mktemp("served"), bundle) as (port, _):
        yield f"http://127.0.0.1:{port}"


def test_the_service_decides_as_the_backtest_does(service, bundle):
    "One connection, so that the payments arrive in their order."
    run = traffic(service, 300, 1, 0.3, seed=8, connections=1)
    assert run.errors == {} and run.model == "small@4" and run.report.answered == 300
    sent = run.month.table.assign(fraud=run.month.table["scenario"] > 0)
    seen = as_arrays(sent)
    now = policy(RULES, model := read_model(bundle))
    history = History("sent", "", seen, batch(table(*seen[:5])))
    expected = decide(history, now, model.probabilities(history)).outcome
    assert np.array_equal(run.decision, expected) and len(set(expected.tolist())) > 1
    found = confusion(run)
    assert found.loc["large amount", "stopped"] == 1 and found.loc["all fraud", "sent"] == 90
    assert found["sent"].drop("all fraud").sum() == 300 and not found["no decision"].any()


def test_the_command_with_labels(service):
    "The service has seen another run."
    asked = ["simulate", "traffic", "--url", service, "--tps", "300", "--seconds", "1", "--feedback"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    words = told.output.split()
    assert int(words[words.index("labels") + 3]) > 20, told.output
    for text in ("p99.9", "small@4", "compromised terminal", "errors"):
        assert text in told.output


class Wrong(BaseHTTPRequestHandler):
    "A service that is not what was asked for."

    status, model, predict, keys = 200, b"{}", 200, []
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        Wrong.keys.append(self.headers["authorization"])
        self.answer(self.status, self.model)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(self.predict, b'{"decision": "approve"}')

    def log_message(self, *_):
        "Says nothing."


@pytest.fixture
def wrong():
    "Its address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CARDS = json.dumps({"contract": {"name": "card_transactions"}, "name": "small", "version": "1"}).encode()


@pytest.mark.parametrize(("status", "model", "says"), [
    (401, b"{}", "asks for a key: name the variable that holds it with --key-env"),
    (404, b"<html>", "is no service of finure"),
    (200, b'{"contract": {"name": "lendingclub"}}', "decides on `lendingclub`, not on card payments"),
])  # fmt: skip
def test_another_service_is_told_before_anything_is_sent(wrong, monkeypatch, status, model, says):
    monkeypatch.setattr(Wrong, "status", status)
    monkeypatch.setattr(Wrong, "model", model)
    with pytest.raises(FinureError, match=says):
        traffic(wrong, 10, 1)


def test_nobody_listens():
    with pytest.raises(FinureError, match="does not answer"):
        traffic(f"http://127.0.0.1:{free_port()}", 10, 1)


def test_errors_are_counted_and_end_with_1(wrong, monkeypatch):
    monkeypatch.setattr(Wrong, "model", CARDS)
    monkeypatch.setattr(Wrong, "predict", 503)
    told = CliRunner().invoke(app, ["simulate", "traffic", "--url", wrong, "--tps", "40", "--seconds", "0.2"])
    assert told.exit_code == 1 and "error: HTTP 503" in told.output and "no decision" in told.output


def test_a_key_comes_from_the_environment(wrong, monkeypatch):
    monkeypatch.setattr(Wrong, "model", CARDS)
    monkeypatch.setenv("A_KEY", "fk_secret")
    asked = ["simulate", "traffic", "--url", wrong, "--tps", "40", "--seconds", "0.2", "--key-env"]
    told = CliRunner().invoke(app, [*asked, "A_KEY"])
    assert told.exit_code == 0 and "fk_secret" not in told.output and Wrong.keys[-1] == "Bearer fk_secret"
    told = CliRunner().invoke(app, [*asked, "B_KEY"])
    assert "--key-env B_KEY: this variable is not set" in str(told.exception)
