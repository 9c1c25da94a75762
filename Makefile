# make install set everything up in .venv
# make train   set everything up and meta-train the sinusoid example
# make test    set everything up and pass the tests
# make test-long  those that show at length, or in one more way, what the others show (CI runs both)
# make check   lint and types
# make chaos   the tests in which everything goes wrong at once (some twenty minutes)
# make fuzz    10,000 spoiled configs, pools, run directories and episodes
# make bench   how fast meta-gradients are beside plain torch.func, and beside the peers that are installed
# make audit   known vulnerabilities of the pinned versions (needs the network)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install train test test-long test-on-ray test-on-heads test-of-numbers test-without-ray chaos fuzz bench check audit clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(BIN)/metadist train configs/sinusoid_maml.yaml

# The tests that start a Ray mostly wait, the others mostly compute: side by side they share two cores well.
TIER := not long
LANES := $(MAKE) --no-print-directory --keep-going --jobs=4 --output-sync=target \
  test-of-numbers test-without-ray test-on-ray test-on-heads
test: check
	$(LANES)

test-long: $(INSTALLED)
	$(LANES) TIER=long

test-on-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m "ray and not head and not chaos and $(TIER)"

test-on-heads: $(INSTALLED)
	$(BIN)/python -m pytest -m "ray and head and not chaos and $(TIER)"

# The compiler takes one core, and leaves the other to the tests beside it.
NUMBERS := tests/core tests/algorithms tests/models
test-of-numbers: $(INSTALLED)
	TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -m "not ray and not chaos and $(TIER)" $(NUMBERS)

test-without-ray: $(INSTALLED)
	TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -m "not ray and not chaos and $(TIER)" \
	  $(NUMBERS:%=--ignore=%)

chaos: $(INSTALLED)
	$(BIN)/python -m pytest -m chaos

fuzz: $(INSTALLED)
	FUZZ_CASES=10000 $(BIN)/python -m pytest tests/test_fuzz.py

bench: $(INSTALLED)
	TORCHINDUCTOR_COMPILE_THREADS=2 $(BIN)/python -m benchmarks.inner_loop --quick

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known vulnerabilities of the pinned versions, in an environment of its own. PyYAML 5.3 has some: where none are
# found for it, the list cannot be reached, and would show none for anything.
AUDIT := build/audit/bin/pip-audit --strict --disable-pip --no-deps
audit:
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	@echo "PyYAML==5.3" > build/audit/known.txt
	@if $(AUDIT) -r build/audit/known.txt 2>&1 | grep -q "known vulnerabilit.* in 1 package"; then $(AUDIT) -r constraints.txt; \
	else echo "audit: skipped, since the list of vulnerabilities cannot be reached from here"; fi

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
