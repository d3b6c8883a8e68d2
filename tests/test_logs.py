"""A service's own words: JSON lines without values, and traces that continue the caller's"""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import GOOD, MODULE, PREDICT
from test_serve import LOOP, call

from finure.serve.app import App
from finure.serve.logs import JsonLines, tracer


@pytest.fixture
def collector(monkeypatch):
    "A collector of traces on this machine: what it was sent, decoded."
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield received
    server.shutdown()
    server.server_close()


def test_a_request_continues_the_callers_trace(collector):
    app = App(MODULE.Scorer(), trace=tracer("finure-test"))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    caller = {"content-type": "application/json", "traceparent": f"00-{trace}-{parent}-01", "x-request-id": "r-1"}
    assert call(PREDICT, GOOD, caller, app=app)[0] == 200
    assert call(PREDICT, b"{", caller, app=app)[0] == 400
    LOOP.run_until_complete(app.stop())
    (resource,) = [part for request in collector for part in request.resource_spans]
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "finure-test"
    good, bad = [span for scope in resource.scope_spans for span in scope.spans]
    assert (good.trace_id.hex(), good.parent_span_id.hex(), good.name) == (trace, parent, PREDICT)
    assert 0 < good.end_time_unix_nano - good.start_time_unix_nano < 60e9
    told = {a.key: a.value for a in bad.attributes}
    assert told["http.response.status_code"].int_value == 400
    assert told["finure.request_id"].string_value == "r-1"
    assert "kitchen" not in str(collector)


def test_without_a_collector_nothing_is_traced(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert tracer("finure-test") is None


def test_a_refused_request_is_one_line_of_json(caplog):
    with caplog.at_level(logging.INFO, "finure.serve"):
        call(PREDICT, b'{"story": "a secret kitchen"}', {"content-type": "application/json", "x-request-id": "r-2"})
    (line,) = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert (line["level"], line["message"], line["request_id"]) == ("INFO", "refused", "r-2")
    assert (line["route"], line["status"]) == (PREDICT, 422) and line["ms"] >= 0
    assert line["at"].endswith("+00:00") and "kitchen" not in json.dumps(line)
