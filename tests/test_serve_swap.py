"""A new model takes over between two requests; a broken one never decides, and following goes on after it"""

import asyncio
import json
import logging
import shutil
import sys
import time
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from serving import MODULE, PREDICT, ask, body, bundle

from finure.audit.log import open_store, read_records
from finure.audit.verify import verify
from finure.core import FinureError, Settings
from finure.serve import follow as follow_module
from finure.serve import swap
from finure.serve.service import service
from finure.serve.swap import point


@asynccontextmanager
async def following(folder: Path, **settings):
    "A service that follows a pointer, which names version 1 at first; with its background work."
    pointer = folder / "pointer"
    point(pointer, bundle(folder / "v1", "1"))
    settings = Settings(home=folder, follow=pointer, **settings)
    app = service(folder / "none", settings=settings)
    tasks = [asyncio.create_task(work()) for work in app.background]
    yield app, pointer
    for task in tasks:
        assert not task.done(), "work in the background has ended"
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    app.log.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Looks often."
    monkeypatch.setattr(swap, "LOOK_SECONDS", 0.02)


async def until(condition):
    "Waits until something is so."
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def asked(app, amount=20_000) -> dict:
    "A decision, which must be one."
    status, _, answer = await ask(app, PREDICT, body(amount=amount))
    assert status == 200, answer
    return json.loads(answer)


def records(folder: Path, kind: str) -> list[dict]:
    "The bodies of all records of a kind, oldest first."
    with closing(open_store(f"sqlite:///{folder}/decisions.db")) as store:
        assert verify(store) == []
        return [json.loads(record.body) for record in read_records(store) if record.kind == kind]


def test_a_new_model_takes_over_without_a_failed_request(tmp_path):
    async def story():
        async with following(tmp_path) as (app, pointer):
            answers, stop = [], asyncio.Event()

            async def load():
                while not stop.is_set():
                    answers.append(await asked(app))

            callers = [asyncio.create_task(load()) for _ in range(4)]
            for version in ("2", "3"):
                await until(lambda: len(answers) > 50)
                answers.clear() if version == "2" else None
                point(pointer, bundle(tmp_path / f"v{version}", version, most=25_000))
                await until(lambda version=version: app.decider.model == f"finure-test:{version}")
                seen = len(answers)
                await until(lambda seen=seen: len(answers) > seen + 50)
            stop.set()
            await asyncio.gather(*callers)
            return answers, app.metrics.text()

    answers, metrics = asyncio.run(story())
    models = [answer["model"][-1] for answer in answers]
    assert "".join(models) == "".join(sorted(models)) and set(models) == {"1", "2", "3"}
    assert all(answer["decision"] == ("decline" if answer["model"][-1] == "1" else "approve") for answer in answers)
    assert "finure_model_swaps_total 2" in metrics and 'model="finure-test:3"' in metrics
    assert [told["model"] for told in records(tmp_path, "model")] == [f"finure-test:{n}" for n in "123"]
    recorded = {told["answer"]["decision_id"]: told for told in records(tmp_path, "decision")}
    for answer in answers:
        assert recorded[answer["decision_id"]]["model"] == answer["model"]
    assert len({told["bundle"] for told in recorded.values()}) == 2  # versions 2 and 3 hold the same model


def removed(folder):
    (folder / "weights.json").unlink()


def cut(folder):
    (folder / "model.json").write_text((folder / "model.json").read_text()[:20])


def foreign(folder):
    (folder / "model.json").write_text('{"scorer": "os:system", "version": "2"}')


BROKEN = {
    "a file is missing": ({}, removed),
    "model.json is cut": ({}, cut),
    "model.json names a foreign function": ({}, foreign),
    "the folder is not there": ({}, shutil.rmtree),
    "it raises": ({"fault": "raises"}, None),
    "it answers NaN": ({"fault": "nan"}, None),
    "it has another contract": ({"fault": "contract"}, None),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_never_decides(tmp_path, caplog, what):
    facts, damage = BROKEN[what]
    broken = bundle(tmp_path / "broken", "2", **facts)
    if damage:
        damage(broken)

    async def story():
        async with following(tmp_path) as (app, pointer):
            await asked(app)
            point(pointer, broken)
            await until(lambda: app.metrics.model_swaps_refused)
            assert (await asked(app))["model"] == "finure-test:1" and app.metrics.model_swaps == 0
            point(pointer, bundle(tmp_path / "v3", "3"))
            await until(lambda: app.metrics.model_swaps)
            assert (await asked(app))["model"] == "finure-test:3"
            assert "finure_model_swaps_refused_total 1" in app.metrics.text()

    with caplog.at_level(logging.ERROR, "finure.serve"):
        asyncio.run(story())
    assert [told["model"] for told in records(tmp_path, "model")] == ["finure-test:1", "finure-test:3"]
    (refused,) = [record for record in caplog.records if "refused" in record.message]
    assert refused.facts["why"] and "secret" not in refused.facts["why"]


def test_a_model_that_fails_on_what_was_really_asked_never_decides(tmp_path, monkeypatch):
    decide = MODULE.Scorer.decide

    def fails(self, application, explain=False):
        if self.info["version"] == "2" and application["amount"] == 777:
            raise ValueError("777")
        return decide(self, application, explain)

    monkeypatch.setattr(MODULE.Scorer, "decide", fails)

    async def story():
        async with following(tmp_path) as (app, pointer):
            await asked(app, 777)
            for _ in range(5):
                await asked(app)
            point(pointer, bundle(tmp_path / "v2", "2"))
            await until(lambda: app.metrics.model_swaps_refused)
            assert (await asked(app))["model"] == "finure-test:1"

    asyncio.run(story())


def test_a_pointer_that_vanishes_changes_nothing(tmp_path):
    async def story():
        async with following(tmp_path) as (app, pointer):
            for damage in (pointer.unlink, lambda: pointer.write_text("")):
                damage()
                await asyncio.sleep(0.2)
                assert (await asked(app))["model"] == "finure-test:1"
            point(pointer, bundle(tmp_path / "v2", "2"))
            await until(lambda: app.metrics.model_swaps)

    asyncio.run(story())


def test_what_is_written_while_the_service_starts_is_followed(tmp_path, monkeypatch):
    load = MODULE.load

    def slow(folder):
        if folder.name == "v1":
            point(tmp_path / "pointer", bundle(tmp_path / "v2", "2"))
        return load(folder)

    monkeypatch.setattr(MODULE, "load", slow)

    async def story():
        async with following(tmp_path) as (app, _):
            await until(lambda: app.decider.model == "finure-test:2")

    asyncio.run(story())


def test_no_model_takes_over_while_the_log_is_down(tmp_path):
    async def story():
        async with following(tmp_path) as (app, pointer):
            with open_store(app.settings.database()) as store:
                store.execute("ALTER TABLE heads RENAME TO gone")
                point(pointer, bundle(tmp_path / "v2", "2"))
                await until(lambda: app.metrics.model_swaps_refused)
                store.execute("ALTER TABLE gone RENAME TO heads")
            await until(lambda: app.log.failed is None)
            assert (await asked(app))["model"] == "finure-test:1"

    asyncio.run(story())


# The registry


def test_the_pointer_follows_an_alias(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path / "home"))
    bundles = {version: bundle(tmp_path / version, "0", most=1000 * int(version)) for version in "12"}
    champion, failing = ["1"], []

    def find(name, alias):
        if failing:
            raise failing[0]
        return {"name": name, "version": champion[0]}

    registry = SimpleNamespace(find=find, bundle_of=lambda name, version: bundles[version])
    monkeypatch.setitem(sys.modules, "finure.registry", registry)
    pointer = tmp_path / "pointer"
    look = lambda version: follow_module._look("finure-test", "champion", version, pointer)
    assert look("1") == "1" and not pointer.exists()
    champion[0] = "2"
    assert look("1") == "2"
    named = swap.followed(pointer).bundle
    assert json.loads((named / "model.json").read_text())["version"] == "2"
    assert json.loads((named / "weights.json").read_text()) == {"most": 2000}
    for error in (FinureError("no such alias"), OSError("no network"), KeyError("x")):
        failing[:] = [error]
        assert look("2") == "2" and str(error) in capsys.readouterr().err
    failing.clear()
    champion[0] = "1"
    assert look("2") == "1" and swap.followed(pointer).bundle != named


def test_a_service_follows_an_alias_of_the_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from finure.registry import client, register

    contract = MODULE.TITLES | {"reasons": MODULE.REASONS, "columns": MODULE.COLUMNS}
    for n in (1, 2):
        folder = bundle(tmp_path / f"trained{n}", "0", most=10_000 * n)
        (folder / "contract.yaml").write_text(yaml.safe_dump(contract, sort_keys=False))
        register(folder, "finure-test", {"n": n}, {"auc": 0.7}, {"run": f"r{n}"})
    alias = lambda version: client().set_registered_model_alias("finure-test", "champion", version)
    look = lambda version: follow_module._look("finure-test", "champion", version, tmp_path / "pointer")
    alias("1")
    assert look("none") == "1"

    async def story():
        app = service(tmp_path / "none", settings=Settings(home=tmp_path, follow=tmp_path / "pointer"))
        task = asyncio.create_task(app.background[-1]())
        answers = [await asked(app, 15_000)]
        alias("2")
        assert look("1") == "2"
        await until(lambda: app.metrics.model_swaps)
        answers.append(await asked(app, 15_000))
        task.cancel()
        app.log.close()
        return [(answer["model"], answer["decision"]) for answer in answers]

    assert asyncio.run(story()) == [("finure-test:1", "decline"), ("finure-test:2", "approve")]


def test_the_watcher_ends_with_its_service_and_survives_the_registry(tmp_path, monkeypatch):
    import sys

    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    looks = []

    def look(name, alias, version, pointer, share):
        looks.append(version)
        return str(int(version) + 1)

    monkeypatch.setattr(follow_module, "_look", look)
    monkeypatch.setattr(follow_module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(follow_module.signal, "signal", lambda *_: None)
    told = "import os, time; time.sleep(1.5); assert os.environ['FINURE_FOLLOW'].endswith('t@champion')"
    monkeypatch.setattr(follow_module, "serve_command", lambda *_: [sys.executable, "-c", told])
    (follow_module.bento_folder("t:1") / "src").mkdir(parents=True)
    started = time.monotonic()
    assert follow_module.serve_following("t:1", "champion", "127.0.0.1", 0) == 0
    assert looks[:3] == ["1", "2", "3"] and time.monotonic() - started < 30
    assert swap.followed(tmp_path / "serving" / "t@champion").bundle.name == "bundle"
