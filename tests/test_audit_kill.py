"""A service that is killed under load, again and again, has every answered decision in the log"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

from finure.audit.log import body_hash, now, open_store, read_heads, read_records
from finure.audit.verify import verify
from finure.audit.writer import DecisionLog, Entry, KeyConflictError

APP = "test_audit_kill:app"  # any ASGI app that answers POST /decide (and reads FINURE_DATABASE_URL) can be put here
KILLS, CLIENTS = 20, 8


async def app(scope, receive, send):
    "A service of one route: answers when the record is on disk."
    if scope["type"] == "lifespan":
        await receive()
        app.log, app.n = DecisionLog(os.environ["FINURE_DATABASE_URL"]), 0
        app.name = app.log.head.chain
        await send({"type": "lifespan.startup.complete"})
        await receive()
        app.log.close()
        return await send({"type": "lifespan.shutdown.complete"})
    body = (await receive())["body"]
    key = dict(scope["headers"]).get(b"idempotency-key")
    app.n += 1
    answer = json.dumps({"decision_id": f"{app.name}-{app.n}", "you": body.decode()}).encode()
    entry = Entry("decision", f"{app.name}-{app.n}", now(), answer, key and key.decode(), key and body_hash(body))
    status = 200
    try:
        answer = await app.log.submit(entry)
    except KeyConflictError:
        status, answer = 409, b"{}"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


NURSERY = """
import importlib, os, sys, uvicorn
app, fd = sys.argv[1], int(sys.argv[2])
importlib.import_module(app.partition(":")[0])
for _ in sys.stdin:
    if (child := os.fork()) == 0:
        uvicorn.run(app, fd=fd, log_level="error", loop="uvloop", http="httptools")
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


class Service:
    "The service in a process of its own, on a socket that stays open when it is killed."

    def __init__(self, app, url):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port, fd = self.socket.getsockname()[1], self.socket.fileno()
        environment = {**os.environ, "FINURE_DATABASE_URL": url, "PYTHONPATH": os.path.dirname(__file__)}
        command = [sys.executable, "-c", NURSERY, app, str(fd)]  # imports once, forks for each start
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.nursery = subprocess.Popen(command, env=environment, pass_fds=[fd], **pipes)

    def start(self):
        self.nursery.stdin.write("start\n")
        self.child = int(self.nursery.stdout.readline())

    def kill(self):
        os.kill(self.child, signal.SIGKILL)

    def close(self):
        self.nursery.stdin.close()
        self.nursery.wait(30)
        self.nursery.stdout.close()
        self.socket.close()


class Client(threading.Thread):
    "Sends one request after the other, each fourth with a key of an earlier one; remembers what was answered."

    def __init__(self, name, port, stop):
        super().__init__(daemon=True)
        self.name, self.port, self.stop = name, port, stop
        self.answered, self.lost, self.wrong = [], 0, []

    def run(self):
        n = 0
        while not self.stop.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                while not self.stop.is_set():
                    i = n // 4 if n % 4 == 3 else n
                    status, answer = self.ask(connection, f"{self.name}-{i}", f"application {i}")
                    self.answered.append((f"{self.name}-{i}", answer)) if status == 200 else self.wrong.append(answer)
                    n += 1
            except (OSError, http.client.HTTPException):
                self.lost += 1  # the same request goes out again
                time.sleep(0.005)

    @staticmethod
    def ask(connection, key, body):
        connection.request("POST", "/decide", body, {"Idempotency-Key": key, "Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def killed_under_load(app, url, seed=7):
    "Starts and kills the service; the clients, with what they were answered."
    moments, service, stop = random.Random(seed), Service(app, url), threading.Event()
    clients = [Client(f"c{i}", service.port, stop) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        for i in range(KILLS):
            service.start()
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
            assert Client.ask(connection, f"start {i}", "application")[0] == 200  # of the new process, from here on
            connection.close()
            time.sleep(moments.uniform(0, 0.3))
            service.kill()
    finally:
        stop.set()
        service.close()
        for client in clients:
            client.join(30)
    return clients


def test_every_answer_is_in_the_log(tmp_path):
    url = f"sqlite:///{tmp_path}/decisions.db"
    clients = killed_under_load(APP, url)
    with open_store(url) as store:
        assert verify(store) == []
        assert len(read_heads(store)) >= KILLS
        records = {r.id: r for r in read_records(store) if r.kind == "decision"}
        owners = dict(store.rows("SELECT key, id FROM idempotency"))
    answers = [(key, answer) for client in clients for key, answer in client.answered]
    assert len(answers) > KILLS * CLIENTS
    assert sum(client.lost for client in clients) >= KILLS
    assert [wrong for client in clients for wrong in client.wrong] == []
    for key, answer in answers:
        id = json.loads(answer)["decision_id"]
        assert records[id].body == answer
        assert owners[key] == id
    assert sorted(owners.values()) == sorted(records)  # no decision twice for one key


def test_the_next_process_knows_the_keys_of_a_killed_one(tmp_path):
    url = f"sqlite:///{tmp_path}/decisions.db"
    service = Service(APP, url)
    answers = []
    for _ in range(2):
        service.start()
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
        answers.append(Client.ask(connection, "k", "one"))
        conflict, _ = Client.ask(connection, "k", "two")
        assert conflict == 409
        service.kill()
        connection.close()
    service.close()
    assert answers[0] == answers[1]
