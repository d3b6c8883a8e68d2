"Recourse: every advice verified, minimal, monotone, and only in what the applicant can change; and its route"

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from explained import KINDS, applications, bundle, refused, scorer
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import call, problem

from finure.bundle import load_scorer
from finure.contracts.contract import Column, load, parse, to_plain
from finure.contracts.read import ApplicationReader
from finure.contracts.schema import asked
from finure.core import FinureError
from finure.explain.recourse import MOST_ADVICE, MOST_COLUMNS, MOST_SCORINGS, Scorings, ladder, recourse
from finure.explain.reference import Reference, Span, read_products
from finure.explain.summary import explain
from finure.serve.app import App

EXPLAIN = "/api/v1/explain"
CONTRACT = load("simulated_bank")
CAN_CHANGE = {name for name, column in CONTRACT.columns.items() if column.change}


def asked_of(application):
    "An application as a caller sends it."
    fields = {name: application[name] for name in asked(CONTRACT) if application.get(name) is not None}
    for name, value in fields.items():
        if CONTRACT.columns[name].type == "integer":
            fields[name] = int(value)
        elif CONTRACT.columns[name].type == "date":
            fields[name] = str(value)[:10]
    return fields


def additive(weights, cutoff, steps=10, own=50):
    "A scorer whose risk is a weighted sum of columns that may go down to zero."
    columns = {
        name: {"type": "integer", "range": [0, 100], "reason": "r", "change": {"direction": "down", "step": steps}}
        for name in weights
    } | {"age": {"type": "integer", "role": "protected"}, "past": {"type": "integer", "reason": "r"}}
    contract = parse({
        "contract": "sum", "version": "1", "title": "Sum", "reasons": {"r": {"category": "OTHER", "text": "A reason"}},
        "columns": columns,
    })  # fmt: skip
    risk = lambda a: sum(weight * a[name] for name, weight in weights.items()) + a["past"]
    made = SimpleNamespace(
        contract=contract, cutoff=cutoff, features=SimpleNamespace(online=lambda a: a), risk=risk,
        decide=lambda a: SimpleNamespace(answer={"decision": "approve" if risk(a) <= cutoff else "decline"}),
    )  # fmt: skip
    reference = Reference(9, {}, {name: Span(0, 100, 10) for name in weights})
    return Scorings(made, dict.fromkeys(weights, own) | {"age": 40, "past": 0}), reference


def test_planted_cases_have_the_known_answers():
    scorings, reference = additive({"a": 1.0, "b": 0.1}, 30)  # 55: a must fall by 25 or more; b alone is never enough
    assert [one.changes for one in recourse(scorings, reference)] == [{"a": 20}]
    scorings, reference = additive({"a": 1.0, "b": 0.1}, 3)  # a to zero leaves 5: both are needed
    assert [one.changes for one in recourse(scorings, reference)] == [{"a": 0, "b": 30}]
    assert recourse(*additive({"a": 1.0, "b": 0.1}, -1)) == []  # nothing is enough


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 900))
def test_one_column_is_minimal_and_the_best_is_close_to_that_of_all(weights, cutoff):
    scorings, reference = additive(dict(zip("abc", map(float, weights), strict=False)), float(cutoff))
    names, risk = "abc"[: len(weights)], scorings.scorer.risk
    every = [{}]
    for name in names:
        every = [values | {name: value} for values in every for value in range(0, 60, 10)]
    base = scorings.application
    costs = [sum(50 - v for v in values.values()) / 10 for values in every if risk(base | values) <= cutoff]
    found = recourse(scorings, reference)
    if risk(base) <= cutoff:
        return
    assert bool(found) == bool(costs)
    if found:
        assert min(costs) <= found[0].cost <= min(costs) + 1
    for one in found:
        for name, value in one.changes.items():
            back = one.changes | {name: value + 10}
            assert risk(base | back) > cutoff


def test_an_advice_that_more_of_would_spoil_is_not_given():
    scorings, reference = additive({"a": 1.0}, 30)
    scorings.scorer.risk = lambda a: 0.0 if 10 <= a["a"] <= 30 else 99.0
    assert recourse(scorings, reference) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_advice_and_every_offer_for_simulated_applicants(kind):
    told, some, reader = scorer(kind), {"recourse": 0, "products": 0}, ApplicationReader(CONTRACT)
    for application in map(asked_of, refused(kind)[:30]):
        found = explain(told, told.reference, application)
        some = {name: n + bool(found[name]) for name, n in some.items()}
        assert len(found["recourse"]) <= MOST_ADVICE and found["scorings"] <= MOST_SCORINGS
        check_offers(told, application, {one["id"]: one["terms"] for one in found["products"]})
        for one in found["recourse"]:
            new = {change["field"]: change["to"] for change in one["changes"]}
            follows = {change["field"]: change["to"] for change in one["follows"]}
            assert 1 <= len(new) <= MOST_COLUMNS and set(new) <= CAN_CHANGE
            assert set(follows) <= {other for name in new for other in CONTRACT.columns[name].change.moves}
            changed = reader.read(json.dumps(application | new | follows).encode())
            assert told.decide(changed).answer["decision"] == "approve"
            for name, value in new.items():
                assert further_is_no_worse(told, application, changed, name, value)
    assert some["recourse"] > 15 and some["products"] > 2


def check_offers(told, application, offered):
    "A product is offered within its terms and only if approved; and it is offered if its smallest loan would be."
    for product in told.reference.products:
        smallest = application | {name: low for name, (low, _) in product.columns.items()}
        if product.id not in offered:
            assert told.decide(smallest).answer["decision"] != "approve"
            continue
        terms = offered[product.id]
        assert all(low <= terms[name] <= high for name, (low, high) in product.columns.items())
        assert told.decide(application | terms).answer["decision"] == "approve"


def further_is_no_worse(told, application, changed, name, value):
    "Whether larger changes of a column are approved, too, and the change goes the way that the contract allows."
    column = CONTRACT.columns[name]
    before, after = (column.levels.index(v) if column.levels else v for v in (application[name], value))
    sign = {"down": -1, "up": 1}[column.change.direction]
    assert sign * (after - before) > 0
    span = told.reference.columns[name]
    assert after <= span.high if sign > 0 else after >= min(span.low, before)
    more = ladder(name, column, value, span, sign)
    tried = range(1, more.rungs + 1, max(1, more.rungs // 7)) if more else ()
    risks = [told.risk(told.features.online(changed | {name: more.at(rung)})) for rung in tried]
    assert risks == sorted(risks, reverse=True)
    return all(risk <= told.cutoff for risk in risks)


def test_the_approved_are_given_no_advice():
    told = scorer("scorecard")
    approved = next(a for a in applications()[2] if told.decide(a).answer["decision"] == "approve")
    found = explain(told, told.reference, asked_of(approved))
    assert found["recourse"] == found["products"] == [] and found["scorings"] == 0


@pytest.mark.parametrize("role", ["protected", "outcome", "lender"])
def test_a_contract_cannot_open_what_is_no_applicants_to_change(role):
    plain = to_plain(CONTRACT)
    closed = {"type": "integer", "role": role, "change": {"direction": "up", "step": 1}}
    with pytest.raises(FinureError, match=f"columns.x: a {role} column cannot have `change`"):
        parse(plain | {"columns": plain["columns"] | {"x": closed}})


def test_a_change_survives_in_a_bundle_and_protected_columns_in_no_product(tmp_path):
    assert parse(to_plain(CONTRACT)) == CONTRACT
    path = tmp_path / "products.yaml"
    path.write_text("simulated_bank: [{id: young, name: Young, columns: {age_years: [18, 25]}}]")
    with pytest.raises(FinureError, match="young: age_years: not a column with `change`"):
        read_products(path, CONTRACT)


def test_a_special_code_or_nothing_cannot_be_changed():
    column = Column(type="integer", special={-9.0: "none"}, change={"direction": "down", "step": 1})
    assert ladder("x", column, None, Span(0, 9, 1), -1) is ladder("x", column, -9, Span(0, 9, 1), -1) is None


def test_the_service_explains_and_records_nothing():
    told = scorer("boosting")
    app, application = App(told), asked_of(refused("boosting")[0])
    status, _, body = call(app, EXPLAIN, json.dumps(application).encode())
    answer = json.loads(body)
    assert status == 200 and answer["simulated"] and "decision_id" not in answer
    expected = explain(told, told.reference, ApplicationReader(CONTRACT).read(json.dumps(application).encode()))
    assert {name: answer[name] for name in expected} == json.loads(json.dumps(expected))
    assert not app.metrics.outcomes
    problem(422, call(app, EXPLAIN, json.dumps(application | {"amount": -1}).encode()))
    problem(422, call(app, EXPLAIN, json.dumps(application | {"sex": "female"}).encode()))
    document = json.loads(call(app, "/openapi.json")[2])
    assert document["paths"][EXPLAIN]["post"]["requestBody"] and app.routes[EXPLAIN].scope == "simulate"


def test_a_bundle_without_a_reference_has_no_route(tmp_path):
    shutil.copytree(bundle("scorecard"), tmp_path / "bundle")
    (tmp_path / "bundle" / "reference.json").unlink()
    problem(404, call(App(load_scorer(tmp_path / "bundle")), EXPLAIN, b"{}"))


def test_explaining_needs_nothing_heavy():
    application = json.dumps(asked_of(refused("boosting")[0]))
    code = (
        "import sys, json, pathlib, finure.serve.explain; from finure.bundle import load_scorer;"
        f"s = load_scorer(pathlib.Path({str(bundle('boosting'))!r})); from finure.explain.summary import explain;"
        f"explain(s, s.reference, json.loads({application!r}) | {{'application_date': None}});"
        "print(*{'pandas', 'xgboost', 'sklearn', 'scipy', 'mlflow', 'shap', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", done.stdout
