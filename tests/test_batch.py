"""A batch is the same decisions in any format, and a row that is wrong stops nobody else"""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_serve import APP, BATCH, call, namespace, problem, without_id

from finure.contracts.read import violations
from finure.serve.batch import csv_rows
from finure.serve.openapi import MAX_BATCH

LINES, CSV, PARQUET = "application/x-ndjson", "text/csv", "application/vnd.apache.parquet"
ROWS = [
    {"ref": f"a{i}", "applied": "2024-01-01", "amount": 500 + 100 * i, "PAY 0": None if i % 3 else -9}
    for i in range(250)
]


def as_csv(rows: list[dict]) -> bytes:
    "Rows as CSV; a missing value is an empty field."
    lines = [",".join(rows[0])]
    lines += [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "\r\n".join(lines).encode()


def as_parquet(rows: list[dict]) -> bytes:
    "Rows as a Parquet file."
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_lines(rows: list) -> bytes:
    "Rows as JSON lines."
    return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"


FORMATS = {LINES: as_lines, CSV: as_csv, PARQUET: as_parquet}


def told(body: bytes, media: str) -> tuple[list[dict], dict]:
    "The lines of an answer, and its last one."
    status, headers, answer = call(BATCH, body, {"content-type": media})
    assert (status, headers["content-type"]) == (200, LINES), answer
    *lines, counts = [json.loads(line) for line in answer.splitlines()]
    return lines, counts


@pytest.mark.parametrize("media", FORMATS)
def test_every_format_gets_the_decisions_of_json(media):
    same = json.loads(call(BATCH, json.dumps(ROWS).encode())[2])["results"]
    lines, counts = told(FORMATS[media](ROWS), media)
    assert [without_id(json.dumps(line)) for line in lines] == [without_id(json.dumps(line)) for line in same]
    assert counts == {"rows": 250, "decided": 250, "rejected": 0}


@pytest.mark.parametrize("media", FORMATS)
def test_a_wrong_row_is_rejected_where_it_stands(media):
    rows = [dict(row) for row in ROWS[:120]]
    rows[110]["amount"] = 1
    lines, counts = told(FORMATS[media](rows), media)
    (wrong,) = [line for line in lines if "violations" in line]
    assert (wrong["row"], wrong["violations"][0]["field"], wrong["violations"][0]["rule"]) == (110, "amount", "range")
    assert counts == {"rows": 120, "decided": 119, "rejected": 1}


def test_rows_that_are_no_applications():
    lines, counts = told(b'{"amount": 500}\n\n5\n{"amount": 500, "amount": 1}\n\xff\n{"amount"\n', LINES)
    assert [line["violations"][0]["rule"] for line in lines if "violations" in line] == ["type", "json", "json", "json"]
    assert counts["rows"] == 5


def test_csv_is_typed_by_the_contract():
    contract = namespace["Scorer"].contract
    body = b'\xef\xbb\xbfamount,ref,story\r\n5e2,007,"a, b"\r\n1000,,true\r\nmany,x,y\r\n'
    rows = [json.loads(row) for row in csv_rows(body, contract)]
    assert rows[0] == {"amount": 500, "ref": "007", "story": "a, b"}
    assert rows[1] == {"amount": 1000, "ref": None, "story": "true"}
    assert [v["rule"] for v in violations(rows[2], contract)] == ["type"]


@pytest.mark.parametrize(
    ("media", "body", "status"),
    [
        (LINES, b"", 422), (LINES, b"\n\n", 422), (CSV, b"", 422), (CSV, b"amount\n", 422), (CSV, b"a,a\n1,2\n", 422),
        (CSV, b"amount,ref\n1\n", 422), (CSV, b"\xff\xfe", 400), (CSV, b'amount\n"5', 400), (PARQUET, b"", 400),
        (PARQUET, b"PAR1", 400), (PARQUET, as_parquet(ROWS)[:-9], 400), (PARQUET, as_parquet([{"x": 1}]), 422),
        ("application/json; charset=latin-1", b"[]", 415), ("application/xml", b"", 415),
    ],
)  # fmt: skip
def test_files_that_are_no_batch(media, body, status):
    problem(status, BATCH, body, {"content-type": media})


def test_a_fault_in_the_middle_is_the_last_line():
    lines, last = told(as_csv(ROWS) + b"\r\n1,2\r\n", CSV)
    assert len(lines) == 200 and last["status"] == 422 and "Line 252" in last["detail"]


def test_values_of_other_kinds_are_rejected():
    lines, counts = told(as_parquet([{"amount": [1, 2]}, {"amount": None}]), PARQUET)
    assert counts["rejected"] == 2
    assert told(as_parquet([{"ref": b"x", "amount": 500}]), PARQUET)[1]["rejected"] == 1


def test_a_batch_over_the_limit_is_not_read():
    problem(413, BATCH, b"", {"content-type": CSV, "content-length": str(MAX_BATCH + 1)})


def test_too_many_batches_at_once_are_told_to_come_back():
    batches = APP.routes[BATCH].answer.__self__
    batches.running = 2
    try:
        assert call(BATCH, as_lines(ROWS), {"content-type": LINES})[1]["retry-after"] == "1"
    finally:
        batches.running = 0
