# Every verb sets itself up: Python >= 3.11 is all a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all lint bench proto docs clean

demo: $(INSTALLED)  ## three local nodes with a small model answer questions about a picture
	$(BIN)/mdi demo

test: $(INSTALLED)  ## the tests, without the slow ones: some minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED)  ## the slow ones: hosts (as root, with iproute2), outside clients, benchmarks, many lost nodes
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow  ## all tests

lint: $(INSTALLED)  ## ruff, types, and the rooms' borders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## the exact 2B shape against transformers (needs 20 GB of disk and memory)
	$(BIN)/python -m benchmarks.fullsize

proto: $(INSTALLED)  ## regenerate messages and service after editing node.proto
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. mdi/rpc/node.proto

docs: $(INSTALLED)  ## write docs/commands.md from the command line itself
	$(BIN)/python -m testing.docs

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("MDI-LLM needs Python 3.11 or newer; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
