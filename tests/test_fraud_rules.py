"""Fraud rules: what the file may say, what wins, what is kept, and that both ways of running them agree"""

import datetime as dt
import json
import logging
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml

from finure.core import FinureError, generator, write_atomic
from finure.fraud.features import DAY
from finure.fraud.online import Online, Transaction, transaction
from finure.fraud.rules import ACTIONS, Result, RuleBook, apply_batch, expired, read_rules

NAMES = ("amount", "count", "top")
FILE = Path(__file__).parents[1] / "params" / "fraud_rules.yaml"
NOON = 20_000 * DAY + DAY // 2  # 2024-10-04
TODAY = dt.date(2024, 10, 4)


def rule(id: str, when: str | list[str], action: str = "review", mode: str = "live", **more: object) -> dict:
    "A rule as in the file."
    about = {"description": "d", "owner": "o", "reason": f"because of {id}"}
    return {"id": id, "when": when, "action": action, "mode": mode, **about, **more}


def suppression(id: str, **more: object) -> dict:
    "A suppression as in the file."
    return {"rule": id, "from": TODAY, "until": TODAY, "who": "J. Doe", "why": "knows", **more}


def write(folder: Path, *rules: dict, **more: object) -> Path:
    "A file of rules."
    write_atomic(folder / "fraud_rules.yaml", yaml.safe_dump({"version": "3", "rules": list(rules), **more}))
    return folder / "fraud_rules.yaml"


def book(folder: Path, *rules: dict, **more: object) -> RuleBook:
    "A compiled file of rules whose lists lie beside it."
    return RuleBook(write(folder, *rules, **more), NAMES, home=folder / "home")


def pay(amount: float = 10.0, time: int = NOON, customer: int = 1, terminal: int = 2) -> Transaction:
    "A transaction."
    return transaction(1, time, customer, terminal, amount)


WRONG = [
    (rule("a", "amuont > 5"), "rule `a`: when: `amuont` is no feature; did you mean `amount`?"),
    (rule("a", "amount => 5"), "rule `a`: when: `=>` is no comparison for `amount`"),
    (rule("a", "amount in blocked"), "`in` is no comparison for `amount`"),
    (rule("a", "customer_id > 5"), "`>` is no comparison for `customer_id`"),
    (rule("a", "customer_id in bloked"), "`bloked` is no list of this file; did you mean `blocked`?"),
    (rule("a", "amount > five"), "`five` is not a number"),
    (rule("a", "amount > nan"), "`nan` is not a number"),
    (rule("a", "amount >"), "must be three words"),
    (rule("a", []), "rule `a`: `when` is empty"),
    (rule("a", "amount > 5", action="blok"), "rule `a`: Invalid enum value 'blok' - at `action`"),
    (rule("a", "amount > 5", mode="on"), "at `mode`"),
    (rule("a", "amount > 5", untill=TODAY), "rule `a`: Object contains unknown field `untill`"),
    (rule("a", "amount > 5", until="soon"), "at `until`"),
    (rule("a", "amount > 5", until=TODAY, **{"from": dt.date(2025, 1, 1)}), "`until` 2024-10-04 is before `from`"),
    ({"id": "a"}, "rule `a`: Object missing required field"),
]


@pytest.mark.parametrize(("content", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_what_a_rule_may_not_say(tmp_path, content, text):
    path = write(tmp_path, content, lists={"blocked": "blocked.txt"})
    with pytest.raises(FinureError) as error:
        read_rules(path, NAMES)
    assert text in str(error.value) and str(error.value).startswith("fraud_rules.yaml, rule `a`: ")


def test_ids_differ(tmp_path):
    with pytest.raises(FinureError, match="rule `a` is given 2 times"):
        read_rules(write(tmp_path, rule("a", "amount > 5"), rule("a", "amount > 6")), NAMES)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (suppression("b", customer_id=1), "suppression 1 of `b`: there is no such rule"),
        (suppression("a"), "suppression 1 of `a`: give it a customer_id or a terminal_id"),
        ({"rule": "a", "customer_id": 1}, "missing required field `from`"),
        (suppression("a", customer_id="x"), "at `customer_id`"),
        (suppression("a", customer_id=1, until=dt.date(2024, 1, 1)), "is before `from`"),
    ],
)
def test_what_a_suppression_may_not_say(tmp_path, content, text):
    with pytest.raises(FinureError, match=text):
        read_rules(write(tmp_path, rule("a", "amount > 5"), suppressions=[content]), NAMES)


def test_the_version_changes_with_every_change_of_the_file(tmp_path):
    one = read_rules(write(tmp_path, rule("a", "amount > 5")), NAMES).version
    two = read_rules(write(tmp_path, rule("a", "amount > 6")), NAMES).version
    assert one != two and one.startswith("3+") and two.startswith("3+")


@pytest.mark.parametrize(
    ("comparison", "below", "at", "above"),
    [(">", 0, 0, 1), (">=", 0, 1, 1), ("<", 1, 0, 0), ("<=", 1, 1, 0), ("==", 0, 1, 0)],
)
def test_comparisons(tmp_path, comparison, below, at, above):
    rules = book(tmp_path, rule("a", f"count {comparison} 3"))
    hits = [rules.decide_rules(pay(), (10.0, count, 0.0)).results[0].hit for count in (2.0, 3.0, 4.0)]
    assert hits == [bool(below), bool(at), bool(above)]


def test_the_strongest_action_wins_and_the_order_in_the_file_does_not_matter(tmp_path):
    rules = [rule("ok", "amount > 1", "approve"), rule("look", "amount > 2"), rule("stop", "amount > 3", "block")]
    for order in (rules, rules[::-1]):
        found = book(tmp_path, *order)
        said = [found.decide_rules(pay(amount), (amount, 0.0, 0.0)) for amount in (1.0, 2.0, 3.0, 4.0)]
        assert [one.outcome for one in said] == ["approve", "approve", "review", "block"]
        assert [one.hits for one in said] == [(), ("ok",), ("look", "ok"), ("stop", "look", "ok")]
        assert said[-1].reasons == ("because of stop", "because of look", "because of ok")


def test_all_conditions_of_a_rule_must_hold(tmp_path):
    rules = book(tmp_path, rule("a", ["top > 3", "amount > 50"]))
    rows = [(60.0, 0.0, 4.0), (40.0, 0.0, 4.0), (60.0, 0.0, 2.0)]
    results = [rules.decide_rules(pay(row[0]), row).results[0] for row in rows]
    assert [result.hit for result in results] == [True, False, False]
    assert [result.values for result in results] == [(4.0, 60.0), (4.0, 40.0), (2.0, 60.0)]


def test_a_shadow_rule_is_recorded_and_decides_nothing(tmp_path):
    said = book(tmp_path, rule("a", "amount > 5", "block", "shadow"), rule("b", "amount > 5")).decide_rules(
        pay(), (10.0, 0.0, 0.0)
    )
    assert (said.outcome, said.hits, said.reasons) == ("review", ("b",), ("because of b",))
    assert said.results == [Result("a", "block", "shadow", True, (10.0,)), Result("b", "review", "live", True, (10.0,))]


def test_a_rule_is_in_force_from_its_first_to_its_last_day(tmp_path):
    rules = book(tmp_path, rule("a", "amount > 5", until=TODAY, **{"from": TODAY}))
    midnight = NOON - DAY // 2
    times = (midnight - 1, midnight, midnight + DAY - 1, midnight + DAY)
    said = [rules.decide_rules(pay(time=time), (10.0, 0.0, 0.0)) for time in times]
    assert [one.outcome for one in said] == ["approve", "review", "review", "approve"]
    assert [(one.results[0].mode, one.results[0].hit) for one in said][::3] == [("off", False)] * 2


def test_a_suppression_holds_for_whom_it_names_and_ends_by_the_clock_of_the_events(tmp_path):
    rules = book(
        tmp_path,
        rule("a", "amount > 5"),
        rule("b", "amount > 500"),
        suppressions=[suppression("a", customer_id=1), suppression("a", customer_id=7, terminal_id=8)],
    )
    midnight = NOON - DAY // 2
    tries = [pay(), pay(customer=3), pay(time=midnight + DAY), pay(time=midnight - 1)]
    tries += [pay(customer=7), pay(customer=7, terminal=8)]
    said = [rules.decide_rules(event, (10.0, 0.0, 0.0)) for event in tries]
    assert [one.outcome for one in said] == ["approve", "review", "review", "review", "review", "approve"]
    assert said[0].results[0] == Result("a", "review", "suppressed", True, (10.0,)) and said[0].hits == ()
    assert rules.decide_rules(pay(600.0), (600.0, 0.0, 0.0)).hits == ("b",), "another rule still decides"


def test_what_has_ended_is_noted(tmp_path):
    old, last = dt.date(2024, 1, 1), dt.date(2024, 1, 31)
    path = write(
        tmp_path,
        rule("a", "amount > 5", until=last),
        rule("b", "amount > 5", until=TODAY),
        suppressions=[{**suppression("b", terminal_id=4), "from": old, "until": last}],
    )
    ended = expired(read_rules(path, NAMES), TODAY)
    assert ended == ["The rule `a` ended on 2024-01-31.", "The suppression of `b` for terminal 4 ended on 2024-01-31."]


def test_a_list_is_read_again_and_the_one_at_home_counts(tmp_path, caplog):
    write_atomic(tmp_path / "blocked.txt", "# lost\n1\n")
    rules = book(tmp_path, rule("a", "customer_id in blocked", "block"), lists={"blocked": "blocked.txt"})

    def blocked() -> list[int]:
        "Who is blocked after a look at the lists."
        rules.next_look = 0
        return [c for c in (1, 2, 3) if rules.decide_rules(pay(customer=c), (10.0, 0.0, 0.0)).outcome == "block"]

    assert blocked() == [1]
    write_atomic(tmp_path / "blocked.txt", "1\n2 # by phone\n")
    assert blocked() == [1, 2]
    write_atomic(tmp_path / "home" / "blocked.txt", "3\n")
    assert blocked() == [3]
    caplog.set_level(logging.WARNING, "finure.fraud")
    write_atomic(tmp_path / "home" / "blocked.txt", "3\n1.5\n")
    assert (blocked(), blocked()) == ([3], [3])
    assert len(caplog.messages) == 1 and "line 2: `1.5` is not an id" in caplog.messages[0]
    (tmp_path / "home" / "blocked.txt").unlink()
    assert blocked() == [1, 2]
    (tmp_path / "blocked.txt").unlink()
    assert blocked() == [1, 2]
    assert "no such list" in caplog.messages[1]


def test_a_list_must_be_there_and_right_at_the_start(tmp_path):
    content = rule("a", "customer_id in blocked", "block")
    with pytest.raises(FinureError, match=r"blocked\.txt: no such list"):
        book(tmp_path, content, lists={"blocked": "blocked.txt"})
    write_atomic(tmp_path / "blocked.txt", "-4\n")
    with pytest.raises(FinureError, match="line 1: `-4` is not an id"):
        book(tmp_path, content, lists={"blocked": "blocked.txt"})


def test_the_lists_are_not_looked_at_for_every_transaction(tmp_path):
    write_atomic(tmp_path / "blocked.txt", "1\n")
    rules = book(tmp_path, rule("a", "customer_id in blocked"), lists={"blocked": "blocked.txt"})
    rules.next_look = float("inf")
    write_atomic(tmp_path / "blocked.txt", "2\n")
    assert rules.decide_rules(pay(customer=1), (10.0, 0.0, 0.0)).outcome == "review"


def test_the_record_is_json_and_holds_every_rule():
    online = Online()
    rules = RuleBook(FILE, online.names)
    event = transaction(1, NOON, 1, 2, 300.0)
    trace = json.loads(msgspec.json.encode(rules.decide_rules(event, online.observe(event))))
    assert [result["id"] for result in trace["results"]] == [compiled.id for compiled in rules.rules]
    large = next(result for result in trace["results"] if result["id"] == "large_amount")
    assert large == {"id": "large_amount", "action": "review", "mode": "live", "hit": True, "values": [300.0]}
    assert (trace["outcome"], trace["reasons"], trace["version"]) == ("review", ["Large amount"], rules.checked.version)


def test_rows_and_columns_agree(tmp_path):
    write_atomic(tmp_path / "blocked.txt", "3\n5\n")
    rules = book(
        tmp_path,
        rule("blocked", "customer_id in blocked", "block"),
        rule("terminal", "terminal_id in blocked"),
        rule("amount", "amount >= 50"),
        rule("own", ["top > 3", "amount > 20"], "block", until=TODAY),
        rule("many", "count == 4", mode="shadow"),
        rule("trusted", "count < 1", "approve"),
        lists={"blocked": "blocked.txt"},
        suppressions=[
            suppression("amount", customer_id=1),
            suppression("blocked", customer_id=3, terminal_id=2),
            suppression("own", terminal_id=4),
        ],
    )
    draw, rows = generator(1, "rules"), 2_000
    columns = {name: draw.integers(0, 6, rows) for name in ("customer_id", "terminal_id")}
    columns["amount"] = np.rint(draw.uniform(0, 10_000, rows)) / 100
    columns["event_time"] = NOON + draw.integers(-4, 4, rows) * (DAY // 4) - draw.integers(0, 2, rows)
    columns |= {"count": draw.integers(0, 6, rows) * 1.0, "top": draw.integers(0, 6, rows) * 1.0}
    whole = apply_batch(rules, columns)
    plain = {name: column.tolist() for name, column in columns.items()}
    for i in range(rows):
        here = {name: column[i] for name, column in plain.items()}
        event = transaction(i, here["event_time"], here["customer_id"], here["terminal_id"], here["amount"])
        one = rules.decide_rules(event, tuple(here[name] for name in NAMES))
        assert ACTIONS[whole.outcome[i]] == one.outcome
        assert whole.hits[:, i].tolist() == [result.hit for result in one.results]
        assert tuple(np.array(whole.rules)[whole.counts[:, i]]) == one.hits
    assert whole.hits.any(axis=1).all() and not whole.hits.all(axis=1).any()
    assert set(np.unique(whole.outcome)) == {0, 1, 2} and (whole.hits & ~whole.counts).any()
    stamps = {**columns, "event_time": columns["event_time"].astype("datetime64[s]")}
    assert np.array_equal(apply_batch(rules, stamps).counts, whole.counts)


def test_the_rules_load_nothing_heavy():
    heavy = ("pandas", "mlflow", "xgboost", "sklearn", "scipy", "sqlalchemy")
    code = f"import sys, finure.fraud.rules; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
