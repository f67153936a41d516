# Every command of the project; `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: setup demo test test-all test-fast compare faults lint bench ui submit help

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Huge pages for what Python and torch allocate, where the C library knows them. On virtual machines whose address
# translation is slow, `import torch` took 3 s instead of 8 to 12.
export PYTHONMALLOC ?= malloc
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PORT ?= 5000
ADDRESS ?= http://127.0.0.1:8265

# A stamp holds the checksum of what was installed from, since a checkout makes every file new.
PINS := $(shell cksum < pyproject.toml)
ifneq ($(PINS),$(shell cat .venv/.installed 2>/dev/null))
.PHONY: .venv/.installed
endif

##  setup        install everything into .venv (3 to 4 minutes, once); PYTHON=python3.12 picks the interpreter
setup: .venv/.installed

# torch goes first and alone, so that its pin decides before another package's looser requirement does. Bytecode is
# compiled at the end, as pip would, but on all cores; packages hold some files that are no Python, which fail. nnU-Net's
# layers, which a test compares with, need torch alone; what else their package asks for would replace that.
.venv/.installed:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found: make setup PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: expected Python >= 3.11, got $$($(PYTHON) -V): make setup PYTHON=python3.11" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "setup: 1 of 3, $(TORCH)"
	@$(PIP) --no-compile "$(TORCH)"
	@echo "setup: 2 of 3, kmtr and all it needs"
	@$(PIP) --no-compile --editable '.[dev]'
	@$(PIP) --no-compile --no-deps 'dynamic-network-architectures>=0.4,<0.5' || \
		echo "setup: dynamic-network-architectures is left out; the test of nnU-Net's layers will be skipped" >&2
	@echo "setup: 3 of 3, bytecode"
	@$(PY) -m compileall -qq -j 0 .venv/lib || true
	@echo "$(PINS)" > $@

##  demo         setup; then simulate, pretrain on two workers, evaluate, fine-tune four tasks: 15 minutes on two cores; the
##               same command again resumes; ARGS="key=value ..." are its settings, and ARGS= is the whole recipe
ARGS ?= masked.steps=400 align.steps=80 task.steps=150 task.frames=1
demo: setup
	@$(PY) jobs/demo.py tiny $(ARGS)

# Two processes, for two cores, and huge pages (above): 27 minutes where three processes without them took 43.
TESTS := $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=20 --durations-min=5

##  test         setup; then a test of every promise: 20 to 30 minutes on two cores
test: setup
	@$(TESTS) -m "not full"

##  test-all     setup; then all tests, whole tables and measurements too
test-all: setup
	@$(TESTS)

##  test-fast    setup; then the tests without Ray and without the slow ones
test-fast: setup
	@$(TESTS) -m "not ray and not slow and not full"

##  compare      setup; then k-MTR beside its opponents, from a simulated cohort to the report, one seed, small: it shows that
##               each row runs, not who wins; COMPARE="key=value ..." are its settings
COMPARE ?= masked.steps=60 align.steps=20 align.head_steps=8 task.steps=40 task.frames=1 train.eval_every=20 \
	task.unet_width=8 data.global_batch=16 train.eval_subjects=32 study.bound_steps=40 study.bound_patience=2 study.seeds=0 \
	evaluate.accelerations=4,8 train.workers=1 data.loader=threads
compare: setup
	@$(PY) jobs/simulate.py tiny data.root=runs/compare simulate.subjects=320 simulate.difficulty=medium
	@$(PY) jobs/study.py systems tiny data.root=runs/compare $(COMPARE)

##  faults       setup; then every fault that a run is to survive, at every moment of it; the last line counts them
faults: setup
	@$(PY) -m pytest tests/faults --durations=0 --durations-min=60

##  lint         setup; then style, types, import layers and sizes
lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(PY) .ci/shape.py

##  bench        setup; then the speed of reading, beside other loaders in an environment of their own (runs/bench-env)
bench: setup runs/bench-env/.installed
	@$(PY) jobs/bench.py data

PEERS := runs/bench-env/bin/python
PEER_PINS := $(shell cat kmtr/bench/peers.txt pyproject.toml | cksum)
ifneq ($(PEER_PINS),$(shell cat runs/bench-env/.installed 2>/dev/null))
.PHONY: runs/bench-env/.installed
endif
runs/bench-env/.installed:
	@test -x $(PEERS) || $(PYTHON) -m venv runs/bench-env
	@echo "bench: 1 of 2, $(TORCH) for the peers"
	@$(PEERS) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "bench: 2 of 2, the peers of kmtr/bench/peers.txt"
	@$(PEERS) -m pip install --quiet --disable-pip-version-check "$(TORCH)" --requirement kmtr/bench/peers.txt
	@echo "$(PEER_PINS)" > $@

##  ui           MLflow on http://127.0.0.1:5000 over the runs in runs/mlflow.db; PORT=... takes another port
ui: setup
	@$(PY) -m kmtr.tracking.ui runs $(PORT)

##  submit       JOB="pretrain tiny key=value ..." to the Ray cluster at ADDRESS=http://127.0.0.1:8265
# A submitted job runs in a throwaway upload of this folder without git-ignored files: its paths become absolute first,
# and those that JOB leaves out are passed too. `ray job stop` kills 3 seconds after it has asked, unless told: a run saves.
submit: setup
	@$(PY) -m kmtr.config.submitted $(JOB) | xargs --null --no-run-if-empty \
		$(BIN)/ray job submit --address "$(ADDRESS)" --working-dir . \
		--runtime-env-json "$$($(PY) -c 'from kmtr.tracking.origin import main; main()' RAY_JOB_STOP_WAIT_TIME_S=90)" --

help:
	@echo "make ..."
	@sed -n 's/^##//p' $(firstword $(MAKEFILE_LIST))
