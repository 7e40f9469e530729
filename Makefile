# Every command makes its own virtual environment the first time and reuses it afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINS := setup.cfg pyproject.toml constraints.txt
# One stamp for each set of extras, so that the demo does not wait for the tests' tools.
DEMO_READY := $(VENV)/.ready-demo
TEST_READY := $(VENV)/.ready-test

.PHONY: help demo test lint types unit interpreter docs targets sanitize fuzz soak package clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): $(PINS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[report]"
	@touch $@

$(TEST_READY): $(PINS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@ $(DEMO_READY)

demo: $(DEMO_READY)  ## train the same GPT with torch and with memopt, and compare
	$(BIN)/python -m examples.train_gpt --html demo.html

test: lint types unit interpreter  ## lint, types and tests; CI adds docs, sanitize and package

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_READY)
	$(BIN)/mypy

unit: $(TEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
	    --ignore tests/interpreter --ignore tests/faults/test_sanitizers.py --ignore tests/integrations/test_docs.py

interpreter: $(TEST_READY)  # Triton compiles or interprets, never both in one process
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/interpreter

docs: $(TEST_READY)  ## build the documentation into site/ and run every block and command in it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/integrations/test_docs.py

targets: $(TEST_READY)  ## registers, spills and shared memory of every Triton kernel on four GPUs
	$(BIN)/python -m benchmarks.kernels --targets

sanitize: $(TEST_READY)  ## native kernels under the compiler's sanitizers; MEMOPT_SANITIZE=all takes every one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/faults/test_sanitizers.py

fuzz: $(TEST_READY)  ## an hour of fuzzing of every file format that memopt reads
	$(BIN)/python -m tests.faults.fuzzing all 3600

soak: $(TEST_READY)  ## long runs: 20000 optimizer steps, 2000 planned steps, 30 kills
	MEMOPT_SOAK_STEPS=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults/test_long_runs.py
	$(BIN)/python -m benchmarks.soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.killed 30

package: $(TEST_READY)  ## wheel and sdist, installed and imported outside the checkout
	$(PYTHON) -m venv $(VENV)-build && $(VENV)-build/bin/pip install --quiet --disable-pip-version-check build
	$(VENV)-build/bin/python -m build --outdir dist .
	bash tests/check_wheel.sh dist $(PYTHON)

clean:  ## remove the environments and what was built
	rm -rf $(VENV) $(VENV)-build dist build site *.egg-info demo.html
