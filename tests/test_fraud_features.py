"""Fraud features over a whole history: against pandas, against plain recomputation, and against the future."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finure.core import FinureError, generator
from finure.fraud.features import DAY, HANDBOOK, HOUR, LARGEST, RICH, Plan, batch, describe, table

FILE = Path(os.environ.get("FINURE_DATA", "")) / "fraud_handbook_transactions.parquet"


def history(rows=4000, customers=25, terminals=40, days=70, seed=1):
    "A made-up history with ties in time, frauds, and labels that come after 7 days, earlier, later or never."
    r = generator(seed, "fraud history")
    frame = pd.DataFrame(
        {
            "event_time": np.sort(r.integers(1_522_540_800, 1_522_540_800 + days * DAY, rows)),
            "customer_id": r.integers(0, customers, rows),
            "terminal_id": r.integers(0, terminals, rows),
            "amount": np.round(r.gamma(2, 30, rows), 2),
            "fraud": (r.random(rows) < 0.06).astype(int),
        }
    )
    twins = r.integers(1, rows, rows // 20)  # same second as the row before, often the same customer too
    frame.loc[twins, "event_time"] = frame.event_time.to_numpy()[twins - 1]
    frame.loc[twins[::2], "customer_id"] = frame.customer_id.to_numpy()[twins[::2] - 1]
    frame = frame.sort_values("event_time", kind="stable", ignore_index=True)
    frame["transaction_id"] = np.arange(rows) * 3 + 5
    delay = r.choice([0, HOUR, 7 * DAY, 9 * DAY, 500 * DAY], rows, p=[0.05, 0.1, 0.6, 0.2, 0.05])
    frame["known_time"] = frame.event_time + delay
    return frame


def handbook(rows=None):
    "The handbook's transactions under this project's names."
    frame = pd.read_parquet(FILE).rename(
        columns={
            "TRANSACTION_ID": "transaction_id",
            "TX_DATETIME": "event_time",
            "CUSTOMER_ID": "customer_id",
            "TERMINAL_ID": "terminal_id",
            "TX_AMOUNT": "amount",
            "TX_FRAUD": "fraud",
        }
    )[:rows]
    return frame.assign(known_time=frame.event_time + pd.Timedelta(days=7))


def columns(frame):
    "The columns of a frame as the batch driver takes them."
    names = ("transaction_id", "event_time", "customer_id", "terminal_id", "amount", "fraud", "known_time")
    return table(*(frame[name].to_numpy() for name in names))


def rolling(frame, key, value, window):
    "Count and sum over a window, by pandas, in the order of the frame."
    time = pd.to_datetime(frame.event_time, unit="s") if frame.event_time.dtype.kind == "i" else frame.event_time
    groups = frame.assign(at=time).groupby(key).rolling(f"{window}D", on="at")[value]
    order = np.argsort(frame[key].to_numpy(), kind="stable")
    count, total = np.empty(len(frame)), np.empty(len(frame))
    count[order], total[order] = groups.count().to_numpy(), groups.sum().to_numpy()
    return count, total


def reference(frame):
    "The handbook's 15 features by plain pandas, with labels known after 7 days."
    time = pd.to_datetime(frame.event_time, unit="s") if frame.event_time.dtype.kind == "i" else frame.event_time
    found = {"amount": frame.amount, "weekend": time.dt.weekday >= 5, "night": time.dt.hour <= 6}
    for w in (1, 7, 30):
        count, total = rolling(frame, "customer_id", "amount", w)
        found |= {f"customer_count_{w}d": count, f"customer_mean_{w}d": total / count}
    delayed, frauds = rolling(frame, "terminal_id", "fraud", 7)
    for w in (1, 7, 30):
        count, total = rolling(frame, "terminal_id", "fraud", 7 + w)
        n, k = count - delayed, total - frauds
        found |= {f"terminal_count_{w}d": n, f"terminal_risk_{w}d": np.divide(k, n, out=np.zeros(len(n)), where=n > 0)}
    return {name: np.asarray(values, float) for name, values in found.items()}


def assert_handbook(frame):
    "Counts, shares and flags equal pandas exactly; means up to the rounding that pandas gathers in its running sums."
    ours, theirs = batch(columns(frame), HANDBOOK), reference(frame)
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        if "mean" in name:
            np.testing.assert_allclose(ours[name], values, rtol=1e-9, atol=1e-8, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def naive(frame, row):
    "All features of one row, from nothing but the rows and labels known at its time."
    now = frame.iloc[row]
    t = now.event_time
    past = frame.iloc[: row + 1]
    label = np.maximum(past.known_time, past.event_time + 1) <= t
    past = past.assign(cents=(past.amount * 100).round().astype(int), known=(past.fraud == 1) & label)
    x, found = round(now.amount * 100), {}
    for f in RICH:
        own = past[past[f"{f.entity}_id"] == now[f"{f.entity}_id"]] if f.entity else past
        window = own[(own.event_time > t - f.delay - f.window) & (own.event_time <= t - f.delay)]
        earlier = window[window.index != row]
        base = own[(own.event_time > t - f.base) & (own.index != row)]
        found[f.name] = measure(f, now, x, own, window, earlier, base)
    return found


def usual(cents):
    "The mean in cents, and a unit."
    return cents.mean() + 100


def in_a_row(window):
    "How many known frauds stand at the end of a window."
    return int(np.cumprod(window.known.to_numpy()[::-1]).sum())


def measure(f, now, x, own, window, earlier, base):
    "One feature in plain words."
    t, hour = now.event_time, now.event_time % DAY // HOUR
    match f.what:
        case "amount":
            return now.amount
        case "weekend":
            return float(pd.Timestamp(t, unit="s").weekday() >= 5)
        case "night":
            return float(hour <= 6)
        case "count":
            return len(window)
        case "mean":
            return window.amount.mean() if len(window) else 0
        case "risk":
            return window.known.mean() if len(window) else 0
        case "frauds":
            return window.known.sum()
        case "since":
            return min(t - earlier.event_time.max(), f.window) / HOUR if len(earlier) else f.window / HOUR
        case "since_fraud":
            last = own[own.known].event_time.max()
            return min(t - last, f.window) / HOUR if own.known.any() else f.window / HOUR
        case "run":
            return in_a_row(window)
        case "run_age":
            first = window.event_time.iloc[-n] if (n := in_a_row(window)) else t - f.delay - f.window
            return (t - first) / HOUR
        case "since_good":
            good = window.event_time[~window.known]
            return (t - (good.max() if len(good) else t - f.delay - f.window)) / HOUR
        case "visits":
            return (earlier.terminal_id == now.terminal_id).sum()
        case "deviation":
            return (x - earlier.cents.mean()) / (earlier.cents.std(ddof=0) + 100) if len(earlier) else 0
        case "times_mean":
            return (x + 100) / usual(earlier.cents) if len(earlier) else 1
        case "times_top":
            return (x + 100) / (earlier.cents.max() + 100) if len(earlier) else 1
        case "top":
            return (window.cents.max() + 100) / usual(base.cents) if len(base) else 1
        case "spent":
            return (window.cents.sum() + 100) / usual(base.cents) if len(base) else 1
        case "off_hours":
            mean = np.exp(2j * np.pi * (earlier.event_time % DAY // HOUR) / 24).sum()
            here = np.exp(2j * np.pi * hour / 24)
            return 0.5 - 0.5 * (here * np.conj(mean)).real / abs(mean) if abs(mean) > 1e-6 else 0.5
    raise AssertionError(f.what)


def assert_naive(frame, rows):
    "The batch driver's rows equal a plain recomputation from the past."
    ours = batch(columns(frame))
    for row in rows:
        expected = naive(frame, int(row))
        for name, value in expected.items():
            tolerance = 2e-3 if "off_hours" in name else 1e-6 if "deviation" in name else 1e-9
            assert ours[name][row] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, row)


def test_the_handbooks_features_equal_pandas():
    frame = history()
    assert_handbook(frame.assign(known_time=frame.event_time + 7 * DAY))


def test_every_feature_equals_a_recomputation_from_the_past():
    frame = history(seed=2)
    assert_naive(frame, generator(3, "rows").choice(len(frame), 60, replace=False))


@pytest.mark.skipif(not FILE.is_file(), reason="needs the handbook's transactions (FINURE_DATA)")
def test_real_rows_equal_a_recomputation_from_the_past():
    frame = handbook(400_000)
    frame["event_time"] = frame.event_time.to_numpy().astype("datetime64[s]").astype(np.int64)
    jitter = generator(5, "known").choice([0, DAY, 4 * DAY], len(frame))
    frame["known_time"] = frame.event_time + 7 * DAY + jitter
    assert_naive(frame, generator(4, "rows").choice(len(frame), 12, replace=False))


@pytest.mark.parametrize("row", [500, 2222, 3999])
def test_the_future_changes_nothing(row):
    frame = history(seed=6)
    changed, r = frame.copy(), generator(7, "future")
    t = frame.event_time[row]
    later = frame.index > row
    changed.loc[later, "amount"] = np.round(r.random(later.sum()) * 1000, 2)
    changed.loc[later, "customer_id"] = r.integers(0, 25, later.sum())
    unknown = np.maximum(frame.known_time, frame.event_time + 1) > t
    changed.loc[unknown, "fraud"] = 1 - changed.fraud[unknown]
    before, after = batch(columns(frame)), batch(columns(changed))
    for name, values in before.items():
        assert values[row] == after[name][row], name


def test_threads_and_ids_of_any_size_change_nothing(monkeypatch):
    monkeypatch.setattr("finure.fraud.features.BLOCK", 512)
    frame = history(seed=8)
    expected = batch(columns(frame))
    renamed = frame.assign(customer_id=frame.customer_id * 10**15 - 7, terminal_id=-frame.terminal_id)
    for other in (batch(columns(frame), threads=2), batch(columns(renamed))):
        for name, values in expected.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_the_compiled_walk_of_large_tables_changes_nothing(monkeypatch):
    frame = history(seed=9)
    expected = batch(columns(frame))
    monkeypatch.setattr("finure.fraud.features.COMPILE", 0)
    compiled = batch(columns(frame), threads=2)
    for name, values in expected.items():
        np.testing.assert_array_equal(values, compiled[name], err_msg=name)


def test_largest_amounts_stay_exact():
    n = 50
    time = np.arange(n) * HOUR
    events = table(np.arange(n), time, np.ones(n, int), np.ones(n, int), np.full(n, LARGEST / 100))
    found = batch(events)
    assert (found["customer_mean_30d"] == LARGEST / 100).all()
    assert (found["customer_deviation_30d"] == 0).all()


def test_an_empty_history_has_all_columns():
    found = batch(table(*[np.zeros(0, int)] * 5))
    assert list(found) == [f.name for f in RICH]
    assert all(len(values) == 0 for values in found.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"event_time": [5, 4]}, "event_time: the rows are not in order"),
        ({"event_time": [5, 5], "transaction_id": [2, 2]}, "event_time: the rows are not in order"),
        ({"amount": [1.0, -0.01]}, "amount: every amount"),
        ({"amount": [1.0, float("nan")]}, "amount: every amount"),
    ],
)
def test_wrong_columns_are_named(change, text):
    good = {
        "transaction_id": [1, 2],
        "event_time": [4, 5],
        "customer_id": [1, 1],
        "terminal_id": [1, 1],
        "amount": [1.0, 2],
    }
    with pytest.raises(FinureError, match=text):
        table(**{name: np.array(values) for name, values in (good | change).items()})


def test_missing_known_times_are_never_known():
    frame = history(500)
    time = frame.event_time.to_numpy().astype("datetime64[s]")
    never = np.full(len(frame), np.datetime64("NaT", "s"))
    rest = [frame[name].to_numpy() for name in ("customer_id", "terminal_id", "amount", "fraud")]
    found = batch(table(frame.transaction_id.to_numpy(), time, *rest, never))
    assert not found["terminal_risk_30d"].any()
    assert (found["customer_since_fraud"] == 37 * 24).all()


def test_every_feature_has_words():
    assert len({describe(feature) for feature in RICH}) == len(RICH)
    assert Plan().names[:15] == Plan(HANDBOOK).names
