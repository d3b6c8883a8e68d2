"""Fraud features: the batch driver beside pandas, events a second online, a replay of every row (make bench-fraud)"""

import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from test_fraud_features import FILE, columns, handbook, reference
from test_fraud_online import events, steps

from finure.fraud.features import HANDBOOK, RICH, batch
from finure.fraud.online import Online
from finure.fraud.stores import LocalStore

WINDOWED = HANDBOOK[3:]


def timed(job, times=1):
    "The result of a job and the seconds of its fastest run."
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = job()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def conditions():
    "What else the figures depend on; a free core of this kind does this in about 0.04 s."
    loop = timed(lambda: [None for i in range(1_000_000) if i * 2 < 0], 5)[1]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{versions}, {os.cpu_count()} cores, load {load}, calibration {loop:.3f} s")


def memory():
    "The most memory this process has had, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def windows(rows, value, delay, lengths):
    "Count and sum of one entity's values over windows of days that end `delay` days ago, by pandas."
    spans = rows[value].rolling
    late = (spans(f"{delay}D").count(), spans(f"{delay}D").sum()) if delay else (0, 0)
    return {w: (spans(f"{delay + w}D").count() - late[0], spans(f"{delay + w}D").sum() - late[1]) for w in lengths}


def one_at_a_time(frame):
    "The windowed features by pandas, a customer and a terminal at a time, as the Handbook goes about it."
    found = {}
    for entity, value, delay in (("customer", "amount", 0), ("terminal", "fraud", 7)):
        parts = []
        for _, rows in frame.groupby(f"{entity}_id"):
            of = windows(rows.set_index("event_time"), value, delay, (1, 7, 30))
            columns = {f"{entity}_count_{w}d": n.to_numpy() for w, (n, _) in of.items()}
            name = "mean" if entity == "customer" else "risk"
            columns |= {f"{entity}_{name}_{w}d": (total / n).fillna(0).to_numpy() for w, (n, total) in of.items()}
            parts.append(pd.DataFrame(columns, index=rows.index))
        found |= {name: column.to_numpy() for name, column in pd.concat(parts).sort_index().items()}
    return found


def bench_batch(frame, table):
    "The 12 windowed features by both, and the rich set."
    before = memory()
    first = timed(lambda: batch(table, WINDOWED, threads=2))[1]
    ours, seconds = timed(lambda: batch(table, WINDOWED, threads=2), 7)
    print(
        f"batch, 12 windowed features, {len(table.time):,} rows: {seconds:.2f} s; first call {first:.2f} s (compiler)"
    )
    print(f"memory before and after: {before:.0f} and {memory():.0f} MB")
    for way, job in (("one groupby().rolling() a window", reference), ("an entity at a time", one_at_a_time)):
        theirs, slow = timed(lambda job=job: job(frame))
        equal = all(np.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-8) for name in ours)
        print(f"pandas, {way}: {slow:.1f} s, {slow / seconds:.0f} times as long; equal: {equal}")
    del ours, theirs
    rich, seconds = timed(lambda: batch(table, RICH, threads=2))
    print(f"batch, all {len(RICH)} features: {seconds:.2f} s; memory {memory():.0f} MB")
    return rich


def bench_replay(table, rich):
    "Every row, one at a time."
    expected, place, different, online = list(rich.values()), 0, 0, Online()
    todo, block = steps(table), []
    start, cpu = time.perf_counter(), time.process_time()
    for _, is_event, key, what in todo:
        if not is_event:
            online.feedback(key, True, what)
            continue
        block.append(online.observe(what))
        if len(block) == 50_000 or place + len(block) == len(table.time):
            rows = np.array(block).T
            different += sum((r != e[place : place + len(block)]).sum() for r, e in zip(rows, expected, strict=True))
            place, block = place + len(block), []
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    n = len(table.time)
    print(f"replay of {n:,} rows: {n / wall:,.0f} events/s, {n / cpu:,.0f} a second of CPU; {different} values differ")
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        store.online = online
        _, seconds = timed(store.snapshot)
        size = (Path(folder) / "snapshot").stat().st_size / 2**20
        store.close()
        _, again = timed(lambda: LocalStore(folder).close())
    print(f"snapshot: {size:.0f} MB written in {seconds:.2f} s, read in {again:.2f} s; memory {memory():.0f} MB")


def bench_online(table):
    "Events a second with a warm state, without and with the journal (a sync every 50 events)."
    with tempfile.TemporaryDirectory() as folder:
        for name, store in (("in memory", Online()), ("with journal", LocalStore(folder))):
            rates, todo = [], events(table)[:60_000]
            for first in range(0, len(todo), 5_000):
                start = time.perf_counter()
                for i, event in enumerate(todo[first : first + 5_000]):
                    store.observe(event)
                    if name == "with journal" and i % 50 == 49:
                        store.sync()
                rates.append(5_000 / (time.perf_counter() - start))
            print(
                f"online, {len(RICH)} features, {name}: median {np.median(rates):,.0f} events/s, best {max(rates):,.0f}"
            )


if __name__ == "__main__":
    if not FILE.is_file():
        sys.exit("FINURE_DATA must name the folder that holds fraud_handbook_transactions.parquet.")
    frame = handbook()
    table = columns(frame)
    conditions()
    bench_online(table)
    rich = bench_batch(frame, table)
    bench_replay(table, rich)
    conditions()
