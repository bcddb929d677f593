# Needs Python 3.11 or newer and make; the rest is installed into .venv.
# Appended where they say: DEMO_ARGS, NOTEBOOK_ARGS, TEST_ARGS, BENCH_ARGS; JOBS test processes.
BIN := .venv/bin
JOBS ?= 3
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test chaos check wheel bench fmt clean

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: .venv/run ## Orders into a log, projections replayed and promoted, in a folder of its own
	$(BIN)/kappa-log demo $(DEMO_ARGS)

notebooks: .venv/notebooks ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks $(NOTEBOOK_ARGS)

test: .venv/dev ## All tests, on SQLite and on a real PostgreSQL, with coverage
	$(BIN)/python -m pytest --cov --numprocesses=$(JOBS) --dist=worksteal $(TEST_ARGS)

chaos: .venv/dev ## About 1,000 kill trials, and the storms for longer
	KAPPA_LOG_TEST_TRIALS=1000 $(BIN)/python -m pytest --numprocesses=$(JOBS) \
		--dist=worksteal tests/anomaly/test_kafka_*.py $(TEST_ARGS)

check: .venv/dev ## Format, lint, types, import directions, and the built wheel in an empty environment
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy && $(BIN)/lint-imports --no-cache
	.ci/wheel $(BIN)/python

wheel: .venv/dev ## Build the wheel and try it in an empty environment (part of check)
	.ci/wheel $(BIN)/python

bench: .venv/dev ## Speed, as ratios to bare loops over the same store
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

fmt: .venv/dev ## Format, and fix what can be fixed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean: ## Remove the environment and what the tools left
	rm -rf .venv dist build .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps: made anew when pyproject.toml changed, otherwise nothing is installed twice.
.venv/made:
	@test -n "$(PYTHON)" || { echo "kappa-log needs Python 3.11 or newer, and none was found. Install it, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/run: .venv/made pyproject.toml
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/notebooks: .venv/made pyproject.toml
	$(PIP_INSTALL) --editable '.[notebooks]'
	@touch .venv/run $@

.venv/dev: .venv/made pyproject.toml
	$(PIP_INSTALL) --editable '.[dev]'
	@touch .venv/run $@
