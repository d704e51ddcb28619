# Two commands from a fresh machine: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
EXTRAS := .venv-extras
CORE := $(VENV)/.core
READY := $(VENV)/.ready
TRUNKS := lpips-alex lpips-vgg
DATA := mnist fashion-mnist cifar10
SCALE ?= full
DEVICE ?= cpu
HAVE ?=
BROWSER ?= optional
PRETEND ?= optional
SWEEP ?= pairs

.PHONY: cuda-wheels cuda-check help setup demo trunks pretend test test-device test-full test-long torture test-browser test-pythons test-extras test-assets assets check format trained fuzz recheck docs reference wheel clean

help:
	@echo "make demo         set up, and run four attacks against seven defenses on the images that ship with leakbench"
	@echo "make test         set up, and run the tests that need no network"
	@echo "make test-long    run the longest tests: the paper's tables in small, broken defenses, killed runs, an installed package, a small benchmark"
	@echo "make test-device  compare attacks on a pretended GPU with the CPU, which takes minutes (SWEEP=few|pairs|full)"
	@echo "make cuda-check   check leakbench on a GPU in eight minutes, into reports/cuda; make cuda-wheels fetches what it lacks"
	@echo "make test-full    run torchvision's networks of full size, which takes an hour"
	@echo "make test-pythons run a part of the tests on each of Python 3.12 and 3.13 that is installed"
	@echo "make torture      kill, interrupt, fill the disk and make the clock jump, which takes minutes"
	@echo "make test-browser open the pages in a headless Chromium; installs it as root on Debian, or says that it did not run"
	@echo "make test-extras  set up .venv-extras with Flower, Ray and the trackers of experiments, and run the tests that need them"
	@echo "make check        format, lint, types, and which room imports which"
	@echo "make assets       fetch the datasets and weights into the cache"
	@echo "make test-assets  run the tests that need them"
	@echo "make bench        measure speed into reports/speed (SCALE=smoke|full, DEVICE=cpu|cuda)"
	@echo "make trained      train the networks that reports attack after training into runs/trained (80 minutes on one core)"
	@echo "make fuzz         feed a million hostile inputs to what reads files and specs, hours"
	@echo "make recheck      recompute the figures of README.md and reports/README.md from the committed data"
	@echo "make docs         build the documentation into build/docs, and run the tutorial and the notebook"
	@echo "make reference    write the pages of docs/reference from the code"
	@echo "make wheel        build and check dist/*.tar.gz, and dist/*.whl from it"
	@echo "make clean        remove what make made, the cache of datasets excepted"

setup: $(READY)

# What a run needs. Without bytecode, which Python writes at the first import of what is used: a minute sooner.
$(CORE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11, 4) else "error: leakbench needs Python 3.11.4 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(READY): $(CORE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(CORE) trunks
	$(BIN)/leakbench run matrix --suite quick --workers "$$(getconf _NPROCESSORS_ONLN)" --out runs/quick

# LPIPS needs its trained trunks; without them the demo's LPIPS columns stay empty.
trunks: $(CORE)
	@$(BIN)/leakbench assets fetch $(TRUNKS) || echo "LPIPS is left out: no source of its weights could be reached"

# The pretended GPU of tests/device, compiled once. PRETEND=required fails without a compiler; otherwise its tests are skipped.
pretend: setup
	@command -v g++ >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && apt-get update -qq && apt-get install -y -qq g++ >/dev/null; } || true
	@if command -v g++ >/dev/null; then $(BIN)/python -c 'import sys; sys.path.insert(0, "tests/device"); import pretend; pretend.build()'; \
	else echo "the tests on a pretended GPU will NOT run: there is no g++; install the package g++"; [ "$(PRETEND)" != required ]; fi

# The pretended GPU has processes of its own: torch counts devices at the first gradient of a process.
test: pretend
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long and not device" tests/device
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/device -m "not assets and not full and not docs and not browser and not fl and not ray and not trackers and not torture and not long and not device"

# Attacks, defenses, models and threat models on the pretended GPU against the CPU. SWEEP=few is for every commit; SWEEP=full crosses all of them, for hours.
test-device: pretend
	SWEEP=$(SWEEP) $(BIN)/python -m pytest -n 2 --dist worksteal -m device

# What a machine with Python 3.12 and only torch and torchvision lacks (80 MB); --platform names that machine's, not this one's.
# HAVE="scipy pandas" leaves out what else it has.
cuda-wheels: setup
	rm -rf build/cuda-wheels
	mkdir -p build/cuda-wheels
	$(BIN)/python tools/cuda_wheels.py $(HAVE) > build/cuda-wheels/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
	    --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --platform any --dest build/cuda-wheels \
	    -r build/cuda-wheels/requirements.txt

# On that machine, in a copy of this tree: PYTHON=python3 make cuda-check. Nothing is installed outside build/.
cuda-check:
	@$(PYTHON) -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "error: torch finds no GPU; run tools/cuda_check.py --device pretend --small")'
	if [ -d build/cuda-wheels ]; then $(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/cuda-site build/cuda-wheels/*.whl; fi
	PYTHONPATH=build/cuda-site:. $(PYTHON) tools/cuda_check.py --out $${OUT:-reports/cuda}

test-long: pretend
	$(BIN)/python -m pytest -m long tests/device
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/device -m long

# The newer versions of Python that are on the PATH or among pyenv's: what depends on the version, in small.
PYTHONS ?= 3.12 3.13
test-pythons:
	@for version in $(PYTHONS); do \
	    found=; for one in "$$(command -v python$$version)" $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python$$version 2>/dev/null); do \
	        if [ -n "$$one" ] && "$$one" --version >/dev/null 2>&1; then found="$$one"; fi; done; \
	    if [ -z "$$found" ]; then echo "the tests on Python $$version were NOT run: there is no python$$version"; continue; fi; \
	    echo "Python $$version: $$found"; rm -rf .venv-python; \
	    { "$$found" -m venv .venv-python && .venv-python/bin/python -m pip install --quiet --no-compile --editable ".[dev]" \
	    && .venv-python/bin/python -m pytest -n 2 --dist worksteal -m "not long and not fl and not ray and not assets" \
	        tests/test_api.py tests/test_engine.py tests/test_registry.py tests/test_plugin.py; } || exit 1; \
	done; rm -rf .venv-python

torture: setup
	$(BIN)/python -m pytest -m torture

test-full: setup
	$(BIN)/python -m pytest -m full

# Debian's Chromium, driven by Playwright; no browser is downloaded. BROWSER=required fails where it cannot run.
test-browser: setup
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --quiet --group browser || true
	@if command -v chromium >/dev/null && $(BIN)/python -c 'import playwright' 2>/dev/null; \
	then $(BIN)/python -m pytest -m browser; \
	else echo "the tests in a browser were NOT run: no chromium on the PATH, or no Playwright; install the package chromium, and Playwright with pip install --group browser"; \
	    [ "$(BROWSER)" != required ]; fi

# Flower pins older versions of typer and rich, so that it has an environment of its own; the command line runs there too.
$(EXTRAS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --upgrade pip
	$(EXTRAS)/bin/python -m pip install --quiet --editable ".[dev,fl,ray,mlflow,tensorboard,wandb]"
	@touch $@

test-extras: $(EXTRAS)/.ready
	$(EXTRAS)/bin/python -m pytest -m "fl or ray or trackers"
	$(EXTRAS)/bin/python -m pytest tests/test_registry.py
	$(EXTRAS)/bin/leakbench list defenses >/dev/null

assets: setup
	$(BIN)/leakbench assets fetch $(TRUNKS) dists $(DATA)

test-assets: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m assets

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# SCALE=full writes reports/speed and the README's table; the machine must be quiet. smoke writes runs/speed-smoke.
bench: setup
	@$(BIN)/python -c 'import breaching' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks.speed --scale $(SCALE) --device $(DEVICE)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An interrupted training is resumed.
trained: setup
	$(BIN)/leakbench assets fetch cifar10
	$(BIN)/leakbench run accuracy benchmarks/trained.toml --scale cpu --device $(DEVICE) --out runs/trained

fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	$(BIN)/python tools/fuzz.py

recheck: setup
	$(BIN)/python -m benchmarks.recheck

docs: setup
	@$(DOCS)/bin/mkdocs --version >/dev/null 2>&1 || { $(PYTHON) -m venv $(DOCS) && $(DOCS)/bin/python -m pip install --quiet --upgrade pip && $(DOCS)/bin/python -m pip install --quiet --group docs; }
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@$(BIN)/python -c 'import ipykernel, nbclient' 2>/dev/null || $(BIN)/python -m pip install --quiet --group notebook
	$(BIN)/python -m pytest -m docs

reference: setup
	$(BIN)/python tools/reference.py

wheel: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-python $(DOCS) $(EXTRAS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
