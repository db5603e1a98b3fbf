# Needs git, make and Python 3.11 to 3.13; everything else goes into .venv. Written for make 3.81 and BSD tools too.

# The report's feed and page: make report FEED=my.jsonl OUT=my.html
FEED := $(firstword $(sort $(wildcard data/*normal*)))
OUT := build/report.html
# The interpreter that .venv is made with: make test PYTHON=python3.12
PYTHON := python3.13 python3.12 python3.11 python3 python

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help report test lab lint bench lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

report: .venv/.lab ## where every byte of FEED goes, as a page (OUT) and a table
	@test -n "$(FEED)" || { echo "data/ holds no sample; name a feed: make report FEED=path" >&2; exit 1; }
	@mkdir -p "$$(dirname "$(OUT)")"
	@$(BIN)/liqlab report --feed "$(FEED)" --out "$(OUT)"

test: .venv/.test ## lint, tests on real servers, notebooks, browser; the last lines say what ran and what did not
	@$(BIN)/python tests/run.py

lab: .venv/.lab ## JupyterLab on notebooks/00-start.ipynb
	@$(BIN)/liqlab lab

lint: .venv/.test ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.test ## speed and memory beside their rivals: build/bench.json, docs/benchmarks.md
	@rm -f build/bench.json
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done
	@$(BIN)/python benchmarks/rows.py --docs

lock: .venv/.made ## resolve constraints.txt anew
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --upgrade --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --quiet --output-file constraints.txt pyproject.toml

clean: ## remove .venv and everything built
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.made:
	@found=; for name in $(PYTHON); do \
	    if "$$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then found=$$name; break; fi; \
	done; \
	test -n "$$found" || { echo "liqlab needs Python 3.11, 3.12 or 3.13 with its venv module, and found none as:" \
	    "$(PYTHON). Install one, or name it: make $(MAKECMDGOALS) PYTHON=path" >&2; exit 1; }; \
	rm -rf .venv; "$$found" -m venv .venv
	@$(PIP) install uv || echo "uv could not be installed; pip does its work, in a minute instead of seconds" >&2
	@touch $@

# The stamps are removed before an installation starts and touched after it ended well: an interrupted one does not count.
# $(1) names the extras.
define install
@rm -f .venv/.lab .venv/.test
@echo "installing liqlab[$(1)] into .venv"
@UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(1)]' \
    || $(PIP) install -c constraints.txt -e '.[$(1)]'
endef

comma := ,

.venv/.lab: $(PINS) | .venv/.made
	$(call install,server$(comma)lab)
	@touch $@

.venv/.test: $(PINS) | .venv/.made
	$(call install,server$(comma)lab$(comma)test)
	@touch .venv/.lab $@
