"""What the tests of the fraud service share: simulated payments, a small model of them, payments as JSON"""

import datetime as dt
import functools
import json
from pathlib import Path

import numpy as np

from finure.contracts.contract import load
from finure.core import root
from finure.fraud.data import as_arrays, simulated_table
from finure.fraud.features import batch, table
from finure.fraud.model import Costs, learn, write_bundle
from finure.fraud.online import Transaction
from finure.fraud.protocol import fold_as_of
from finure.fraud.rules import RULES
from finure.simulate.cards import Cards

FEEDBACK = "/api/v1/feedback"


@functools.cache
def payments():
    "Simulated payments, the table of their features' driver, and the features."
    cards = Cards(customers=300, terminals=600, days=60, compromised=0.5, leaked=0.5, radius=30)
    arrays = as_arrays(simulated_table(cards))
    events = table(*arrays[:7])
    return arrays, events, batch(events)


@functools.cache
def learned(rounds=30, names=None):
    "A model of the payments."
    arrays, _, columns = payments()
    fold = fold_as_of(arrays.day, arrays.customer_id, arrays.fraud, int(arrays.day[0]) + 58)
    return learn(arrays, columns, names or tuple(columns), fold, Costs(), settings={"rounds": rounds})


def bundle(folder: Path, model=None, **facts) -> Path:
    "A bundle of the model, with the rules of params/."
    model, rules = model or learned(), root() / "params" / RULES
    facts = {"name": "finure-cards", "version": "1"} | facts
    return write_bundle(folder, *model[:2], load("card_transactions"), *model[2:], facts, rules)


def event(row: int) -> Transaction:
    "One of the payments as the store takes it."
    events = payments()[1]
    return Transaction(*(int(column[row]) for column in events[:5]))


def raw(event: Transaction, **changes) -> dict:
    "A payment as a caller sends it."
    when = dt.datetime.fromtimestamp(event.time, dt.UTC)
    return {
        "transaction_id": event.id, "event_time": f"{when:%Y-%m-%dT%H:%M:%SZ}", "customer_id": event.customer,
        "terminal_id": event.terminal, "amount": event.cents / 100,
    } | changes  # fmt: skip


def application(event: Transaction, **changes) -> dict:
    "A payment as the scorer takes it."
    return raw(event) | {"event_time": dt.datetime.fromtimestamp(event.time, dt.UTC)} | changes


def sent(event: Transaction, **changes) -> bytes:
    "A payment as bytes."
    return json.dumps(raw(event, **changes)).encode()


def expected(rows) -> np.ndarray:
    "The features of some payments by the batch driver, where no label was told."
    events = payments()[1]
    return np.array(list(batch(events._replace(frauds=events.frauds[:0], known=events.known[:0])).values())).T[rows]
