"""Backtests of fraud policies: figures by hand, the same decisions as one by one, and the command"""

import datetime as dt
import re

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from finure.cli.main import app
from finure.contracts.contract import load
from finure.core import Settings, write_atomic
from finure.fraud.backtest import (
    History,
    Model,
    Policy,
    backtest,
    by_kind,
    by_rule,
    decide,
    policy,
    read_history,
    read_model,
    totals,
)
from finure.fraud.data import Transactions, simulated_table
from finure.fraud.features import RICH
from finure.fraud.model import Calibration, Costs, learn, write_bundle
from finure.fraud.online import Online, transaction
from finure.fraud.protocol import fold_as_of
from finure.fraud.rules import ACTIONS, RuleBook
from finure.simulate.cards import Cards

NAMES = tuple(feature.name for feature in RICH)
NOON = np.datetime64("2018-04-01T12:00:00", "s")


def rule(id: str, when: str, action: str = "review", mode: str = "live") -> dict:
    "A rule as in the file."
    return {"id": id, "when": when, "action": action, "mode": mode, "description": "d", "owner": "o", "reason": "r"}


def write(path, *rules: dict, **more: object):
    "A file of rules."
    write_atomic(path, yaml.safe_dump({"version": "1", "rules": list(rules), **more}))
    return path


@pytest.fixture
def hand(tmp_path):
    "Eight payments, three rules (one on trial, one suppressed for card 3), and a model whose scores are given."
    amount = np.array([300.0, 300.0, 100.0, 100.0, 20.0, 20.0, 300.0, 20.0])
    payments = Transactions(
        transaction_id=np.arange(8), event_time=NOON + np.arange(8) * np.timedelta64(6, "h"),
        customer_id=np.array([1, 2, 1, 2, 1, 2, 3, 9]), terminal_id=np.full(8, 7), amount=amount,
        fraud=np.array([1, 0, 1, 0, 1, 0, 1, 0], np.int8), known_time=np.full(8, NOON + np.timedelta64(90, "D")),
        scenario=np.array([1, 0, 3, 0, 2, 0, 1, 0], np.int8),
    )  # fmt: skip
    write_atomic(tmp_path / "blocked.txt", "9\n")
    days = {"from": dt.date(2018, 4, 1), "until": dt.date(2018, 4, 30), "who": "A", "why": "b", "customer_id": 3}
    file = write(
        tmp_path / "rules.yaml", rule("large", "amount > 220"), rule("stolen", "customer_id in blocked", "block"),
        rule("middle", "amount > 50", mode="shadow"), rule("known", "amount < 30", "approve"),
        lists={"blocked": "blocked.txt"}, suppressions=[{"rule": "large", **days}],
    )  # fmt: skip
    scores = np.array([0.9, 0.1, 0.1, 0.1, 0.4, 0.4, 0.2, 0.2])
    book = RuleBook(file, NAMES, home=tmp_path)
    now = Policy(book, Model("given", (), None, Calibration(1, 0), {}), 0.3, 0.8)
    return History("by hand", "", payments, {"amount": amount}), now, scores


def test_by_hand(hand):
    "Outcomes: block, review, approve, approve, review, review, approve (suppressed), block (stolen)."
    history, now, scores = hand
    decided = decide(history, now, scores)
    assert [ACTIONS[code][0] for code in decided.outcome] == list("bra" + "arr" + "ab")
    found = totals(history.payments, decided.outcome, Costs(good_blocked=20, review_cost=4, review_saves=0.5))
    assert found == {
        "payments": 8, "frauds": 4, "frauds caught": 2, "share of frauds caught": 0.5, "frauds blocked": 1,
        "amount of fraud": 720, "amount caught": 320, "payments reviewed": 3, "cards reviewed a day": 1,
        "share of reviews with fraud": pytest.approx(1 / 3), "good payments reviewed": 2, "good payments blocked": 1,
        "good customers hit": 2, "cost of fraud and checks": 100 + 300 + 10 + 3 * 4 + 20, "money saved": 278,
    }  # fmt: skip


def test_by_rule_and_by_kind_by_hand(hand):
    history, now, scores = hand
    decided = decide(history, now, scores)
    table = by_rule(history.payments, decided, now.book)
    assert table.T.to_dict("list") == {
        "stolen": ["block, live", 1, 0, 1, 0],
        "large": ["review, live", 3, 2, 2, 1],  # the model had the first; the last is suppressed: nobody stopped it
        "middle": ["review, shadow", 5, 3, 3, 2],  # of 300, 300, 100, 100, 300: all that nobody stopped
        "known": ["approve, live", 3, 1, 0, 0],
        "the model": ["", 3, 2, 2, 1],
    }
    kinds = by_kind(history.payments, {"now": decided.outcome})
    assert kinds["now"].to_dict() == {"large amount": 0.5, "leaked card": 0.0, "compromised terminal": 1.0}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    "Two months of a small simulated bank, a bundle made of its first weeks, and two files of rules."
    home = tmp_path_factory.mktemp("bank")
    cards = Cards(customers=150, terminals=80, days=60, compromised=0.4, leaked=0.6, radius=30, seed=3)
    simulated_table(cards).to_parquet(home / "cards.parquet")
    past = read_history(str(home / "cards.parquet"), settings=Settings(home=home))
    days = (past.payments.day, past.payments.customer_id, past.payments.fraud)
    names = ("amount", "customer_times_mean_30d", "terminal_risk_30d", "customer_count_1d")
    learned = learn(
        past.payments, past.columns, names, fold_as_of(*days, int(days[0][0]) + 40), Costs(), 10, {"rounds": 10}
    )
    about = {"name": "small", "version": "4", "as_of": "2018-05-11", "costs": {"review_saves": 0.6}}
    contract = load("card_transactions")
    write_bundle(home / "bundle", *learned[:2], contract, *learned[2:], about)
    write(home / "now.yaml", rule("large", "amount > 220"), rule("many", "customer_count_1h > 4", "block"))
    write(home / "new.yaml", rule("large", "amount > 150"), rule("top", "customer_times_top_30d > 3", mode="shadow"))
    return home


def test_features_do_not_depend_on_the_days_that_are_replayed(bank):
    whole = read_history(str(bank / "cards.parquet"))
    part = read_history(str(bank / "cards.parquet"), dt.date(2018, 5, 12), dt.date(2018, 5, 20))
    assert part.span == (dt.date(2018, 5, 12), dt.date(2018, 5, 20))
    rows = np.isin(whole.payments.transaction_id, part.payments.transaction_id)
    assert all(np.array_equal(part.columns[name], whole.columns[name][rows]) for name in NAMES)


def test_the_same_decisions_as_payment_by_payment(bank):
    "Rules, features and limits as the online drivers see them."
    history = read_history(str(bank / "cards.parquet"))
    model = read_model(bank / "bundle")
    review, block = np.quantile(model.probabilities(history), [0.9, 0.99])
    now = policy(bank / "new.yaml", model, review, block)
    payments, online, rules, rows = history.payments, Online(), [], []
    fraud = np.flatnonzero(payments.fraud)
    known = list(
        zip(*[c[fraud].astype(int).tolist() for c in (payments.known_time, payments.transaction_id)], strict=True)
    )
    known.sort(reverse=True)
    columns = [c.tolist() for c in (payments.transaction_id, payments.event_time.astype(int), *payments[2:5])]
    for event in map(transaction, *columns):
        while known and known[-1][0] <= event.time:
            time, label = known.pop()
            online.feedback(label, True, time)
        rows.append(online.observe(event))
        rules.append(ACTIONS.index(now.book.decide_rules(event, rows[-1]).outcome))
    rows = dict(zip(online.names, np.array(rows).T, strict=True))
    probability = model.probabilities(history._replace(columns=rows))
    outcome = np.maximum(rules, (probability >= review).astype(int) + (probability >= block))
    whole = decide(history, now, model.probabilities(history))
    assert np.array_equal(outcome, whole.outcome) and set(outcome) == {0, 1, 2}


def test_a_change_is_the_sum_of_its_payments(bank):
    history = read_history(str(bank / "cards.parquet"), dt.date(2018, 5, 12))
    model = read_model(bank / "bundle")
    now, changed = (policy(bank / file, model) for file in ("now.yaml", "new.yaml"))
    there, back = backtest(history, now, changed, Costs()), backtest(history, changed, now, Costs())
    assert (there.totals["difference"] == -back.totals["difference"]).all() and there.totals["difference"].any()
    assert set(there.rules.index) == {"many", "large", "top", "the model"}
    assert there.rules["as it is"].loc["top"].isna().all() and there.rules["changed"].loc["many"].isna().all()
    caught = (there.kinds["frauds"] * there.kinds["changed"]).sum()
    assert caught == pytest.approx(there.totals["changed"]["frauds caught"])


def run(bank, *more: str):
    "The command on the simulated bank."
    given = ["--data", str(bank / "cards.parquet"), "--model", str(bank / "bundle"), "--rules", str(bank / "now.yaml")]
    return CliRunner().invoke(app, ["fraud", "backtest", *given, *more])


def test_the_command_says_the_same_twice_and_writes_a_page_that_loads_nothing(bank):
    more = ("--rules-new", str(bank / "new.yaml"), "--block", "0.5", "--from", "2018-05-12", "--cost", "review_cost=2")
    first, again = (run(bank, *more, "--html", str(bank / "page.html")) for _ in range(2))
    assert first.exit_code == 0 and first.output == again.output
    assert "may have learned from earlier days" not in first.output
    assert "was made on 2018-05-11 and may have" in run(bank, "--block", "0.5", "--from", "2018-05-10").output
    page = (bank / "page.html").read_text()
    for text in (
        "2018-05-12 to 2018-05-30",
        "review_cost 2",
        "review_saves 0.6",
        "small@4",
        "block from 0.5",
        "good customers hit",
    ):
        assert text in first.output and text in page
    assert not re.search(r"https?://|<script", page)


@pytest.mark.parametrize(("more", "says"), [
    ([], "Nothing is changed"),
    (["--review", "0.9", "--block", "0.5"], "expected 0 <= review <= block"),
    (["--rules-new", "nowhere.yaml"], "nowhere.yaml: no such file"),
    (["--model-new", "finure-fraud"], "neither the folder of a bundle nor NAME@VERSION"),
    (["--review", "0.1", "--from", "2031-01-01"], "no payments from 2031-01-01 to the end; it holds 2018-04-01"),
    (["--review", "0.1", "--to", "May"], "--to May: expected a day"),
    (["--review", "0.1", "--cost", "review=3"], "--cost review=3: expected a number for one of loss_share"),
    (["--review", "0.1", "--cost", "review_saves=3"], "costs: all must be above 0"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(bank, more, says):
    told = run(bank, *more)
    assert told.exit_code == 1 and says in str(told.exception)


def test_a_bundle_of_another_product_is_refused(bank):
    (bank / "other").mkdir()
    write_atomic(bank / "other" / "model.json", '{"features": ["pd"], "calibration": {}}')
    told = run(bank, "--model-new", str(bank / "other"))
    assert told.exit_code == 1 and "model.json lacks thresholds" in str(told.exception)
