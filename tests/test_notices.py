"""Notices: what they say, what stops them, how they are recorded and when they are due"""

import datetime as dt
import hashlib
import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import GOOD, MODULE, PREDICT, body, bundle, call, problem
from typer.testing import CliRunner

from finure.audit.log import open_store
from finure.audit.trail import Decision
from finure.audit.writer import DecisionLog
from finure.bundle import fingerprint, load_scorer
from finure.cli.notices import notice_app
from finure.contracts.contract import load, parse, to_plain
from finure.core import FinureError, Settings
from finure.explain.reasons import CATEGORIES
from finure.notices import routes as notice_routes
from finure.notices.clock import noticed
from finure.notices.facts import Case, Missing, Notice, Offer, Score, Stated, notice_of, possible_reasons
from finure.notices.issue import Noted, entry
from finure.notices.law import DISCLOSURES, HOME_NOTICE, KINDS, VERSION, ecoa_notice
from finure.notices.letter import letter, words
from finure.notices.lint import RULES, lint
from finure.notices.render import read_notice, to_html, to_pdf
from finure.notices.settings import REQUIRED, Creditor, Party, read_creditor
from finure.serve.app import App

ROOT = Path(__file__).parents[1]
DAY = dt.date(2026, 3, 2)
AT = int(dt.datetime(2026, 3, 2, 18, tzinfo=dt.UTC).timestamp()) * 1_000_000
LENDER, OFFICE = Party("Sample Lender", ["1 First Street"], "555-0100"), Party("Office", ["2 First Street"], "555-0101")
BUREAU, PAT = Party("Sample Bureau", ["9 Ninth Street"], "555-0900"), Party("Pat Doe", ["3 Third Street"])
CREDITOR = Creditor(
    creditor=LENDER, reasons_office=OFFICE, agencies=["fdic"], contracts=["simulated_bank"], credit="a personal loan",
    time_zone="America/Chicago", consumer_report=True, score_used=True, outside_information=True,
    reporting_agencies={"sb": BUREAU},
)  # fmt: skip
HOME = msgspec.structs.replace(CREDITOR, home_loans=["simulated_bank"], credit="a home loan")
BANK = load(ROOT / "data" / "contracts" / "simulated_bank.yaml")
POSSIBLE = possible_reasons(SimpleNamespace(contract=BANK))
FACTORS = ["Late payments", "Balances too high", "Short history", "Many accounts", "Number of inquiries"]
SCORE = Score(value=612, low=300, high=850, date=DAY, provider=BUREAU, factors=FACTORS, ranks_above=21)


def decided(decision="decline", reasons=POSSIBLE[:2], **answer) -> Decision:
    told = [{"code": one.code, "text": one.text} for one in reasons]
    answer = {"decision": decision, "event_time": "2026-02-27", "reasons": told} | answer
    return Decision(model="finure-credit:7", contract="simulated_bank 1", answer=answer)


def notice(kind="decline", **changes) -> Notice:
    "A sound notice of a kind, with changes to its facts."
    made = {"incomplete": "refer", "score-disclosure": "approve"}.get(kind, "decline")
    creditor = HOME if KINDS[kind].home else CREDITOR
    case = {"score": None if kind == "incomplete" else SCORE}
    case |= {"offer": Offer({"Amount": "$4,000"}, dt.date(2026, 4, 20))} if kind == "counter-offer" else {}
    case |= {"missing": Missing(["Proof of income"], dt.date(2026, 3, 27))} if kind == "incomplete" else {}
    facts = notice_of("d-1", AT, decided(made), POSSIBLE, creditor, Case(applicant=PAT, kind=kind, **case))
    return msgspec.structs.replace(facts, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_notice_of_each_kind_has_no_finding(kind):
    made = notice(kind)
    text = read_notice(to_html(made))[1]
    assert lint(made, DAY, CREDITOR, text) == []
    assert (ecoa_notice(["fdic"]) in text) == KINDS[kind].adverse
    assert all((one.text in text) == KINDS[kind].reasons for one in made.principal)
    for said in ("Sample Lender", "1 First Street", "Pat Doe", made.credit, "February 27, 2026"):
        assert said in text


# a rule, and changes to a sound notice that break it
BROKEN = [
    ("vague", {"reasons": [Stated("LOW_SCORE_HISTORY", "Low credit score")]}),
    ("vague", {"reasons": [Stated("OTHER", "Did not meet our internal standards")]}),
    ("prohibited", {"reasons": [Stated("OTHER", "Marital status")]}),
    ("closest-box", {"reasons": [Stated("UTILISATION", "Excessive obligations in relation to income.")]}),
    ("closest-box", {"reasons": [Stated("OTHER", "Other, specify")]}),
    ("not-in-model", {"reasons": [*POSSIBLE[:2], Stated("COLLATERAL", "Value of the car")]}),
    ("not-principal", {"reasons": POSSIBLE[:3]}),
    ("left-out", {"reasons": POSSIBLE[1:2]}),
    ("no-reasons", {"reasons": [], "principal": []}),
    ("too-many", {"reasons": POSSIBLE[:5], "principal": POSSIBLE[:5]}),
    ("too-many", {"reasons": [POSSIBLE[0], POSSIBLE[0]]}),
    ("incomplete-scored", {"reasons": [Stated("INCOMPLETE", "Credit application incomplete")]}),
    ("agency", {"agencies": []}),
    ("agency", {"agencies": ["fed"]}),
    ("agency", {"agencies": ["occ"]}),
    ("parties", {"creditor": Party("", [])}),
    ("parties", {"office": Party("Office", ["2 First Street"])}),
    ("parties", {"creditor": Party("Another Lender", ["1 First Street"], "555-0100")}),
    ("deadline", {"deadline": DAY - dt.timedelta(1)}),
    ("deadline", {"dated": DAY - dt.timedelta(1)}),
    ("report", {"report": None}),
    ("report", {"report": Party("Sample Bureau", ["9 Ninth Street"])}),
    ("score", {"score": None}),
    ("score", {"score_used": False}),
    ("score", {"score": msgspec.structs.replace(SCORE, value=900)}),
    ("score", {"score": msgspec.structs.replace(SCORE, provider=LENDER)}),
    ("score", {"score": msgspec.structs.replace(SCORE, factors=[])}),
    ("score", {"score": msgspec.structs.replace(SCORE, factors=[*FACTORS[:4], "Utilisation"])}),
    ("score", {"kind": "score-disclosure", "score": msgspec.structs.replace(SCORE, ranks_above=None)}),
    ("score", {"kind": "home-score-disclosure", "score": None}),
    ("score", {"kind": "home-score-disclosure", "score": msgspec.structs.replace(SCORE, factors=[])}),
    ("score", {"kind": "home-score-disclosure", "score": msgspec.structs.replace(SCORE, ranks_above=None)}),
    ("report", {"kind": "home-score-disclosure", "report": Party("Sample Bureau", ["9 Ninth Street"])}),
    ("form", {"kind": "home-score-disclosure"}),
    ("form", {"kind": "score-disclosure", "home_loan": True}),
    ("age", {"reasons": [Stated("OTHER", "Your age")]}),
    ("offer", {"offer": Offer({"Amount": "$1"}, DAY)}),
    ("offer", {"kind": "counter-offer"}),
    ("offer", {"kind": "counter-offer", "offer": Offer({"Amount": "$1"}, DAY)}),
    ("missing", {"kind": "incomplete"}),
    ("missing", {"kind": "incomplete", "missing": Missing([], dt.date(2026, 4, 1))}),
    ("missing", {"kind": "incomplete", "missing": Missing(["Proof of income"], DAY)}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes"), BROKEN, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(BROKEN)])
def test_each_rule_stops_what_breaks_it(rule, changes):
    found = lint(msgspec.structs.replace(notice(), **changes), DAY, CREDITOR)
    assert (rule, "error") in {one[:2] for one in found}


def test_every_rule_is_tried():
    assert {rule for rule, _ in BROKEN} == set(RULES)


def test_a_page_must_say_what_its_facts_say():
    page = to_html(notice()).decode()
    for changed, rules in (
        (page.replace("marital status, ", ""), {"ecoa", "altered"}),
        (page.replace(POSSIBLE[0].text + "</li>", "Income</li>"), {"altered"}),
        (page.replace("</main>", "<p>Your score was too low.</p></main>"), {"altered"}),
        (page.replace("1 First Street<br>", ""), {"altered"}),
    ):
        assert changed != page
        facts, text = read_notice(changed.encode())
        assert {one.rule for one in lint(facts, DAY, CREDITOR, text)} == rules


def test_the_home_loan_applicant_reads_the_notice_of_the_statute_word_for_word():
    made = notice("home-score-disclosure")
    page = to_html(made).decode()
    told = ("612", "a low of 300 to a high of 850", *FACTORS, "Sample Bureau, 9 Ninth Street, telephone 555-0900")
    assert made.decision == "decline" and all(one in page for one in (*HOME_NOTICE, *told, "March 2, 2026"))
    assert "Federal Equal Credit" not in page and "approved" not in page and "denied" not in page
    facts, text = read_notice(page.replace("technologies change", "methods change").encode())
    assert {one.rule for one in lint(facts, DAY, HOME, text)} == {"home-notice", "altered"}


def test_the_loan_decides_which_disclosure_it_is():
    for creditor, decision, kind in ((CREDITOR, "approve", DISCLOSURES[False]), (HOME, "approve", DISCLOSURES[True]),
                                     (HOME, "decline", DISCLOSURES[True])):  # fmt: skip
        case = Case(applicant=PAT, kind="score-disclosure", score=SCORE)
        assert notice_of("d-1", AT, decided(decision), POSSIBLE, creditor, case).kind == kind
    with pytest.raises(FinureError, match="cannot follow the decision `decline`"):
        notice_of("d-1", AT, decided(), POSSIBLE, CREDITOR, Case(applicant=PAT, kind="score-disclosure"))


# age checked by the run, the applicant's age, the words; whether the letter may go out
AGED = [
    (True, 61, "Your age", True), (True, 62, "Your age", False), (True, 80, "Your age", False),
    (True, 30, "Time at work", False), (True, None, "Your age", False), (False, 30, "Your age", False),
    (False, 80, "Your age", False),
]  # fmt: skip


@pytest.mark.parametrize(("checked", "years", "words", "passes"), AGED)
@pytest.mark.parametrize("kind", ["decline", "right-to-reasons"])
def test_an_age_reason_is_for_the_young_and_for_models_that_were_checked(checked, years, words, passes, kind):
    plain = to_plain(BANK)
    plain["reasons"]["age"] = {"category": "OTHER", "text": words}
    plain["columns"]["age_years"] |= {"role": "input"}
    plain["features"] = plain["features"] | {
        "years_at_work_of_age": {"op": "ratio", "of": ["employment_years", "age_years"], "reason": "age"}
    }
    model = SimpleNamespace(contract=parse(plain), info={"age": "checked"} if checked else {})
    possible = possible_reasons(model)
    principal = [*POSSIBLE[:1], Stated("OTHER", words)]
    decision = decided(reasons=principal)
    decision.request = msgspec.Raw(json.dumps({"age_years": years} if years else {}).encode())
    facts = notice_of("d-1", AT, decision, possible, CREDITOR, Case(applicant=PAT, kind=kind, score=SCORE))
    assert [one.rule for one in lint(facts, DAY, CREDITOR)] == ([] if passes else ["age"])
    assert read_notice(to_html(facts))[0] == facts
    other = msgspec.structs.replace(facts, principal=POSSIBLE[:1], reasons=POSSIBLE[:1])
    assert lint(other, DAY, CREDITOR) == []


def test_a_person_never_states_age():
    case = Case(applicant=PAT, kind="decline", score=SCORE, acted=DAY, reviewer=[Stated("OTHER", "Age")])
    found = lint(notice_of("d-1", AT, decided("refer"), POSSIBLE, CREDITOR, case), DAY, CREDITOR)
    assert [one.rule for one in found] == ["age"]


def test_a_notice_that_age_has_no_part_in_keeps_its_bytes():
    kept = msgspec.to_builtins(notice())
    assert not {"years", "home_loan"} & set(kept) and not any("age" in one for one in kept["possible"])


def test_what_is_late_goes_out_once_somebody_says_why_and_what_is_near_is_told():
    assert [one.severity for one in lint(notice(), dt.date(2026, 3, 26))] == ["warning"]
    assert lint(notice(), dt.date(2026, 3, 20)) == []
    assert [one.severity for one in lint(notice(late=True), dt.date(2026, 4, 9))] == ["warning"]


@settings(max_examples=60, deadline=None)
@given(st.permutations(POSSIBLE), st.integers(1, 4), st.data())
def test_the_notice_states_the_reasons_of_the_decision_and_no_others(order, count, data):
    principal = order[:count]
    facts = notice_of("d-1", AT, decided(reasons=principal), POSSIBLE, CREDITOR, Case(applicant=PAT, score=SCORE))
    assert facts.reasons == principal and lint(facts, DAY, CREDITOR) == []
    said = words([part for part in letter(facts) if part.style == "list"][:1])
    assert said == [one.text for one in principal]
    drop = data.draw(st.sampled_from(principal))
    less = msgspec.structs.replace(facts, reasons=[one for one in principal if one != drop])
    more = msgspec.structs.replace(facts, reasons=[*principal[1:], order[count]])
    assert "left-out" in {one.rule for one in lint(less, DAY, CREDITOR)}
    assert {"left-out", "not-principal"} <= {one.rule for one in lint(more, DAY, CREDITOR)}


def test_in_the_grey_band_both_components_have_a_word():
    case = Case(
        applicant=PAT, kind="decline", score=SCORE, acted=DAY, reviewer=[Stated("COLLATERAL", "Age of the car")]
    )
    facts = notice_of("d-1", AT, decided("refer", POSSIBLE[:4]), POSSIBLE, CREDITOR, case)
    assert [one.by for one in facts.reasons] == ["reviewer", "model", "model", "model"]
    assert lint(facts, DAY, CREDITOR) == []
    alone = msgspec.structs.replace(facts, reasons=facts.reasons[1:])
    assert "no-reasons" in {one.rule for one in lint(alone, DAY, CREDITOR)}
    for lacks, told in (({"reviewer": []}, "at least one"), ({"acted": None}, "on which day")):
        with pytest.raises(FinureError, match=told):
            notice_of("d-1", AT, decided("refer"), POSSIBLE, CREDITOR, msgspec.structs.replace(case, **lacks))


def test_the_creditors_own_score_is_nowhere():
    facts = notice_of(
        "d-1", AT, decided(score=777123, pd=0.31415, grade="E"), POSSIBLE, CREDITOR, Case(applicant=PAT, score=SCORE)
    )
    page = to_html(facts)
    assert b"777123" not in page and b"31415" not in page and b"612" in page


def test_the_contracts_categories_are_those_of_the_law():
    for path in (ROOT / "data" / "contracts").glob("*.yaml"):
        reasons = [one for one in load(path).reasons.values() if one.category != "INCOMPLETE"]  # an underwriter's own
        stated = [Stated(one.category, one.text) for one in reasons]
        found = {one.rule for one in lint(notice(reasons=stated, principal=stated, possible=stated), DAY)}
        assert found <= ({"too-many"} if stated else {"no-reasons"}), path.name  # a table of figures gives none
    assert {one.code for one in POSSIBLE} <= set(CATEGORIES)


# --- pages and PDFs


@pytest.mark.parametrize("kind", KINDS)
def test_a_pdf_has_one_tagged_page_and_the_facts(kind):
    made = notice(kind)
    pdf = to_pdf(made)
    assert re.findall(rb"/Type/Pages/Count (\d+)", pdf) == [b"1"]
    assert b"/StructTreeRoot" in pdf and b"/Lang" in pdf and b"pdfuaid:part" in pdf
    assert read_notice(pdf) == (made, None)


def test_a_page_can_be_read_by_everybody():
    page = to_html(notice()).decode()
    assert '<html lang="en-US">' in page and "<title>" in page and "<img" not in page and "http" not in page
    assert re.findall(r"<h([1-6])", page)[0] == "1" and set(re.findall(r"<h([1-6])", page)) == {"1", "2"}


CHILD = """
import hashlib, sys
import finure.credit.decide, finure.notices.routes
assert not {"typst", "jinja2"} & set(sys.modules), "a service that decides does not need them"
import msgspec
from finure.notices.facts import Notice
from finure.notices.render import to_html, to_pdf
notice = msgspec.json.decode(sys.stdin.buffer.read(), type=Notice)
print(*(hashlib.sha256(make(notice)).hexdigest() for make in (to_html, to_pdf)))
"""


def test_the_same_decision_makes_the_same_bytes_in_another_process():
    made = notice("counter-offer")
    done = subprocess.run([sys.executable, "-c", CHILD], input=msgspec.json.encode(made), capture_output=True)
    assert done.stdout.decode().split() == [hashlib.sha256(make(made)).hexdigest() for make in (to_html, to_pdf)]


# --- the creditor


def filled(folder: Path, **changes) -> Path:
    "A creditor's file."
    path = folder / "notices.yaml"
    path.write_text(yaml.safe_dump(msgspec.to_builtins(CREDITOR) | {"contracts": ["test"]} | changes))
    return path


def test_the_file_as_it_comes_stops_every_notice():
    with pytest.raises(FinureError, match="`creditor.name` is not set"):
        read_creditor(ROOT / "params" / "notices.yaml")
    assert all(not value or not any(value.values()) for value in yaml.safe_load(
        (ROOT / "params" / "notices.yaml").read_text()).values())  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_an_unset_field_is_named(tmp_path, name):
    assert read_creditor(filled(tmp_path)).agencies == ["fdic"]
    with pytest.raises(FinureError, match=f"`{name}(.name)?` is not set"):
        read_creditor(filled(tmp_path, **{name: None}))


# --- service and terminal

TODAY = dt.datetime.now(dt.UTC).date()
CASE = {"applicant": {"name": "Pat Doe", "address": ["3 Third Street"]}}
SCORED = msgspec.to_builtins(msgspec.structs.replace(SCORE, date=dt.date(2020, 1, 1)))
PATH = "/api/v1/notices/"


class Scorer(MODULE.Scorer):
    "The scorer of the tests, with notices."

    def routes(self, decider):
        return notice_routes.routes(decider)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A creditor, a bundle and a log, known to this process by its settings."
    url, made = f"sqlite:///{tmp_path}/decisions.db", bundle(tmp_path / "bundle")
    monkeypatch.setenv("FINURE_NOTICES", str(filled(tmp_path)))
    monkeypatch.setenv("FINURE_DATABASE_URL", url)
    log = DecisionLog(url)
    app = App(Scorer(made), fingerprint(made), log, settings=Settings())
    yield SimpleNamespace(folder=tmp_path, bundle=made, url=url, log=log, app=app)
    log.close()


def decline(place) -> str:
    "The id of a recorded decline of today."
    answer = json.loads(call(place.app, PREDICT, body(applied=str(TODAY)))[2])
    assert answer["decision"] == "decline"
    return answer["decision_id"]


def notices(place) -> list[dict]:
    "The notice records of the log."
    with open_store(place.url) as store:
        return [json.loads(row[0]) for row in store.rows("SELECT body FROM records WHERE kind = 'notice' ORDER BY at")]


def test_the_service_writes_a_notice_and_records_it_once(place):
    id, sent = decline(place), json.dumps(CASE | {"score": SCORED}).encode()
    status, headers, pdf = call(place.app, PATH + id, sent)
    assert (status, headers["content-type"]) == (200, "application/pdf") and pdf.startswith(b"%PDF")
    assert call(place.app, PATH + id, sent)[2] == pdf
    status, headers, page = call(place.app, PATH + id, sent, {"accept": "text/html"})
    assert status == 200 and headers["content-type"].startswith("text/html") and b"Amount too large" in page
    kept = notices(place)
    assert [(one["decision_id"], one["form"], one["template"]) for one in kept] == [
        (id, "pdf", VERSION), (id, "html", VERSION)]  # fmt: skip
    assert headers["etag"] == f'"{kept[1]["sha256"]}"' and b"Pat Doe" not in json.dumps(kept).encode()


def test_the_service_says_what_is_wrong(place):
    id, sent = decline(place), json.dumps(CASE | {"score": SCORED}).encode()
    problem(404, call(place.app, PATH + "nothing", sent))
    problem(406, call(place.app, PATH + id, sent, {"accept": "image/png"}))
    problem(400, call(place.app, PATH + id, b"{"))
    assert "applicant" in problem(422, call(place.app, PATH + id, b"{}"))["detail"]
    assert (
        "score: a credit score was used"
        in problem(422, call(place.app, PATH + id, json.dumps(CASE).encode()))["detail"]
    )
    old = json.loads(call(place.app, PREDICT, GOOD)[2])["decision_id"]
    assert "still owed" in problem(422, call(place.app, PATH + old, sent))["detail"]
    late = json.dumps(CASE | {"score": SCORED, "late": "mail room was closed"}).encode()
    assert call(place.app, PATH + old, late)[0] == 200 and notices(place)[0]["late"] == "mail room was closed"
    other = App(Scorer(place.bundle), "another bundle", place.log, settings=Settings())
    assert "finure notice make" in problem(409, call(other, PATH + id, sent))["detail"]
    assert len(notices(place)) == 1


def test_the_route_is_described_and_needs_the_creditor(place):
    told = json.loads(call(place.app, "/openapi.json")[2])["paths"][PATH + "{decision_id}"]["post"]
    assert set(told["responses"]["200"]["content"]) == {"application/pdf", "text/html"}
    filled(place.folder, credit=None)
    with pytest.raises(FinureError, match="`credit` is not set"):
        notice_routes.routes(place.app.decider)


def finure(*words: str) -> SimpleNamespace:
    "What a command prints and its exit code; a FinureError is its text and 1."
    done = CliRunner().invoke(notice_app, words)
    if isinstance(done.exception, FinureError):
        return SimpleNamespace(code=1, text=str(done.exception))
    return SimpleNamespace(code=done.exit_code, text=done.output)


def test_make_due_settle_and_lint_at_the_terminal(place):
    first, second = decline(place), decline(place)
    late = json.loads(call(place.app, PREDICT, GOOD)[2])["decision_id"]
    case, target = place.folder / "case.yaml", place.folder / "out" / "notice.pdf"
    case.write_text(yaml.safe_dump(CASE | {"score": SCORED}))
    due = finure("due", "--json")
    assert due.code == 1 and [one["id"] for one in json.loads(due.text)] == [late, first, second]
    assert [one["left"] for one in json.loads(due.text)][1:] in ([30, 30], [31, 31])  # UTC may be a day ahead
    made = finure("make", first, "--case", str(case), "-o", str(target), "--bundle", str(place.bundle))
    assert made.code == 0, made.text
    bytes_of_first = target.read_bytes()
    finure("make", first, "--case", str(case), "-o", str(target.with_suffix(".html")), "--bundle", str(place.bundle))
    finure("make", first, "--case", str(case), "-o", str(target), "--bundle", str(place.bundle))
    assert target.read_bytes() == bytes_of_first and len(notices(place)) == 2
    assert finure("settle", second, "--why", "withdrawn", "--by", "me").code == 0
    assert [one["id"] for one in json.loads(finure("due", "--json").text)] == [late]
    assert finure("settle", late, "--why", "approved on review", "--by", "me").code == 0
    assert finure("due").code == 0
    assert finure("lint", str(place.folder / "out")).code == 0
    page = target.with_suffix(".html")
    page.write_bytes(page.read_bytes().replace(b"<li>Amount too large</li>", b"<li>Score too low</li>"))
    found = finure("lint", str(place.folder / "out"))
    assert found.code == 1 and "altered" in found.text and "1 with errors" in found.text


def test_a_score_disclosure_does_not_settle_the_notice_of_a_decline(place):
    id = decline(place)
    for kind, done in (("home-score-disclosure", set()), ("decline", {id})):
        place.log.append(entry(Noted(id, kind, sha256=kind)))
        with open_store(place.url) as store:
            assert noticed(store) == done


def test_a_changed_record_or_an_unknown_bundle_is_no_ground_for_a_notice(place):
    id, case = decline(place), place.folder / "case.yaml"
    case.write_text(yaml.safe_dump(CASE | {"score": SCORED}))
    words = ["make", id, "--case", str(case), "-o", str(place.folder / "notice.html")]
    other = bundle(place.folder / "other", most=20_000)
    assert "cannot be checked" in finure(*words, "--bundle", str(other)).text
    assert load_scorer(place.bundle).contract.contract == "test"
    with closing(open_store(place.url)) as store:
        changed = store.rows("SELECT body FROM records WHERE id = ?", (id,))[0][0].replace(b"large", b"small")
        store.run("UPDATE records SET body = ? WHERE id = ?", (changed, id))
    assert "not as it was written" in finure(*words, "--bundle", str(place.bundle)).text
    assert not notices(place)
