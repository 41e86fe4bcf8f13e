# Everything runs in .venv, which the first target that needs it makes. Where pip looks, and what holds it back
# (PIP_CONSTRAINT and the like), is left to the environment.
PYTHON ?= python3
BIN := .venv/bin
DEMO := $(BIN)/python examples/noisy_labels.py

.DEFAULT_GOAL := help
.NOTPARALLEL:  # one pip at a time in one .venv
.PHONY: help venv demo demo-short test test-lowest matrix mutants wheel lint docs notebooks site docs-test clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/.dev  ## make .venv with all that development needs

demo: .venv/.demo  ## train on wrong labels with and without ELRCallback; prints a table, draws a plot
	$(DEMO)

demo-short: .venv/.demo  ## the same in a few seconds: one seed, 20 epochs
	$(DEMO) --seeds 1 --epochs 20

# Bytecode is kept: pytest's asserts in 180 files, made anew in each worker, are seconds of each run.
test: .venv/.dev  ## run the tests and the docstrings' examples
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

test-lowest:  ## the same with the lowest version of everything that pyproject.toml declares, in .venv/lowest
	$(PYTHON) -m venv --clear .venv/lowest
	$(PYTHON) .ci/lowest_versions.py > .venv/lowest/constraints.txt
	.venv/lowest/bin/python -m pip install -c .venv/lowest/constraints.txt -e '.[dev]'
	.venv/lowest/bin/python .ci/torchvision_operators.py
	.venv/lowest/bin/python -m pytest -n 2 --dist worksteal

wheel: .venv/.dev  ## build and check wheel and sdist, install the wheel where nothing is, run the README's first example
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv/wheel
	.venv/wheel/bin/python -m pip install dist/*.whl
	cd .venv/wheel && bin/python ../../.ci/first_example.py

matrix: .venv/.dev  ## try all pairs of techniques that changed since they were tried, and each on models people have
	$(BIN)/python -m tests.conformance.matrix --run
	$(BIN)/python benchmarks/models.py --save benchmarks/results/models.md

mutants: .venv/.dev  ## change the package in 150 small ways and see which the tests notice; goes on where it stopped
	$(BIN)/python .ci/mutants.py

lint: .venv/.dev  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev  ## rewrite the generated files
	$(BIN)/python -m lightning_reg generate
	$(BIN)/python -m tests.conformance.matrix
	$(BIN)/python docs/_site/generated.py

site: .venv/.docs  ## build the documentation into build/site; a link or reference that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-test: site  ## load the site in a browser (CHROMIUM, CHROMEDRIVER: where it is): no complaint, search, formulas
	$(BIN)/python -m pytest docs/_site/test_site.py

notebooks: .venv/.dev  ## run the notebooks of those scripts in examples/ that have changed, and keep their outputs
	$(BIN)/python .ci/notebooks.py

clean:  ## remove .venv, caches and builds
	rm -rf .venv .mutants build dist .mypy_cache .pytest_cache .ruff_cache checkpoints lightning_logs *.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps lie in .venv, so removing it starts anew. A stamp is written last: what broke off is done again.
.venv/.made:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	touch $@

.venv/.demo: pyproject.toml | .venv/.made
	$(BIN)/python -m pip install --no-compile -e '.[examples]'  # what the demo imports is compiled when it is imported
	touch $@

# The pages are made of the cases in the tests, so that what tests need is needed too.
.venv/.docs: .venv/.dev
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

# The development set holds the examples' set.
.venv/.dev: pyproject.toml | .venv/.made
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python .ci/torchvision_operators.py
	touch .venv/.demo $@
