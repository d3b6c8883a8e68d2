"""Decisions on card payments: rules and model, the state behind them, everything that arrives in an unusual way"""

import datetime as dt
import subprocess
import sys
import time

import msgspec
import numpy as np
import paying
import pytest
from paying import application, event
from serving import call, problem
from test_fraud_online import server  # noqa: F401

from finure.bundle import ConflictError, load_scorer, what_if
from finure.contracts.read import ViolationError
from finure.core import FinureError, Settings, root
from finure.fraud.decide import score
from finure.fraud.features import HANDBOOK
from finure.fraud.model import margins
from finure.fraud.rules import ACTIONS, RULES
from finure.fraud.stores import LocalStore
from finure.serve.app import App


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return paying.bundle(tmp_path_factory.mktemp("model") / "b")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def scorer(bundle, home):
    "A scorer that serves, with a state of its own."
    made = load_scorer(bundle)
    state = made.start(Settings(home=home))
    yield made
    state.close()


def put(home, name, text):
    "Writes a file that the rules read at once."
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(text)


def test_features_probability_and_outcome_are_those_of_training(scorer):
    decided = [scorer.decide(application(event(row))) for row in range(1500)]
    seen = np.array([one.trace["features"] for one in decided])
    np.testing.assert_array_equal(seen, paying.expected(slice(1500)))
    model = paying.learned()
    probability = model.calibration.probability(margins(model.booster, seen.astype(np.float32)))
    answers = [one.answer for one in decided]
    np.testing.assert_allclose([answer["probability"] for answer in answers], probability, rtol=1e-4)
    for answer, p, one in zip(answers, probability, decided, strict=True):
        by_model = sum(p >= model.thresholds[name] for name in ("review", "block"))
        assert answer["decision"] == ACTIONS[max(by_model, ACTIONS.index(one.trace["rules"].outcome))]
        assert answer["score"] == pytest.approx(score(np.log(p / (1 - p))), abs=1)
        assert bool(answer["reasons"]) == (answer["decision"] != "approve")
    assert {answer["decision"] for answer in answers} >= {"approve", "review"}


def test_a_record_decides_again_without_the_state(scorer, bundle):
    elsewhere = load_scorer(bundle)
    for row in range(300):
        decided = scorer.decide(application(event(row)), explain=row % 3 == 0)
        answer, trace, _ = msgspec.json.decode(msgspec.json.encode(decided))
        again = msgspec.json.decode(msgspec.json.encode(elsewhere.replay(trace, b"")))
        assert again[:2] == [answer, trace]
    assert "store" not in vars(elsewhere) and "rules" not in vars(elsewhere)


def test_what_if_adds_nothing(scorer):
    for row in range(200):
        asked = [what_if(scorer, application(event(row))) for _ in range(2)]
        decided = scorer.decide(application(event(row)), explain=True)
        assert asked == [decided, decided] == [decided, what_if(scorer, application(event(row)))]
    assert len(scorer.store.online.memory.order) == 200


def test_rules_come_first_and_the_stronger_one_decides(scorer, home):
    pays = application(event(0))
    assert scorer.decide(pays).answer["decision"] == "approve"
    put(home, "lists/blocked_cards.txt", f"{pays['customer_id']}  # stolen\n")
    put(home, "lists/compromised_terminals.txt", f"{pays['terminal_id']}\n")
    scorer.rules.book.next_look = 0
    decided = scorer.decide(pays | {"transaction_id": 10**6})
    assert decided.answer["decision"] == "block"
    codes = [reason["code"] for reason in decided.answer["reasons"]]
    assert codes[:2] == ["blocked_card", "compromised_terminal"]
    assert {("blocked_card", "live"), ("compromised_terminal", "live")} <= set(decided.hits)
    results = decided.trace["rules"].results
    assert len(results) == 8 and {result.mode for result in results} == {"live", "shadow"}


def test_a_rule_on_trial_is_recorded_and_decides_nothing(scorer):
    pays = application(event(0)) | {"terminal_id": 990_001}
    for n in range(3):
        scorer.decide(pays | {"transaction_id": 10**6 + n, "customer_id": 990_000 + n})
        scorer.store.feedback(10**6 + n, True, event(0).time + 60)
    decided = scorer.simulate(application(event(0), transaction_id=10**7) | {"terminal_id": 990_001,
                              "event_time": pays["event_time"] + dt.timedelta(hours=1)})  # fmt: skip
    assert ("terminal_with_frauds", "shadow") in decided.hits
    assert "terminal_with_frauds" not in [reason["code"] for reason in decided.answer["reasons"]]


def test_rules_of_the_home_folder_take_over_and_broken_ones_do_not(scorer, home, caplog):
    own = (root() / "params" / RULES).read_text()
    pays, before = application(event(0)), scorer.rules.book.checked.version
    put(home, RULES, own.replace('version: "1"', 'version: "2"').replace("amount > 220", "amount > 0"))
    scorer.rules.next_look = 0
    told = scorer.simulate(pays)
    assert told.answer["reasons"][0]["code"] == "large_amount"
    assert told.trace["rules"].version.startswith("2+") and before.startswith("1+")
    put(home, RULES, "version: 3")
    scorer.rules.next_look = 0
    assert scorer.simulate(pays) == told
    assert caplog.text.count("the rules stay as they were") == 1


# -- what arrives in an unusual way


def test_the_same_payment_twice_counts_once_and_another_of_its_id_is_refused(scorer):
    first = [scorer.decide(application(event(row))) for row in range(50)]
    assert [scorer.decide(application(event(row))) for row in range(50)] == first
    for wrong in ({"amount": 1.0}, {"customer_id": 7777}, {"event_time": dt.datetime(2018, 4, 1, tzinfo=dt.UTC)}):
        with pytest.raises(ConflictError) as refused:
            scorer.decide(application(event(3), **wrong))
        assert refused.value.violations[0]["field"] == "transaction_id"
    batch = scorer.decide_batch([application(event(0)), application(event(1), amount=9.0), application(event(50))])
    assert batch[0] == first[0] and isinstance(batch[1], ConflictError)
    np.testing.assert_array_equal(batch[2].trace["features"], paying.expected(50))


def test_a_clock_that_is_ahead_is_told_so(scorer):
    soon, late = (dt.datetime.now(dt.UTC) + dt.timedelta(minutes=m) for m in (4, 6))
    assert scorer.decide(application(event(0), event_time=soon)).answer["decision"]
    for pays, field in (({"event_time": late}, "event_time"), ({"transaction_id": None}, "transaction_id")):
        with pytest.raises(ViolationError) as refused:
            scorer.decide(application(event(1), **pays))
        assert [violation["field"] for violation in refused.value.violations] == [field]
    assert len(scorer.store.online.memory.order) == 1


def test_late_and_ancient_payments_are_decided_and_strangers_have_no_history(scorer):
    names, day = scorer.feature_names, dt.timedelta(days=1)
    start = dt.datetime(2024, 5, 6, 12, tzinfo=dt.UTC)
    pays = {"transaction_id": 1, "event_time": start, "customer_id": 1, "terminal_id": 1, "amount": 10.0}
    seen = lambda **changes: dict(zip(names, scorer.decide(pays | changes).trace["features"], strict=True))
    stranger = seen()
    assert (stranger["customer_count_30d"], stranger["customer_times_mean_30d"], stranger["terminal_risk_30d"]) == (
        1,
        1,
        0,
    )
    for n in range(2, 90):
        seen(transaction_id=n, event_time=start + n * day)
    late = seen(transaction_id=100, event_time=start + 89 * day - day / 2)
    assert (late["customer_count_7d"], late["customer_since"]) == (8, 12)  # it does not see what came after it
    ancient = seen(transaction_id=101, event_time=start - 400 * day)
    assert ancient == seen(transaction_id=102, customer_id=5, terminal_id=5, event_time=start - 400 * day)
    assert seen(transaction_id=103, event_time=start + 90 * day)["customer_count_7d"] == 8


def ask(app, pays: dict, wait: float) -> bytes:
    "What is answered to a payment, after a while."
    time.sleep(wait)
    status, _, answer = call(app, "/api/v1/predict", msgspec.json.encode(pays))
    assert status == 200, answer
    return answer


def test_a_payment_without_a_time_that_comes_again_is_the_same(bundle, home):
    app = App(scorer := load_scorer(bundle), settings=Settings(home=home, decision_log=False))
    state = scorer.start(app.settings)
    pays = paying.raw(event(0))
    del pays["event_time"]
    first, again = (msgspec.json.decode(ask(app, pays, wait)) for wait in (0, 1.1))
    assert first["event_time"][:19] == again["event_time"][:19]
    told = problem(409, call(app, "/api/v1/predict", paying.sent(event(0))))
    assert "came before" in told["detail"] and told["violations"][0]["rule"] == "conflict"
    late = problem(422, call(app, "/api/v1/simulate", paying.sent(event(1), event_time="2999-01-01T00:00:00Z")))
    assert late["violations"][0]["field"] == "event_time"
    state.close()


# -- the state


def test_loading_takes_nothing_and_a_model_that_takes_over_shares_the_state(bundle, home, tmp_path):
    first = load_scorer(bundle)
    state = first.start(Settings(home=home))
    first.decide(application(event(0)))
    few = paying.learned(5, tuple(feature.name for feature in HANDBOOK))
    other = load_scorer(paying.bundle(tmp_path / "few", few, version="2"))
    assert other.start(Settings(home=home)) is state
    row = dict(zip(other.feature_names, other.decide(application(event(1))).trace["features"], strict=True))
    full = dict(zip(first.feature_names, paying.expected(1), strict=True))
    assert row == {feature.name: full[feature.name] for feature in HANDBOOK}
    with pytest.raises(FinureError, match="another process keeps its state here"):
        LocalStore(home / "fraud-state")
    state.close()
    assert load_scorer(bundle).start(Settings(home=home)).event(event(1).id) == event(1)


def test_redis_decides_the_same_and_says_when_it_is_gone(bundle, tmp_path, server):  # noqa: F811
    server.flushall()
    url = f"unix://{server.connection_pool.connection_kwargs['path']}"
    remote, local = load_scorer(bundle), load_scorer(bundle)
    remote.start(Settings(home=tmp_path, redis_url=url))
    state = local.start(Settings(home=tmp_path))
    for row in range(120):
        pays = application(event(row))
        assert remote.simulate(pays) == local.simulate(pays)
        assert remote.decide(pays, explain=True) == local.decide(pays, explain=True) == remote.simulate(pays)
    for ask in (remote.decide, remote.simulate):
        with pytest.raises(ConflictError):
            ask(application(event(0), amount=1.0))
    assert remote.first_time({"transaction_id": event(5).id}) == local.first_time({"transaction_id": event(5).id})
    state.close()
    app = App(gone := load_scorer(bundle), settings=Settings(decision_log=False))
    gone.start(Settings(home=tmp_path, redis_url="unix:///nothing/here"))
    for body in (paying.sent(event(0)), msgspec.json.encode({**paying.raw(event(0)), "event_time": None})):
        told = problem(503, call(app, "/api/v1/predict", body))
        assert "out of reach" in told["detail"] and "nothing" not in told["detail"]


def test_nothing_heavy_is_imported(bundle, tmp_path):
    code = (
        "import sys, finure.fraud.feedback; from finure.bundle import load_scorer; from finure.core import Settings;"
        f"load_scorer({str(bundle)!r}).start(Settings(home={str(tmp_path)!r})).close();"
        "print(*{'pandas', 'xgboost', 'sklearn', 'scipy', 'redis', 'mlflow', 'shap', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
