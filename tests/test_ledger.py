"""The ledger: no line is lost, changed or put in unseen, two writers take turns, and it alone says who decided"""

import multiprocessing

import pytest

from finure.audit.log import Head, open_store
from finure.core import Settings
from finure.ledger import (
    CHAIN,
    PROMOTED,
    ROLLED_BACK,
    Change,
    add,
    champion_before,
    check,
    disagreement,
    history,
    in_charge,
    ledger_file,
    read,
    state,
    terms,
    writing,
)  # fmt: skip


def change(version, before=None, model="finure-a", how=PROMOTED, **more) -> Change:
    "A promotion."
    after = {"champion": version} | ({"previous": before} if before else {})
    told = {"by": "Bob", "account": "bob", "why": "better", "moved": {"champion": (before, version)}, "aliases": after}
    return Change(model=model, how=how, **(told | more))


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def lines(settings) -> list:
    "Three champions of one model, and a line of another one."
    with writing(settings) as store:
        return [add(store, change("1")), add(store, change("2", "1")), add(store, change("1", model="finure-b")),
                add(store, change("3", "2", facts={"auc": 0.71}))]  # fmt: skip


def changed(settings, sql: str, *values) -> None:
    "Somebody writes into the file past the ledger."
    with open_store(f"sqlite:///{ledger_file(settings)}", create=False) as store:
        store.execute(sql, values)


def test_what_is_written_is_read(settings, lines):
    assert history(settings=settings) == lines and check(settings=settings) == []
    assert [line.seq for line in history("finure-a", settings)] == [1, 2, 4]
    assert lines[3].change.facts == {"auc": 0.71} and lines[3].hash != lines[2].hash
    assert all(after.at > before.at for before, after in zip(lines, lines[1:], strict=False))


@pytest.mark.parametrize(
    ("sql", "values", "found"),
    [
        ("UPDATE records SET body = ? WHERE seq = 2", (b'{"by": "nobody"}',), ("changed", 2)),
        ("UPDATE records SET at = at - 86400000000 WHERE seq = 2", (), ("changed", 2)),
        ("UPDATE records SET body = NULL WHERE seq = 3", (), ("changed", 3)),
        ("DELETE FROM records WHERE seq = 2", (), ("removed", 2)),
        ("DELETE FROM records WHERE seq = 4", (), ("removed", 4)),
        ("DELETE FROM records", (), ("removed", 0)),
    ],
)
def test_a_line_that_was_touched_is_named(settings, lines, sql, values, found):
    changed(settings, sql, *values)
    assert (found[0], found[1]) in [(one.what, one.seq) for one in check(settings=settings)]


def test_a_ledger_that_was_cut_with_its_end_is_found_by_who_remembers_it(settings, lines):
    end = Head(CHAIN, 4, bytes.fromhex(lines[3].hash))
    assert check([end], settings) == []
    changed(settings, "DELETE FROM records WHERE seq = 4")
    changed(settings, "UPDATE heads SET seq = 3, hash = ?", bytes.fromhex(lines[2].hash))
    assert check(settings=settings) == []  # nobody else knew of it
    assert [(one.what, one.seq) for one in check([end], settings)] == [("removed", 4)]
    ledger_file(settings).unlink()
    assert [one.what for one in check([end], settings)] == ["removed"]


def test_a_line_that_cannot_be_read_hides_no_other(settings, lines):
    changed(settings, "UPDATE records SET body = ? WHERE seq = 2", b"nonsense")
    assert [line.seq for line in history(settings=settings)] == [1, 3, 4]


def test_who_was_in_charge_is_said_by_the_ledger_alone(settings, lines):
    own = history("finure-a", settings)
    assert [term.version for term in terms(own)] == [None, "1", "2", "3"]
    at = own[1].at
    assert [term.version for term in in_charge(own, at, at + 1)] == ["2"]
    assert [term.version for term in in_charge(own, at - 1, at + 1)] == ["1", "2"]
    assert [term.version for term in in_charge(own, own[2].at + 10**12, own[2].at + 10**12 + 1)] == ["3"]
    assert [(term.version, term.line) for term in in_charge(own, 0, 1)] == [(None, None)]


def test_going_back_twice_goes_back_further(lines):
    own = [line for line in lines if line.change.model == "finure-a"]
    assert champion_before(own, "3") == "2"
    back = own[-1]._replace(change=change("2", "3", how=ROLLED_BACK))
    assert champion_before([*own, back], "2") == "1"  # not "3", which was taken away


def test_an_alias_moved_by_hand_is_told(settings, lines):
    own = history("finure-a", settings)
    assert state(own) == {"champion": "3", "previous": "2"}
    assert disagreement(own, {"champion": "3", "previous": "2"}) == {}
    assert disagreement(own, {"champion": "9"}) == {"champion": ("3", "9"), "previous": ("2", None)}
    assert disagreement([], {"champion": "1"}) == {"champion": (None, "1")}


def _write(home, name, n):
    "Another process that promotes."
    settings = Settings(home=home)
    for _ in range(n):
        with writing(settings) as store:
            before = state(read(store, "finure-a")).get("champion", "0")
            add(store, change(str(int(before) + 1), before, by=name))


def test_two_writers_take_turns(settings):
    start = multiprocessing.get_context("fork")
    both = [start.Process(target=_write, args=(settings.home, name, 15)) for name in ("Ann", "Bob")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    found = history("finure-a", settings)
    assert [line.change.aliases["champion"] for line in found] == [str(n) for n in range(1, 31)]
    assert {line.change.by for line in found} == {"Ann", "Bob"} and check(settings=settings) == []
