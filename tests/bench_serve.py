"""The service beside its rivals, the same model and the same requests, in one run: `make bench-serve`

Every server has one worker, one thread for its numerics, and the loopback; wrk (one thread, kept connections) saturates
them in turns. Then the service alone gets requests at a constant rate, each with an id of its own.
"""

import datetime as dt
import json
import logging
import os
import platform
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import joblib
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from finure.bundle import load_scorer
from finure.contracts.check import check, good_bad
from finure.contracts.contract import load
from finure.contracts.schema import asked
from finure.core import FinureError, Settings, generator, telemetry_off, write_atomic
from finure.credit.decide import Scale
from finure.credit.model import FittedScorecard, FittedTrees, Training, fit_scorecard, fit_trees, policy, write_bundle
from finure.features import FeatureSet
from finure.serve.load import Report, drawn
from finure.serve.load import load as send
from finure.serve.pack import bento_environment, bento_folder, free_port, pack
from finure.simulate.bank import Bank, modelling_table, simulate

RIVALS = Path(__file__).parent / "rivals"
SCALE = {"pdo": 40.0, "ref_score": 600.0, "ref_odds": 10.0}
N, BODIES, CONNECTIONS = 20_000, 200, (1, 8, 32, 64)
HEAVY = ("pandas", "mlflow", "shap", "evidently", "xgboost", "sklearn", "scipy", "matplotlib", "sqlalchemy")
ALL = "bare,log,plain,bentoml,mlflow,fastapi"
RATIOS = {("log", "fastapi"): 25.0, ("log", "mlflow"): 60.0, ("log", "bare"): 0.35, ("plain", "bare"): None}
WRK = """
local requests, at = {}, 0
init = function(arguments)
  for line in io.lines(os.getenv("BENCH_BODIES")) do
    requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, line)
  end
end
request = function()
  at = at % #requests + 1
  return requests[at]
end
done = function(summary, latency, _)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "seconds": %f, "p50": %f, "p95": %f, "p99": %f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
"""
out = Console() if sys.stdout.isatty() else Console(width=130)


class Model(NamedTuple):
    "A trained model in both forms, and the requests."

    bundle: Path
    pipeline: object  # scikit-learn, takes a frame of raw fields
    applications: list[dict]  # plain JSON values
    limit: float  # PD above which applications are declined


class Server(NamedTuple):
    "How a server is started and asked."

    what: str
    command: list[str]
    folder: Path  # where it is started
    environment: dict[str, str]
    ready: str  # path that answers 200
    path: str  # of the requests
    wrap: Callable[[dict], object] = lambda application: application
    risk: Callable[[dict], float] = lambda answer: answer["pd"]  # the PD in an answer; NaN: none


class Running(NamedTuple):
    "A server that answers."

    process: subprocess.Popen
    url: str
    bodies: Path  # one request per line
    seconds: float  # from its start until it was ready
    log: Path


# -- the model ---------------------------------------------------------------------------------------------------------


def train(kind: str, seed: int, folder: Path) -> Model:
    "The model on the simulated bank, as a bundle and as a pipeline."
    contract = load("simulated_bank")
    clean = check(modelling_table(simulate(Bank(n=N, seed=seed))), contract).clean
    features = FeatureSet(contract)
    values, bad = features.batch(clean), good_bad(clean, contract)
    training = Training(contract, values, bad, np.ones(len(bad)), seed)
    fitted = fit_scorecard(training, Scale(**SCALE)) if kind == "scorecard" else fit_trees(training)
    pds = fitted.pds(values, features.names) if kind == "scorecard" else fitted.out_of_fold
    limits = policy(0.08, 0.55, 0.8)
    bundle = write_bundle(folder / "bundle", fitted, training, pds, limits, SCALE, [0.5, 0.5], {"name": "bench"})
    drawn_rows = generator(seed, "bodies").choice(len(clean), BODIES, replace=False)
    rows = clean.iloc[drawn_rows][list(asked(contract))]
    applications = [json.loads(row) for row in rows.to_json(orient="records", lines=True, date_format="iso").split()]
    whole = [name for name, column in asked(contract).items() if column.type == "integer"]
    for application in applications:
        application["application_date"] = application["application_date"][:10]
        application |= {name: int(application[name]) for name in whole if application[name] is not None}
    return Model(bundle, pipeline(fitted, training), applications, limits["decline_above"])


def pipeline(fitted: FittedScorecard | FittedTrees, training: Training) -> object:
    "The same model as a scikit-learn pipeline that takes a frame of raw fields."
    sys.path.insert(0, str(RIVALS))
    from pipeline import Calibrated, Codes, Evidence, Fields
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from xgboost import XGBClassifier

    contract = training.contract
    levels = {n: list(c.levels) for n, c in asked(contract).items() if c.type == "category"}
    ratios = {name: list(feature.of) for name, feature in contract.features.items()}
    fields = Fields(list(contract.model_features()), levels, ratios)
    if isinstance(fitted, FittedScorecard):
        line = LogisticRegression()
        line.classes_, line.coef_ = np.array([0, 1]), np.array([fitted.slopes])
        line.intercept_, line.n_features_in_ = np.array([fitted.intercept]), len(fitted.slopes)
        return make_pipeline(
            fields, Evidence([evidence(b, fields.names.index(b.feature)) for b in fitted.binned]), line
        )
    codes = {i: list(getattr(f, "special", ())) for i, f in enumerate(contract.model_features().values())}
    trees = XGBClassifier(n_jobs=1)
    trees.load_model(fitted.booster.save_raw("ubj"))
    coded = Codes({i: listed for i, listed in codes.items() if listed})
    return make_pipeline(fields, coded, Calibrated(trees, fitted.slope, fitted.intercept))


def evidence(b: object, index: int) -> dict:
    "The bins of one characteristic as the rival's transformer takes them."
    cuts = len(b.woe) - len(b.codes) - 1
    edges, woe = list(b.edges), b.woe[:cuts].tolist()
    if b.groups is not None:
        bin_of = {level: i for i, group in enumerate(b.groups) for level in group}
        edges, woe = [k - 0.5 for k in range(1, len(bin_of))], [b.woe[bin_of[k]] for k in range(len(bin_of))]
    special = {code: b.woe[cuts + k] for k, code in enumerate(b.codes)}
    return {"index": index, "edges": edges, "woe": woe, "missing": b.woe[-1], "special": special}


# -- the servers -------------------------------------------------------------------------------------------------------


def servers(model: Model, folder: Path) -> dict[str, Server]:
    "Everything that is compared."
    import pandas as pd

    joblib.dump(model.pipeline, folder / "model.joblib")
    save_for_mlflow(model, folder / "mlflow", pd.DataFrame(model.applications))
    tag = pack(model.bundle, "credit", "finure-bench", "1")
    python = [sys.executable, "-m"]
    rival = {"RIVAL_MODEL": str(folder / "model.joblib"), "RIVAL_LIMIT": str(model.limit)}
    uvicorn = [*python, "uvicorn", "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--port", "PORT"]
    bento = [*python, "bentoml", "serve", "--host", "127.0.0.1", "--port", "PORT"]
    credit = [*bento, str(bento_folder(tag))], bento_folder(tag) / "src"
    log = {"FINURE_DATABASE_URL": f"sqlite:///{folder / 'decisions.db'}", "FINURE_DECISION_LOG": "true"}
    mlflow = [*python, "mlflow", "models", "serve", "-m", str(folder / "mlflow"), "--env-manager", "local"]
    mlflow += ["--host", "127.0.0.1", "--port", "PORT", "--workers", "1"]
    records = lambda application: {"dataframe_records": [application]}
    second = lambda answer: answer["predictions"][0][1]
    api, constant = "/api/v1/predict", lambda answer: float("nan")
    return {
        "bare": Server("bare uvicorn, a constant", [*uvicorn, "constant:app"], RIVALS, {}, "/", "/", risk=constant),
        "log": Server("finure, decision log on", *credit, log, "/readyz", api),
        "plain": Server("finure, decision log off", *credit, {"FINURE_DECISION_LOG": "false"}, "/readyz", api),
        "bentoml": Server(
            "@bentoml.api + pandas", [*bento, "with_bentoml:Rival"], RIVALS, rival, "/readyz", "/predict"
        ),
        "mlflow": Server("mlflow models serve", mlflow, folder, {}, "/ping", "/invocations", records, second),
        "fastapi": Server(
            "FastAPI + joblib + pandas", [*uvicorn, "with_fastapi:app"], RIVALS, rival, "/ready", "/predict"
        ),
    }


def empty_service() -> Server:
    "BentoML with nothing in it: the floor of the time to start."
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", "PORT", "with_nothing:Empty"]
    return Server("BentoML, an empty service", command, RIVALS, {}, "/readyz", "/ping")


def starts(server: Server, model: Model, folder: Path, times: int) -> list[tuple[str, float]]:
    "Seconds until a server is ready, over and over, and an empty one in turn with it."
    found = []
    for _ in range(times):
        for name, each in (("empty", empty_service()), ("start", server)):
            with running(name, each, model, folder) as up:
                found.append((each.what, up.seconds))
    return found


def save_for_mlflow(model: Model, path: Path, frame: object) -> None:
    "The pipeline as an MLflow model with a signature."
    import mlflow.sklearn
    from mlflow.models import infer_signature

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    mlflow.sklearn.save_model(
        model.pipeline, path, code_paths=[str(RIVALS / "pipeline.py")], serialization_format="cloudpickle",
        signature=infer_signature(frame, model.pipeline.predict_proba(frame)), pip_requirements=[],
        pyfunc_predict_fn="predict_proba",
    )  # fmt: skip


@contextmanager
def running(key: str, server: Server, model: Model, folder: Path, **more: str) -> Iterator[Running]:
    "A started server; it and its children are gone afterwards whatever happens."
    port, log, bodies = free_port(), folder / f"{key}.log", folder / f"{key}.jsonl"
    bodies.write_text("".join(json.dumps(server.wrap(application)) + "\n" for application in model.applications))
    environment = bento_environment() | server.environment | more | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(port) if word == "PORT" else word for word in server.command]
    started = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=server.folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            wait_ready(f"http://127.0.0.1:{port}{server.ready}", process, log)
            yield Running(process, f"http://127.0.0.1:{port}{server.path}", bodies, time.monotonic() - started, log)
        finally:
            stop(process)


def wait_ready(address: str, process: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    "Returns when a server answers."
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.02)
    raise FinureError(f"{address} does not answer. The end of its log:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen) -> None:
    "Ends a server and all its children."
    children = family(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    process.wait()


def family(pid: int) -> list[psutil.Process]:
    "A process and its children."
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def worker(pid: int) -> psutil.Process:
    "The process of a family that does the work: the one that has used the most processor time."
    return max(family(pid), key=lambda process: sum(process.cpu_times()[:2]))


# -- the measurements --------------------------------------------------------------------------------------------------


def find_wrk() -> str:
    "wrk from the PATH, else from Debian's archive into the user's cache."
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finure" / "wrk"
    if found := shutil.which("wrk") or shutil.which("wrk", path=cache / "usr" / "bin"):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    try:
        for command in (["apt-get", "download", "wrk"], ["sh", "-c", "dpkg -x wrk_*.deb ."]):
            subprocess.run(command, cwd=cache, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FinureError(f"wrk is needed and could not be fetched ({error}). Install it: apt install wrk.") from None
    return str(cache / "usr" / "bin" / "wrk")


def ask(server: Server, up: Running) -> list[float]:
    "The PD that a server answers to every request."
    risks = []
    for line in up.bodies.read_bytes().splitlines():
        request = urllib.request.Request(up.url, line, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                risks.append(server.risk(json.load(answer)))
        except urllib.error.HTTPError as error:
            raise FinureError(f"{server.what} answered {error.code}: {error.read()[:500]!r}") from None
    return risks


def saturate(wrk: str, script: Path, up: Running, connections: int, seconds: float) -> dict[str, float]:
    "What a server can do with a number of connections."
    command = [wrk, "-t1", f"-c{connections}", f"-d{max(round(seconds), 1)}s", "--timeout", "10s", "-s", str(script)]
    environment = os.environ | {"BENCH_BODIES": str(up.bodies)}
    done = subprocess.run([*command, up.url], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"rate": found["requests"] / found["seconds"]}


def sustain(up: Running, rate: int, seconds: float, seed: int, database: Path) -> dict:
    "Requests at a constant rate, each with an id of its own, and whether each left a record."
    since, bodies = time.time_ns() // 1000, up.bodies.read_bytes().splitlines()
    answers: list[bytes] = [b""] * round(rate * seconds)

    def keep(number: int, status: int, body: bytes) -> None:
        "Keeps a decision."
        if status == 200:
            answers[number] = body

    make = drawn(bodies, seed, name_header="X-Request-ID", prefix=f"bench-{rate}-{os.urandom(4).hex()}")
    told = send(up.url, make, rate, seconds, on_answer=keep)
    found = told.plain() | {"rate": rate, "records": None}
    if (recorded := records(database, since)) is not None:
        decided = {json.loads(body)["decision_id"] for body in answers if body}
        found |= {"records": len(recorded), "without_record": len(decided - recorded)}
        found["different_decisions"] = len(decided)
    return found | {"verdict": verdict(told)}


def verdict(told: Report) -> str:
    "Whether the sustained run kept what is promised, and whether the client may be trusted."
    latency = told.plain()["latency_ms"]
    kept = told.statuses == {200: told.planned} and latency["p95"] < 5 and latency["p99"] < 15
    return ("kept" if kept else "missed") + (", client late" if told.late else "")


def records(database: Path, since: int) -> set[str] | None:
    "The ids of the records made since then (microseconds); None if there is no log."
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as log:
            found = log.execute("SELECT id FROM records WHERE kind = 'decision' AND at >= ?", [since])
            return {row[0] for row in found}
    except sqlite3.OperationalError:
        return None


def imports(server: Server, model: Model, folder: Path) -> dict[str, object]:
    "What the service's processes import (python -X importtime), and what the worker has mapped (/proc/PID/maps)."
    with running("imports", server, model, folder, PYTHONPROFILEIMPORTTIME="1") as up:
        ask(server, up)
        maps = Path(f"/proc/{worker(up.process.pid).pid}/maps")
        mapped = maps.read_text() if maps.exists() else ""
        text = up.log.read_text(errors="replace")
    seen = set(re.findall(r"(?m)^import time:.*\| +([\w-]+)", text))
    libraries = sorted(name for name in HEAVY if re.search(rf"/{name}[/.-]", mapped))
    return {"modules": len(seen), "heavy_imported": sorted(seen & set(HEAVY)), "heavy_mapped": libraries}


# -- the run -----------------------------------------------------------------------------------------------------------


def measure(plan: dict, entered: dict[str, Running], folder: Path) -> list[dict]:
    "The rounds: every server in turn at every number of connections, the order turned from round to round."
    wrk, script, rows = find_wrk(), folder / "wrk.lua", []
    script.write_text(WRK)
    names = list(entered)
    for up in entered.values():
        saturate(wrk, script, up, 8, 1)
    for turn in range(plan["rounds"]):
        for connections in plan["connections"]:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found = saturate(wrk, script, entered[name], connections, plan["seconds"])
                rows.append({"server": name, "connections": connections, "round": turn} | found)
        out.print(f"round {turn + 1} of {plan['rounds']} done, load {os.getloadavg()[0]:.1f}", style="dim")
    return rows


def middle(rows: list[dict], what: str, **wanted: object) -> float:
    "The median over the rounds."
    return statistics.median(row[what] for row in rows if all(row[k] == v for k, v in wanted.items()))


def ratios(rows: list[dict]) -> list[dict]:
    "Request rates in relation to each other, round by round, then the median."
    found, rates = [], {(row["server"], row["connections"], row["round"]): row["rate"] for row in rows}
    for (ours, theirs), wanted in RATIOS.items():
        for connections in sorted({key[1] for key in rates}):
            pairs = [
                rate / rates[theirs, connections, turn]
                for (name, c, turn), rate in rates.items()
                if (name, c) == (ours, connections) and (theirs, connections, turn) in rates
            ]
            if pairs:
                ratio = {"of": ours, "to": theirs, "connections": connections, "ratio": statistics.median(pairs)}
                found.append(ratio | {"wanted": wanted, "lowest": min(pairs), "highest": max(pairs)})
    return found


def memory(up: Running) -> dict[str, float]:
    "Resident MiB of a server's processes together, and of the one that works."
    whole = sum(process.memory_info().rss for process in family(up.process.pid))
    return {"rss_all": whole / 2**20, "rss_worker": worker(up.process.pid).memory_info().rss / 2**20}


def show(found: dict) -> None:
    "Prints the tables."
    table = Table("server", "connections", "req/s", "p50 ms", "p95", "p99", "errors")
    for name, about in found["servers"].items():
        for c in found["plan"]["connections"]:
            shown = [f"{middle(found['rounds'], w, server=name, connections=c):,.2f}" for w in ("p50", "p95", "p99")]
            rate = f"{middle(found['rounds'], 'rate', server=name, connections=c):,.0f}"
            errors = sum(r["errors"] for r in found["rounds"] if (r["server"], r["connections"]) == (name, c))
            table.add_row(about["what"], str(c), rate, *shown, str(errors))
    out.print(table)
    table = Table("server", "ready after s", "RSS MiB, all", "RSS MiB, worker", "largest difference of PD")
    for about in found["servers"].values():
        size = [f"{about[name]:.0f}" for name in ("rss_all", "rss_worker")]
        table.add_row(about["what"], f"{about['ready']:.1f}", *size, f"{about['difference']:.1g}")
    out.print(table)
    table = Table("ratio of req/s", "connections", "median", "lowest", "highest", "wanted")
    for r in found["ratios"]:
        shown = [f"{r[name]:.2f}" for name in ("ratio", "lowest", "highest")]
        what = [found["servers"][r[name]]["what"] for name in ("of", "to")]
        table.add_row(" / ".join(what), str(r["connections"]), *shown, f">= {r['wanted']}" if r["wanted"] else "")
    out.print(table)


def show_sustained(found: list[dict]) -> None:
    "Prints the runs at a constant rate."
    table = Table("req/s", "answered", "errors", "p50 ms", "p95", "p99", "p99.9", "max", "client lag p99", "records")
    table.add_column("p95 < 5, p99 < 15")
    for r in found:
        shown = [f"{value:,.2f}" for value in (*r["latency_ms"].values(), r["client_lag_ms"]["p99"])]
        statuses = {status: n for status, n in r["statuses"].items() if status != 200} | r["errors"]
        table.add_row(str(r["rate"]), f"{r['answered']:,}", str(statuses or 0), *shown, str(r["records"]), r["verdict"])
        if r["records"] is None:
            out.print(f"{r['rate']} req/s: there is no decision log, so records are not counted", style="yellow")
        elif r["without_record"] or not r["records"] == r["different_decisions"] == r["statuses"].get(200, 0):
            told = (
                f"{r['records']} records, {r['different_decisions']} decisions, {r['without_record']} without a record"
            )
            out.print(f"{r['rate']} req/s: {r['answered']} answers but {told}", style="bold red")
    out.print(table)
    if any("late" in r["verdict"] for r in found):
        out.print("The client was late at times: the machine was busy, and the latencies are upper bounds.")


def conditions(kind: str, seed: int) -> dict:
    "Where and with what the figures were taken."
    facts = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*: (.*)$", facts.read_text()) if facts.exists() else []
    packages = ("bentoml", "uvicorn", "fastapi", "mlflow", "pandas", "scikit-learn", "xgboost", "msgspec", "uvloop")
    return {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "model": kind,
        "seed": seed,
        "load_before": os.getloadavg(),
    }


def compare(plan: dict, model: Model, folder: Path) -> dict:
    "Starts the servers, measures them, stops them."
    found, expected = {"plan": plan, "servers": {}}, [load_scorer(model.bundle).decide(a) for a in dated(model)]
    expected = [decided.answer["pd"] for decided in expected]
    chosen = {name: server for name, server in servers(model, folder).items() if name in plan["only"]}
    with ExitStack() as stack:
        entered = {}
        for name, server in chosen.items():
            entered[name] = stack.enter_context(running(name, server, model, folder))
            wrong = np.abs(np.array(ask(server, entered[name])) - expected).max()
            found["servers"][name] = {"what": server.what, "ready": entered[name].seconds, "difference": wrong}
            out.print(f"{server.what}: ready after {entered[name].seconds:.1f} s", style="dim")
        found["rounds"] = measure(plan, entered, folder)
        for name, up in entered.items():
            found["servers"][name] |= memory(up)
        found["ratios"] = ratios(found["rounds"])
        show(found)
        if "log" in entered and plan["sustained"]:
            runs = [(rate, plan["sustained"], plan["seed"], folder / "decisions.db") for rate in plan["rates"]]
            found["sustained"] = [sustain(entered["log"], *run) for run in runs]
            show_sustained(found["sustained"])
    if "log" in chosen:
        found["starts"] = starts(chosen["log"], model, folder, plan["rounds"])
        for what in dict.fromkeys(what for what, _ in found["starts"]):
            seconds = statistics.median(each for name, each in found["starts"] if name == what)
            out.print(f"{what}: ready after {seconds:.1f} s (median of {plan['rounds']}, alone on the machine)")
        found["imports"] = imports(chosen["log"], model, folder)
        out.print(f"imports of the service: {found['imports']}")
    return found


def dated(model: Model) -> list[dict]:
    "The applications as the scorer takes them."
    name = "application_date"
    return [application | {name: dt.date.fromisoformat(application[name])} for application in model.applications]


def main(
    quick: Annotated[bool, typer.Option(help="One short round; shows that it works, measures little.")] = False,
    seconds: Annotated[float, typer.Option(help="Of each measurement with wrk.")] = 4,
    rounds: Annotated[int, typer.Option(help="Over which medians are taken.")] = 3,
    sustained: Annotated[float, typer.Option(help="Seconds of each run at a constant rate; 0: none.")] = 60,
    only: Annotated[str, typer.Option(help="Which servers, such as log,fastapi.")] = ALL,
    model: Annotated[str, typer.Option(help="scorecard or boosting")] = "scorecard",
    seed: int = 0,
) -> None:
    "The service beside its rivals: req/s, latency, memory, and what it keeps up at a constant rate."
    telemetry_off()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = {"seconds": seconds, "rounds": rounds, "sustained": sustained, "connections": list(CONNECTIONS)}
    if quick:
        plan |= {"seconds": 1, "rounds": 1, "sustained": 5, "connections": [1, 32]}
    plan |= {"only": only.split(","), "rates": [1000, 2000], "seed": seed}
    if unknown := set(plan["only"]) - set(ALL.split(",")):
        raise FinureError(f"--only: there is no {', '.join(sorted(unknown))}. Known: {ALL}.")
    results = Settings().home_dir() / "bench"
    results.mkdir(parents=True, exist_ok=True)
    facts = conditions(model, seed)
    out.print(facts)
    with tempfile.TemporaryDirectory(dir=results, prefix=".work-") as folder:
        os.environ["FINURE_HOME"] = folder
        found = {"conditions": facts} | compare(plan, train(model, seed, Path(folder)), Path(folder))
    facts["load_after"] = os.getloadavg()
    out.print(f"load before {facts['load_before'][0]:.1f}, after {facts['load_after'][0]:.1f}")
    path = results / f"serve-{model}-{dt.datetime.now():%Y%m%d-%H%M%S}.json"
    write_atomic(path, json.dumps(found, indent=1, default=float))
    out.print(f"written to {path}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FinureError as error:
        out.print(str(error), style="bold red", markup=False)
        sys.exit(1)
