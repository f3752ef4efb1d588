# make demo and make test do all their own set-up, in .venv. PYTHON is the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without a GPU DeepSpeed has to be told so; with one the variable stays unset.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(GPU),0)
export DS_ACCELERATOR := cpu
endif
export PATH := $(abspath $(BIN)):$(PATH)

CHAOS := $(VENV)/chaos.jsonl
HURT := $(addprefix tests/chaos/,test_kills.py test_faults.py test_elastic.py) tests/dataloaders/test_prepare_kills.py \
	tests/cluster/test_sweep_array.py \
	$(addprefix tests/rev2net/test_training.py::, \
	'test_p4_p5_every_zero_stage_saves_restores_and_agrees[all]' \
	test_p9_a_step_without_a_finite_loss_is_skipped_and_three_in_a_row_end_the_run)

.PHONY: help setup demo test check bench accuracy systems claims chaos test-gpu clean

help:
	@echo "make demo      generated clips (or VIDEOS=folder) -> shards -> training on two processes -> MLflow; 5 to 10 minutes"
	@echo "make setup     .venv with everything in it (the others do it by themselves)"
	@echo "make test      the test suite"
	@echo "make check     ruff and mypy"
	@echo "make bench     training step and test-time network, written to benchmarks/train_step.md"
	@echo "make accuracy  the accuracy runs of benchmarks/accuracy.md (about three hours on 2 cores)"
	@echo "make systems   every system of the paper on generated clips, benchmarks/systems.md (about three hours on 2 cores)"
	@echo "make claims    the paper's claim on generated clips, benchmarks/claims.md (days; goes on where it was ended)"
	@echo "make chaos     trainings and preparations that are hurt; rewrites the table of docs/reliability.md (40 minutes)"
	@echo "make test-gpu  the tests that need an NVIDIA GPU"
	@echo "make clean     remove what the demo has made"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@echo "==> setting up $(VENV) (once; a few minutes, about 8 GB)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e '.[dev]' > $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
	@echo "==> compiling TV-L1 for this machine"
	@$(BIN)/python scripts/compile.py > $(VENV)/compile.log 2>&1 || tail -n 3 $(VENV)/compile.log
	@touch $@

demo: $(STAMP)
	@bash scripts/demo.sh

test: $(STAMP)
	@echo "==> the whole suite; real-clip tests skip where ../shared is absent"
	@# Two files at a time: much of a test is waiting for processes.
	@# Without GPUs, also where there are some: make test-gpu is for those.
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu $(BIN)/python -m pytest -m 'not gpu and not chaos' -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py --write benchmarks/train_step.md

accuracy: $(STAMP)
	$(BIN)/python benchmarks/accuracy.py

systems: $(STAMP)
	$(BIN)/python benchmarks/systems.py

claims: $(STAMP)
	$(BIN)/python benchmarks/claims.py

chaos: $(STAMP)
	@rm -f $(CHAOS)
	@# Slurm's jobs wait most of their time: the others go on meanwhile.
	@export REV2NET_CHAOS_TABLE=$(abspath $(CHAOS)); \
	$(BIN)/python -m pytest -m 'not gpu' tests/chaos/test_slurm_chaos.py > $(VENV)/slurm-chaos.log 2>&1 & slurm=$$!; \
	$(BIN)/python -m pytest -m 'not gpu' $(HURT); status=$$?; \
	wait $$slurm || status=1; cat $(VENV)/slurm-chaos.log; exit $$status
	$(BIN)/python tests/chaos/table.py $(CHAOS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf demo
