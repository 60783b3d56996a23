PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/runtime
INSTALLED := .venv/installed
NANO := runtime/varedit_runtime/nano
DEMO := build/demo
FRESH := build/fresh

.PHONY: help demo test lint format docs nano-bundle dist clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(RUNTIME): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e .
	touch $@

$(INSTALLED): $(RUNTIME)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[export,train,tensorrt-rtx,dev]'
	touch $@

demo: $(RUNTIME)  ## edit a sample picture
	mkdir -p $(DEMO)
	$(BIN)/varedit-run docs/samples/person.png "add a hat" --bundle $(NANO) --seed 3 \
		-o $(DEMO)/hat.png --compare $(DEMO)/before-and-after.png
	@echo "before and after: $(DEMO)/before-and-after.png"

test: lint  ## lint, then run the tests
	$(BIN)/python -m pytest -n auto --dist loadscope

lint: $(INSTALLED)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## write the commands' help into docs/commands.md
	$(BIN)/python tests/commands_page.py

nano-bundle: $(INSTALLED)  ## build the embedded bundle of nano's weights
	$(BIN)/python -m varedit_nano.embedded_bundle $(NANO)

dist: $(INSTALLED)  ## build source archive and wheel, check them, edit a picture from the wheel
	rm -rf dist $(FRESH)
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/pip install --quiet dist/*.whl
	env -u VAREDIT_BUNDLE XDG_DATA_HOME=$(FRESH) $(FRESH)/bin/varedit-run \
		docs/samples/person.png "add a hat" --seed 3 -o $(FRESH)/hat.png
	rm -rf $(FRESH)

clean:  ## remove the environment, caches and what was built
	rm -rf .venv .pytest_cache .ruff_cache build dist
