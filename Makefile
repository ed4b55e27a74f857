# make demo · make test · make quick · make bench · make docs · make wheel: each makes .venv and installs what it needs.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
ARGS ?=

BIN := .venv/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f)

# One worker of pytest-xdist a core. A worker that is done takes over tests that another has not begun.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test browser quick bench docs wheel try-wheel aarch64 smoke lint types format clean

# Fill and enlarge a photograph with PyTorch and with the kernels, print time, memory, difference and PSNR.
demo: .venv/demo.stamp
	$(BIN)/inr-kernels demo $(ARGS)

test: .venv/test.stamp browser
	$(BIN)/pytest $(PARALLEL) $(ARGS)

# For the tests of the web page: Debian's Chromium, if it is missing and can be installed. Without it they fail.
browser:
	@command -v chromedriver >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver; }

# After an edit: the tests that are not marked slow, in minutes.
quick: .venv/test.stamp
	$(BIN)/pytest $(PARALLEL) -m "not slow" --durations 5 --durations-min 5 $(ARGS)

# Measure, then write the tables and plots. With BASE=REV: compare the kernels of that git revision with these.
bench: .venv/peers.stamp
ifdef BASE
	$(BIN)/python -m bench.compare '$(BASE)' $(ARGS)
else
	$(BIN)/pytest bench --benchmark-only $(ARGS)
	$(BIN)/python -m bench.report
endif

# The documentation as a site, build/site/index.html.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Into dist/: a source distribution, and a manylinux wheel for each Python of PYTHONS, with CUDA where nvcc is on PATH.
# The kernels are compiled once, for all of them.
wheel: .venv/wheel.stamp
	rm -rf build/wheels
	$(BIN)/python -m build --sdist --outdir dist .
	set -e; for python in $(PYTHONS); do \
	  $(BIN)/python -m pip --python "$$(command -v $$python)" wheel -q --no-deps -w build/wheels .; \
	done
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl

# Installs the wheel for each Python of PYTHONS into an environment of its own, and runs the demo there; then, in the last
# one, the source distribution, without CUDA.
try-wheel: wheel
	set -e; for python in $(PYTHONS); do \
	  $$python -m venv --clear build/try; \
	  tag=$$($$python -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
	  build/try/bin/pip install -q "$$(ls -t dist/*-$$tag-*.whl | head -n 1)[demo]"; \
	  (cd build/try && bin/inr-kernels info && bin/inr-kernels demo $(ARGS)); \
	done
	INR_KERNELS_CUDA=0 build/try/bin/pip install -q --no-deps --force-reinstall dist/*.tar.gz
	cd build/try && bin/inr-kernels demo $(ARGS)

# The C++ kernels for aarch64: cross-compiles them, and runs their numeric tests in qemu. Needs Debian.
aarch64: .venv/test.stamp
	tests/support/aarch64/build.sh
	PYTHONPATH=tests/support $(BIN)/python -m aarch64 $(ARGS)

# Every benchmark runs once, none is timed.
smoke: .venv/test.stamp
	$(BIN)/pytest bench --benchmark-disable $(PARALLEL) $(ARGS)

lint: .venv/test.stamp types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/test.stamp
	mkdir -p build/types/inr_kernels
	ln -sfn $(CURDIR)/inr_kernels/* $(CURDIR)/models build/types/inr_kernels # the package as it is installed
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p inr_kernels

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info inr_kernels/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp an extra; an edit to the native code or to the build installs again, incrementally. spandrel is tested
# without torchvision, whose wheel breaks torchmetrics where it does not fit the build of torch.
.venv/%.stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	$(if $(filter test,$*),$(BIN)/python -m pip install -q -c constraints.txt --no-deps spandrel)
	touch $@
