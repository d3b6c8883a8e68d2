"""Champion and challenger: a verdict that may be asked for every day, the fair comparison, the guard"""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from serving import PREDICT, body, call
from test_serve_shadow import served
from typer.testing import CliRunner

from finure.audit.log import open_store
from finure.audit.writer import DecisionLog, Entry
from finure.bundle import Decided
from finure.challenge import guard as guard_module
from finure.challenge import refit as refit_module
from finure.challenge.guard import guard_champion, last_decisions, last_in_the_shadow
from finure.challenge.refit import DATA, MODEL, refit, refit_champion
from finure.challenge.sequential import looks, needed
from finure.challenge.traffic import read_traffic
from finure.challenge.verdict import judge, loss_differences, read_rules
from finure.cli.main import app as cli
from finure.contracts.contract import load
from finure.core import FinureError, Settings, generator, root
from finure.ledger import PROMOTED, ROLLED_BACK, Change, add, writing

RULES = read_rules(root() / "params" / "challenge.yaml", "simulated_bank")
AT = np.arange(40, 2001, 40)  # a look a day


def losses(run: int, better: float = 0.0) -> np.ndarray:
    "Differences of the losses of two models that err alike, or of which the second errs less."
    rng = generator(run, "models")
    true = rng.beta(2, 8, AT[-1])
    first, second = np.clip(true + rng.normal(0, 0.12, (2, true.size)) * [[1], [1 - better]], 0.01, 0.99)
    bad = rng.random(true.size) < true
    return loss_differences(pd.DataFrame({"bad": bad, "champion_risk": first, "challenger_risk": second}))


# The sequential test


def test_equal_models_are_seldom_called_different_however_often_one_looks():
    ours, ordinary = [], []
    for run in range(300):
        d = losses(run)
        ours.append(looks(d / 0.25, AT).p_value[-1] <= 0.05)
        total, squares = np.cumsum(d)[AT - 1], np.cumsum(d**2)[AT - 1]
        ordinary.append((2 * stats.norm.sf(np.abs(total / np.sqrt(squares - total**2 / AT)))).min() <= 0.05)
    assert np.mean(ours) <= 0.05 and np.mean(ordinary) > 0.15


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_true_mean_lies_in_all_intervals_at_once(share):
    missed = []
    for run in range(150):
        d = np.where(generator(run, "skewed").random(AT[-1]) < share, 1.0, -share)  # seldom and large
        mean, seen = share - share * (1 - share), looks(d, AT)
        missed.append(((seen.low > mean) | (seen.high < mean)).any())
        assert (seen.low <= seen.high).all() or missed[-1]
    assert np.mean(missed) <= 0.05


def test_a_real_difference_is_found_and_the_wait_is_told():
    found = [looks(losses(run, 0.8) / 0.25, AT) for run in range(40)]
    assert np.mean([seen.low[-1] > 0 for seen in found]) > 0.9
    gain, spread = np.mean([seen.mean[-1] for seen in found]), np.mean([seen.spread for seen in found])
    reached = [AT[np.argmax(seen.low > 0)] for seen in found if seen.low[-1] > 0]
    assert 0.5 < np.median(reached) / needed(gain, spread) < 2


def test_bad_rules_are_named(tmp_path):
    file = tmp_path / "challenge.yaml"
    for text, told in (("default: {chance: 2}", "out of range"), ("default: {hope: 1}", "unknown field `hope`"),
                       ("german: {guard: {last: x}}", "german.*guard")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(FinureError, match=told):
            read_rules(file, "german")


# From the log


def test_the_report_reads_what_a_service_recorded(tmp_path, monkeypatch):
    app = served(tmp_path, 0.3)
    for i in range(150):
        assert call(app, PREDICT, body(ref=f"A-{i}", amount=5_000 + 150 * i))[0] == 200
    app.decider.challenger.scorer.fault = "raises"
    assert call(app, PREDICT, body(ref="A-200", amount=5_000))[0] == 200
    app.log.close()
    labels = tmp_path / "labels.csv"
    rows = [f"A-{i},{int(i % 7 == 0)},2026-03-{1 + i % 20:02}" for i in range(0, 150, 2)]
    labels.write_text("\n".join(["id,bad,known_time", *rows]))
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["challenge", "report", "test", "--labels", str(labels), "-o", str(page)])
    assert done.exit_code == 0, done.output
    facts = json.loads(page.with_suffix(".json").read_text())
    assert (facts["decisions"], facts["outcomes"], facts["gain"]) == (151, 75, 0)  # both say the same probability
    assert facts["verdict"] == "wait" and facts["champion"] == "finure-test:1"
    with open_store(f"sqlite:///{tmp_path}/decisions.db") as store:
        traffic = read_traffic(store, "finure-test", labels)
        with pytest.raises(FinureError, match="no decision of finure-credit with a challenger"):
            read_traffic(store, "finure-credit", labels)
    both = traffic.frame[traffic.frame["fault"] == ""]
    moved = (both["champion_decision"] == "decline") & (both["challenger_decision"] == "approve")
    assert len(both) == 150 and moved.sum() == 67  # 10,000 < amount <= 20,000
    assert f"no longer decline: {moved.sum()}" in page.read_text() and "KeyError: 1" in page.read_text()
    assert judge(traffic, RULES).looks.n.tolist() == facts_of_days(traffic)


def facts_of_days(traffic) -> list[int]:
    "How many outcomes were known at the end of each day."
    return traffic.judged.groupby("known").size().cumsum().tolist()


# New data or a new model?


class Judged:
    "A scorer that sees one feature of a contract, with some noise of its own."

    answer_schema = {"decision": {"enum": ["approve", "decline"]}, "pd": {}}
    contract, feature_names = load("german"), ["duration_months"]

    def __init__(self, noise: float):
        self.noise = noise

    def decide_features(self, rows) -> list[Decided]:
        off = generator(int(self.noise * 10), "noise").normal(0, self.noise, len(rows))
        risks = np.clip(np.asarray(rows)[:, 0] / 100 + off, 0.01, 0.99)
        return [Decided({"pd": p, "decision": "decline" if p > 0.5 else "approve", "reasons": []}, {}) for p in risks]


def rows(n: int = 700) -> pd.DataFrame:
    "A feature that tells the risk, and the outcome."
    risk = generator(0, "rows").random(n)
    return pd.DataFrame({"duration_months": 100 * risk, "bad": (generator(1, "rows").random(n) < risk).astype(int)})


def test_new_data_is_not_mistaken_for_a_better_model():
    old, new = Judged(0.5), Judged(0.0)
    data, model = (refit_champion(rows(), old, again, new) for again in (new, old))  # only the rows were newer; not so
    first, second = (found.table.set_index(["what", "figure"])["change"] for found in (data, model))
    assert first[DATA, "auc"] == second[MODEL, "auc"] > 0 and first[MODEL, "auc"] == second[DATA, "auc"] == 0
    assert model.better and "is better than the champion" in model.words
    assert not data.better and "is not shown to be better" in data.words


def test_the_champion_is_trained_with_its_own_parameters_on_the_challengers_rows(tmp_path, monkeypatch):
    asked, folder, job = [], tmp_path / "run", "credit/40_train"
    names = ("candidate", "reject_inference", "rejected", "macro", "data", "test_to")
    parameters = {  # a record has no paths of the machine
        "champion": ("scorecard", "fuzzy", "$FINURE_HOME/declined.csv", "old", "$FINURE_HOME/old.csv", "2023-01-01"),
        "challenger": ("boosting", "none", "", "new", "$FINURE_HOME/new.csv", "2024-01-01"),
    }
    runs = {
        alias: ({"job": job, "parameters": dict(zip(names, values, strict=True))}, folder)
        for alias, values in parameters.items()
    }
    monkeypatch.setattr(refit_module, "find_one", lambda which, home: runs[which.partition("@")[2]])

    def run(job, file, given, how):
        asked.append((job, given))
        return SimpleNamespace(record={}, folder=folder, page="")

    models = iter([Judged(0.5), Judged(0.5), Judged(0.0)])
    monkeypatch.setattr(refit_module, "run", run)
    monkeypatch.setattr(refit_module, "model_of", lambda record, folder: next(models))
    monkeypatch.setattr(refit_module, "tested_rows", lambda folder: rows())
    page, found = refit("credit", Settings(home=tmp_path))
    ((asked_job, given),) = asked
    assert asked_job == job and given == {
        "candidate": "scorecard", "reject_inference": "fuzzy", "rejected": f"{tmp_path}/declined.csv", "macro": "new",
        "data": f"{tmp_path}/new.csv", "test_to": "2024-01-01", "register": False,
    }  # fmt: skip
    assert found.better and page.sections[0].words == found.words


# The guard


@pytest.fixture
def promoted(tmp_path):
    "A ledger in which version 2 took over from version 1, and a log of both."
    settings = Settings(home=tmp_path)
    log = DecisionLog(settings.database())
    for version, approved in ((1, 0.7), (2, 0.2)):
        for i in range(300):
            decision = "approve" if i < 300 * approved else "decline"
            told = {"model": f"finure-credit:{version}", "bundle": "b", "contract": "simulated_bank 1", "trace": {}}
            content = json.dumps(told | {"answer": {"decision": decision, "pd": 0.1}}).encode()
            log.append(Entry("decision", f"d-{version}-{i}", version * 1000 + i, content))
    log.close()
    move(settings, PROMOTED, ("1", "2"))
    return settings


def move(settings, how, moved) -> None:
    "A line of the ledger."
    told = {"by": "b", "account": "b", "why": "w", "aliases": {"champion": moved[1]}}
    with writing(settings) as ledger:
        add(ledger, Change(model="finure-credit", how=how, moved={"champion": moved}, **told))


def test_the_guard_rolls_back_what_left_its_bounds(promoted, monkeypatch):
    done = []
    monkeypatch.setattr("finure.promote.rollback", lambda *told: done.append(told) or SimpleNamespace(seq=2))
    file = root() / "params" / "challenge.yaml"
    assert guard_champion("credit", file, act=False, settings=promoted).broken and not done
    found = guard_champion("credit", file, settings=promoted)
    assert found.broken and "20.0% of the last 300 approved" in found.text and "before approved 70.0%" in found.text
    ((product, by, why, figures, _),) = done
    assert (product, by) == ("credit", "guard") and figures["guard"]["approved"] == pytest.approx(0.2)
    assert why.startswith("guard: ") and found.done.seq == 2
    move(promoted, ROLLED_BACK, ("2", "1"))
    found = guard_champion("credit", file, settings=promoted)
    assert not found.broken and len(done) == 1 and "no champion that came by a promotion" in found.text


@contextmanager
def telling(page: str, key: str):
    "A service that tells its metrics to who has the key: its address."

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            right = (self.path, self.headers["authorization"]) == ("/metrics", f"Bearer {key}")
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write(page.encode() if right else b"")

        def log_message(self, *told):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_guard_rolls_back_a_champion_that_fails(promoted, monkeypatch, tmp_path):
    done, file = [], tmp_path / "challenge.yaml"
    file.write_text("default: {guard: {most_errors: 0.1}}")  # any share of approvals is right
    monkeypatch.setattr("finure.promote.rollback", lambda *told: done.append(told) or SimpleNamespace(seq=2))
    monkeypatch.setenv("FINURE_HOME", str(promoted.home_dir()))
    monkeypatch.setenv("GUARDS_KEY", "fk_1")
    app = served(tmp_path / "services", 0)
    app.metrics.decides({"model": "finure-credit:1"})
    for _ in range(200):  # of the champion before
        app.told(PREDICT, 500, 0.001, {}, b"-")
    app.metrics.decides({"model": "finure-credit:2"})
    for i in range(300):
        app.told(PREDICT, 500 if i % 8 == 0 else 200, 0.001, {}, b"-")
    app.log.close()
    ask = ["challenge", "guard", "credit", "--rules", str(file)]
    assert CliRunner().invoke(cli, ask).exit_code == 0 and not done
    with telling(app.metrics.text(), "fk_1") as url:
        refused = CliRunner().invoke(cli, [*ask, "--service", url])
        found = CliRunner().invoke(cli, [*ask, "--service", url, "--key-env", "GUARDS_KEY"])
    assert isinstance(refused.exception, FinureError) and "401" in str(refused.exception)
    assert found.exit_code == 2 and "12.7% of 300 requests failed: at most 10.0% may fail" in found.output, found.output
    assert done[0][3]["guard"] == pytest.approx({"errors": 38 / 300, "requests": 300, "approved": 0.2, "decisions": 300,
                                                 "approved_before": 0.7})  # fmt: skip


def test_the_guard_expects_what_the_champion_said_in_the_shadow(promoted):
    "Its owners promoted it knowing that it approves less; only another share is a surprise."
    log = DecisionLog(promoted.database())
    for i in range(300):
        beside = {"role": "challenger", "model": "finure-credit:2", "bundle": "c", "share": 0.0}
        said = {"decision": "approve" if i < 60 else "decline", "pd": 0.2}
        told = {"model": "finure-credit:1", "bundle": "b", "contract": "simulated_bank 1"}
        told |= {"trace": {"beside": beside | {"answer": said}}, "answer": {"decision": "approve", "pd": 0.1}}
        log.append(Entry("decision", f"s-{i}", 1500 + i, json.dumps(told).encode()))
    log.close()
    with open_store(promoted.database()) as store:
        assert last_in_the_shadow(store, "finure-credit:2", 500)[:2] == (300, 60)
    found = guard_champion("credit", root() / "params" / "challenge.yaml", act=False, settings=promoted)
    assert not found.broken and "20.0% of the last 300 approved" in found.text


def test_the_guard_reads_the_log_page_by_page(promoted, monkeypatch):
    monkeypatch.setattr(guard_module, "PAGE", 7)
    with open_store(promoted.database()) as store:
        assert last_decisions(store, "finure-credit:1", 300)[:2] == (300, 210)
        assert last_decisions(store, "finure-credit:2", 50)[:2] == (50, 0)
        monkeypatch.setattr(guard_module, "PAGES", 2)
        assert last_decisions(store, "finure-credit:2", 50).decisions == 14
