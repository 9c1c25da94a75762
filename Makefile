# make train   set everything up and meta-train the sinusoid example
# make test    set everything up and pass the tests
# make check   lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test test-on-ray test-without-ray check clean

train: $(INSTALLED)
	$(BIN)/metadist train configs/sinusoid_maml.yaml

# The tests that start a Ray mostly wait, the others mostly compute: side by side they share two cores well.
test: check
	$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target test-on-ray test-without-ray

test-on-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray

# The compiler takes one core, and leaves the other to the tests beside it.
test-without-ray: $(INSTALLED)
	TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -m "not ray"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
