# Two commands do everything on a machine with Python 3.11 to 3.13: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: run make PYTHON=python3.11 (3.11 to 3.13)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A simulated dataset of four participants, segmented and tabulated.
demo: $(READY)
	rm -rf demo
	$(BIN)/fdl simulate demo/bids --truth demo/truth --participants 4 --seed 1
	$(BIN)/fdl-bidsapp demo/bids demo/out participant
	$(BIN)/fdl-bidsapp demo/bids demo/out group
	@echo
	@echo "The simulated dataset is in demo/bids, its true label maps in demo/truth."
	@echo "Masks and tables: demo/out/sub-*/ ; the cohort: demo/out/group_morph.tsv"
	@echo "To look at in a browser: demo/out/group_morph.html"

# Tests of one file share fixtures that take long to make; one thread each leaves the cores to them.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info
