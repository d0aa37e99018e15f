# `make demo` shows the whole path; `make test` proves it. Both make their own virtual environment.
# TORCH_ARGS adds options to the installation of torch, for another build of it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint nightly coverage mutants bench clean

demo: $(STAMP)
	$(BIN)/pocketrec demo --out demo --threads 1

# A processor without AVX: what hangs on the last digit fails here and not on another machine.
LOWEST := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott POCKETREC_KERNEL=portable

test: lint
	$(LOWEST) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "delicate and not nightly"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

nightly: coverage mutants

# What reads and writes files, data and budgets must be reached by the whole suite: 95 % of the lines of each package.
COVERED := format data compression

coverage: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "nightly or not nightly" --timeout 3600 \
		$(COVERED:%=--cov=pocketrec.%) --cov-report=
	@for name in $(COVERED); do echo "pocketrec.$$name" && \
		$(BIN)/python -m coverage report --include="*/pocketrec/$$name/*" -m --skip-covered --fail-under=95 || exit 1; done

# One line of format/, families/coding/ or files.py changed at a time: the suite must notice nine changes of ten.
mutants: $(STAMP)
	$(BIN)/python bench/mutants.py record --workers $(WORKERS)
	$(BIN)/python bench/mutants.py check --sample 200 --workers $(WORKERS)

bench: $(STAMP)
	@echo "Every benchmark is one command; results go to bench/results/."
	@for file in $$(grep -l __main__ bench/*.py); do echo "  $(BIN)/python $$file --help"; done

$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py src/pocketrec/native/src/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --constraint constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv build demo
