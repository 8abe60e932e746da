# Every verb sets itself up: Python >= 3.11 is all a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
# Modules are compiled when they are imported first: most of torch and transformers never is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
KERNELS := src/mdi/kernels
LIBRARY := $(KERNELS)/libmdi_kernels.so

test test-slow: export PYTHONDONTWRITEBYTECODE =  # each of many processes would compile the project anew
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all lint bench proto docs wheels clean

demo: $(INSTALLED) $(LIBRARY)  ## three local nodes with a small model answer questions about a picture
	$(BIN)/mdi demo

test: $(DEVELOPED) $(LIBRARY)  ## the tests, without the slow ones: some minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEVELOPED) $(LIBRARY)  ## the slow ones: hosts (as root, with iproute2), the page (with chromium), completion (with zsh), outside clients, benchmarks, many lost nodes
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow  ## all tests

lint: $(DEVELOPED)  ## ruff, types, and the rooms' borders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) $(LIBRARY)  ## the exact 2B shape against llama.cpp and transformers (needs 25 GB of disk, 14 GB of memory, a C++ compiler)
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python -m benchmarks.fullsize

proto: $(DEVELOPED)  ## regenerate messages and service after editing node.proto
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. mdi/rpc/node.proto

docs: $(DEVELOPED)  ## write docs/commands.md from the command line itself
	$(BIN)/python -m testing.docs

wheels:  ## one wheel for each of Linux x86-64, Linux arm64 and macOS arm64, into dist/
	for platform in manylinux_2_17_x86_64 manylinux_2_17_aarch64 macosx_11_0_arm64; do \
		MDI_WHEEL=$$platform $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist . || exit 1; \
	done

clean:
	rm -f $(LIBRARY)*
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("MDI-LLM needs Python 3.11 or newer; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(LIBRARY): $(KERNELS)/build.py $(wildcard $(KERNELS)/c/*) | $(INSTALLED)
	-@$(BIN)/python $(KERNELS)/build.py && touch $@
