"""Airflow itself reads what `finure schedule print airflow` writes, in its own environment (make prove-airflow)"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WANTED = ("apache-airflow>=3,<4", "apache-airflow-providers-standard")
READ = """
import sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
for name, dag in sorted(bag.dags.items()):
    (task,) = dag.tasks
    assert not dag.catchup and dag.max_active_runs == 1 and task.retries == 0
    minutes = int(task.execution_timeout.total_seconds() // 60)
    print(name, dag.timetable.expression, minutes, task.bash_command, sep="\\t")
"""


def main() -> None:
    "Installs Airflow, reads the DAGs, and holds them against params/schedule.yaml."
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([bin_folder / "uv", "venv", "--quiet", place / "env"], check=True)
        python = place / "env" / "bin" / "python"
        command = [bin_folder / "uv", "pip", "install", "--quiet", "--no-config", "--python", python, *WANTED]
        subprocess.run(command, check=True)
        subprocess.run(
            [bin_folder / "finure", "schedule", "print", "airflow", "-o", place / "dags"], cwd=ROOT, check=True
        )
        environment = {"AIRFLOW_HOME": str(place / "home"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
        environment |= {"AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR", "PATH": os.environ["PATH"]}
        said = subprocess.run(
            [python, "-c", READ, place / "dags"], env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    found = {line.split("\t")[0]: line.split("\t")[1:] for line in said.splitlines() if line.startswith("finure-")}
    jobs = yaml.safe_load((ROOT / "params" / "schedule.yaml").read_text())["jobs"]
    expected = {
        f"finure-{name}": [job["at"], str(job.get("minutes", 120)), f".venv/bin/finure {job['command']}"]
        for name, job in jobs.items()
    }
    assert found == expected, (found, expected)
    print(f"Airflow reads all {len(found)} DAGs as params/schedule.yaml says them.")


if __name__ == "__main__":
    main()
