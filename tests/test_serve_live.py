"""A real server: it does what its document says, slow callers cost others nothing, and a stop loses nothing"""

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest
from serving import BATCH, GOOD, JSON, PREDICT, body, bundle, running
from test_audit_kill import killed_under_load

from finure.audit.log import open_store, read_records
from finure.audit.verify import verify
from finure.serve.keys import create_key

DEADLINE = 1


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("bundle") / "v7")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def port(home, served):
    "The port of a server with a short deadline."
    with running(home, served, deadline=DEADLINE) as (port, _):
        yield port


def connected(port) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    return sock


def rest(sock) -> bytes:
    "All that still comes, until the server closes."
    got = b""
    try:
        while part := sock.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def said(port, *parts: bytes, pause=0.0) -> bytes:
    "What the server says to some bytes, until it closes or says nothing more."
    with closing(connected(port)) as sock:
        for part in parts:
            try:
                sock.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        return rest(sock)


def request(content=GOOD, *headers: str, path=PREDICT, close=True) -> bytes:
    "The bytes of a request."
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(content)}"]
    lines += [*headers, *(["connection: close"] if close else [])]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def is_problem(answer: bytes, expected: int) -> bool:
    "Whether raw bytes are one whole problem of this status."
    head, _, content = answer.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    return (
        status(answer) == expected
        and b"content-type: application/problem+json" in head.lower()
        and len(content) == length
        and json.loads(content)["status"] == expected
    )


def decided(home) -> dict[str, dict]:
    "All decision records of a home, from a log that is as it was written."
    with open_store(f"sqlite:///{home}/decisions.db") as store:
        assert verify(store) == []
        return {record.id: json.loads(record.body) for record in read_records(store) if record.kind == "decision"}


# What is not HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"garbage\r\n\r\n",
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET  HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST " + PREDICT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n",
        b"POST " + PREDICT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST " + PREDICT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n12345",
        request(GOOD, "transfer-encoding: chunked"),
        request(GOOD, "transfer-encoding: gzip, chunked"),
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: a\rb\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_what_is_not_http_gets_a_problem_and_is_closed(port, sent):
    answer = said(port, sent)
    assert is_problem(answer, 400), answer  # one, and nothing after it


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET /livez HTTP/1.1\r\nx: " + b"a" * 70_000],  # one header without an end
        [b"GET /livez HTTP/1.1\r\n", *[b"x: " + b"a" * 10_000 + b"\r\n"] * 8],
        [b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000 + b"\r\n\r\n"],  # whole, in one piece
        [b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
        [b"GET /livez HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(6000)) + b"\r\n"],
        [b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET /livez HTTP/1.1\r\nx: " + b"a" * 40_000, b"a" * 40_000],
    ],
    ids=["endless", "many pieces", "whole", "path", "many", "second request"],
)
def test_headers_that_are_too_large_are_refused(port, sent):
    answer = said(port, *sent, pause=0.05)
    assert is_problem(answer[answer.rindex(b"HTTP/1.1 ") :], 431), answer[:300]


def test_a_large_body_in_the_same_packet_is_no_large_header(port):
    sent = body(story="x" * 4000) + b" " * 50_000
    assert status(said(port, request(sent))) == 200
    assert status(said(port, request(b" " * 70_000))) == 413
    with closing(connected(port)) as sock:
        sock.sendall(request(sent, close=False) + request(sent))
        assert rest(sock).count(b"HTTP/1.1 200") == 2


def test_an_upgrade_is_answered_like_any_other_request(port):
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    upgrade += "sec-websocket-version: 13\r\n"
    for path, expected in (("/livez", 200), ("/nothing", 404)):
        with closing(connected(port)) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n".encode())
            assert status(sock.recv(65536)) == expected


# Slow callers


def slow(port, kind: int) -> socket.socket:
    "A connection on which a request begins and does not end."
    sock = connected(port)
    whole = request(GOOD, close=False)
    head = whole.index(b"\r\n\r\n") + 4
    sock.sendall((b"", whole[:9], whole[: head - 30], whole[:head], whole[: head + 20])[kind])
    return sock


@contextmanager
def drip(socks):
    "Sends one more byte a second on every connection."
    stop = threading.Event()

    def work():
        while not stop.wait(0.5):
            for sock in socks:
                try:
                    sock.send(b"x")
                except OSError:
                    continue

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def closed_within(socks, seconds: float) -> bool:
    "Whether the server closes all connections in time."
    until = time.monotonic() + seconds
    for sock in socks:
        sock.settimeout(max(0.01, until - time.monotonic()))
        try:
            rest(sock)
        except TimeoutError:
            return False
    return True


def test_two_hundred_slow_callers_cost_others_nothing_and_are_let_go(port):
    socks = [slow(port, i % 5) for i in range(200)]
    took = []
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with drip(socks[::2]):
        until = time.monotonic() + DEADLINE + 2
        while time.monotonic() < until:
            started = time.monotonic()
            client.request("POST", PREDICT, GOOD, JSON)
            answer = client.getresponse()
            assert answer.status == 200 and answer.read()
            took.append(time.monotonic() - started)
            time.sleep(0.01)
        assert closed_within(socks, 15)
    assert len(took) > 20 and sorted(took)[len(took) // 2] < 0.2 and max(took) < 2
    for sock in socks:
        sock.close()


def test_a_body_that_does_not_come_is_a_408(port):
    with closing(slow(port, 4)) as sock:
        assert is_problem(rest(sock), 408)


@pytest.mark.parametrize("cuts", [(), (20,), (200,), (60, 61, 300)], ids=str)
def test_requests_behind_one_another_are_answered_in_their_order_however_they_arrive(port, cuts):
    page = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    first, bad = request(body(), "x-request-id: first", close=False), request(b"{", "x-request-id: bad", close=False)
    sent = first + page + bad + first.replace(b"first", b"other") + request(body(), "x-request-id: last")
    parts = [sent[a:b] for a, b in zip((0, *cuts), (*cuts, len(sent)), strict=True)]
    answered = said(port, *parts, pause=0.05)
    heads = re.findall(rb"HTTP/1.1 (\d+) .*?x-request-id: ([\w-]+)", answered, re.DOTALL)
    assert [int(status) for status, _ in heads] == [200, 200, 400, 200, 200]
    assert [name for _, name in heads if len(name) < 6] == [b"first", b"bad", b"other", b"last"]


def test_an_idle_connection_may_be_used_again(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(2):
        client.request("POST", PREDICT, GOOD, JSON)
        assert client.getresponse().read()
        time.sleep(DEADLINE + 2)  # longer than a request may take to arrive


def test_callers_who_do_not_read_are_let_go(port):
    socks = []
    for _ in range(20):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n" * 10)
        socks.append(sock)
    ends, until = [sock.getsockname()[1] for sock in socks], time.monotonic() + 30
    while time.monotonic() < until and _open_to(port, ends):
        time.sleep(0.2)
    assert not _open_to(port, ends)
    for sock in socks:
        sock.close()


def _open_to(port: int, ends: list[int]) -> int:
    "How many of these connections the server still holds (Linux)."
    with open("/proc/net/tcp") as table:
        rows = [line.split()[1:4] for line in table.readlines()[1:]]
    wanted = {f"0100007F:{end:04X}" for end in ends}
    return sum(near == f"0100007F:{port:04X}" and far in wanted and state == "01" for near, far, state in rows)


def test_a_fault_in_the_middle_of_an_answer_breaks_it_off_and_tells_no_value(port, home):
    rows = [body(story="Zzmarker")] * 200 + [body(story="fail", ref="Zzmarker")]
    sent = b"\n".join(rows)
    whole = request(sent, path=BATCH, close=False).replace(b"application/json", b"application/x-ndjson", 1)
    answer = said(port, whole)
    assert status(answer) == 200 and answer.count(b"decision_id") == 200 and not answer.endswith(b"0\r\n\r\n")
    log = (home / "server.log").read_text()
    assert "unexpected error" in log and "Zzmarker" not in log and "secret" not in log and "Traceback" not in log


# More than it can do, and the end


async def _ask(port: int, content: bytes) -> tuple[int, dict[str, str], bytes]:
    "One request over a connection of its own."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(content))
    answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    names = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    return status(answer), names, content


def test_more_than_it_can_do_is_refused_and_what_is_accepted_is_recorded(tmp_path, served):
    async def story(port):
        return await asyncio.gather(*(_ask(port, body(ref=f"r{i}")) for i in range(400)))

    with running(tmp_path, served, max_waiting=8) as (port, _):
        answers = asyncio.run(story(port)) + asyncio.run(story(port))
        assert asyncio.run(_ask(port, GOOD))[0] == 200
    accepted = [json.loads(content) for code, _, content in answers if code == 200]
    refused = [(code, names, json.loads(content)) for code, names, content in answers if code != 200]
    assert len(accepted) >= 8 and refused
    for code, names, told in refused:
        assert code == 503 and int(names["retry-after"]) >= 1 and told["type"] == "urn:finure:problem:overloaded"
    records = decided(tmp_path)
    assert len(records) == len(accepted) + 1
    assert all(records[answer["decision_id"]]["answer"] == answer for answer in accepted)


def test_a_stop_answers_what_is_under_way_and_loses_nothing(tmp_path, served):
    answers, refused = [], []

    async def story(port, process):
        stopped = asyncio.Event()

        async def caller(i):
            while not stopped.is_set():
                try:
                    answers.append(await _ask(port, body(ref=f"r{i}")))
                except (OSError, IndexError):  # refused, or closed before a byte of an answer
                    refused.append(i)
                    return

        batch = asyncio.create_task(_batch(port))
        callers = [asyncio.create_task(caller(i)) for i in range(20)]
        while len(answers) < 100:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*callers), 20)
        stopped.set()
        return await batch

    async def _batch(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"[" + b",".join([GOOD] * 3000) + b"]", path=BATCH))
        return await reader.read()

    with running(tmp_path, served) as (port, process):
        batch = asyncio.run(story(port, process))
        assert process.wait(20) == 0
    assert {code for code, _, _ in answers} == {200} and len(refused) == 20
    results = json.loads(batch.partition(b"\r\n\r\n")[2])["results"]
    records = decided(tmp_path)
    assert len(results) == 3000 and len(records) == len(results) + len(answers)
    for told in (*results, *(json.loads(content) for _, _, content in answers)):
        told.pop("row", None)
        assert records[told["decision_id"]]["answer"] == told


def test_a_stop_does_not_wait_for_slow_callers(tmp_path, served):
    with running(tmp_path, served, deadline=1) as (port, process):
        socks = [slow(port, i % 5) for i in range(20)]
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and time.monotonic() - started < 10
        for sock in socks:
            sock.close()


def test_a_service_that_is_killed_again_and_again_has_every_answer_on_disk(tmp_path, served, monkeypatch):
    monkeypatch.setenv("FINURE_BUNDLE", str(served))
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    clients = killed_under_load("serving:killable", f"sqlite:///{tmp_path}/decisions.db")
    records, first = decided(tmp_path), {}
    assert sum(len(client.answered) for client in clients) > 100
    for client in clients:
        assert client.wrong == []
        for key, content in client.answered:
            told = json.loads(content)
            assert records[told["decision_id"]]["answer"] == told
            assert first.setdefault(key, content) == content  # also when it was asked again after a kill


# The document


@pytest.fixture(scope="module")
def closed_port(tmp_path_factory, served):
    "The port of a server that asks for keys, and a key that opens everything."
    folder = tmp_path_factory.mktemp("closed")
    with open_store(f"sqlite:///{folder}/decisions.db") as store:
        _, shown = create_key(store, "all", ["admin"])
    with running(folder, served, deadline=DEADLINE) as (port, _):
        yield port, shown


def hold_to_document(port: int, examples: int, **headers: str) -> int:
    "Sends what the document allows and what it does not, with every check; returns how many requests that were."
    import schemathesis
    from schemathesis.engine import events, from_schema

    told = {"generation": {"max-examples": examples}, "seed": 1, "headers": headers}
    config = schemathesis.Config.from_dict(told)
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=config)
    cases, broken = 0, []
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            cases += len(event.recorder.interactions)
            broken += list(_broken(event.recorder))
        elif isinstance(event, events.NonFatalError | events.FatalError):
            broken.append(repr(event))
    assert not broken, "\n\n".join(broken[:10])
    return cases


def _broken(recorder):
    "What the service did against its document, in words, with the request."
    for case, checks in recorder.checks.items():
        for check in checks:
            if check.failure_info and not _beyond_a_schema(check.name, recorder.interactions[case]):
                yield f"{recorder.label}: {check.failure_info.failure}\n{check.failure_info.code_sample}"[:1500]


def _beyond_a_schema(check: str, sent) -> bool:
    "Whether a request was refused for what no JSON schema can say: the range of a date, the content of a file."
    if check != "positive_data_acceptance":
        return False
    if "json" not in sent.request.headers["Content-Type"][0]:
        return True
    rules = {(one["field"], one["rule"]) for one in json.loads(sent.response.content).get("violations", ())}
    return rules == {("since", "range")}


def test_the_service_does_what_its_document_says(port):
    assert hold_to_document(port, 25) > 300


def test_a_service_with_keys_does_what_its_document_says(closed_port):
    port, shown = closed_port
    assert hold_to_document(port, 5, Authorization=f"Bearer {shown}") > 100
    assert hold_to_document(port, 2) > 50  # without a key
