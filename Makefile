# make demo   the whole pipeline on the embedded model, with a report in demo-out/
# make test   every check: lint, format, types, import contracts, sizes, tests, docs
# Both set up .venv first; tools/install.sh says how.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# Tests share the cores with nothing that is worth several threads.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/python -m pytest
# Tests of one file share fixtures, so a file stays with one worker until the other has none left.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test check size docs test-gpu test-slow clean

demo: $(VENV)/.demo
	$(RUN)/teal demo models/py-16m --out demo-out --force

test: check size $(VENV)/.dev
	$(PYTEST) $(WORKERS) -m "not gpu"

check: $(VENV)/.dev
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/lint-imports

size: $(VENV)/.dev
	$(RUN)/python tools/size.py

docs: $(VENV)/.dev
	$(PYTEST) tests/test_docs.py

test-gpu: $(VENV)/.dev
	$(PYTEST) -m gpu

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

$(VENV)/.demo: pyproject.toml requirements/constraints.txt tools/install.sh
	bash tools/install.sh "$(PYTHON)" "$(VENV)" report,cpu
	touch $@

$(VENV)/.dev: pyproject.toml requirements/constraints.txt tools/install.sh
	bash tools/install.sh "$(PYTHON)" "$(VENV)" dev
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo-out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
