# Every target sets up .venv by itself; PYTHON=python3.12 chooses another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?=
TESTS ?=
PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean constraints

help:  ## what there is
	@grep -hE '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tidegate needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose another with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make $(VENV): on Debian and Ubuntu the module venv is in the package python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(READY)  ## a fleet of 60 devices, a bad release halted, a good one rolled out in waves (DEMO="--keep")
	$(BIN)/python starter.py demo $(DEMO)

# Where time is skipped, a busy machine is taken for an idle one: the server runs ahead of tasks that wait for a core. So
# those tests have the machine to themselves.
test: $(READY)  ## all tests, in two processes (TESTS="tests/unit -k gate" for some, in one)
ifeq ($(strip $(TESTS)),)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --ignore tests/workflow
	$(BIN)/python -m pytest -n 1 tests/workflow
else
	$(BIN)/python -m pytest $(TESTS)
endif

check: $(READY)  ## lint, format, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## rollouts of 500, 2,000 and 10,000 simulated devices against the targets; lookups; provisioning; heartbeats
	$(BIN)/python -m bench all --folder bench-results

docs: $(READY)  ## docs/reference.md from the settings and from --help
	$(BIN)/python docs/generate_reference.py

constraints:  ## constraints.txt from the newest versions that pyproject.toml allows
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" \
	  && "$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check '.[dev]' \
	  && { sed -n '/^#/p' constraints.txt; "$$folder/venv/bin/python" -m pip freeze | grep -v '^tidegate'; } > "$$folder/new" \
	  && cp "$$folder/new" constraints.txt

clean:  ## remove what make and the tools have made, but no state of a stack
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache bench-results dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
