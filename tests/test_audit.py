"""The decision log: tables, hashes, reading, and what verify finds when somebody meddles with the database"""

import json
import sqlite3
import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from finure.audit.log import (
    COLUMNS,
    FIRST_PREV,
    Head,
    LogFailedError,
    Record,
    body_hash,
    find_record,
    now,
    open_store,
    read_between,
    read_heads,
    read_records,
    record_hash,
)
from finure.audit.verify import read_anchors, verify, write_anchors
from finure.audit.writer import Chain, DecisionLog, Entry, link
from finure.core import FinureError


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/state/decisions.db"


@pytest.fixture
def store(url):
    with open_store(url) as store:
        yield store


def written(url, *groups):
    "One chain for each group of ids; their names."
    names = []
    for group in groups:
        with open_store(url) as store:
            chain = Chain(store)
            chain.write([Entry("decision", id, 1000 * i, b"body of " + id.encode()) for i, id in enumerate(group)])
            names.append(chain.head.chain)
    return names


def found(store, anchors=()):
    return [(f.what, f.chain, f.seq, f.id) for f in verify(store, anchors)]


def rehash(store, chain, seq):
    "What a forger does: all hashes of a chain anew from a record on."
    rows = [r for r in read_records(store) if r.chain == chain]
    prev = rows[seq - 2].hash
    for r in rows[seq - 1 :]:
        digest = body_hash(r.body)
        new = record_hash(prev, chain, r.seq, r.at, r.kind, r.id, digest)
        place = (prev, digest, new, chain, r.seq)
        store.run("UPDATE records SET prev = ?, body_hash = ?, hash = ? WHERE chain = ? AND seq = ?", place)
        prev = new
    return prev


def test_record_hash_reads_in_one_way_only():
    digest = body_hash(b"")
    one = record_hash(FIRST_PREV, "c", 1, 23, "kind", "id", digest)
    assert one != record_hash(FIRST_PREV, "c", 12, 3, "kind", "id", digest)
    assert one != record_hash(FIRST_PREV, "c", 1, 23, "kin", "did", digest)
    assert one != record_hash(FIRST_PREV, "c", 1, 23, "kind", "id\n", digest)


def test_file_is_private_and_synced(url, tmp_path):
    with open_store(url) as store:
        assert store.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.execute("PRAGMA synchronous").fetchone() == (2,)
        Chain(store)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert modes == {"decisions.db": 0o600, "decisions.db-wal": 0o600, "decisions.db-shm": 0o600}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://host/db", "mysql:// is not known"),
        ("decisions.db", "FINURE_DATABASE_URL"),
        ("sqlite:////proc/nothing/decisions.db", "cannot be opened"),
        ("postgresql://u:secret@127.0.0.1:1/db", "cannot be opened"),
    ],
)
def test_bad_address(url, why):
    with pytest.raises(FinureError, match=why) as error:
        open_store(url)
    assert "secret" not in str(error.value)


def test_no_log_is_not_made_by_reading(tmp_path):
    with pytest.raises(LogFailedError, match="There is no decision log"):
        open_store(f"sqlite:///{tmp_path}/none.db", create=False)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(LogFailedError, match="no such table"):
        open_store(f"sqlite:///{tmp_path}/other.db", create=False)
    assert not (tmp_path / "none.db").exists()


def test_many_open_at_once(url):
    "Tables are made once, whoever comes first."
    errors = []

    def start():
        try:
            open_store(url).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_insert_of_many_rows(store):
    rows = [(f"k{i}", b"h", f"i{i}") for i in range(700)]
    into = "idempotency (key, request_hash, id)"
    assert store.insert(into, rows) == 700
    assert store.insert(into, [*rows[:3], ("new", b"h", "i")], "ON CONFLICT (key) DO NOTHING") == 1
    assert store.insert(into, []) == 0


def test_transaction_is_all_or_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.insert("idempotency (key, request_hash, id)", [("k", b"h", "i")])
        raise ZeroDivisionError
    assert store.rows("SELECT * FROM idempotency") == []


def test_run_says_why(store):
    with pytest.raises(LogFailedError, match="no such table: nowhere"):
        store.run("SELECT 1 FROM nowhere")


def test_reading(url, store):
    one, two = written(url, "abc", "de")
    ids = [r.id for r in read_records(store, page=2)]
    assert sorted(ids) == sorted([one, two, *"abcde"])
    assert [(r.chain, r.seq) for r in read_records(store)] == sorted((r.chain, r.seq) for r in read_records(store))
    assert [r.id for r in read_between(store, 0, 2000, page=1)] == [r.id for r in read_between(store, 0, 2000)]
    assert sorted(r.id for r in read_between(store, 0, 2000)) == list("abde")
    assert find_record(store, "b").body == b"body of b"
    assert find_record(store, "none") is None
    assert {name: head.seq for name, head in read_heads(store).items()} == {one: 4, two: 3}


def test_chain_links(url, store):
    written(url, "abc")
    records = list(read_records(store))
    assert records[0].prev == FIRST_PREV
    assert all(b.prev == a.hash and b.seq == a.seq + 1 for a, b in pairwise(records))


def test_start_records_take_note_of_each_head_once(url, store):
    one, two, three = written(url, "ab", "c", "d")
    told = {r.chain: json.loads(r.body)["heads"] for r in read_records(store) if r.kind == "start"}
    heads = read_heads(store)
    assert told[one] == {}
    assert told[two] == {one: [3, heads[one].hash.hex()]}
    assert told[three] == {two: [2, heads[two].hash.hex()]}


def test_serving_modules_are_light():
    heavy = ["pandas", "sqlalchemy", "psycopg", "mlflow", "sklearn", "xgboost", "IPython", "fastcore"]
    code = f"import sys, finure.audit.writer; assert not [m for m in {heavy} if m in sys.modules], sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_untouched_log_is_good(url, store):
    written(url, "abc", "def", "g")
    assert verify(store) == []
    assert verify(store, read_heads(store).values()) == []


@pytest.mark.parametrize(
    "change",
    ["body = x'00'", "at = at + 1", "kind = 'other'", "id = 'z'", "prev = x'00'", "body_hash = x'00'", "hash = x'00'"],
)
@pytest.mark.parametrize("seq", [1, 3, 5])
def test_changed_record(url, store, change, seq):
    written(url, "uv")
    chain = written(url, "abcd")[0]
    store.run(f"UPDATE records SET {change} WHERE chain = ? AND seq = ?", (chain, seq))
    said = found(store)
    assert ("changed", chain, seq) in [f[:3] for f in said]
    assert {f[:3] for f in said} == {("changed", chain, seq)}


@pytest.mark.parametrize("seq", [2, 4, 5])
def test_changed_record_with_its_own_hash_made_anew(url, store, seq):
    (chain,) = written(url, "abcd")
    r = next(r for r in read_records(store) if r.seq == seq)
    digest = body_hash(b"forged")
    new = record_hash(r.prev, chain, seq, r.at, r.kind, r.id, digest)
    store.run("UPDATE records SET body = ?, body_hash = ?, hash = ? WHERE seq = ?", (b"forged", digest, new, seq))
    assert [f[:3] for f in found(store)] == [("changed", chain, seq)]


@pytest.mark.parametrize(("gone", "said"), [([3], 3), ([3, 4], 3), ([1], 1), ([5], 5), ([4, 5], 4)])
def test_removed_records(url, store, gone, said):
    (chain,) = written(url, "abcd")
    store.run(f"DELETE FROM records WHERE seq IN ({', '.join(map(str, gone))})")
    assert found(store) == [("removed", chain, said, "")]


def test_removed_record_and_the_rest_renumbered(url, store):
    (chain,) = written(url, "abcdef")
    store.run("DELETE FROM records WHERE seq = 3")
    for seq in range(4, 8):
        store.run("UPDATE records SET seq = seq - 1 WHERE seq = ?", (seq,))
    assert found(store) == [("removed", chain, 3, "")]


def forged(store, chain, seq):
    "A record that follows another by the book."
    before = next(r for r in read_records(store) if (r.chain, r.seq) == (chain, seq - 1))
    return link(chain, seq - 1, before.hash, [Entry("decision", "forged", now(), b"forged")])[0]


def test_inserted_record(url, store):
    (chain,) = written(url, "abcdef")
    for seq in range(7, 2, -1):
        store.run("UPDATE records SET seq = seq + 1 WHERE seq = ?", (seq,))
    store.append([forged(store, chain, 3)])
    assert found(store) == [("inserted", chain, 3, "forged")]
    store.run("UPDATE heads SET seq = seq + 1")
    assert ("inserted", chain, 3, "forged") in found(store)


def test_inserted_at_the_end(url, store):
    (chain,) = written(url, "ab")
    store.append([forged(store, chain, 4)])
    assert found(store) == [("inserted", chain, 4, "forged")]


def test_inserted_chain(url, store):
    written(url, "ab")
    store.append(link("forged", 0, FIRST_PREV, [Entry("decision", "x", now(), b"x")]))
    assert found(store) == [("inserted", "forged", 0, "")]


def test_cut_tail_is_missed_by_the_head_and_by_later_chains(url, store):
    one, _ = written(url, "abcd", "e")
    store.run("DELETE FROM records WHERE chain = ? AND seq > 3", (one,))
    assert found(store) == [("removed", one, 4, "")]
    third = next(r for r in read_records(store) if (r.chain, r.seq) == (one, 3))
    store.run("UPDATE heads SET seq = 3, hash = ? WHERE chain = ?", (third.hash, one))
    assert found(store) == [("removed", one, 4, "")]


def test_removed_chain_is_missed_by_the_heads_and_by_later_chains(url, store):
    one, _ = written(url, "abcd", "e")
    store.run("DELETE FROM records WHERE chain = ?", (one,))
    assert found(store) == [("removed", one, 0, "")]
    store.run("DELETE FROM heads WHERE chain = ?", (one,))
    assert found(store) == [("removed", one, 0, "")]


def test_rewritten_chain_is_found_by_heads_then_later_chains_then_anchors(url, store):
    one, two = written(url, "abcd", "ef")
    kept = read_anchors(write_anchors(read_heads(store).values()))
    store.run("UPDATE records SET body = ? WHERE id = 'b'", (b"forged",))
    head = rehash(store, one, 3)
    assert [f[:3] for f in found(store)] == [("changed", one, 5)]
    store.run("UPDATE heads SET hash = ? WHERE chain = ?", (head, one))
    assert found(store) == [("changed", one, 5, "d")]
    start = {"finure": "", "heads": {one: [5, head.hex()]}}
    store.run("UPDATE records SET body = ? WHERE chain = ? AND seq = 1", (json.dumps(start).encode(), two))
    place = next(r for r in read_records(store) if (r.chain, r.seq) == (two, 1))
    first = record_hash(FIRST_PREV, two, 1, place.at, "start", place.id, body_hash(place.body))
    place = (body_hash(place.body), first, two)
    store.run("UPDATE records SET body_hash = ?, hash = ? WHERE chain = ? AND seq = 1", place)
    store.run("UPDATE heads SET hash = ? WHERE chain = ?", (rehash(store, two, 2), two))
    assert found(store) == []
    assert {f[:2] for f in found(store, kept)} == {("changed", one), ("changed", two)}


def test_anchor_of_a_chain_that_is_gone(url, store):
    written(url, "a")
    assert found(store, [Head("other", 3, b"x" * 32)]) == [("removed", "other", 0, "")]


def test_purged_body_needs_a_purge_record(url, store):
    one, two = written(url, "abcd", "e")
    store.run("UPDATE records SET body = NULL WHERE id IN ('a', 'b', 'd')")
    assert found(store) == [("changed", one, 2, "a"), ("changed", one, 3, ""), ("changed", one, 5, "d")]
    chain = Chain(store)
    chain.write([Entry("purge", "p", now(), json.dumps({"purged": {one: [[2, 3]]}}).encode())])
    assert found(store) == [("changed", one, 5, "d")]
    chain.write([Entry("purge", "q", now(), json.dumps({"purged": {one: [[5, 5]], two: []}}).encode())])
    assert found(store) == []


def test_several_forgeries_are_all_named(url, store):
    one, two = written(url, "abcdefgh", "ijkl")
    store.run("UPDATE records SET body = x'00' WHERE id IN ('b', 'c')")
    store.run("DELETE FROM records WHERE id = 'f'")
    store.run("UPDATE records SET at = 7 WHERE id = 'k'")
    said = [(f[0], f[1], f[2]) for f in found(store)]
    assert said == [("changed", one, 3), ("changed", one, 4), ("removed", one, 7), ("changed", two, 4)]


def test_verify_while_records_are_written(url, store):
    log = DecisionLog(url)
    done = threading.Event()

    def write():
        i = 0
        while not done.is_set():
            log.append(Entry("decision", f"w{(i := i + 1)}", now(), b"x"))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(5):
            assert verify(store) == []
    finally:
        done.set()
        thread.join()
        log.close()


def test_progress(url, store):
    chain = Chain(store)
    for i in range(5):
        chain.write([Entry("decision", f"{i}-{j}", 0, b"") for j in range(5000)])
    seen = []
    verify(store, progress=seen.append)
    assert seen == [10_000, 20_000, 25_001]


@pytest.mark.parametrize("text", ["", "[]", '{"c": 1}', '{"c": [1, "xy"]}', "null"])
def test_anchors_that_are_none(text):
    if text == "[]":
        text = "[1]"
    with pytest.raises(FinureError, match="no anchors"):
        read_anchors(text)


def test_record_columns():
    assert COLUMNS.split(", ") == list(Record._fields)
