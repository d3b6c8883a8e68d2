"""The load client keeps its timetable, hides no waiting, and counts what went wrong"""

import asyncio
import gc
import socketserver
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn

from finure.core import FinureError
from finure.serve.load import Report, drawn, load, percentiles
from finure.serve.pack import free_port

SEEN: list[dict] = []


async def app(scope, receive, send):
    "Answers as the body asks: a status, `stall` for everybody, or `close` the connection after the answer."
    if scope["type"] != "http":
        return
    body = (await receive())["body"]
    SEEN.append(dict(scope["headers"]) | {b"path": scope["raw_path"], b"client": scope["client"]})
    if body == b"stall":
        time.sleep(0.3)
    headers = [(b"content-length", b"%d" % len(body))] + [(b"connection", b"close")] * (body == b"close")
    status = int(body) if body.isdigit() else 200
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def address():
    "A running service."
    config = uvicorn.Config(app, port=free_port(), log_level="error", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{config.port}/path?a=1"
    server.should_exit = True
    thread.join()


@contextmanager
def answering(data: bytes | None):
    "A server that answers with some bytes and closes, or not at all (None)."
    done = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(10_000)
            self.request.sendall(data) if data is not None else done.wait(20)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            done.set()
            server.shutdown()
            thread.join()


def test_every_request_is_sent_once_and_answered_with_its_own_body(address):
    SEEN.clear()
    bodies, said = [b"body-%d" % i for i in range(20)], {}
    make = drawn(bodies, 3, {"x-a": "b"}, name_header="X-Request-ID", prefix="run")
    found = load(address, make, 400, 0.5, connections=4, on_answer=lambda *answer: said.update({answer[0]: answer[1:]}))
    assert (found.planned, found.answered, found.statuses, found.errors, found.reopened) == (
        200,
        200,
        {200: 200},
        {},
        0,
    )
    assert said == {i: (200, make(i)[0]) for i in range(200)}
    assert sorted(seen[b"x-request-id"] for seen in SEEN) == sorted(b"run-%d" % i for i in range(200))
    assert {(seen[b"x-a"], seen[b"path"]) for seen in SEEN} == {(b"b", b"/path")}
    assert len({seen[b"client"] for seen in SEEN}) <= 4, "connections are kept open"


def test_requests_leave_by_the_timetable(address):
    sent = []
    found = load(address, lambda i: (sent.append(time.monotonic()) or b"x", {}), 100, 1.0)
    early = np.diff(sent).cumsum() - np.arange(1, 100) / 100 + found.lag[0] / 1000
    assert (early > -0.002).all(), "no request leaves before it is due"
    assert np.median(found.lag) < 5 and (found.milliseconds >= found.lag).all() and 0.98 < found.seconds < 3
    assert 0 < found.cpu < 1


def test_statuses_are_counted(address):
    found = load(address, lambda i: (b"503" if i % 4 == 0 else b"201", {}), 200, 0.2)
    assert (found.statuses, found.errors, found.answered) == ({201: 30, 503: 10}, {}, 40)


def test_a_stall_shows_in_all_requests_that_came_meanwhile(address):
    found = load(address, lambda i: (b"stall" if i == 10 else b"go", {}), 200, 0.3, connections=64)
    waited = found.milliseconds[10:50]  # due within 200 ms of the beginning of a stall of 300 ms
    assert (waited > 300 - 5 * np.arange(40) - 20).all() and found.answered == 60
    one = load(address, lambda i: (b"stall" if i == 10 else b"go", {}), 200, 0.3, connections=1)
    assert (one.milliseconds[10:50] > 80).all(), "also where the client has no free connection"


def test_closed_connections_are_opened_again_and_counted(address):
    found = load(address, lambda i: (b"close" if i % 10 == 0 else b"go", {}), 200, 0.3, connections=2)
    assert (found.statuses, found.errors) == ({200: 60}, {}) and found.reopened in (5, 6)


@pytest.mark.parametrize(
    ("data", "error"), [(b"", "closed"), (b"HTTP/1.1 200 OK\r\ncontent-", "closed"), (b"no http", "unreadable")]
)
def test_connections_that_break_are_errors(data, error):
    with answering(data) as address:
        found = load(address, lambda i: (b"x", {}), 20, 0.2, connections=2)
    assert (found.statuses, found.errors) == ({}, {error: 4})
    assert np.isnan(found.milliseconds).all() and found.plain()["latency_ms"] == {}


def test_unanswered_requests_count_with_the_time_they_waited():
    with answering(None) as address:
        found = load(address, lambda i: (b"x", {}), 50, 0.1, connections=2, wait=0.3)
    assert (found.planned, found.answered, found.errors) == (5, 0, {"unanswered": 5})
    assert (found.milliseconds > 300).all()


def test_progress_is_told_every_second(address):
    told = []
    load(address, drawn([b"x"], 0), 20, 2.2, on_second=told.append)
    assert len(told) == 2 and told[0].sent < told[1].sent <= 44
    assert all(p.sent == p.answered + p.open and p.failed == 0 for p in told)


def test_errors_of_the_caller_end_the_run(address):
    def broken(*arguments):
        raise KeyError("mine")

    started = time.monotonic()
    for arguments in ({"make": broken}, {"make": drawn([b"x"], 0), "on_answer": broken}):
        with pytest.raises(KeyError, match="mine"):
            load(address, rate=10, seconds=30, **arguments)
    assert time.monotonic() - started < 15 and gc.isenabled()


def test_what_cannot_be_done_is_said():
    with pytest.raises(FinureError, match="Start the service first"):
        load(f"http://127.0.0.1:{free_port()}/", drawn([b"x"], 0), 10, 1)
    with pytest.raises(FinureError, match="http://host:port/path"):
        load("localhost:3000/x", drawn([b"x"], 0), 10, 1)
    with pytest.raises(FinureError, match="not even one request"):
        load("http://127.0.0.1:1/", drawn([b"x"], 0), 1, 0.1)


def test_it_works_inside_a_running_loop_too(address):
    async def cell():
        return load(address, drawn([b"x"], 0), 50, 0.1)

    assert asyncio.run(cell()).answered == 5


def test_a_late_client_says_so():
    def of(lag: float) -> Report:
        return Report(100, 1.0, {200: 100}, {}, 0, np.full(100, 2.0), np.array([0.1] * 98 + [lag] * 2), 0.1)

    assert not of(0.9).late and of(30.0).late and of(30.0).plain()["client_late"]
    assert of(30.0).plain()["latency_ms"] == percentiles(np.full(100, 2.0)) and of(1.0).answered == 100
