"""Alerts: raised once, told to real servers that take, refuse or lose them; no run suffers and no secret leaves"""

import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from finure.alerts.rules import Event, Rule, Rules, Sink, load_rules
from finure.alerts.send import Sent, alert, book_events
from finure.alerts.sinks import tell
from finure.alerts.store import Alert, listed, opened
from finure.cli.alerts import alerts_app
from finure.core import Settings, root

ONE = Alert(7, "drift", "credit/psi", "credit", "error", "credit: drift", "PSI of `dti` 0.300", 0.0, 0.0, 0.0, 1)
PSI = Event(source="finding", key="psi", gravity="alarm", title="credit: drift", text="PSI 0.3", product="credit")
RULE = {"id": "r", "source": "finding", "severity": "error", "again_after_hours": 24.0}


class Receiver(BaseHTTPRequestHandler):
    "A web server that answers as it is told and remembers what it got."

    def do_POST(self):  # noqa: N802
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, json.loads(content)))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 202)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def web():
    "A running web server."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def mail_server():
    "A running mail server: its port, and the letters it got."
    letters, started, loop = [], threading.Event(), asyncio.new_event_loop()

    async def serve(reader, writer):
        writer.write(b"220 ready\r\n")
        answers = {b"DATA": b"354 go on", b"QUIT": b"221 bye"}
        while line := await reader.readline():
            word = line.split()[0].upper()
            writer.write(answers.get(word, b"250 ok") + b"\r\n")
            if word == b"DATA":
                letters.append((await reader.readuntil(b"\r\n.\r\n")).decode())
                writer.write(b"250 taken\r\n")
            if word == b"QUIT":
                break
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        run.port = server.sockets[0].getsockname()[1]
        started.set()
        async with server:
            await server.serve_forever()

    thread = threading.Thread(target=_forever, args=(loop, run))
    thread.start()
    started.wait(5)
    yield run.port, letters
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    thread.join(5)


def _forever(loop, run):
    "Runs a coroutine until it is cancelled."
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(run())
    loop.close()


# sinks


def test_a_webhook_gets_a_text(web, monkeypatch):
    monkeypatch.setenv("FINURE_HOOK", f"{web.url}/services/T0/secret")
    assert tell(Sink(kind="webhook", url_env="FINURE_HOOK"), [ONE, ONE], Path(), []) == ""
    path, content = web.got[0]
    assert path == "/services/T0/secret" and list(content) == ["text"]
    assert content["text"].startswith("*finure: 2 alerts") and "PSI of `dti` 0.300" in content["text"]


def test_a_pager_gets_an_event_for_each_alert(web, monkeypatch):
    monkeypatch.setenv("FINURE_PAGER_KEY", "k3y")
    monkeypatch.setenv("FINURE_PAGER_URL", web.url)
    sink = Sink(kind="pager", key_env="FINURE_PAGER_KEY", url_env="FINURE_PAGER_URL")
    assert tell(sink, [ONE, ONE._replace(key="credit/auc")], Path(), []) == ""
    first, second = (content for _, content in web.got)
    assert (first["routing_key"], first["event_action"], first["payload"]["severity"]) == ("k3y", "trigger", "error")
    assert first["dedup_key"] == "finure/drift/credit/psi" != second["dedup_key"]


def test_a_mail_arrives():
    with mail_server() as (port, letters):
        sink = Sink(kind="mail", host="127.0.0.1", port=port, sender="finure@example.com", to=["a@x.org", "b@x.org"])
        assert tell(sink, [ONE._replace(title="credit:\ndrift é")], Path(), []) == ""
    assert "To: a@x.org, b@x.org" in letters[0] and "Subject: " in letters[0] and "finure alerts ack 7" in letters[0]


def test_what_fails_is_tried_again_and_what_is_refused_is_not(web, monkeypatch):
    monkeypatch.setenv("FINURE_HOOK", web.url)
    sink = Sink(kind="webhook", url_env="FINURE_HOOK")
    web.answers[:] = [503, 429]
    assert tell(sink, [ONE], Path(), [], (0.01, 0.01)) == "" and len(web.got) == 3
    web.answers[:] = [500, 500, 500]
    assert "500" in tell(sink, [ONE], Path(), [], (0.01, 0.01)) and len(web.got) == 6
    web.answers[:] = [404]
    assert "404" in tell(sink, [ONE], Path(), [], (0.01, 0.01)) and len(web.got) == 7


def test_errors_and_messages_hold_no_secret(web, monkeypatch):
    monkeypatch.setenv("FINURE_HOOK", "http://127.0.0.1:1/s3cr3t")
    sink = Sink(kind="webhook", url_env="FINURE_HOOK")
    told = tell(sink, [ONE], Path(), ["http://127.0.0.1:1/s3cr3t"], ())
    assert told and "s3cr3t" not in told
    monkeypatch.setenv("FINURE_HOOK", "ftp://s3cr3t")
    assert "s3cr3t" not in tell(sink, [ONE], Path(), ["ftp://s3cr3t"], ())
    monkeypatch.setenv("FINURE_HOOK", web.url)
    tell(sink, [ONE._replace(text="failed at https://x/s3cr3t")], Path(), ["https://x/s3cr3t"])
    assert "s3cr3t" not in json.dumps(web.got)


# from the event to the sink


def rules(**more) -> Rules:
    "One rule that posts."
    sinks = {"team": Sink(kind="webhook", url_env="FINURE_HOOK")}
    return Rules(sinks=sinks, rules=[Rule(**RULE | {"sinks": ["team"]} | more)])


def test_the_same_matter_is_told_once_and_a_lost_one_later(web, tmp_path, monkeypatch):
    settings = Settings(home=tmp_path)
    monkeypatch.setenv("FINURE_HOOK", f"{web.url}/hook")
    web.answers[:] = [401]
    lost = alert([PSI], settings, rules())
    assert lost.told == 0 and "401" in lost.failed["team"] and "/hook" not in lost.failed["team"]
    assert alert([PSI], settings, rules()) == Sent(1, {})
    assert alert([PSI], settings, rules()) == Sent(0, {})
    assert len(web.got) == 2
    with opened(tmp_path) as db:
        (one, error), *others = listed(db)
    assert (one.seen, error, others) == (3, "", [])


def test_a_digest_is_one_message(web, tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOOK", web.url)
    settings, collecting = Settings(home=tmp_path), rules(digest_hours=24.0)
    events = [Event(source="finding", key=f"k{k}", gravity="alarm", title=f"t{k}", text="x") for k in range(30)]
    assert alert(events, settings, collecting) == Sent(30, {})
    assert len(web.got) == 1 and "30 alerts" in web.got[0][1]["text"] and "and 10 more" in web.got[0][1]["text"]
    assert alert([PSI], settings, collecting) == Sent(0, {})  # the next digest is tomorrow's


def run_record(home: Path, name: str, status: str, **files) -> None:
    "A run of credit."
    folder = home / "credit" / ("monitor" if files else "train") / name
    folder.mkdir(parents=True)
    job = "credit/60_monitor" if files else "credit/40_train"
    record = {"status": status, "product": "credit", "job": job, "run": name, "started": name}
    (folder / "run.json").write_text(json.dumps(record | {"error": {"message": "disk full"}}))
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))


def facts(*found) -> dict:
    "What a monitoring run keeps."
    rest = {"period": "2024-03", "since": "2024-02", "severity": "alarm", "periods": 2}
    standing = [rest | {"signal": signal, "what": what, "text": f"{signal} {what}"} for signal, what in found]
    return {"model": "finure-credit:1", "standing": standing}


def test_runs_are_looked_at_once_and_what_is_over_is_closed(tmp_path, capsys):
    ours, settings = load_rules(root() / "params" / "alerts.yaml"), Settings(home=tmp_path)
    run_record(tmp_path, "1", "failed")
    run_record(tmp_path, "2", "done", monitor=facts(("feature", "dti"), ("score", "")))
    assert alert(settings=settings, rules=ours).failed == {}
    printed = capsys.readouterr().err
    assert printed.count("[error]") == 3 and "disk full" in printed and "since 2024-02" in printed
    run_record(tmp_path, "3", "done", monitor=facts(("score", "")))
    run_record(tmp_path, "4", "done")
    alert(settings=settings, rules=ours)
    with opened(tmp_path) as db:
        assert [one.title for one, _ in listed(db)] == ["credit: score"]
        assert len(listed(db, all=True)) == 3
    run_record(tmp_path, "5", "failed")
    alert(settings=settings, rules=ours)
    assert "failed" in capsys.readouterr().err


def test_who_is_high_risk_and_who_crossed_a_band(tmp_path, capsys):
    ours = load_rules(root() / "params" / "alerts.yaml")
    rows = pd.DataFrame({"id": ["a", "b", "c"], "pd": [0.1, 0.2, 0.3], "grade": ["A", "B", "C"], "decision": "approve"})
    rows.to_csv(tmp_path / "before.csv", index=False)
    now = rows.assign(grade=["A", "D", "C"], pd=[0.1, 0.6, 0.3], decision=["approve", "decline", "approve"])
    now.to_csv(tmp_path / "now.csv", index=False)
    events = book_events(tmp_path / "now.csv", ours, tmp_path / "before.csv")
    assert [event.source for event in events] == ["high_risk", "migration"]
    assert "1 of 3 accounts that would be declined; the riskiest: b" in events[0].text
    assert alert(events, Settings(home=tmp_path), ours) == Sent(4, {})
    few = Rules(sinks=ours.sinks, rules=[Rule(**RULE | {"source": "high_risk", "least_share": 0.5, "sinks": ["log"]})])
    assert alert(book_events(tmp_path / "now.csv", few), Settings(home=tmp_path / "x"), few) == Sent(0, {})


def test_nothing_is_ever_raised(tmp_path):
    broken = tmp_path / "home"
    broken.write_text("a file where a folder should be")
    sent = alert([PSI], Settings(home=broken), rules())
    assert sent.told == 0 and "alerts" in sent.failed


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    ask = lambda *words: CliRunner().invoke(alerts_app, list(words))
    assert "no open alert" in ask("ls").stdout
    assert ask("test", "log").exit_code == 0
    assert json.loads((tmp_path / "alerts.jsonl").read_text())["rule"] == "test"
    run_record(tmp_path, "1", "failed")
    assert ask("send").exit_code == 0
    listing = ask("ls").stdout
    assert "disk full" in listing and "open" in listing
    assert ask("ack", "1", "--by", "J. Doe", "--note", "more disk").exit_code == 0
    assert "no open alert" in ask("ls").stdout and "more disk" in ask("ls", "--all").stdout
