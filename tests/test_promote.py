"""Promotion: what must be shown before a version decides, what the ledger keeps of it, and the way back"""

import datetime as dt
import json
import re
import zipfile

import pytest
from scorecards import METRICS, record, scorecard
from typer.testing import CliRunner

from finure import doctor
from finure.cli.registry import evidence as evidence_command
from finure.cli.registry import registry_app
from finure.core import FinureError, GateError, Settings
from finure.ledger import FOUND, history, ledger_file
from finure.promote import aliases_of, champion_of, odd_aliases, promote, rollback, who_decided
from finure.registry import bundle_of, client, find, register
from finure.serve import check as check_module

TAGS = {"run": "r", "data": "d1", "contract": "tiny 1", "kind": "scorecard"}
SERVED = {"asked": 200, "recorded": 0, "different_answers": 0, "refused_alike": 0, "unanswered": 0, "p99_ms": 4.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def settings(home) -> Settings:
    return Settings(home=home, user="Ann")


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(home))
    monkeypatch.setenv("FINURE_USER", "Ann")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    "Three versions; the third did not pass its gate, which a run would not have registered."
    made = tmp_path_factory.mktemp("made")
    for n, best in enumerate((330.0, 331.0, 332.0), 1):
        bundle, files = scorecard(made / f"v{n}", best), record(made / f"run{n}", passed=n < 3)
        register(bundle, "finure-tiny", {"n": n}, METRICS, TAGS | {"run": f"r{n}"}, files, settings)
    return settings


def served(monkeypatch, **changes):
    "The check of the packed service finds this, without a service."
    monkeypatch.setattr("finure.promote.check_bundle", lambda *_, **__: SERVED | changes)


def test_registering_is_in_the_ledger_with_who_trained(trained):
    lines = history("finure-tiny", trained)
    assert [line.change.moved for line in lines] == [
        {"challenger": (None, "1")}, {"challenger": ("1", "2")}, {"challenger": ("2", "3")},
    ]  # fmt: skip
    row = find("finure-tiny", "2", trained)
    assert (row["tags"]["trained_by"], lines[1].change.by, lines[1].change.account) == ("Ann", "Ann", "Ann")
    assert lines[1].change.facts["bundle"] == row["tags"]["bundle"] and lines[1].change.facts["figures"] == METRICS
    assert champion_of("tiny", trained) is None and aliases_of("tiny", trained) == {"challenger": "3"}


def test_nothing_is_promoted_that_may_not_be(trained, monkeypatch, home):
    served(monkeypatch)
    with pytest.raises(FinureError, match="ann trained this version: somebody else"):
        promote("tiny@1", "ann", "mine", settings=trained)
    with pytest.raises(GateError, match=r"1 of 1 gates not passed: auc 0.71.*Nothing was promoted"):
        promote("tiny", "Bob", "the challenger", settings=trained)
    served(monkeypatch, different_answers=1, p99_ms=5000.0)
    with pytest.raises(
        GateError, match=r"2 of 3 gates not passed: different answers 1.*p99 ms 5000.*Nothing was promoted"
    ):
        promote("tiny@1", "Bob", "slow", settings=trained)
    with pytest.raises(FinureError, match="--reason"):
        promote("tiny@1", "Bob", " ", settings=trained)
    with pytest.raises(FinureError, match=r"no registered model finure-none. There are: finure-tiny"):
        promote("none@1", "Bob", "x", settings=trained)
    table = bundle_of("finure-tiny", "1", trained) / "scorecard.json"
    was = table.read_text()
    table.write_text(was.replace("330.0", "339.0"))
    with pytest.raises(FinureError, match="not those that were registered"):
        promote("tiny@1", "Bob", "x", settings=trained)
    table.write_text(was)
    assert len(history("finure-tiny", trained)) == 3 and aliases_of("tiny", trained) == {"challenger": "3"}


def test_a_packed_service_is_checked_promoted_and_in_charge(trained, tmp_path):
    patient, said = tmp_path / "gates.yaml", []  # however busy this machine is
    patient.write_text("promotion: {max_different_answers: 0, max_unanswered: 0, max_p99_ms: 2000}")
    line = promote(
        "tiny@1", "Bob", "the first", gates=patient, settings=trained, say=said.append, rate=50.0, seconds=1.0
    )
    check = line.change.facts["check"]
    assert (check["asked"], check["different_answers"], check["unanswered"]) == (200, 0, 0) and 0 < check[
        "p99_ms"
    ] < 2000
    assert check["bento"] == "finure-tiny:1" and len(said) == 4
    assert line.change.facts["trained_by"] == "Ann" and line.change.facts["gate"][0]["passed"]
    assert champion_of("tiny", trained)["version"] == "1"
    assert not (trained.home_dir() / "decisions.db").exists()  # what was tried is no decision


def test_another_answer_than_the_models_is_seen(trained, tmp_path):
    other = scorecard(tmp_path / "other", 250.0)
    scorer = check_module.load_scorer(other)
    bodies, _ = check_module.questions(scorer, trained)
    own = [check_module.own_answer(check_module.Decider(scorer, check_module.Metrics({})), body) for body in bodies]
    first = check_module.load_scorer(bundle_of("finure-tiny", "1", trained))
    there = [check_module.own_answer(check_module.Decider(first, check_module.Metrics({})), body) for body in bodies]
    assert 0 < sum(a != b for a, b in zip(own, there, strict=True)) < len(bodies)


def test_going_there_and_back(trained, monkeypatch):
    served(monkeypatch)
    promote("tiny@2", "Bob", "better", settings=trained)
    assert aliases_of("tiny", trained) == {"champion": "2", "previous": "1", "challenger": "3"}
    with pytest.raises(FinureError, match="already"):
        promote("tiny@2", "Bob", "again", settings=trained)
    line = rollback("tiny", "Eve", "alarms", {"guard": 0.2}, trained)
    assert aliases_of("tiny", trained) == {"champion": "1", "challenger": "3"}
    assert line.change.facts["guard"] == 0.2 and line.change.how == "rolled back"
    with pytest.raises(FinureError, match="no previous champion"):
        rollback("tiny", "Eve", "more", settings=trained)
    promote("tiny@2", "ann", "on my machine", dev=True, settings=trained)
    assert history("finure-tiny", trained)[-1].change.facts["dev"] is True


def test_the_ledger_alone_says_who_decided(trained):
    lines = [line for line in history("finure-tiny", trained) if "champion" in line.change.moved]
    client(trained).set_registered_model_alias("finure-tiny", "champion", "3")  # whatever MLflow says now
    found = who_decided("tiny", lines[0].at, lines[-1].at + 1, trained)
    assert [(term.version, term.line.change.by) for term in found] == [
        ("1", "Bob"), ("2", "Bob"), ("1", "Eve"), ("2", "ann"),
    ]  # fmt: skip
    told = CliRunner().invoke(registry_app, ["as-of", "tiny", f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"])
    assert told.exit_code == 0 and [row.split()[1] for row in told.output.splitlines()] == [
        "no",
        "1,",
        "2,",
        "1,",
        "2,",
    ]
    assert "Rolled back by Eve (account Ann): alarms." in told.output
    with pytest.raises(FinureError, match="it knows: finure-tiny"):
        who_decided("other", 0, 1, trained)


def test_an_alias_moved_by_hand_is_told_and_written_down(trained, monkeypatch):
    served(monkeypatch)
    assert odd_aliases(trained) == {"finure-tiny": {"champion": ("2", "3")}}
    run = lambda *words: CliRunner().invoke(registry_app, [*words])
    told = run("history", "tiny")
    assert told.exit_code == 1 and "champion of finure-tiny is 3 in MLflow and 2 in the ledger" in " ".join(
        told.output.split()
    )
    assert (looked := doctor._ledger(trained)).state == "bad" and "champion 3 (ledger: 2)" in looked.found
    promote("tiny@1", "Bob", "back in order", settings=trained)
    found, line = history("finure-tiny", trained)[-2:]
    assert (found.change.how, found.change.moved, found.change.by) == (FOUND, {"champion": ("2", "3")}, "unknown")
    assert line.change.moved["champion"] == ("3", "1") and odd_aliases(trained) == {}
    assert run("history", "tiny").exit_code == 0 and run("verify").exit_code == 0


def test_the_evidence_of_a_promoted_version(trained, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(evidence_command)
    done = CliRunner().invoke(app, ["tiny@1", "-o", str(tmp_path / "e.zip")])
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile(tmp_path / "e.zip") as pack:
        lines = [json.loads(line) for line in pack.read("ledger/ledger.jsonl").splitlines()]
        assert [line["hash"] for line in lines] == [line.hash for line in history("finure-tiny", trained)]
        assert json.loads(pack.read("ledger/verification.json"))["as_written"] is True
        assert b"different_answers" in pack.read("validation/validation.html")
        assert json.loads(pack.read("card/card.json"))["aliases"] == ["champion"]


def test_a_cut_ledger_is_found_by_what_mlflow_remembers(trained):
    from finure.audit.log import open_store

    with open_store(f"sqlite:///{ledger_file(trained)}") as store:
        last = store.rows("SELECT seq FROM records ORDER BY seq DESC LIMIT 1")[0][0]
        store.execute("DELETE FROM records WHERE seq = ?", (last,))
        hash = store.rows("SELECT hash FROM records WHERE seq = ?", (last - 1,))[0][0]
        store.execute("UPDATE heads SET seq = ?, hash = ?", (last - 1, hash))
    told = CliRunner().invoke(registry_app, ["verify"])
    assert told.exit_code == 1 and re.search(rf"removed.*{last}", told.output)
