"""A pull never leaves a wrong file, and a split never learns from the test period"""

import contextlib
import datetime as dt
import hashlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finure.contracts.contract import parse
from finure.core import FinureError, Settings, sha256_file
from finure.credit.data import load_table, split_rows
from finure.data import Entry, catalog, data_folder, entry, fingerprint, locate, pull, read

CONTENT = b"amount,bad\n" + b"".join(b"%d,%d\n" % (i, i % 2) for i in range(400_000))


def book(content=CONTENT, file="x.csv"):
    "A catalogue with one data set of this content."
    facts = {"title": "t", "publisher": "p", "licence": "l", "get": "ask the publisher", "rows": 1}
    return {"x": Entry(file=file, size=len(content), sha256=hashlib.sha256(content).hexdigest(), **facts)}


@pytest.fixture
def source(tmp_path):
    "A folder that holds the file."
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.csv").write_bytes(CONTENT)
    return tmp_path / "source"


def setting(tmp_path, data):
    return Settings(home=tmp_path / "home", data=None if data is None else str(data))


class Handler(BaseHTTPRequestHandler):
    "Serves CONTENT; can resume or not, can break off or lie, and notes what was asked."

    def __init__(self, *args, plan, **options):
        self.plan = plan
        super().__init__(*args, **options)

    def do_GET(self):
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.plan["asked"].append(self.headers.get("Range"))
        if self.plan.get("status"):
            return self.send_error(self.plan["status"])
        begin = int(start[1]) if start and self.plan["resumes"] else 0
        body = self.plan["content"][begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.plan["breaks"].pop(0)] if self.plan["breaks"] else body)
        self.close_connection = True

    def log_message(self, *args):
        "Says nothing."


@contextlib.contextmanager
def server(resumes=True, breaks=(), content=CONTENT, status=None):
    "A real HTTP server on this machine; gives its address and its plan."
    plan = {"resumes": resumes, "breaks": list(breaks), "content": content, "asked": [], "status": status}
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, plan=plan))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/", plan
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def files(tmp_path):
    "Name and content of all that a pull left."
    folder = tmp_path / "home" / "data"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


# Pulling


def test_from_a_folder_once(source, tmp_path):
    seen = []
    path = pull("x", setting(tmp_path, source), book(), lambda done, size: seen.append((done, size)))
    assert files(tmp_path) == {"x.csv": CONTENT}
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    (source / "x.csv").unlink()
    assert pull("x", setting(tmp_path, None), book()) == path


@pytest.mark.parametrize("resumes", [True, False])
def test_over_http_after_two_breaks(resumes, tmp_path):
    with server(resumes, breaks=[1_500_000, 1_200_000]) as (url, plan):
        for _ in range(2):
            with pytest.raises(FinureError, match="Pull again, it goes on from there"):
                pull("x", setting(tmp_path, url), book())
            assert list(files(tmp_path)) == ["x.csv.part"]
        pull("x", setting(tmp_path, url), book())
        ranges = [None, "bytes=1500000-", f"bytes={2_700_000 if resumes else 1_200_000}-"]
        assert plan["asked"] == ranges
    assert files(tmp_path) == {"x.csv": CONTENT}


@pytest.mark.parametrize("status", [404, 403, 500, 416])
def test_what_the_server_refuses_is_told(status, tmp_path):
    with (
        server(status=status) as (url, _),
        pytest.raises(FinureError, match="not to be had from .*ask the publisher"),
    ):
        pull("x", setting(tmp_path, url), book())
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:9", "http://127.0.0.1:port", "http:///", "odd://x", "http://[x", "/no/such"]
)
def test_addresses_that_lead_nowhere(base, tmp_path):
    with pytest.raises(FinureError, match="x.csv is not to be had from "):
        pull("x", setting(tmp_path, base), book())
    assert files(tmp_path) == {}


def test_a_wrong_file_is_not_kept(source, tmp_path):
    (source / "x.csv").write_bytes(CONTENT[::-1])
    with pytest.raises(FinureError, match="not the file of the catalogue: .*Nothing was kept"):
        pull("x", setting(tmp_path, source), book())
    assert files(tmp_path) == {}
    with (
        server(content=CONTENT + b"more") as (url, _),
        pytest.raises(FinureError, match="not the file of the catalogue"),
    ):
        pull("x", setting(tmp_path, url), book())
    assert files(tmp_path) == {}


def test_a_truncated_source_is_told_and_the_next_pull_goes_on(source, tmp_path):
    (source / "x.csv").write_bytes(CONTENT[:1000])
    for _ in range(2):
        with pytest.raises(FinureError, match=f"cut off: 1,000 of {len(CONTENT):,} bytes.*at the source is not whole"):
            pull("x", setting(tmp_path, source), book())
        assert files(tmp_path) == {"x.csv.part": CONTENT[:1000]}
    (source / "x.csv").write_bytes(CONTENT)
    pull("x", setting(tmp_path, source), book())
    assert files(tmp_path) == {"x.csv": CONTENT}


@pytest.mark.parametrize("size", [1000, len(CONTENT), len(CONTENT) + 9])
@pytest.mark.parametrize("over_http", [False, True])
def test_a_part_of_another_file_does_not_spoil_the_pull(size, over_http, source, tmp_path):
    folder = tmp_path / "home" / "data"
    folder.mkdir(parents=True)
    (folder / "x.csv.part").write_bytes(b"z" * size)
    with server() as (url, _):
        pull("x", setting(tmp_path, url if over_http else source), book())
    assert files(tmp_path) == {"x.csv": CONTENT}


def test_the_old_file_stays_until_the_new_one_is_whole(source, tmp_path):
    pull("x", setting(tmp_path, source), book())
    newer = CONTENT + b"1,1\n"
    with pytest.raises(FinureError, match="cut off"):
        pull("x", setting(tmp_path, source), book(newer))
    assert files(tmp_path)["x.csv"] == CONTENT
    (source / "x.csv").write_bytes(newer)
    pull("x", setting(tmp_path, source), book(newer))
    assert files(tmp_path) == {"x.csv": newer}


def test_a_file_that_was_changed_here_is_pulled_again(source, tmp_path):
    path = pull("x", setting(tmp_path, source), book())
    path.write_bytes(CONTENT[::-1])
    assert pull("x", setting(tmp_path, source), book()).read_bytes() == CONTENT


def test_nothing_set_says_how_to_get_it(tmp_path):
    with pytest.raises(FinureError, match="FINURE_DATA is not set.*x.csv(.|\n)*ask the publisher"):
        pull("x", setting(tmp_path, None), book())
    with pytest.raises(FinureError, match="no data set `y`. Known: x"):
        entry("y", book())


# The catalogue and files of one's own


def test_the_catalogue_says_who_and_under_which_licence(tmp_path):
    for name, wanted in catalog().items():
        assert wanted.publisher, name
        assert wanted.licence, name
        assert wanted.get, name
        assert re.fullmatch("[0-9a-f]{64}", wanted.sha256), name
        assert wanted.size > 0, name
    (tmp_path / "catalog.yaml").write_text("x: {title: t, file: x.csv}\n")
    with pytest.raises(FinureError, match="catalog.yaml: .*sha256"):
        catalog(tmp_path / "catalog.yaml")


def test_a_file_of_ones_own(source, tmp_path):
    assert locate(str(source / "x.csv")) == source / "x.csv"
    assert len(read(str(source / "x.csv"), settings=setting(tmp_path, None))) == 400_000
    assert fingerprint(source / "x.csv") == sha256_file(source / "x.csv")[:16]
    with pytest.raises(FinureError, match="no such file"):
        locate(str(source / "y.csv"))


# Credit: the table


CONTRACT = {
    "contract": "c",
    "version": "1",
    "title": "t",
    "reasons": {"a": {"category": "OTHER", "text": "An example"}},
    "columns": {
        "on": {"type": "date", "role": "event_time"},
        "known": {"type": "date", "role": "known_time", "null": "allowed"},
        "x": {"type": "number", "reason": "a"},
        "bad": {"type": "integer", "levels": [0, 1], "role": "target", "bad": 1},
    },
}
TIMED = parse(CONTRACT)
PLAIN = parse(CONTRACT | {"columns": {name: CONTRACT["columns"][name] for name in ("x", "bad")}})


def test_a_table_with_and_without_a_header(tmp_path):
    rows = "1.5,0\nno,1\n2,1\n"
    (tmp_path / "head.csv").write_text("x,bad\n" + rows)
    (tmp_path / "bare.csv").write_text(rows)
    for name, header in (("head.csv", True), ("bare.csv", False)):
        checked = load_table(str(tmp_path / name), PLAIN, header)
        assert checked.clean["x"].tolist() == [1.5, 2.0]
        assert checked.rejects["reject_reason"].tolist() == ["x: is not a number"]


def test_the_simulated_bank_is_made_once(monkeypatch, tmp_path):
    frame = pd.DataFrame({"x": [1.0]})
    made = []
    monkeypatch.setattr("finure.credit.data.simulate", made.append)
    monkeypatch.setattr("finure.credit.data.modelling_table", lambda bank: frame)
    ours = setting(tmp_path, None)
    paths = {locate("simulated_bank", ours) for _ in range(2)}
    assert paths == {data_folder(ours) / "simulated_bank.parquet"}
    assert len(made) == 1
    assert list(files(tmp_path)) == ["simulated_bank.parquet"]


# Credit: the split


def applications(n=800, seed=0):
    "Applications over two years; labels known 30 to 400 days later, some not at all."
    rng = np.random.default_rng(seed)
    on = pd.Timestamp("2022-01-01") + pd.to_timedelta(rng.integers(0, 730 * 24, n), unit="h")
    known = pd.Series(on + pd.to_timedelta(rng.integers(30, 400, n), unit="D")).where(rng.random(n) > 0.05)
    return pd.DataFrame({"on": on, "known": known, "x": 1.0}), (rng.random(n) < 0.3).astype(np.int8)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 99),
    st.dates(dt.date(2022, 9, 1), dt.date(2023, 8, 1)),
    st.integers(1, 90),
)
def test_nothing_of_the_test_period_is_learnt_and_labels_were_known(seed, start, gap):
    frame, bad = applications(seed=seed)
    start = pd.Timestamp(start)
    try:
        split = split_rows(frame, TIMED, bad, str((start - pd.Timedelta(days=gap)).date()), str(start.date()))
    except FinureError as error:
        assert "too few" in str(error)
        return
    assert not (split.train & split.test).any()
    assert (frame["on"][split.train] < start).all()
    assert (frame["known"][split.train] < start).all()
    assert (frame["on"][split.test] >= start).all()
    assert f"{start:%Y-%m-%d}" in split.how


def test_the_last_day_belongs_to_it_to_its_last_hour():
    frame, bad = applications()
    plain = parse(CONTRACT | {"columns": {n: c for n, c in CONTRACT["columns"].items() if n != "known"}})
    split = split_rows(frame, plain, bad, "2022-12-31", "2023-01-01", "2023-06-30")
    assert split.train.sum() == (frame["on"] < "2023-01-01").sum()
    assert split.test.sum() == frame["on"].between("2023-01-01", "2023-06-30 23:59").sum()


def test_the_default_split_is_the_last_quarter():
    frame, bad = applications()
    split = split_rows(frame, TIMED, bad)
    assert 0.2 < split.test.mean() < 0.35
    assert frame["on"][split.test].min().day == 1
    assert frame["on"][split.test].max() == frame["on"].max()


def test_without_dates_the_split_is_random_but_fixed():
    _, bad = applications()
    frame = pd.DataFrame({"x": np.ones(len(bad))})
    first, again, other = (split_rows(frame, PLAIN, bad, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.test, again.test)
    assert (first.test != other.test).any()
    assert (first.train ^ first.test).all()
    assert abs(bad[first.test].mean() - bad.mean()) < 0.005
    assert "random" in first.how


def test_splits_that_cannot_be():
    frame, bad = applications()
    for dates, why in (
        (("2023-06-01", "2023-01-01"), "not in order"),
        (("", "soon"), "test_from: `soon` is not a date"),
        (("", "2023-01-01", "2022-01-01"), "not in order"),
        (("2022-01-05", "2023-01-01"), "training rows .* too few"),
        (("", "2023-12-30"), "test rows .* too few"),
    ):
        with pytest.raises(FinureError, match=why):
            split_rows(frame, TIMED, bad, *dates)
    with pytest.raises(FinureError, match="too few"):
        split_rows(frame[["x"]], PLAIN, np.zeros(len(bad), np.int8))
