"""Settings, safe writes, YAML and seeds"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from finure.core import (
    FinureError,
    GateError,
    Settings,
    atomic_path,
    find_root,
    generator,
    read_yaml,
    root,
    sha256_file,
    telemetry_off,
    write_atomic,
)

# Settings


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FINURE_HOME", str(tmp_path))
    monkeypatch.setenv("FINURE_PORT", "4000")
    monkeypatch.setenv("FINURE_DATA", "http://data.example/credit")
    settings = Settings()
    assert (settings.home_dir(), settings.port, settings.data) == (tmp_path, 4000, "http://data.example/credit")
    assert settings.tracking() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("FINURE_TRACKING_URI", "http://mlflow.example")
    assert Settings().tracking() == "http://mlflow.example"


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    for name in ("DATA", "HOME", "PORT", "BUNDLE", "TRACKING_URI"):
        monkeypatch.setenv(f"FINURE_{name}", "")
    settings = Settings()
    assert (settings.data, settings.home, settings.bundle, settings.tracking_uri, settings.port) == (None,) * 4 + (
        3000,
    )


def test_a_wrong_setting_is_named(monkeypatch):
    monkeypatch.setenv("FINURE_PORT", "many")
    with pytest.raises(FinureError, match="FINURE_PORT is 'many'"):
        Settings()


def test_the_state_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FINURE_HOME", raising=False)
    assert Settings().home_dir() == root() / "runs"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert find_root() is None
    assert Settings().home_dir() == tmp_path / "share" / "finure"


def test_the_root_is_found_from_below(monkeypatch):
    here = root()
    monkeypatch.chdir(here / "notebooks" / "credit")
    assert find_root() == root() == here


def test_exit_codes():
    assert (FinureError.exit_code, GateError.exit_code) == (1, 2)
    assert issubclass(GateError, FinureError)


def test_telemetry_is_off(monkeypatch):
    for name in ("MLFLOW_DISABLE_TELEMETRY", "BENTOML_DO_NOT_TRACK", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")
    telemetry_off()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["BENTOML_DO_NOT_TRACK"] == "True"


def test_the_core_is_light():
    code = "import sys, finure.core; print(*{'pandas', 'sklearn', 'mlflow', 'fastcore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Writing


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "deep" / "page.html"
    write_atomic(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text(encoding="utf-8") == "größe"
    assert os.listdir(path.parent) == ["page.html"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


WRITER = """
import itertools, sys
from finure.core import write_atomic
for i in itertools.count():
    write_atomic(sys.argv[1], f"{i % 10}" * 2_000_000)
    if i == 0: print("started", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05])
def test_a_killed_writer_leaves_a_whole_file(delay, tmp_path):
    path = tmp_path / "state.txt"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    time.sleep(delay)
    for _ in range(5):
        content = path.read_bytes()
        assert content == content[:1] * 2_000_000
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    content = path.read_bytes()
    assert content == content[:1] * 2_000_000
    assert all(name == "state.txt" or name.startswith(".state.txt.") for name in os.listdir(tmp_path))


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf")


# YAML


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: [1,\n", "line 3"),
        ("a: 1\na: 2\n", "line 2: not valid YAML: `a` is given twice"),
        ("x: {b: 1, b: 2}", "`b` is given twice"),
        ("a: 2011-02-30", "day is out of range"),
        ("- a", "expected a mapping"),
        ("", "expected a mapping"),
        ("a:\n\t- b", "line 2"),
        (b"\xff\xfe", "not valid YAML"),
        ("a: *x", "undefined alias"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine"),
    ],
)
def test_bad_yaml_is_named_with_its_reason(text, why, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FinureError, match=why) as error:
        read_yaml(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)


def test_absent_yaml(tmp_path):
    with pytest.raises(FinureError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(FinureError, match="cannot be read"):
        read_yaml(tmp_path)


def test_good_yaml_may_merge_and_repeat_a_key_at_another_place(tmp_path):
    (tmp_path / "good.yaml").write_text("base: &b {a: 1, c: 2}\nx: {<<: *b, a: 3}\ny: {a: 4}\n1: one\n'1': also one\n")
    content = read_yaml(tmp_path / "good.yaml")
    assert (content["x"], content["y"], content[1], content["1"]) == ({"a": 3, "c": 2}, {"a": 4}, "one", "also one")


# Seeds

SPLIT_0 = [182713, 49150, 673425]  # fixed: other numbers would be another split of every portfolio


def test_generators_repeat_and_are_independent():
    draws = {
        names: generator(*names).random(2000) for names in [(1,), (2,), (1, "a"), (1, "b"), (1, "a", "b"), (1, "ab")]
    }
    for names, numbers in draws.items():
        np.testing.assert_array_equal(numbers, generator(*names).random(2000))
    correlation = np.corrcoef(list(draws.values())) - np.eye(len(draws))
    assert abs(correlation).max() < 0.1


def test_the_same_numbers_on_every_machine():
    assert generator(0, "split").integers(0, 10**6, 3).tolist() == SPLIT_0
    code = "from finure.core import generator; print(generator(0, 'split').integers(0, 10**6, 3).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(SPLIT_0)
