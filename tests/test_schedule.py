"The schedule, in the words of each scheduler, read back by what reads it there"

import ast
import configparser
import datetime as dt
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from croniter import croniter
from typer.testing import CliRunner

from finure.cli.main import app
from finure.core import FinureError, root
from finure.run.schedule import KINDS, files_of_kind, on_calendar, read_schedule

BASE = dt.datetime(2026, 2, 27, 13, 7)
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def schedule():
    "The schedule of this checkout."
    return read_schedule(root() / "params" / "schedule.yaml", list(typer.main.get_command(app).commands))


def files(kind, schedule):
    "What is written for a scheduler, as if the checkout were in /srv."
    return files_of_kind(kind, schedule, Path("/srv/finure"))


def test_every_kind_is_printed_and_written(tmp_path):
    for kind in KINDS:
        shown = CliRunner().invoke(app, ["schedule", "print", kind])
        assert (
            shown.exit_code == 0 and "run credit/40_train" in shown.output.replace("\n- ", " ") or kind == "kubernetes"
        )
    written = CliRunner().invoke(app, ["schedule", "print", "systemd", "-o", str(tmp_path)])
    assert written.exit_code == 0 and len(list(tmp_path.glob("finure-credit-train.*"))) == 2


def test_cron_reads_the_times(schedule):
    (text,) = files("cron", schedule).values()
    lines = [line for line in text.splitlines() if line[0].isdigit()]
    assert len(lines) == len(schedule.jobs) and "CRON_TZ=UTC" in text
    for line, job in zip(lines, schedule.jobs.values(), strict=True):
        at, command = " ".join(line.split()[:5]), line.split(maxsplit=5)[5]
        assert croniter.is_valid(at) and command.startswith("cd /srv/finure && timeout ")
        assert command.endswith(f".venv/bin/finure {job.command}")


@pytest.mark.skipif(ANALYZE is None, reason="systemd is not here")
@pytest.mark.parametrize(
    "at", ["0 2 * * 0", "*/20 9-17 * * 1-5", "5,35 */6 1-7 * *", "0 0 29 2 *", "30 4 * 1-12/5 *", "0 3 * * 5-7"]
)
def test_systemd_and_cron_mean_the_same_times(at):
    command = [
        ANALYZE,
        "calendar",
        f"--base-time={BASE:%Y-%m-%d %H:%M:%S} UTC",
        "--iterations=8",
        on_calendar(at, "UTC"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"TZ": "UTC"}).stdout
    found = [dt.datetime.fromisoformat(text) for text in re.findall(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", said)]
    times = croniter(at, BASE)
    expected = [times.get_next(dt.datetime) for _ in range(8)]
    assert sorted(set(found)) == expected


def test_systemd_reads_the_units(schedule, tmp_path):
    there = tmp_path / ".venv" / "bin" / "finure"
    there.parent.mkdir(parents=True)
    there.write_text("#!/bin/sh\n")
    there.chmod(0o755)
    units = files_of_kind("systemd", schedule, tmp_path)
    for name, text in units.items():
        (tmp_path / name).write_text(text)
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read_string(text)
        assert unit["Timer"]["OnCalendar"] if name.endswith(".timer") else unit["Service"]["ExecStart"]
    if ANALYZE:
        places = [str(tmp_path / name) for name in units]
        done = subprocess.run([ANALYZE, "verify", "--man=no", *places], capture_output=True, text=True)
        assert not [line for line in done.stderr.splitlines() if str(tmp_path) in line], done.stderr


def test_kubernetes_reads_the_jobs(schedule):
    (text,) = files("kubernetes", schedule).values()
    documents = list(yaml.safe_load_all(text))
    assert [document["metadata"]["name"] for document in documents] == [f"finure-{name}" for name in schedule.jobs]
    for document, job in zip(documents, schedule.jobs.values(), strict=True):
        assert (document["apiVersion"], document["kind"]) == ("batch/v1", "CronJob")
        spec, template = document["spec"], document["spec"]["jobTemplate"]["spec"]
        assert croniter.is_valid(spec["schedule"]) and spec["concurrencyPolicy"] == "Forbid"
        assert (template["backoffLimit"], template["activeDeadlineSeconds"]) == (0, 60 * job.minutes)
        pod = template["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never" and all(isinstance(word, str) for word in container["command"])
        assert " ".join(container["command"]) == f".venv/bin/finure {job.command}"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_github_reads_the_workflow(schedule):
    (text,) = files("github", schedule).values()
    workflow = yaml.safe_load(text)
    times = {entry["cron"] for entry in workflow["on"]["schedule"]}
    assert times == {job.at for job in schedule.jobs.values()} and all(map(croniter.is_valid, times))
    for name, job in schedule.jobs.items():
        assert f"github.event.schedule == '{job.at}'" in workflow["jobs"][name]["if"]
        assert workflow["jobs"][name]["steps"][-1] == {"run": f".venv/bin/finure {job.command}"}
        assert workflow["jobs"][name]["timeout-minutes"] == job.minutes


def test_airflow_gets_a_module_with_every_job(schedule):
    # Airflow itself reads it in an environment of its own: make prove-airflow
    (text,) = files("airflow", schedule).values()
    jobs = next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
    told = {name: (job.at, job.minutes, f".venv/bin/finure {job.command}") for name, job in schedule.jobs.items()}
    assert ast.literal_eval(jobs) == told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: {a: {at: 0 2 * * 8, command: report}}", "a: at: .* the weekday '8' must be 0 to 7"),
        ("jobs: {a: {at: 0 2 * * *, command: repot}}", "no `finure repot`"),
        ("jobs: {a: {at: 0 2 * * *, comand: report}}", "unknown field `comand`"),
        ("jobs: {a: {at: 0 2 * * *, command: report, minutes: 0}}", "minutes"),
        ("jobs: {A b: {at: 0 2 * * *, command: report}}", "key"),
    ],
)
def test_a_schedule_that_is_wrong_is_refused(tmp_path, text, message):
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    with pytest.raises(FinureError, match=message):
        read_schedule(path, ["report"])


def test_a_time_that_a_scheduler_cannot_say_is_refused(schedule):
    with pytest.raises(FinureError, match="UTC only"):
        files("github", type(schedule)(schedule.jobs, "Europe/Berlin"))
    with pytest.raises(FinureError, match="no kind of schedule 'at'"):
        files("at", schedule)
