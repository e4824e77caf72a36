# make demo          distil a tiny model end to end, minutes on a laptop (DEMO_ARGS=--quick: the shortest)
# make test          lint and the test suite, but for tests of half a minute and more, and most of several ranks
# make test-all      all of it
# make docs          the documentation as a site, in site/
# make demo-models   train the demo's teacher again, from scratch (ten minutes on a core)
# All install what they need into $(VENV) first.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TESTS ?= tests
PYTEST_ARGS ?=
DEMO_ARGS ?=

.PHONY: demo test test-all lint docs install demo-models clean

demo: install
	$(BIN)/vlsi-fast demo --fresh $(DEMO_ARGS)

test: PYTEST_ARGS += -m "not slow"
test test-all: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n 2 --dist loadfile $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

docs: install $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[docs]"
	touch $@

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer; install it, or pass PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools" wheel
	@# Without an NVIDIA GPU the CPU build: plain torch on Linux brings gigabytes of CUDA libraries.
	if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet torch==$(TORCH); \
	else \
	  $(BIN)/python -m pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[deepspeed,demo,test]"
	touch $@

demo-models: install
	$(BIN)/python -m vlsi_fast.demo.models

clean:
	rm -rf $(VENV) runs build site *.egg-info
