"""HMDA under the contracts' names: pulled as published, read right, leakage refused, the publisher's own counts"""

import contextlib
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import msgspec
import pandas as pd
import pytest
from typer.testing import CliRunner

from finure.cli.main import app
from finure.contracts.check import check
from finure.contracts.contract import faults, load, parse, to_plain
from finure.contracts.schema import request_struct
from finure.core import FinureError, Settings
from finure.data import locate
from finure.denial.data import load_table, normalised, pull_records

DATA = os.environ.get("FINURE_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="FINURE_DATA is not set")
HMDA = ("hmda_nc_va", "hmda_us", "hmda_lar")
TINY = {
    "activity_year": "2024", "lei": "A", "state_code": "DC", "action_taken": "1", "loan_type": "1", "lien_status": "1",
    "loan_purpose": "32", "occupancy_type": "1", "loan_amount": "205000.0", "property_value": "405000", "income": "88",
    "debt_to_income_ratio": "30%-<36%", "loan_to_value_ratio": "79.5", "denial_reason-1": "10", "applicant_age": "8888",
    "derived_dwelling_category": "Single Family (1-4 Units):Site-Built", "derived_race": "White", "loan_term": "360",
    "derived_ethnicity": "Joint", "derived_sex": "Joint", "interest_rate": "6.5",
}  # fmt: skip


def published(rows: int = 3) -> pd.DataFrame:
    "A made-up file with the 99 columns as the CFPB names them."
    back = {"combined_loan_to_value_ratio": "loan_to_value_ratio", "open_end_line_of_credit": "open-end_line_of_credit",
            "derived_msa_md": "derived_msa-md"}  # fmt: skip
    names = []
    for name in load("hmda_lar").columns:
        name = back.get(name, name.replace("co_applicant", "co-applicant"))
        stem, _, last = name.rpartition("_")
        numbered = ("denial_reason", "aus", "race", "ethnicity")
        names.append(f"{stem}-{last}" if last in "12345" and stem.endswith(numbered) else name)
    names.remove("denied")
    assert len(names) == 99 and set(TINY) <= set(names)
    table = pd.DataFrame([{name: TINY.get(name, "NA") for name in names}] * rows)
    table.loc[1, ["action_taken", "interest_rate", "debt_to_income_ratio"]] = ["3", "NA", "Exempt"]
    table.loc[1, ["denial_reason-1", "denial_reason-2", "denial_reason-3"]] = ["3", "8", "9"]
    table.loc[2, "action_taken"] = "4"
    return table


class Browser(BaseHTTPRequestHandler):
    "Answers like the Data Browser; may break off."

    def __init__(self, *args, body, asked, breaks, **options):
        self.body, self.asked, self.breaks = body, asked, breaks
        super().__init__(*args, **options)

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: self.breaks or None])
        self.close_connection = True

    def log_message(self, *args):
        "Says nothing."


@contextlib.contextmanager
def browser(table, breaks=0):
    "A real HTTP server on this machine."
    asked = []
    body = table if isinstance(table, bytes) else table.to_csv(index=False).encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Browser, body=body, asked=asked, breaks=breaks))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/view/csv", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_asks_as_the_data_browser_wants_and_keeps_every_column(tmp_path, monkeypatch):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    with browser(published()) as (url, asked):
        monkeypatch.setenv("FINURE_HMDA", url)
        done = CliRunner().invoke(app, ["data", "pull", "hmda", "--state", "dc", "--year", "2024"])
        assert done.exit_code == 0, done.output
        again = CliRunner().invoke(app, ["data", "pull", "hmda", "--state", "DC", "--year", "2024"])
        assert again.exit_code == 0 and len(asked) == 1
    query = parse_qs(urlparse(asked[0]).query)
    assert query == {"states": ["DC"], "years": ["2024"], "actions_taken": ["1,2,3,7,8"]}
    (file,) = (tmp_path / "data").iterdir()
    pd.testing.assert_frame_equal(pd.read_parquet(file), published())
    assert str(file) in done.output.replace("\n", "")
    with pytest.raises(FinureError, match="by state and year"):
        CliRunner().invoke(app, ["data", "pull", "hmda", "--state", "DC"], catch_exceptions=False)


@pytest.mark.parametrize(("table", "breaks", "said"), [
    (published(), 500, "broke off after 500 of"), (b"a,b\n1,2\n", 0, "no column action_taken"),
    (published().head(0), 0, "no applications"),
])  # fmt: skip
def test_a_pull_that_fails_keeps_nothing(tmp_path, table, breaks, said):
    with browser(table, breaks) as (url, _), pytest.raises(FinureError, match=said):
        pull_records("DC", 2024, Settings(home=tmp_path), url)
    assert not list((tmp_path / "data").iterdir())


def test_published_rows_become_decided_applications():
    table = normalised(published())
    assert table["denied"].tolist() == [0, 1]
    assert table["denial_reason_1"].tolist() == [None, "LOW_SCORE_HISTORY"]
    assert table[["denial_reason_2", "denial_reason_3"]].iloc[1].tolist() == ["OTHER", None]
    clean = check(table, load("hmda_lar")).clean
    assert clean["debt_to_income_ratio"].tolist()[0] == 33 and clean["debt_to_income_ratio"].isna().tolist()[1]
    assert clean[["combined_loan_to_value_ratio", "loan_term"]].iloc[0].tolist() == [79.5, 360]


@pytest.mark.parametrize("name", HMDA)
def test_what_is_known_after_the_decision_is_refused_and_groups_are_for_fairness_only(name):
    contract = load(name)
    features, later = contract.model_features(), contract.named("lender", "outcome", "target")
    assert not {"derived_race", "derived_sex", "county_code", "applicant_age"} & set(features)
    assert {"derived_race", "derived_ethnicity", "derived_sex"} <= set(contract.named("protected"))
    assert not set(later) & set(features) and {"denied"} <= set(later)
    if name != "hmda_us":
        assert contract.columns["interest_rate"].role == "lender"
        plain = to_plain(contract)
        plain["features"]["spread"] = {"op": "ratio", "of": ["interest_rate", "income"], "reason": "income"}
        with pytest.raises(FinureError, match="`interest_rate` is lender"):
            parse(plain)
        with pytest.raises(Exception, match="interest_rate"):
            msgspec.json.decode(b'{"interest_rate": 6.5}', type=request_struct(contract))
    assert not faults(contract)


@needs_data
@pytest.mark.parametrize(("name", "data", "rows", "denied", "first"), [
    ("hmda_nc_va", "hmda_2024_nc_va_denial_reasons", 103_248, 21_426, {"DTI": 7_406, "OTHER": 1_724, "CASH": 321}),
    ("hmda_us", "hmda_2022_2024_us_sample", 200_000, 45_676, {}),
    ("hmda_lar", "hmda_2024_one_lender_raw99", 1_254, 379, {"DTI": 284, "OTHER": 36, "CASH": 3}),
])  # fmt: skip
def test_every_real_row_keeps_its_contract_and_the_published_counts(tmp_path, name, data, rows, denied, first):
    checked = load_table(data, load(name), Settings(home=tmp_path, data=DATA))
    assert (len(checked.clean), len(checked.rejects), checked.clean["denied"].sum()) == (rows, 0, denied)
    stated = checked.clean.filter(like="denial_reason_1")
    assert all((stated == reason).sum().item() == n for reason, n in first.items())


@needs_data
def test_a_real_file_of_the_data_browser_comes_through_whole(tmp_path):
    raw = pd.read_parquet(locate("hmda_2024_one_lender_raw99", Settings(home=tmp_path / "a", data=DATA)))
    with browser(raw) as (url, _):
        file = pull_records("CA", 2024, Settings(home=tmp_path / "b"), url)
    pd.testing.assert_frame_equal(pd.read_parquet(Path(file)), raw)
    table = normalised(raw)
    assert table["denial_reason_2"].notna().sum() == 71
