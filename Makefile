PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/runtime
INSTALLED := .venv/installed
NANO := runtime/varedit_runtime/nano
DEMO := build/demo
FRESH := build/fresh
AUDIT := build/audit
JAVASCRIPT := tests/javascript
CHROMIUM := build/chromium
EXTRAS := export,train,tensorrt-rtx,dev
TESTED := 3.11 3.12 3.13
# Run uv without fetching a Python: it only resolves versions.
RESOLVE := $(BIN)/uv --no-python-downloads --quiet pip compile

# What CI and the demo install. It names versions for Linux and the tested Pythons; elsewhere, and
# with `make PIP_CONSTRAINT=`, the ranges of pyproject.toml hold.
export PIP_CONSTRAINT := constraints.txt

.PHONY: help demo test lint format docs nano-bundle dist lock audit clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e .
	touch $@

$(INSTALLED): $(RUNTIME)
	$(BIN)/pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

demo: $(RUNTIME)  ## edit a sample picture
	mkdir -p $(DEMO)
	$(BIN)/varedit-run docs/samples/person.png "add a hat" --bundle $(NANO) --seed 3 \
		-o $(DEMO)/hat.png --compare $(DEMO)/before-and-after.png --overwrite
	@echo "before and after: $(DEMO)/before-and-after.png"

test: lint $(CHROMIUM)/chromium  ## lint, then run the tests
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

# OpenAI's JavaScript client, and a headless Chromium with the libraries that it needs, which its
# package unpacks in Lambda alone. Where this fails, their tests are skipped and say so.
$(CHROMIUM)/chromium: $(JAVASCRIPT)/package-lock.json
	rm -rf $(CHROMIUM)
	mkdir -p $(CHROMIUM)
	-timeout 300 npm --prefix $(JAVASCRIPT) ci --ignore-scripts --no-audit --no-fund --silent && cd $(JAVASCRIPT) && \
		TMPDIR=$(CURDIR)/$(CHROMIUM) AWS_EXECUTION_ENV=AWS_Lambda_nodejs20.x timeout 120 node --eval \
		"import('@sparticuz/chromium').then(package => package.default.executablePath())"

lint: $(INSTALLED)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## write docs/commands.md from the commands' help, and docs/bench.schema.json
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

lock: $(INSTALLED)  ## choose the newest versions for CI and the demo (constraints.txt)
	$(BIN)/pip install --quiet -e '.[audit]'
	printf '%s\n' torch==2.13.0 \
		".[$(EXTRAS),audit]; sys_platform == 'linux' and python_version <= '$(lastword $(TESTED))'" | \
		$(RESOLVE) --custom-compile-command "make lock" --universal --upgrade \
		--python-version $(firstword $(TESTED)) --annotation-style line --no-emit-package varedit-export -o constraints.txt -

# Without the extra tensorrt: its packages download themselves when they are built.
audit: $(INSTALLED)  ## look for known vulnerabilities, and for wheels for 64-bit ARM
	$(BIN)/pip install --quiet -e '.[audit]'
	rm -rf $(AUDIT)
	mkdir -p $(AUDIT)
	set -e; for python in $(TESTED); do \
		resolve="$(RESOLVE) pyproject.toml --python-version $$python"; \
		$$resolve -c constraints.txt --extra train --extra tensorrt-rtx --extra dev --extra audit \
			-o $(AUDIT)/locked-$$python.txt; \
		for which in "-c constraints.txt" "--resolution lowest-direct"; do \
			$$resolve $$which --extra cuda --only-binary :all: --python-platform aarch64-manylinux_2_35 >/dev/null; \
		done; \
	done
	set -e; for extra in train gpu tensorrt-rtx dev; do \
		$(RESOLVE) pyproject.toml --resolution lowest-direct --extra $$extra \
			--python-version $(firstword $(TESTED)) -o $(AUDIT)/lowest-$$extra.txt; \
	done
	set -e; for versions in $(AUDIT)/*.txt; do \
		$(BIN)/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip -r $$versions; \
	done

clean:  ## remove the environment, caches and what was built
	rm -rf .venv .pytest_cache .ruff_cache build dist
