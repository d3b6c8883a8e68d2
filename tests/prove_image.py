"""Proof that the image decides: `make prove-image`. Root on Debian without a registry or a Docker engine

A small Debian is laid out by debootstrap, a model of the simulated bank is trained, `finure image` builds on that base
with buildah, and the container answers. Chroot isolation has the network and the processes of this machine: build,
start and answer are proved, not isolation.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("debootstrap", "buildah")
SUITE = "bookworm"  # its Python is the image's
PYTHON = ("ca-certificates", "python3", "python3-venv")
LIMIT = 600  # MB
COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "ld", "as", "make", "git", "pip", "pip3", "uv")
RESEARCH = ("pandas", "sklearn", "mlflow", "xgboost", "shap", "scipy", "evidently", "matplotlib", "jupyterlab", "nbdev")
DATA = {".csv", ".parquet", ".feather", ".arrow", ".db", ".sqlite", ".pkl", ".pickle", ".joblib", ".ipynb"}
APPLICATIONS = 50
checks: list[bool] = []


class NotPossibleError(Exception):
    "This machine cannot run the proof."


def check(what: str, holds: bool, found: object = "") -> None:
    "One line of the proof."
    checks.append(bool(holds))
    print(f"{'ok  ' if holds else 'FAIL'}  {what}{f': {found}' if found != '' else ''}", flush=True)


def say(text: str) -> None:
    "A line that is no check."
    print(f"      {text}", flush=True)


def run(*command: str, fails: bool = False, **options: object) -> str:
    "What a command printed; if it fails, the end of its errors ends the proof."
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode and not fails:
        raise NotPossibleError(f"{' '.join(map(str, command[:3]))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def tools() -> None:
    "The tools, installed if they are missing."
    missing = [name for name in TOOLS if not shutil.which(name)]
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        raise NotPossibleError("The proof needs root on Debian or Ubuntu: it makes a root file system and enters it.")
    if missing:
        say(f"installing {', '.join(missing)}")
        try:
            run("apt-get", "update")
            run("apt-get", "install", "-y", "--no-install-recommends", *missing)
        except NotPossibleError as error:
            raise NotPossibleError(f"{' and '.join(missing)} are not here and cannot be installed.\n{error}") from None


def storage(folder: Path) -> str:
    "buildah keeps everything in the folder, and enters containers by chroot; returns the driver that works."
    os.environ |= {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
    for driver in ("overlay", "vfs"):
        places = f'runroot = "{folder}/{driver}/run"\ngraphroot = "{folder}/{driver}/graph"'
        (folder / "storage.conf").write_text(f'[storage]\ndriver = "{driver}"\n{places}\n')
        container = run("buildah", "from", "scratch", fails=True).strip()
        if container and run("buildah", "mount", container, fails=True).strip():
            run("buildah", "rm", container)
            return driver
    raise NotPossibleError("buildah can keep no container here, neither with overlay nor with vfs.")


def base(folder: Path) -> str:
    "The name of a base image: a small Debian with Python."
    rootfs = folder / "rootfs"
    run("debootstrap", "--variant=minbase", f"--include={','.join(PYTHON)}", SUITE, str(rootfs))
    for cache in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(rootfs / cache)
        (rootfs / cache).mkdir()
    container = run("buildah", "from", "scratch").strip()
    run("buildah", "add", "-q", container, str(rootfs), "/")
    run("buildah", "commit", "-q", "--rm", container, "finure-base")
    shutil.rmtree(rootfs)
    return "localhost/finure-base"


def build(folder: Path) -> str:
    "Trains a model and makes its image; returns the tag of both."
    finure, params = str(Path(sys.executable).parent / "finure"), str(ROOT / "params" / "simulated_bank.yaml")
    run(finure, "run", "credit/40_train", "-f", params, "-p", "cross_validate=0", cwd=ROOT)
    say("model trained")
    started, on = time.monotonic(), base(folder)
    say(f"base made in {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    # No network in the build: what it needs is given to it.
    options = ("--opt", f"build-arg=BASE={on}", "--opt", "network=none")
    told = run(finure, "image", "credit", "-f", params, *options, cwd=ROOT)
    say(f"image built in {time.monotonic() - started:.0f} s")
    return re.search(r"Built (\S+);", told)[1]


def size(mounted: Path) -> float:
    "Megabytes in the files of a container."
    files = {(s.st_dev, s.st_ino): s.st_size for p in mounted.rglob("*") if not p.is_dir() for s in [p.lstat()]}
    return sum(files.values()) / 1e6


def look(container: str, tag: str, home: Path) -> None:
    "What is in the image, and what is not."
    inside = lambda script: run("buildah", "run", container, "--", "sh", "-c", script, fails=True).split()
    config = json.loads(run("buildah", "inspect", "--type", "image", tag))["Docker"]["config"]
    mounted = Path(run("buildah", "mount", container).strip())
    megabytes = size(mounted)
    check(f"smaller than {LIMIT} MB", megabytes < LIMIT, f"{megabytes:.0f} MB")
    user = inside("id -u")
    check("the user is not root", user and user[0] != "0", f"uid {user[0]}, image says {config['User']}")
    writable = inside("for d in / /app /srv/bento /srv/bento/src /etc; do test -w $d && echo $d; done")
    check("the user cannot write to the code", not writable, " ".join(writable))
    found = inside(f"for t in {' '.join(COMPILERS)}; do command -v $t; done")
    check("no compiler, no installer", not found, " ".join(found))
    script = f"import importlib.util as u; print(*[n for n in {RESEARCH} if u.find_spec(n)])"
    found = inside(f'python -c "{script}"; echo asked')[:-1]
    check("no research packages", not found, " ".join(found))
    places = [mounted / name for name in ("app", "srv", "home", "root", "var/lib/finure", "tmp")]
    found = [p.relative_to(mounted) for place in places for p in place.rglob("*") if p.suffix in DATA]
    check("no training data", not found, " ".join(map(str, found[:5])))
    check("telemetry is off", {"ORT_DISABLE_TELEMETRY=1", "BENTOML_DO_NOT_TRACK=True"} <= set(config["Env"]))
    check("finure's commands run in it", inside("finure version") != [])
    bill(container, json.loads((home / "images" / f"{tag.replace(':', '-')}.sbom.json").read_text()))


def bill(container: str, told: dict) -> None:
    "Whether the bill of materials is valid and names what the image holds."
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from packaging.utils import canonicalize_name

    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(told))
    check("the bill of materials is CycloneDX 1.6", wrong is None, "" if wrong is None else wrong)
    script = "import importlib.metadata as m; print(*{d.name for d in m.distributions()})"
    python = {canonicalize_name(n) for n in run("buildah", "run", container, "--", "python", "-c", script).split()}
    debian = set(run("buildah", "run", container, "--", "dpkg-query", "-W", "-f", "${Package} ").split())
    of = lambda kind: {c["name"] for c in told["components"] if c.get("purl", "").startswith(f"pkg:{kind}/")}
    named = f"{len(of('pypi'))} Python packages, {len(of('deb'))} of Debian"
    check("it names what is installed", of("pypi") == python and of("deb") == debian, named)
    whole = all(c.get("hashes") for c in told["components"] if c.get("purl", "").startswith("pkg:pypi/"))
    check("with a checksum for every Python package", whole)
    check("and the model", any(c["type"] == "machine-learning-model" for c in told["components"]))


@contextmanager
def started(container: str, tag: str, volume: Path) -> Iterator[str]:
    "The address of the image's own command, on a free port of this machine, with a volume for its state."
    from finure.serve.pack import free_port

    port = str(free_port())
    command = json.loads(run("buildah", "inspect", "--type", "image", tag))["Docker"]["config"]["Cmd"]
    command = [port if part == "3000" else part for part in command]
    volume.mkdir()
    os.chown(volume, 10001, 10001)
    with (volume.parent / "service.log").open("w+") as log:
        whole = ["buildah", "run", "-v", f"{volume}:/var/lib/finure", container, "--", *command]
        began = time.monotonic()
        process = subprocess.Popen(whole, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not answers(f"http://127.0.0.1:{port}/readyz"):
                if process.poll() is not None or time.monotonic() - began > 120:
                    raise NotPossibleError(f"The container does not answer:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.1)
            say(f"ready after {time.monotonic() - began:.1f} s")
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)
    check("it stops when it is told to", not answers(f"http://127.0.0.1:{port}/livez"))


def answers(address: str) -> bool:
    "Whether something answers there."
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False


def stop(process: subprocess.Popen) -> None:
    "SIGTERM to the service, the first process in the container; what does not end is killed."
    import psutil

    inside = [p for p in psutil.Process(process.pid).children(recursive=True) if "buildah" not in p.cmdline()[0]]
    if inside:
        inside[0].terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        for left in [*inside, process]:
            left.kill()


def decide(address: str, tag: str) -> dict:
    "The container's decisions are those of the same model in this process; returns its last answer."
    from finure.bundle import load_scorer
    from finure.contracts.read import ApplicationReader
    from finure.credit.data import load_table
    from finure.pipeline import as_applications, ask
    from finure.serve.pack import bento_folder

    scorer = load_scorer(bento_folder(tag) / "src" / "bundle")
    rows = load_table("simulated_bank", scorer.contract).clean.tail(APPLICATIONS)
    reader, same = ApplicationReader(scorer.contract), 0
    for application in as_applications(rows, scorer.contract):
        answer = ask(address, "/api/v1/predict", application)
        here = json.loads(json.dumps(scorer.decide(reader.read(json.dumps(application).encode())).answer))
        same += all(answer[name] == value for name, value in here.items())
    check("every decision is that of the model in this process", same == APPLICATIONS, f"{same} of {APPLICATIONS}")
    say(f"the last one: {json.dumps(answer)[:200]}")
    return answer


def recorded(volume: Path, answer: dict) -> None:
    "The decision is in the log on the volume, and the log is whole."
    if importlib.util.find_spec("finure.audit") is None:
        return say("this finure has no decision log")
    from finure.audit.log import open_store
    from finure.audit.verify import verify

    with open_store(f"sqlite:///{volume / 'decisions.db'}", create=False) as store:
        found = store.rows("SELECT body FROM records WHERE id = ?", (answer["decision_id"],))
        stored = json.loads(found[0][0])["answer"] if found else None
        check("the decision is in the log on the volume, as it was answered", stored == answer)
        (count,) = store.rows("SELECT count(*) FROM records WHERE kind = 'decision'")[0]
        check("one record for every answer", count == APPLICATIONS, count)
        check("the chain of the log is whole", not verify(store))


def prove(folder: Path) -> None:
    "Builds, looks, starts and asks."
    tag = build(folder)
    container = run("buildah", "from", "--pull-never", tag).strip()
    look(container, tag, folder / "home")
    with started(container, tag, folder / "state") as address:
        answer = decide(address, tag)
    recorded(folder / "state", answer)


def main() -> int:
    "Prints the conditions and one line for every check; 0 if all hold, 1 if one does not, 3 if it cannot be tried."
    try:
        tools()
        with tempfile.TemporaryDirectory(prefix="finure-image-") as name:
            folder = Path(name)
            for setting in [name for name in os.environ if name.startswith("FINURE_")]:
                del os.environ[setting]
            os.environ["FINURE_HOME"] = str(folder / "home")
            conditions = [
                platform.platform(),
                f"Python {platform.python_version()}",
                run("buildah", "--version").strip(),
            ]
            say("; ".join([*conditions, f"storage {storage(folder)}, isolation chroot, base {SUITE} by debootstrap"]))
            prove(folder)
            run("buildah", "rm", "--all")
            run("buildah", "rmi", "--all", "--force")
    except NotPossibleError as error:
        print(f"The proof could not be run. {error}", file=sys.stderr)
        return 3
    print(f"{sum(checks)} of {len(checks)} checks hold.")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
