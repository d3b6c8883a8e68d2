"Drift: a shifted column is found, an unshifted one is not, and the page needs nothing from outside."

import re

import numpy as np
import pandas as pd
import pytest

from finure.contracts.contract import parse
from finure.core import FinureError, root
from finure.drift import drift_report, frozen_bins, monitored
from finure.metrics import csi
from finure.monitor.decisions import Decided
from finure.monitor.history import Drawn, add_history, bin_names, draw_page, workspace
from finure.monitor.reference import Reference, freeze_column
from finure.monitor.rules import load_rules
from finure.monitor.watch import watch

ABOUT = {"role": "feature", "reason": "r", "null": "allowed"}
CONTRACT = parse(
    {
        "contract": "example",
        "version": "1",
        "title": "Example",
        "reasons": {"r": {"category": "OTHER", "text": "Reason"}},
        "columns": {
            "steady": {"type": "number", **ABOUT},
            "moved": {"type": "number", **ABOUT},
            "gone": {"type": "number", **ABOUT},
            "kind": {"type": "category", "levels": [1, 2, 3], **ABOUT},
            "empty": {"type": "number", **ABOUT},
        },
    }
)


def rows(seed: int, n: int = 3000, shift: float = 0.0, missing: float = 0.02) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    gone = rng.normal(0, 1, n)
    gone[rng.random(n) < missing] = np.nan
    return pd.DataFrame(
        {
            "steady": rng.lognormal(10, 1, n),
            "moved": rng.normal(shift, 1, n),
            "gone": gone,
            "kind": rng.choice([1, 2, 3], n, p=[0.5, 0.3, 0.2]),
            "empty": np.nan,
            "pd": rng.beta(2 + shift, 10, n),
            "<b>&": 1.0,
        }
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    html = tmp_path_factory.mktemp("drift") / "drift.html"
    after = rows(2, shift=0.8, missing=0.4)
    return drift_report(rows(1), after, CONTRACT, html, others=["pd"], rows=1000, pictures=3, title="A <b> & a")


def test_what_moved_is_found_and_what_did_not_is_not(found):
    verdicts = found.table["verdict"]
    assert verdicts[["moved", "gone", "pd"]].tolist() == ["shift", "shift", "shift"]
    assert verdicts[["steady", "kind", "empty"]].tolist() == ["stable"] * 3
    assert (found.table.loc[["steady", "kind"], "p_value"] > 0.001).all()
    assert "<b>&" not in found.table.index


def test_evidently_agrees_with_our_figures(found):
    theirs = {m["column"]: m for m in found.evidently if m["metric"] == "ValueDrift"}
    assert list(theirs) == found.table.index[:3].tolist()
    for name, metric in theirs.items():
        assert (metric["method"], metric["threshold"]) == ("psi", 0.1)
        assert metric["value"] == pytest.approx(found.table.loc[name, "psi"], rel=0.35)
    counts = [m["value"]["count"] for m in found.evidently if m["metric"] == "DriftedColumnsCount"]
    assert counts == [3, 3]


def test_the_page_is_small_offline_and_says_what_it_shows(found):
    page = found.html.read_text()
    assert len(page.encode()) < 5_000_000
    assert "default-src 'none'" in page[:600]
    assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", page[: page.index("<body>")])
    assert "1,000 of 3,000 training rows and 1,000 of 3,000 current rows" in page
    assert "A &lt;b&gt; &amp; a" in page
    assert "the 3 of 6 columns that moved most" in page


def test_the_same_seed_gives_the_same_figures(found, tmp_path):
    after = rows(2, shift=0.8, missing=0.4)
    shared = {"others": ["pd"], "rows": 1000, "pictures": 3, "bins": frozen_bins(monitored(rows(1), CONTRACT, ["pd"]))}
    again = drift_report(rows(1), after, CONTRACT, tmp_path / "again.html", **shared)
    other = drift_report(rows(1), after, CONTRACT, tmp_path / "other.html", seed=1, **shared)
    kept = [(d.html.with_suffix(".json")).read_text() for d in (found, again, other)]
    assert kept[0] == kept[1] != kept[2]


def test_frozen_bins_are_those_of_the_training_rows():
    bins = frozen_bins(monitored(rows(1), CONTRACT))
    assert csi(bins, monitored(rows(1), CONTRACT))["psi"].max() == 0
    assert bins["kind"].kind == "category"
    with pytest.raises(FinureError, match="None of the features of the contract `example`"):
        monitored(rows(1)[["pd"]], CONTRACT)


def watched(shift: float, days: int):
    "Decisions from the first of March on, watched, and what Evidently draws of them."
    before, after = rows(1), rows(2, shift=shift)
    frozen = {name: freeze_column(before[name], None) for name in ("steady", "moved", "gone")}
    reference = Reference(
        run="r", model="finure-made:1", contract="c", rows=len(before), risk=freeze_column(before["pd"], None),
        features=frozen, decisions={}, reasons={}, figures={}, groups={},
    )  # fmt: skip
    time = pd.date_range("2024-03-01", periods=len(after), freq="1h")[: 24 * days]
    frame = after.head(len(time)).rename(columns={"pd": "risk"}).assign(time=time, decision="approve", reason=None)
    decided, rules = Decided(frame, list(frozen), None, "made"), load_rules(root() / "params" / "monitor.yaml", "c")
    every = frozen | {"estimated risk": reference.risk}
    sample = bin_names(before.rename(columns={"pd": "estimated risk"}), every, 0, "reference")
    return decided, watch(reference, decided, rules), Drawn(every, sample, 0)


def test_the_workspace_has_every_period_once_and_the_page_fits_in_a_mail(tmp_path):
    decided, found, drawn = watched(0.8, 40)
    assert add_history(decided, found, drawn, "finure-made", "month", tmp_path) == ["2024-03", "2024-04"]
    assert add_history(decided, found, drawn, "finure-made", "month", tmp_path) == []
    decided, found, drawn = watched(0.8, 50)
    assert add_history(decided, found, drawn, "finure-made", "month", tmp_path) == ["2024-04"]  # more came since
    (project,) = workspace(tmp_path).list_projects()
    runs = [workspace(tmp_path).get_run(project.id, id) for id in workspace(tmp_path).list_runs(project.id)]
    assert (project.name, sorted(run.name for run in runs)) == ("finure-made", ["2024-03", "2024-04"])
    assert {f"{run.timestamp:%Y-%m-%d}" for run in runs} == {"2024-03-31", "2024-04-30"}
    assert len(project.dashboard.model().panels) == 3
    words = draw_page(decided, found, drawn, tmp_path / "drift.html")
    page = (tmp_path / "drift.html").read_text()
    assert (
        len(page.encode()) < 5_000_000 and words in page.replace("&#x27;", "'") and "default-src 'none'" in page[:600]
    )
