# Everything sets itself up in .venv. Which torch is taken is pip's choice; to name another package index:
#   make demo TORCH_FLAGS="--index-url URL"
PYTHON ?= python3
TORCH_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
NATIVE := src/mixtura/nn/backends/native
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test lint docs sanitize clean

demo: .venv/.ready
	$(BIN)/mixtura demo

test: .venv/.ready-test
	$(OFFLINE) $(BIN)/pytest -n 2

lint: .venv/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.ready-docs
	$(BIN)/mkdocs build --strict

# The native library, compiled so that it sees wrong reads, writes and arithmetic, under random calls. It needs GCC.
# Other calls, or one again: FUZZ="--seed 3", FUZZ="--seed 3 --call 17".
TIME ?= 120
FUZZ ?=
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined
SANITIZE += -fno-sanitize=null,object-size -fno-sanitize-recover=all

sanitize: .venv/.ready-test
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; library="$$folder/libmixtura_native.so"; \
	where() { $${CXX:-c++} -print-file-name=$$1; }; \
	$(BIN)/python $(NATIVE)/build.py "$$library" $(SANITIZE); \
	$(OFFLINE) PYTHONPATH=tests ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(where libasan.so) $$(where libstdc++.so)" $(BIN)/python tests/sanitize/fuzz.py "$$library" $(TIME) $(FUZZ)

clean:
	rm -rf .venv site runs

# The library is compiled by the installation.
.venv/.ready: pyproject.toml constraints.txt hatch_build.py $(NATIVE)/build.py $(wildcard $(NATIVE)/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("mixtura needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up .venv (torch and transformers, a few minutes)"
	@$(PYTHON) -m venv .venv || { echo "python3 -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	@$(PIP) install --upgrade "pip>=25.1"
	@$(PIP) install $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install --constraint constraints.txt --editable ".[demo]"
	@touch $@

.venv/.ready-%: .venv/.ready
	@$(PIP) install --constraint constraints.txt --group $*
	@touch $@
