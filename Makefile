# `make setup` makes .venv and builds the C parts in place; every other target does that first. Nothing is done twice: the
# stamps in .venv say what has been done, and for which versions of the files that decide it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON_BIN := $(BIN)/python

.PHONY: setup install uninstall manual demo test coverage mutation conformance record lint format bench soak races fuzz sanitize clean

setup: $(VENV)/.built

$(VENV)/.packages: tools/system-packages
	PYTHON=$(PYTHON) tools/system-packages
	mkdir -p $(VENV)
	touch $@

# Installed without what mypyc compiles, which takes longest and is built below.
$(VENV)/.installed: $(VENV)/.packages pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check --upgrade pip 'setuptools>=77' 'cffi>=1.16' 'mypy>=1.10'
	BINDERFS_FUSE_UNCOMPILED=1 \
		$(BIN)/pip install -qq --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	touch $@

PROGRAMS := binderfs_fuse/host/keeper binderfs_fuse/host/injector

COMPILED := setup.py $(wildcard uapi/*.h binderfs_fuse/*_build.py binderfs_fuse/*.[ch] binderfs_fuse/host/*.[ch] \
	binderfs_fuse/engine/*.py binderfs_fuse/fuse/*.py)

$(VENV)/.built: $(VENV)/.installed $(COMPILED)
	$(PYTHON_BIN) setup.py --quiet build_ext --inplace
	# What did not change was not built again, but is as new as its source all the same.
	touch $@ binderfs_fuse/*.so binderfs_fuse/*/*.so $(PROGRAMS)

demo: setup
	examples/demo.sh

test: setup
	$(BIN)/pytest

# Every line and branch of the engine, by the tests of the engine alone.
coverage: setup
	$(BIN)/pytest tests/engine --cov=binderfs_fuse/engine --cov-branch --cov-fail-under=100 \
		--cov-report=term-missing:skip-covered

# Which changes of the engine its tests notice; takes an hour or more. What is left is in mutants/, to be gone on with;
# `.venv/bin/mutmut results` lists who survived, `.venv/bin/mutmut show NAME` shows one.
mutation: setup
	$(BIN)/pip install -qq --disable-pip-version-check --editable '.[mutation]'
	$(BIN)/mutmut run

# How many random scenarios to play, and from which number on; the same ones for the same number.
COUNT ?= 1000
SEED ?= 1

conformance: setup
	$(PYTHON_BIN) -m tests.conformance --count $(COUNT) --seed $(SEED) --region passthrough --region pagecache

# Has all scenarios judged anew by the real driver, or those of FILES.
record: setup
	$(PYTHON_BIN) -m tests.conformance.record $(FILES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: setup
	@tools/install

uninstall:
	@tools/install -u

manual:
	mkdir -p build
	$(PYTHON) tools/manual build/binderfs-fuse.8

bench: setup
	$(BIN)/pip install -qq --disable-pip-version-check --editable '.[bench]'
	$(PYTHON_BIN) -m benchmarks

# Seconds of a soak, and of fuzzing each target.
DURATION ?= 600

soak: setup
	$(PYTHON_BIN) -m tests.soak --seconds $(DURATION)

# Transfers raced against execution: a hundred thousand take a quarter of an hour.
races: setup
	BINDERFS_FUSE_RACES=$(COUNT) $(BIN)/pytest tests/host/test_attacks.py -k executed

fuzz: setup
	$(BIN)/pip install -qq --disable-pip-version-check 'atheris>=2.3'
	$(PYTHON_BIN) -m fuzz --seconds $(DURATION)

# The C parts with sanitizers, in a build of their own: the tests that drive them, and DURATION seconds of fuzzing each.
sanitize: setup
	tools/sanitize $(DURATION)

clean:
	rm -rf $(VENV) build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	rm -f binderfs_fuse/*.so binderfs_fuse/*/*.so binderfs_fuse/_uapi.c binderfs_fuse/_system.c binderfs_fuse/_host.c
	rm -f $(PROGRAMS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
