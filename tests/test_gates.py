"""Gates: every limit has its figure, and a missed one is named with its distance"""

from pathlib import Path

import pytest

from finure.core import FinureError, GateError
from finure.gates import check_gates, demand, limits

FILE = Path(__file__).parents[1] / "params" / "gates.yaml"


def test_a_portfolio_without_a_section_has_the_defaults():
    assert limits(FILE, "of-our-own") == limits(FILE, "default")
    assert limits(FILE, "lendingclub") != limits(FILE, "default")


def test_a_portfolio_may_take_a_default_away(tmp_path):
    (tmp_path / "gates.yaml").write_text("default: {min_auc: 0.6, max_psi: 0.25}\ncards: {max_psi: null}\n")
    assert limits(tmp_path / "gates.yaml", "cards") == {"min_auc": 0.6}


@pytest.mark.parametrize(("value", "passed"), [(0.69999, False), (0.7, True), (0.71, True)])
def test_a_minimum_is_inclusive(value, passed):
    assert check_gates({"auc": value}, {"min_auc": 0.7})[0]["passed"] is passed


def test_not_a_number_passes_nothing():
    checks = check_gates({"auc": float("nan"), "ece": float("nan")}, {"min_auc": 0.1, "max_ece": 1})
    assert not any(check["passed"] for check in checks)


def test_every_missed_gate_is_named():
    checks = check_gates({"auc": 0.6, "ece": 0.05, "psi": 0.0}, {"min_auc": 0.7, "max_ece": 0.02, "max_psi": 0.25})
    with pytest.raises(GateError, match=r"2 of 3 gates not passed: auc 0.6.*0.1 away.*ece 0.05.*0.03 away") as raised:
        demand(checks)
    assert raised.value.exit_code == 2


def test_a_limit_that_is_none_is_refused(tmp_path):
    for text in ("min_auc: high", "auc: 0.7", "max_ece: true"):
        (tmp_path / "gates.yaml").write_text(f"default: {{{text}}}\n")
        with pytest.raises(FinureError, match="is not a limit"):
            limits(tmp_path / "gates.yaml", "x")
