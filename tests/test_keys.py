"""API keys: kept as hashes, limited to what they are for and how often, and refused within seconds once revoked"""

import asyncio
import hashlib
import json
import re
import sqlite3
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
from serving import BATCH, GOOD, MODULE, PREDICT, SIMULATE, ask, call, problem
from typer.testing import CliRunner

from finure.audit.log import open_store
from finure.cli import serving as commands
from finure.cli.main import app as cli
from finure.core import FinureError, Settings
from finure.serve import keys as keys_module
from finure.serve.app import App
from finure.serve.keys import SCOPES, Guard, create_key, read_keys, renew_keys, revoke_key

REMOTE = ("203.0.113.9", 5)
RECORD = "/api/v1/decisions/none-1"
NEEDS = {"predict": [(PREDICT, GOOD), (BATCH, b"[" + GOOD + b"]")], "simulate": [(SIMULATE, GOOD)],
         "audit": [(RECORD, None)]}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/keys.db") as store:
        yield store


def guarded(store, **limits) -> App:
    "An application that admits callers by the keys of a store."
    return App(MODULE.load(), guard=Guard(read_keys(store), **limits))


def bearer(shown: str) -> dict:
    return {"authorization": f"Bearer {shown}"}


@pytest.fixture
def finure(tmp_path, monkeypatch):
    "The command line, with a state folder of its own."
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(cli, words)


def test_only_the_hash_of_a_key_is_kept(store, tmp_path):
    key, shown = create_key(store, "portal", ["predict"])
    secret = shown.split("_", 2)[2]
    assert key.hash == hashlib.sha256(secret.encode()).digest() and len(secret) >= 43
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.hash in kept and secret.encode() not in kept


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_opens_its_own_routes_and_no_others(store, scope):
    app, headers = guarded(store, rate=0), {}
    headers = bearer(create_key(store, "one", [scope])[1])
    app.guard.renew(read_keys(store))
    for needed, requests in NEEDS.items():
        for path, body in requests:
            answer = call(app, path, body, headers, caller=REMOTE)
            if scope in (needed, "admin"):
                assert answer[0] == (404 if needed == "audit" else 200)
            else:
                assert f"`{needed}`" in problem(403, answer)["detail"]
    assert call(app, "/api/v1/model", None, headers, caller=REMOTE)[0] == 200


def test_without_a_valid_key_the_answer_says_what_to_send(store):
    key, shown = create_key(store, "one", ["predict"])
    app, secret = guarded(store), shown.split("_", 2)[2]
    for given in ("", "Bearer", "Bearer ", f"Basic {shown}", shown, f"Bearer {shown}x", f"Bearer {shown[:-1]}",
                  f"Bearer fk_{key.id}_", "Bearer fk__", "Bearer fk_ffffffff_" + secret, f"Bearer xx_{key.id}_{secret}",
                  "Bearer \xff\xfe", f"Bearer {shown} {shown}", "Bearer fk_" + "_" * 5000):  # fmt: skip
        for caller in (REMOTE, ("127.0.0.1", 5), None):
            answer = call(app, PREDICT, GOOD, {"authorization": given} if given else {}, caller=caller)
            assert problem(401, answer)["type"] == "urn:finure:problem:no-valid-key"
            assert answer[1]["www-authenticate"] == 'Bearer realm="finure"'
    for good in (f"Bearer {shown}", f"bearer   {shown} "):
        assert call(app, PREDICT, GOOD, {"authorization": good}, caller=REMOTE)[0] == 200


def test_health_and_docs_need_no_key_and_nothing_else_is_open(store):
    create_key(store, "one", ["predict"])
    app = guarded(store)
    closed = {path for path in app.routes if call(app, path, None, {}, caller=REMOTE)[0] == 401}
    assert set(app.routes) - closed == {path for path, route in app.routes.items() if route.open}
    assert {"/metrics", *(path for path in app.routes if path.startswith("/api/"))} == closed


def test_with_no_key_at_all_only_this_machine_is_answered(store):
    app = guarded(store)
    for caller in (("127.0.0.1", 5), ("127.0.1.1", 5), ("::1", 5), ("::ffff:127.0.0.1", 5), None):
        assert call(app, PREDICT, GOOD, caller=caller)[0] == 200
    for caller in (REMOTE, ("10.0.0.1", 5), ("2001:db8::1", 5), ("::ffff:10.0.0.1", 5), ("0.0.0.0", 5), ("", 0)):
        assert "finure keys create" in problem(403, call(app, PREDICT, GOOD, caller=caller))["detail"]
        assert call(app, "/readyz", None, caller=caller)[0] == 200


def test_with_all_keys_revoked_nobody_is_answered(store):
    _, shown = create_key(store, "one", ["admin"])
    revoke_key(store, "one")
    app = guarded(store)
    for headers in ({}, bearer(shown)):
        problem(401, call(app, PREDICT, GOOD, headers))
    app.guard.renew([])  # the table was emptied, or another database took its place
    problem(401, call(app, PREDICT, GOOD))


def test_a_running_service_follows_the_keys(store, monkeypatch):
    monkeypatch.setattr(keys_module, "RENEW_SECONDS", 0.05)
    failing = []

    def read():
        if failing:
            raise FinureError("no database")
        return read_keys(store)

    async def until(app, status, headers):
        async with asyncio.timeout(5):
            while (await ask(app, PREDICT, GOOD, headers))[0] != status:
                await asyncio.sleep(0.02)

    async def story():
        app = guarded(store)
        task = asyncio.create_task(renew_keys(app.guard, read))
        assert (await ask(app, PREDICT, GOOD))[0] == 200
        _, first = create_key(store, "first", ["predict"])
        await until(app, 401, {})
        await until(app, 200, bearer(first))
        _, second = create_key(store, "second", ["predict"])
        await until(app, 200, bearer(second))
        failing.append(True)
        await asyncio.sleep(0.2)
        assert (await ask(app, PREDICT, GOOD, bearer(second)))[0] == 200  # the keys last read stay valid
        failing.clear()
        revoke_key(store, "first")
        await until(app, 401, bearer(first))
        assert (await ask(app, PREDICT, GOOD, bearer(second)))[0] == 200
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(story())


def test_reading_the_keys_never_makes_a_database(tmp_path, monkeypatch):
    from finure.serve.service import _keys

    with pytest.raises(FinureError, match="There is no decision log"):
        _keys(f"sqlite:///{tmp_path}/gone.db", create=False)
    assert not (tmp_path / "gone.db").exists()


def test_each_key_has_its_own_rate(store):
    slow, quick = create_key(store, "slow", ["predict"], 2)[1], create_key(store, "quick", ["predict"], 1e6)[1]
    usual = create_key(store, "usual", ["predict"])[1]
    app = guarded(store, rate=3)
    for shown, most in ((slow, 2), (usual, 3), (quick, 20)):
        answers = [call(app, PREDICT, GOOD, bearer(shown)) for _ in range(20)]
        assert most <= sum(status == 200 for status, _, _ in answers) <= most + 2
        for answer in answers[most + 2 :]:
            assert problem(429, answer)["type"] == "urn:finure:problem:too-many-requests"
            assert int(answer[1]["retry-after"]) >= 1


def test_a_rate_is_refilled_with_time(store, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: clock[0])
    headers = bearer(create_key(store, "one", ["predict"], 2)[1])
    app = guarded(store)
    ask_once = partial(call, app, PREDICT, GOOD, headers)
    assert [ask_once()[0] for _ in range(4)] == [200, 200, 429, 429]
    clock[0] += 0.5
    assert [ask_once()[0] for _ in range(2)] == [200, 429]
    clock[0] += 3600
    assert [ask_once()[0] for _ in range(3)] == [200, 200, 429]


def test_a_rate_without_keys_holds_for_all(store):
    app = guarded(store, rate=2)
    assert [call(app, PREDICT, GOOD)[0] for _ in range(4)][:3] == [200, 200, 429]
    assert call(app, "/readyz")[0] == 200


@pytest.mark.parametrize(
    "name, scopes, rate",
    [
        ("", ["predict"], 0),
        ("a", [], 0),
        ("a", ["all"], 0),
        ("a", ["predict"], -1),
        ("a", ["predict"], float("nan")),
    ],  # fmt: skip
)
def test_a_key_that_makes_no_sense_is_not_made(store, name, scopes, rate):
    with pytest.raises(FinureError):
        create_key(store, name, scopes, rate)
    assert read_keys(store) == []


# The command line


def test_a_key_is_shown_once(finure):
    done = finure("keys", "create", "portal", "--scope", "predict", "--scope", "audit", "--rate", "50")
    shown = re.search(r"fk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", done.stdout)[0]
    listed = finure("keys", "ls").stdout
    assert "portal" in listed and "audit, predict" in listed and "50" in listed
    assert shown not in listed and shown.split("_", 2)[2] not in listed
    app = App(MODULE.load(), guard=Guard(commands._keys()))
    assert call(app, PREDICT, GOOD, bearer(shown), caller=REMOTE)[0] == 200
    problem(403, call(app, SIMULATE, GOOD, bearer(shown), caller=REMOTE))


def test_keys_are_revoked_by_id_or_by_name(finure):
    for name in ("a", "b", "b"):
        finure("keys", "create", name)
    a, b, c = commands._keys()
    assert a.id in finure("keys", "revoke", a.id).stdout
    done = finure("keys", "revoke", "b").stdout
    assert b.id in done and c.id in done
    assert all(key.revoked for key in commands._keys())
    again = finure("keys", "revoke", "b")
    assert isinstance(again.exception, FinureError) and "no valid key" in str(again.exception)


def test_a_wrong_scope_is_refused_by_the_command_line(finure):
    done = finure("keys", "create", "a", "--scope", "everything")
    assert isinstance(done.exception, FinureError) and "predict, simulate, audit, admin" in str(done.exception)
    assert commands._keys() == []


def test_serving_the_network_without_a_key_is_refused(finure, monkeypatch):
    monkeypatch.setenv("FINURE_HOST", "0.0.0.0")
    stubs = {"pipeline": {"params_for": str}, "registry": {"bundle_of": str, "find": str},
             "run.jobs": {"parameters": lambda *_: 1 / 0}}  # fmt: skip
    for name, content in stubs.items():  # slow to import, and not what this is about
        monkeypatch.setitem(sys.modules, f"finure.{name}", SimpleNamespace(**content))
    done = finure("serve")
    assert isinstance(done.exception, FinureError) and "finure keys create" in str(done.exception)
    finure("keys", "create", "portal")
    assert isinstance(finure("serve").exception, ZeroDivisionError)  # it went on


def test_the_database_of_the_keys_is_for_its_owner_only(finure):
    finure("keys", "create", "portal")
    path = Settings().home_dir() / "decisions.db"
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as connection:
        (scopes,) = connection.execute("SELECT scopes FROM api_keys").fetchone()
    assert json.loads(scopes) == ["predict"]
