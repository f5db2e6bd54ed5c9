# Every command of the README; .ci/run calls these and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

.PHONY: install demo test test-fast test-slow test-system test-exhaustive check docs bench recipe clean

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

# Files keep their order, in which those of the shared Ray cluster come early and end in time.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The inner loop: what needs no cluster, no server and no cache; property tests with fewer examples.
test-fast: install
	$(BIN)/python -m pytest -m 'not ray and not server and not long and not slow and not gpu' -n 2 --dist loadfile \
	  --hypothesis-profile=quick

test-slow: test-system test-exhaustive

# Clusters, kills, servers. Two processes: beside a third, Ray's own timeouts end what starts.
test-system: install
	$(BIN)/python -m pytest -m 'slow and not exhaustive' -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# The second call draws random examples for the property tests of `make test`; make prints it with its seed.
test-exhaustive: install
	$(BIN)/python -m pytest -m exhaustive -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m 'hypothesis and not slow and not gpu' -n 2 --dist loadfile \
	  --hypothesis-profile=explore --hypothesis-seed=$(or $(STILLROOM_TEST_SEED),$(strip $(shell od -An -N4 -tu4 /dev/urandom)))

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# No page loads anything from another host; read it with `python -m http.server -d site`.
docs: install
	$(BIN)/python -m tests.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: install
	$(BIN)/python -m tests.benchmarks

recipe: install
	$(BIN)/stillroom recipe cifar10

clean:
	rm -rf $(VENV) runs site
