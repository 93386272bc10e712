PYTHON ?= python3
VENV ?= .venv
SLOW ?=
JOBS ?= 2

BIN := $(VENV)/bin/python
LONG := $(filter-out 0,$(SLOW))
# One thread each: most of the work is many small operations, which two threads hardly speed up.
PYTEST = -m pytest -n $(JOBS) --dist worksteal --durations=25 $(if $(LONG),-m "slow or not slow")

# What runs on the oldest torch; the loss and checkpoints are among the models.
OLDEST_TESTS = tests/models tests/ops
OLDEST = $(abspath $(VENV)-oldest)

# Waiting threads that spin make everything several times slower where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install test test-openmmlab test-oldest test-install lint format docs linkcheck demo demo-seg demo-cls

help:
	@echo 'make install   everything into $(VENV), at the versions of constraints.txt; resumes, and'
	@echo '               returns at once when there is nothing to do'
	@echo 'make demo      install, train Mask R-CNN on made-up shapes, evaluate it, draw pictures'
	@echo 'make demo-seg  the same with UPerNet and masks of classes'
	@echo 'make demo-cls  the same with a classifier: which shape is the largest'
	@echo 'make test      install, lint, and the tests; SLOW=1 adds the long ones and test-oldest,'
	@echo '               JOBS=2 is how many processes run them'
	@echo 'make test-openmmlab   the tests again, on the original OpenMMLab distributions, in an'
	@echo '               environment of their own'
	@echo 'make test-oldest      the tests of the model, on the oldest torch: without MMEngine, and'
	@echo '               with it alone; needs Python 3.10 or 3.11 and compiles nothing'
	@echo 'make test-install     the ways to install, each in a fresh clone of what is committed, and'
	@echo '               then a training of two steps; needs an index of packages, and minutes'
	@echo 'make docs      install, and make the documentation into docs/_build/html'
	@echo 'make linkcheck whether the documentation links to pages that are there; needs a network'
	@echo 'make lint      what Ruff and mypy have to say'
	@echo 'make format    let Ruff fix and format'
	@echo
	@echo 'PYTHON=$(PYTHON) (3.10 to 3.12) makes the environment; VENV=$(VENV) is where it goes.'
	@echo 'On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'
	@echo 'saves the download of the CUDA libraries that PyPI has for torch.'

install:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

test: install lint
	OMP_NUM_THREADS=1 $(BIN) $(PYTEST)
	$(if $(LONG),@! $(SETUP_OLDEST) --has-python || $(MAKE) --no-print-directory test-oldest SLOW=)

# The original distributions, which share no environment with those of `make install`.
test-openmmlab:
	@$(PYTHON) tools/setup_env.py --stack openmmlab --venv $(VENV)-openmmlab
	OMP_NUM_THREADS=1 $(VENV)-openmmlab/bin/python $(PYTEST)

# The oldest torch, in an environment without the toolboxes: first alone, then MMEngine beside it.
SETUP_OLDEST = $(PYTHON) tools/setup_env.py --stack oldest --venv $(OLDEST)
test-oldest:
	@$(SETUP_OLDEST)
	env -u PYTHONPATH OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q tests/without_mmengine.py
	PYTHONPATH=$(OLDEST)/with-mmengine OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) $(OLDEST_TESTS)

# Not by JOBS: each way takes all cores where mmcv has to be compiled.
test-install: install
	PYTHON=$(PYTHON) OMP_NUM_THREADS=1 $(BIN) -m pytest -q -s tests/installing.py

lint: install
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: install
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

# Warnings are errors: a link, an anchor or a name that leads nowhere fails.
docs: install
	$(BIN) -m sphinx -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html
	@echo 'the documentation is docs/_build/html/index.html'

linkcheck: install
	$(BIN) -m sphinx -b linkcheck -q -d docs/_build/doctrees docs docs/_build/linkcheck

demo: install
	$(BIN) tools/demo.py

demo-seg: install
	$(BIN) tools/demo.py seg

demo-cls: install
	$(BIN) tools/demo.py cls
