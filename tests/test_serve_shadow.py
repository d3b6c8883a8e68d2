"""A challenger beside the champion: who answers, what is recorded, and that nothing it does wrong reaches a caller"""

import asyncio
import json
import sys
import time
import types
from collections import Counter
from contextlib import closing
from urllib.request import Request, urlopen

import paying
import pytest
from explained import KINDS, applications
from explained import bundle as credit_bundle
from explained import scorer as credit_scorer
from serving import BATCH, GOOD, JSON, PREDICT, SCORER, SIMULATE, ask, body, bundle, call, running
from test_serve_swap import following, quick, records, until  # noqa: F401  # quick: looks often
from typer.testing import CliRunner

from finure.audit.log import open_store
from finure.audit.trail import replay
from finure.audit.verify import verify
from finure.bundle import fingerprint, load_scorer
from finure.cli.main import app as cli
from finure.core import FinureError, Settings
from finure.pipeline import as_applications
from finure.serve import challenger as module
from finure.serve import follow as follow_module
from finure.serve.app import App
from finure.serve.challenger import challenge, place_of
from finure.serve.service import service
from finure.serve.swap import Served, followed, point

MODULE = types.ModuleType("finure.shadowed_in_tests")
exec(SCORER, MODULE.__dict__)
sys.modules[MODULE.__name__] = MODULE


def beside(self, other):
    "What it says of the amount in a trace."

    def said(application, trace):
        if self.fault == "slow":
            time.sleep(0.002)
        amount = trace["features"]["amount"]
        answer = self.decide({"amount": amount}).answer
        return {name: answer[name] for name in ("pd", "decision")}

    return said


MODULE.Scorer.beside = beside
CHALLENGER = {"scorer": f"{MODULE.__name__}:load"}


def served(folder, share, **facts) -> App:
    "A service of a champion (declines above 10,000) and a challenger (above 20,000)."
    one = bundle(folder / "champion", "1", **CHALLENGER)
    two = bundle(folder / "challenger", "2", most=20_000, **CHALLENGER | facts)
    settings = Settings(home=folder, bundle=one, challenger=two, challenger_share=share)
    return service(folder / "none", settings=settings)


def decided(app, amounts) -> list[dict]:
    "The answers on amounts."
    answers = [call(app, PREDICT, body(ref=f"A-{amount}", amount=amount)) for amount in amounts]
    assert {status for status, _, _ in answers} == {200}, answers
    return [json.loads(answer) for _, _, answer in answers]


def test_a_shadow_is_recorded_and_changes_no_answer(tmp_path):
    app = served(tmp_path, 0)
    answers = decided(app, [5_000, 15_000, 25_000])
    app.log.close()
    assert [a["decision"] for a in answers] == ["approve", "decline", "decline"]
    assert {a["model"] for a in answers} == {"finure-test:1"} and not any("beside" in a for a in answers)
    found = [r["trace"]["beside"] for r in records(tmp_path, "decision")]
    assert [b["answer"]["decision"] for b in found] == ["approve", "approve", "decline"]
    assert [b["answer"]["pd"] for b in found] == pytest.approx([a["pd"] for a in answers])
    assert {(b["role"], b["model"], b["bundle"], b["share"]) for b in found} == {
        ("challenger", "finure-test:2", fingerprint(tmp_path / "challenger"), 0)
    }
    assert [r["model"] for r in records(tmp_path, "model")] == ["finure-test:1", "finure-test:2"]
    text = app.metrics.text()
    assert 'finure_challenger_scorings_total{in_charge="champion",other="same"} 2' in text
    assert 'other="different"} 1' in text and 'finure_challenger_info{model="finure-test:2",share="0"} 1' in text


def test_a_share_is_decided_by_the_challenger_always_the_same(tmp_path):
    app = served(tmp_path, 0.3)
    amounts = range(11_000, 11_120)  # the champion declines them, the challenger does not
    answers = decided(app, amounts)
    assert [a["decision"] for a in decided(app, amounts)] == [a["decision"] for a in answers]
    batch = json.dumps([json.loads(body(ref=f"A-{amount}", amount=amount)) for amount in amounts]).encode()
    again = json.loads(call(app, BATCH, batch)[2])["results"]
    simulated = json.loads(call(app, SIMULATE, body(ref="A-11000", amount=11_000))[2])
    app.log.close()
    assert [a["decision"] for a in again] == [a["decision"] for a in answers]
    assert [a["row"] for a in again] == list(range(len(amounts)))
    assert simulated["model"] == answers[0]["model"]
    salt = bytes.fromhex(fingerprint(tmp_path / "challenger"))
    for amount, answer in zip(amounts, answers, strict=True):
        ours = place_of(f"A-{amount}", salt) < 0.3
        assert (answer["model"][-1], answer["decision"]) == (("2", "approve") if ours else ("1", "decline"))
    shares = Counter(a["model"] for a in answers)
    assert 20 <= shares["finure-test:2"] <= 52
    for record in records(tmp_path, "decision"):
        roles = {"finure-test:1": ("challenger", "approve"), "finure-test:2": ("champion", "decline")}
        other = record["trace"]["beside"]
        assert (other["role"], other["answer"]["decision"]) == roles[record["model"]]
        assert record["answer"]["model"] == record["model"] != other["model"]
        assert other["answer"].keys() == {"pd", "decision"}  # no reasons


def test_a_record_with_another_model_in_it_is_verified_and_replayed(tmp_path):
    app = served(tmp_path, 0.5)
    answers = decided(app, range(11_000, 11_010))
    app.log.close()
    with closing(open_store(f"sqlite:///{tmp_path}/decisions.db")) as store:
        assert verify(store) == [] and len({a["model"] for a in answers}) == 2
        for answer in answers:
            name = {"1": "champion", "2": "challenger"}[answer["model"][-1]]
            assert replay(store, answer["decision_id"], tmp_path / name).verdict == "same"


FAULTS = {"raises": "KeyError", "nan": "no sensible pd"}


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_challenger_never_fails_a_request(tmp_path, caplog, share, fault):
    app = served(tmp_path, share)
    app.decider.challenger.scorer.fault = fault
    answers = decided(app, range(9_000, 9_030))
    again = json.loads(call(app, BATCH, b"[" + GOOD + b"]")[2])["results"]
    assert call(app, SIMULATE, GOOD)[0] == 200
    app.log.close()
    assert {a["model"] for a in [*answers, *again]} == {"finure-test:1"} and len(again) == 1
    found = [r["trace"]["beside"]["fault"] for r in records(tmp_path, "decision")]
    assert Counter(found)[FAULTS[fault]] == module.MOST_FAULTS and found[-1] == "resting"
    assert app.metrics.challenged["champion", "fault"] == 31
    failed = [r for r in caplog.records if "challenger failed" in r.message]
    assert len(failed) == 2 and not any("secret" in str(r.facts) for r in failed)


def test_a_slow_challenger_rests(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.001)
    app = served(tmp_path, 0, fault="slow")
    decided(app, range(9_000, 9_000 + module.MOST_FAULTS + 3))
    found = records(tmp_path, "decision")
    assert sum("answer" in r["trace"]["beside"] for r in found) == module.MOST_FAULTS
    app.decider.challenger.rests_until = 0
    app.decider.challenger.scorer.fault = None
    decided(app, [9_000])
    app.log.close()
    assert "answer" in records(tmp_path, "decision")[-1]["trace"]["beside"] and app.decider.challenger.faults == 0


def test_what_cannot_be_a_challenger_is_refused_and_the_champion_serves(tmp_path, caplog):
    app = served(tmp_path, 0.5, fault="contract")
    assert decided(app, [5_000])[0]["model"] == "finure-test:1"
    app.log.close()
    assert "finure_challengers_refused_total 1" in app.metrics.text() and "challenger_info" not in app.metrics.text()
    (refused,) = [r.facts["why"] for r in caplog.records if "challenger was refused" in r.message]
    assert "the challenger decides under contract `other 1`, the champion under `test 1`" in refused


def test_the_pointer_puts_a_challenger_beside_and_takes_it_away(tmp_path):
    async def story():
        async with following(tmp_path) as (app, pointer):
            one, two = (bundle(tmp_path / f"b{n}", str(n), most=10_000 * n, **CHALLENGER) for n in (1, 2))
            broken = bundle(tmp_path / "broken", "3", **CHALLENGER | {"fault": "nan"})
            point(pointer, one, two, 1.0)
            await until(lambda: app.metrics.challenger)
            seen = [json.loads((await ask(app, PREDICT, body(amount=15_000)))[2])["model"]]
            point(pointer, one, broken, 1.0)
            await until(lambda: app.metrics.challengers_refused)
            await until(lambda: not app.metrics.challenger)
            seen.append(json.loads((await ask(app, PREDICT, body(amount=15_000)))[2])["model"])
            point(pointer, two)  # promoted
            await until(lambda: app.decider.model == "finure-test:2")
            seen.append(json.loads((await ask(app, PREDICT, body(amount=15_000)))[2])["model"])
            assert "finure_model_swaps_total 2" in app.metrics.text()  # another challenger is no other model in charge
            own = 'finure_model_requests_total{model="finure-test:2",route="/api/v1/predict",status="200"} 1'
            assert own in app.metrics.text()
            pointer.write_text(f"{one}\nchallenger two {two}\n")
            with pytest.raises(FinureError, match="its second line must be"):
                followed(pointer)
            return seen

    assert asyncio.run(story()) == ["finure-test:2", "finure-test:1", "finure-test:2"]
    assert followed.__annotations__["return"] is Served


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1]])
def test_credit_models_say_beside_what_they_decide_alone(kinds, share, tmp_path):
    champion, other = (credit_scorer(kind) for kind in kinds)
    rows = as_applications(applications()[0].head(25), champion.contract)
    app = App(champion, fingerprint(credit_bundle(kinds[0])), settings=Settings(home=tmp_path))
    both = lambda decider: challenge(decider, other, fingerprint(credit_bundle(kinds[1])), share)
    app.take_over(*app.prepare(champion, app.decider.bundle, both))
    found = []
    for row in rows:
        application = app.decider.read(json.dumps(row).encode())
        by, one = app.decider.decide(application, False)
        found.append(one)
        (mine, its) = (other, champion) if share else (champion, other)
        assert by.scorer is mine and one.answer == mine.decide(application).answer
        alone = its.decide(application).answer
        assert one.trace["beside"]["answer"] == {name: v for name, v in alone.items() if name != "reasons"}
    batch = [app.decider.read(json.dumps(row).encode()) for row in rows]
    assert [one.trace["beside"] for _, one in app.decider.decide_batch(batch)] == [one.trace["beside"] for one in found]
    explained = json.loads(call(app, "/api/v1/explain", json.dumps(rows[0]).encode())[2])
    assert explained["pd"] == found[0].answer["pd"]


def test_a_real_service_scores_both(tmp_path):
    folders = {kind: credit_bundle(kind) for kind in KINDS}
    settings = {"challenger": folders["boosting"], "challenger_share": 0.5}
    rows = as_applications(applications()[0].head(40), credit_scorer("boosting").contract)
    with running(tmp_path, folders["scorecard"], **settings) as (port, _):
        ask = lambda path, data=None: urlopen(Request(f"http://127.0.0.1:{port}{path}", data, JSON), timeout=30).read()
        answers = [json.loads(ask(PREDICT, json.dumps(row).encode())) for row in rows]
        metrics = ask("/metrics").decode()
    found = records(tmp_path, "decision")
    assert [r["answer"] for r in found] == answers and len(found) == 40
    assert Counter(r["trace"]["beside"]["role"] for r in found).keys() == {
        "champion",
        "challenger",
    }
    assert all("answer" in r["trace"]["beside"] for r in found)
    assert 'in_charge="challenger"' in metrics and 'in_charge="champion"' in metrics


# The registry


def test_the_pointer_follows_champion_and_challenger(tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path / "home"))
    bundles = {version: bundle(tmp_path / version, "0", most=1000 * int(version)) for version in "12"}
    aliases = {"champion": "1", "challenger": "2"}
    held = lambda: [{"version": v, "aliases": [a for a, at in aliases.items() if at == v]} for v in bundles]
    find = lambda name, alias: {"version": aliases[alias]}
    registry = types.SimpleNamespace(find=find, versions=lambda name: held(), bundle_of=lambda name, v: bundles[v])
    monkeypatch.setitem(sys.modules, "finure.registry", registry)
    pointer = tmp_path / "pointer"
    look = lambda before: follow_module._look("finure-test", "champion", before, pointer, 0.1)
    version = lambda folder: json.loads((folder / "model.json").read_text())["version"]
    assert look("1") == "1 2"
    named = followed(pointer)
    assert (version(named.bundle), version(named.challenger), named.share) == ("1", "2", 0.1)
    aliases.update(champion="2")
    del aliases["challenger"]  # promoted
    assert look("1 2") == "2" and version(followed(pointer).bundle) == "2" and followed(pointer).challenger is None
    assert follow_module._look("finure-test", "champion", "2", pointer) == "2"


def test_a_share_without_a_challenger_is_refused():
    done = CliRunner().invoke(cli, ["serve", "credit", "--share", "0.1"])
    assert isinstance(done.exception, FinureError) and "give --challenger" in str(done.exception)


# Payments: decided from a state that each of them changes


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_payments_are_observed_once_and_scored_by_both(tmp_path, share):
    one, two = paying.bundle(tmp_path / "one"), paying.bundle(tmp_path / "two")
    facts = json.loads((two / "model.json").read_text())
    facts["calibration"]["intercept"] += 2  # another model, and no training
    (two / "model.json").write_text(json.dumps(facts))
    settings = Settings(home=tmp_path / "both", bundle=one, challenger=two, challenger_share=share)
    app = service(tmp_path, settings=settings)
    assert app.metrics.challenger, "refused"
    events = [paying.event(row) for row in range(30)]
    answers = [json.loads(call(app, PREDICT, paying.sent(event))[2]) for event in events]
    for close in app.closing:
        close()
    alone = {}
    for name, folder in (("one", one), ("two", two)):
        scorer = load_scorer(folder)
        scorer.start(Settings(home=tmp_path / name))
        alone[name] = [scorer.decide(paying.application(event)).answer for event in events]
        scorer.store.close()
    found = records(tmp_path / "both", "decision")
    assert {record["trace"]["beside"]["role"] for record in found} == {"challenger"} | (
        {"champion"} if share else set()
    )
    for record, answer, *said in zip(found, answers, *alone.values(), strict=True):
        mine, other = said if record["trace"]["beside"]["role"] == "challenger" else said[::-1]
        assert answer["probability"] == mine["probability"] and answer["decision"] == mine["decision"]
        beside = record["trace"]["beside"]["answer"]
        assert beside == {name: value for name, value in other.items() if name != "reasons"}


def test_a_challenger_that_needs_more_features_than_are_seen_is_refused(tmp_path):
    scorer = load_scorer(paying.bundle(tmp_path / "all"))
    other = types.SimpleNamespace(feature_names=scorer.feature_names[1:])
    with pytest.raises(FinureError, match=f"observed once, .* does not see: {scorer.feature_names[0]}; train both"):
        scorer.beside(other)
