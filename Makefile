# Every target sets up what it needs in .venv by itself; nothing is installed elsewhere.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
ifndef DEMO_RUN
DEMO_RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
endif
# A process that has started one Ray cluster cannot ask another for its token, so each of these files gets its own.
RAY_TESTS := tests/test_cluster.py tests/test_runner.py tests/test_tune.py
GUARDS := tests/test_structure.py tests/test_lean_import.py

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment would disturb each other
.PHONY: help demo test check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.extra-demo ## compress the example in a new folder under runs/, approve and export its best point
	$(BIN)/nightpress run examples/mnist5k.yaml --out $(DEMO_RUN)
	$(BIN)/nightpress approve $(DEMO_RUN) best --note "make demo"
	$(BIN)/nightpress export $(DEMO_RUN) best --out $(DEMO_RUN)/export

test: $(VENV)/.extra-test ## run all tests, slow ones too (ARGS="-m 'not slow'" leaves those out)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(RAY_TESTS:%=--ignore=%) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(words $(RAY_TESTS)) --dist loadfile $(RAY_TESTS) $(ARGS) || test $$? = 5

check: $(VENV)/.extra-dev ## lint, format, types, the tests that guard the structure, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest -q $(GUARDS)
	.ci/audit

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist *.egg-info .coverage htmlcov .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o \
		-type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "nightpress needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not installed');" \
			"name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp for each set of extras, renewed when pyproject.toml changed.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.created
	$(BIN)/pip install -e ".[$*]"
	@touch $@
