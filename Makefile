# finure: `make run` for the whole way, `make test` for the proof.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
# kept, or every start of every command compiles all packages again
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install run story test cover lab sync lock bench bench-fraud bench-serve bench-shadow bench-monitor monitor-ui prove-image prove-airflow clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z%-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the locked packages

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("finure needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing the locked packages into $(VENV), once"
	@awk '/^uv==/{take=1} take{print} take&&!/\\$$/{exit}' requirements.lock > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(VENV)/uv.txt
	@$(BIN)/uv pip install --quiet --no-config --python $(BIN)/python --no-deps --require-hashes -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P" 2>/dev/null || true
	@touch $@

run: $(STAMP)  ## the credit pipeline: pull, validate, train, gate, register, pack, serve, ask, report
	@$(BIN)/finure pipeline credit

story: $(STAMP)  ## the life of a model, done in a house of its own: from the first training to the auditor; some minutes
	@$(BIN)/finure run credit/70_story -f params/story.yaml

test: $(STAMP)  ## everything that proves the project
	@$(BIN)/ruff check notebooks tests finure bentos
	@$(BIN)/ruff format --check notebooks tests
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

cover: $(STAMP)  ## which lines of finure the tests run; slower than `make test`
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

lab: $(STAMP)  ## JupyterLab on the notebooks; notebook jobs keep their state in runs/
	@mkdir -p runs/jupyter
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks \
		--SchedulerApp.db_url=sqlite:///$(CURDIR)/runs/jupyter/jobs.db \
		--Scheduler.staging_path=$(CURDIR)/runs/jupyter/staging --Scheduler.output_directory=runs/jupyter/jobs

sync: $(STAMP)  ## format the notebooks and export them to finure/
	@$(BIN)/ruff check --fix --quiet notebooks tests
	@$(BIN)/ruff format --quiet notebooks tests
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

train-%: $(STAMP)  ## train a product: make train-credit
	@$(BIN)/finure run $*/40_train

report-%: $(STAMP)  ## report on the newest model of a product
	@$(BIN)/finure report $*

monitor-%: $(STAMP)  ## hold the decisions of a product against its training run
	@$(BIN)/finure monitor $*

monitor-ui: $(STAMP)  ## the history of monitoring in Evidently's own screens
	@$(BIN)/finure monitor-ui

serve-%: $(STAMP)  ## serve the newest registered model of a product
	@$(BIN)/finure serve $*

image-%: $(STAMP)  ## a container image of the newest registered model, and the bill of what is in it
	@$(BIN)/finure image $*

prove-image: $(STAMP)  ## prove that the image decides: needs root on Debian, no registry and no Docker engine
	@$(BIN)/python tests/prove_image.py

prove-airflow: $(STAMP)  ## prove that Airflow reads the schedule: installs it, in an environment of its own
	@$(BIN)/python tests/prove_airflow.py

bench: $(STAMP)  ## timings of fitting, scoring and serving, with their conditions
	@$(BIN)/python tests/bench.py

bench-fraud: $(STAMP)  ## fraud features: batch beside pandas, events a second, a replay of every row
	@$(BIN)/python tests/bench_fraud.py

bench-serve: $(STAMP)  ## the service beside its rivals: req/s, latency, memory (wrk; ARGS="--quick")
	@$(BIN)/python tests/bench_serve.py $(ARGS)

bench-shadow: $(STAMP)  ## what a challenger in shadow costs: latency at a constant rate, processor time
	@$(BIN)/python tests/bench_shadow.py $(ARGS)

bench-monitor: $(STAMP)  ## a million decisions monitored: seconds and memory
	@$(BIN)/python tests/bench_monitor.py

lock: $(STAMP)  ## renew requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes \
		--no-emit-index-url --no-header --output-file requirements.lock pyproject.toml

clean:  ## remove what tests and builds leave; runs/ and .venv stay
	@rm -rf .pytest_cache .ruff_cache .coverage build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
