"""The evidence pack: the same bytes every time, every claim can be opened, and what is not known is said"""

import dataclasses
import hashlib
import io
import json
import posixpath
import re
import zipfile
from html import unescape
from types import SimpleNamespace

import pytest
from scorecards import record, scorecard

from finure.audit.verify import Finding
from finure.bundle import fingerprint, load_scorer
from finure.contracts.examples import made_up
from finure.evidence.blocks import to_markdown
from finure.evidence.card import card
from finure.evidence.pack import pack_of
from finure.evidence.parts import REASONED, data_sheet
from finure.evidence.samples import NOBODY, samples
from finure.evidence.standards import AI_ACT, SR_26_2
from finure.evidence.version import Version
from finure.ledger import Change, Line
from finure.notices.lint import lint
from finure.notices.render import read_notice

WHY = "better <script>alert(1)</script> | or not"
CHECK = {"asked": 200, "different_answers": 0, "p99_ms": 4.25}


def line(seq, how, moved, aliases, **facts) -> Line:
    told = {"model": "finure-tiny", "by": "Bob", "account": "bob", "why": WHY, "facts": facts}
    return Line(seq, 1_700_000_000_000_000 + seq, "ab" * 32, Change(how=how, moved=moved, aliases=aliases, **told))


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> Version:
    "A promoted version with a whole record."
    place = tmp_path_factory.mktemp("version")
    bundle = scorecard(place / "bundle")
    fair = {"verdict": "measured", "warning": "smallest ratio 0.70, at least 0.8"}
    files = {path.name: path for path in record(place / "run", fairness=fair)}
    row = {"name": "finure-tiny", "version": "2", "created": "2026-03-02 10:00:00", "run_id": "x", "metrics": {},
           "tags": {"trained_by": "Ann", "data": "d1", "contract": "tiny 1", "run": "r1"}}  # fmt: skip
    lines = [
        line(1, "registered", {"challenger": (None, "2")}, {"challenger": "2"}),
        line(2, "promoted", {"champion": (None, "2"), "challenger": ("2", None)}, {"champion": "2"}, check=CHECK),
    ]
    return Version(row, bundle, fingerprint(bundle), load_scorer(bundle), files, lines, [])


def opened(content: bytes) -> dict[str, bytes]:
    "The files of a pack."
    with zipfile.ZipFile(io.BytesIO(content)) as pack:
        return {name: pack.read(name) for name in pack.namelist()}


@pytest.fixture(scope="module")
def files(version) -> dict[str, bytes]:
    return opened(pack_of(version))


def seen(page: bytes) -> str:
    "What a reader sees."
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.decode(), flags=re.DOTALL)).split())


def test_the_same_version_makes_the_same_bytes(version):
    again = dataclasses.replace(version, scorer=load_scorer(version.bundle))
    assert pack_of(version) == pack_of(again)
    other = dataclasses.replace(version, lines=version.lines[:1])
    assert pack_of(version) != pack_of(other)


def test_every_file_has_its_checksum(files):
    told = dict(reversed(row.split("  ")) for row in files["SHA256SUMS"].decode().splitlines())
    assert told.keys() == files.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(files[name]).hexdigest() == digest for name, digest in told.items())


def test_every_link_leads_to_a_file_of_the_pack(files):
    links = 0
    for name, content in files.items():
        if name.endswith(".html") and name != "validation/page.html":
            for target in re.findall(r'href="([^"]+)"', content.decode()):
                links += 1
                assert posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) in files, (name, target)
    assert links > 40


def test_a_standard_names_only_what_a_pack_can_hold(files):
    named = {file for standard in (SR_26_2, AI_ACT) for asked in standard.asked for file in asked.files}
    assert named <= files.keys()
    titles = [asked.title for asked in AI_ACT.asked]
    assert [title.partition(":")[0] for title in titles] == [f"Article {n}" for n in range(9, 16)]
    assert all(asked.files or asked.missing for standard in (SR_26_2, AI_ACT) for asked in standard.asked)


def test_the_card_says_what_is_known(files):
    told = json.loads(files["card/card.json"])
    assert (told["trained_by"], told["aliases"], told["policy"]["approve_up_to"]) == ("Ann", ["champion"], 0.08)
    assert told["never_used"]["protected"] == ["sex"] and {one["name"] for one in told["features"]} == {"use", "income"}
    page = seen(files["card/card.html"])
    assert "0.71 0.69 to 0.73" in page and "smallest ratio 0.70, at least 0.8 is asked for" in page
    assert "never promoted" not in page and "Bob" in page


def test_what_people_wrote_stays_text(files, version):
    assert b"<script>alert" not in files["ledger/ledger.html"] + files["card/card.html"]
    assert (
        "<script>alert(1)</script> | or not"
        in json.loads(files["ledger/ledger.jsonl"].splitlines()[0])["change"]["why"]
    )
    rows = [row for row in to_markdown("Card", card(version)).decode().splitlines() if "alert" in row]
    assert all(row.count("|") - row.count("\\|") == 6 for row in rows) and rows


def test_the_check_of_the_service_and_the_reasons_are_in(files):
    assert "p99_ms 4.25" in seen(files["validation/validation.html"])
    assert "just approved 0.9" in seen(files["reasons/reasons.html"]) and REASONED
    assert "Income insufficient" in seen(files["data/data_sheet.html"])


def test_letters_are_the_models_own_and_sound(files, version):
    letters = samples(version)
    assert letters and len({tuple(one.reasons) for one in letters}) == len(letters)
    for one in letters:
        notice, page = read_notice(files[f"notices/{one.name}.html"])
        assert notice.applicant == NOBODY and [reason.text for reason in notice.reasons] == one.reasons
        assert not [finding for finding in lint(notice, notice.dated, None, page) if finding.severity == "error"]
        assert json.loads(files[f"notices/{one.name}.json"]) == one.application
        assert one.application in made_up(version.scorer.contract, 400)


def test_a_model_without_credit_decisions_makes_no_letters_and_says_so(version):
    enum = {"decision": {"enum": ["allow", "review", "block"]}}
    scorer = SimpleNamespace(contract=version.scorer.contract, info={}, answer_schema=enum)
    told = opened(pack_of(dataclasses.replace(version, scorer=scorer)))
    assert [name for name in told if name.startswith("notices/")] == ["notices/notices.html"]
    assert "Not covered: the decisions of this model are no decisions on applications" in seen(
        told["notices/notices.html"]
    )


def test_a_poor_record_is_told_and_not_covered_up(version):
    bare = dataclasses.replace(version, files={}, lines=[])
    told = opened(pack_of(bare))
    page = seen(told["index.html"])
    assert "Not covered, because the version's record does not hold it: The training run's own page, Fairness." in page
    assert "The record holds no validation/page.html, validation/run.json." in page
    assert "fairness/fairness.html" not in told and "validation/page.html" not in told
    card_page = seen(told["card/card.html"])
    assert "Its record holds no result of a run" in card_page and "never promoted" in card_page
    assert "the run did not measure it" in seen(told["reasons/reasons.html"])
    assert data_sheet(bare)


def test_a_damaged_ledger_is_told(version):
    found = [Finding("changed", "registry", 2, "x", "record 2 was changed")]
    told = opened(pack_of(dataclasses.replace(version, damage=found)))
    assert "not as it was written: record 2 was changed" in seen(told["ledger/ledger.html"])
    assert json.loads(told["ledger/verification.json"])["as_written"] is False
