# Every command of the README; .ci/run calls these and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

.PHONY: install demo test test-slow check bench recipe clean

install: $(VENV)/.installed

# The stamp makes a second call reuse the environment; a changed pyproject.toml refreshes it.
# torch and torchvision go into the empty environment together, so that pip picks a matching pair.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "stillroom needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Call: make PYTHON=python3.12 install" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/stillroom demo --out $(OUT)

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

bench: install
	$(BIN)/python -m tests.benchmarks

recipe: install
	$(BIN)/python -m jobs.recipe jobs/configs/cifar10.yaml

clean:
	rm -rf $(VENV) runs
