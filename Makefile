# make demo · make test · make bench · make docs: each makes .venv and installs what it needs.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench docs smoke lint format clean

# Shrink a photograph, render it, show what that cost.
demo: .venv/demo.stamp
	$(BIN)/inr-kernels demo $(ARGS)

test: .venv/test.stamp
	$(BIN)/pytest $(ARGS)

# Measure, then write the tables and plots.
bench: .venv/bench.stamp
	$(BIN)/pytest bench --benchmark-only $(ARGS)
	$(BIN)/python -m bench.report

# The documentation as a site, build/site/index.html.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Every benchmark runs once, none is timed.
smoke: .venv/test.stamp
	$(BIN)/pytest bench --benchmark-disable $(ARGS)

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info inr_kernels/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp an extra; an edit to the native code or to the build installs again, incrementally.
.venv/%.stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@
