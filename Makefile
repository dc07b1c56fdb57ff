# Everything from a fresh clone with Python 3.11+ and make; no compiler. `make` alone lists the targets.
#
# Variables, to be set on the command line or in the environment:
#   PYTHON       interpreter the virtual environment is made with (python3.11, else python3)
#   VENV         where the virtual environment goes
#   TORCH_SPEC   the torch to install; it goes first, so that nothing else pulls another build of it
#   TORCH_INDEX  package index for that one install, such as PyTorch's own index of CPU wheels (a CPU machine whose pip would
#                otherwise fetch the CUDA build of several GB). Empty: pip's own configuration decides
#   STREAM       what `make quickstart` learns
#   RANKS        processes to start: 2 without a CUDA device, else one for each of at most two devices
#   DS_ACCELERATOR, OMP_NUM_THREADS  as DeepSpeed and OpenMP know them; cpu and cores / RANKS where torch sees no CUDA device
SHELL := /bin/sh
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
STREAM ?= jobs/streams/quickstart.yaml
RANKS ?=

STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# Shell lines that set the environment of a run: the venv's tools are found by name, and the devices decide the rest.
define ENVIRONMENT
PATH="$(abspath $(VENV))/bin:$$PATH"; export PATH; \
devices=$$(python -c 'import torch; print(torch.cuda.device_count())') || exit 1; \
ranks="$(RANKS)"; \
if [ -z "$$ranks" ]; then if [ "$$devices" -eq 1 ]; then ranks=1; else ranks=2; fi; fi; \
if [ "$$devices" -eq 0 ]; then \
  cores=$$(python -c 'import os; print(len(os.sched_getaffinity(0)))'); \
  threads=$$((cores / ranks)); if [ "$$threads" -lt 1 ]; then threads=1; fi; \
  export DS_ACCELERATOR="$${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$threads}"; \
fi
endef

.PHONY: help venv quickstart quickstart-moe test proof-moe proof-plan proof-loading proof-failures proof-faults proof-store proof-hosts proof-tracking fuzz lint clean

help:
	@echo "make quickstart   set up, make the demo's model and data, learn $(STREAM)"
	@echo "make quickstart-moe  the same on a mixture of experts, its experts shared out over 2 processes"
	@echo "make test         set up, run the suite (lint included)"
	@echo "make proof-moe    every expert-parallel size and ZeRO stage on 1, 2 and 4 processes against a naive model"
	@echo "make proof-plan   bytes that jobs/plan.py predicts against those measured on 2 processes (the suite has 4)"
	@echo "make proof-loading   load a 3 GB mixture of experts on 4 processes: bytes read, peak memory (3 minutes)"
	@echo "make proof-failures  kill, stop and wedge ranks and launchers of 13 jobs: times, exit codes, who was named (5 minutes)"
	@echo "make proof-faults    kill runs of three increments at some 80 moments, continue them, compare to the bit (8 CPU minutes)"
	@echo "make proof-store     kill publishing, restoring and retiring before every request and file operation of theirs (4 minutes)"
	@echo "make proof-hosts     2 and 3 hosts in namespaces of this machine: the same bits, every failure, ten commands (root; 12 minutes)"
	@echo "make proof-tracking  two jobs at once on MLflow and PostgreSQL, both killed under them (needs the extra server)"
	@echo "make fuzz         20,000 hostile and broken inputs to every reader of contracts, streams, rows, adapters and published files"
	@echo "make lint         ruff check and format check"
	@echo "make venv         set up only: $(VENV)"
	@echo "make clean        remove $(VENV), demo/ and caches; never a work folder"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: Python 3.11 or newer is needed, and there is no '$(PYTHON)'; install it or set PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is `"$(PYTHON)" --version 2>&1`; set PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) lacks the venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@echo "setting up $(VENV) (about two minutes; 2 GB with the CPU build of torch)"
	@"$(PYTHON)" -m venv "$(VENV)"
	@echo "installing $(TORCH_SPEC)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH_SPEC)"
	@echo "installing the rest"
	@DS_BUILD_OPS=0 $(PIP) --constraint constraints.txt --editable '.[test]'
	@touch "$@"

quickstart: $(STAMP)
	@$(ENVIRONMENT); python jobs/demo.py && exec deepspeed --num_accelerators "$$ranks" jobs/continual.py --stream "$(STREAM)"

quickstart-moe: $(STAMP)
	@$(ENVIRONMENT); python jobs/demo.py --moe && exec deepspeed --num_accelerators "$$ranks" jobs/continual.py --stream jobs/streams/quickstart_moe.yaml

test: $(STAMP)
	@$(ENVIRONMENT); exec python -m pytest -q -n 2 --no-loadscope-reorder

proof-moe: $(STAMP)
	@$(ENVIRONMENT); exec python -m pytest -q -m long tests/moe

proof-plan: $(STAMP)
	@$(ENVIRONMENT); exec python -m pytest -q -m long tests/placement/test_plan_truth.py

proof-loading: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; folder=$$(mktemp -d); \
	deepspeed --num_accelerators 4 tests/placement/loading_proof.py "$$folder/backbone"; code=$$?; rm -rf "$$folder"; exit $$code

proof-failures: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; exec python -m pytest -q -m long tests/jobs/test_failures.py

proof-faults: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; exec python -m tests.faults.driver

proof-store: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; exec python -m pytest -q -m long tests/store

proof-hosts: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; python -m tests.cluster.driver && exec python -m pytest -q -m long tests/cluster

proof-tracking: $(STAMP)
	@$(ENVIRONMENT); export OMP_NUM_THREADS=1; exec python -m pytest -q -s -m long tests/tracking/test_two_streams.py

fuzz: $(STAMP)
	@$(ENVIRONMENT); exec python -m tests.fuzz.driver --count 20000

lint: $(STAMP)
	@"$(VENV)/bin/ruff" check . && "$(VENV)/bin/ruff" format --check .

clean:
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache
	find data_contracts pipeline jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
