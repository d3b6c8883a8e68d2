"""The recipe of an image holds what it should and nothing else, and the bill of materials can be read"""

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from finure.core import TELEMETRY_OFF, FinureError, root
from finure.serve import image
from finure.serve.image import BUILDERS, bill, containerize, find_builder, linux_requirements
from finure.serve.pack import bento_folder, pack, serving_requirements

DPKG = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u14
Description: GNU C Library
 Version: not a field

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
PYTHON = [
    {"name": "msgspec", "version": "0.22.0", "expression": "BSD-3-Clause", "licences": ["BSD License"]},
    {"name": "Jinja2", "version": "3.1.6", "expression": None, "licences": ["BSD License"]},
]
CONTENTS = {"python": PYTHON, "system": ["debian", "12"], "dpkg": DPKG}


@pytest.fixture(scope="module")
def tag(tmp_path_factory) -> str:
    "A bento packed with a bundle that nobody serves."
    folder, patch = tmp_path_factory.mktemp("image"), pytest.MonkeyPatch()
    (folder / "bundle").mkdir()
    (folder / "bundle" / "model.json").write_text('{"scorer": "finure.nothing:load"}')
    patch.setenv("FINURE_HOME", str(folder / "home"))
    yield pack(folder / "bundle", "credit", "finure-test", "7", root())
    patch.undo()


@pytest.fixture(scope="module")
def recipe(tag) -> str:
    "The Dockerfile that BentoML made."
    return (bento_folder(tag) / "env" / "docker" / "Dockerfile").read_text()


def test_what_is_asked_of_an_image_can_be_answered():
    asked = subprocess.run([sys.executable, "-c", image.CONTENTS], capture_output=True, text=True, check=True)
    found = {package["name"]: package for package in json.loads(asked.stdout)["python"]}
    assert found["msgspec"]["expression"] or found["msgspec"]["licences"]


@pytest.fixture
def builders(tmp_path, monkeypatch) -> Path:
    "A path on which nothing is but what a test puts there."
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def client(folder: Path, name: str, code: int) -> None:
    "A builder's client that ends with a code."
    (folder / name).write_text(f"#!/bin/sh\nexit {code}\n")
    (folder / name).chmod(0o755)


def final(recipe: str) -> str:
    "The stage that becomes the image."
    return recipe.split("\nFROM ")[-1]


def test_the_image_runs_as_a_user_of_its_own(recipe):
    assert re.findall(r"(?m)^USER (.+)$", final(recipe)) == ["10001:10001"]
    assert "--uid 10001" in recipe and "-o finure -g finure /var/lib/finure" in recipe


def test_the_image_holds_no_compiler_and_no_installer(recipe):
    assert recipe.count("\nFROM ") == 2
    assert not re.search(r"apt-get|build-essential|\bgit\b|\bgcc\b|\buv\b|curl|wget", recipe)
    assert " install " not in final(recipe).replace("install -d", "")
    assert "--no-cache-dir" in recipe and "--require-hashes" in recipe and "--only-binary :all:" in recipe


def test_the_image_takes_from_the_bento_only_what_serving_needs(recipe):
    assert re.findall(r"(?m)^(?:COPY|ADD) (?!--from)(\S+)", recipe) == ["env/python/", "bento.yaml", "apis/", "src/"]
    assert re.findall(r"(?m)^(?:COPY|ADD) (.+)$", final(recipe)) == [
        "--from=packages /app /app", "--from=packages /srv/bento /srv/bento",
    ]  # fmt: skip


def test_the_image_says_how_it_runs(recipe):
    assert 'CMD ["bentoml", "serve", "/srv/bento", "--host", "0.0.0.0", "--port", "3000"]' in recipe
    assert "/readyz" in recipe[recipe.index("HEALTHCHECK") :] and "\nEXPOSE 3000\n" in recipe
    assert "\nVOLUME /var/lib/finure\n" in recipe and "FINURE_HOME=/var/lib/finure " in recipe
    assert "ORT_DISABLE_TELEMETRY=1" in recipe
    serving = {name: value for name, value in TELEMETRY_OFF.items() if not name.startswith("MLFLOW")}
    assert all(f"{name}={value}" in recipe for name, value in serving.items())


def test_the_recipe_names_no_index_and_no_machine(recipe):
    assert set(re.findall(r"\w+://[^/\s:]+", recipe)) == {"http://127.0.0.1"}
    assert str(root()) not in recipe and str(Path.home()) + "/" not in recipe


def test_the_command_in_the_image_is_the_packages(recipe):
    entry = tomllib.loads((root() / "pyproject.toml").read_text())["project"]["scripts"]["finure"]
    assert "from {} import {}".format(*entry.split(":")) in recipe


def test_requirements_of_an_image_are_those_of_linux():
    pinned = linux_requirements(serving_requirements(root()), "3.11")
    names = Counter(re.findall(r"(?m)^([a-z0-9._-]+)==\S+ \\$", pinned))
    assert {"numpy", "uvloop", "async-timeout"} <= set(names) and max(names.values()) == 1
    assert "colorama" not in names and ";" not in pinned
    assert "async-timeout" not in linux_requirements(serving_requirements(root()), "3.12")


def test_a_builder_is_one_that_answers(builders):
    assert find_builder() is None
    client(builders, "docker", 1)
    assert find_builder() is None
    client(builders, "buildah", 0)
    assert find_builder() == "buildah"


def test_without_a_builder_the_recipe_is_named(tag, builders):
    for name in BUILDERS:
        client(builders, name, 1)
    with pytest.raises(FinureError, match="No image was built") as error:
        containerize(tag)
    named = re.search(r"Dockerfile (\S+Dockerfile)", str(error.value))[1]
    assert Path(named).is_file()


def test_the_bill_can_be_read(tag):
    told = bill(tag, CONTENTS, {"msgspec": "ab" * 32})
    text = json.dumps(told)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert str(root()) not in text
    by_name = {component["name"]: component for component in told["components"]}
    assert set(by_name) == {"finure-test", "finure", "msgspec", "jinja2", "libc6"}
    assert by_name["msgspec"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert by_name["msgspec"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert by_name["jinja2"]["licenses"] == [{"license": {"name": "BSD License"}}]
    assert by_name["libc6"]["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12"
    assert len(by_name["finure-test"]["hashes"][0]["content"]) == 64
    assert told["metadata"]["component"]["version"] == "7" and "properties" not in told["metadata"]


def test_a_bill_without_dpkg_says_so(tag):
    told = bill(tag, CONTENTS | {"dpkg": ""}, {})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(told)) is None
    assert "no dpkg" in told["metadata"]["properties"][0]["value"]


def test_every_bento_has_the_shared_recipe():
    for bentofile in (root() / "bentos").glob("*/bentofile.yaml"):
        assert "dockerfile_template: Dockerfile.j2" in bentofile.read_text(), bentofile
