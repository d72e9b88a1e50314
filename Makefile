# The commands of the README: `make table` and `make test`; both set themselves up.
# ACCELERATOR picks the jax build: cpu (default), cuda12, cuda13 or tpu.
ACCELERATOR ?= cpu
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: table test reproduce figures notebooks docs setup lint slow interop fuzz mutants pods clean

table: setup
	$(BIN)/python -m experiments.perplexity_table $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest $(ARGS)

slow: .venv/test
	$(BIN)/python -m pytest -m slow $(ARGS)

# Damaged files of every kind: what becomes of them, as a table.
fuzz: .venv/test
	$(BIN)/python tests/fuzz.py --cases 4000 $(ARGS)

# How strong the tests are: changes of the core, and whether a test fails (docs/mutants.md).
mutants: .venv/test .venv/mutants
	$(BIN)/python tests/mutants.py $(ARGS)

# Exported files, loaded by the tools that own their formats.
interop: .venv/test .venv/interop
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/test_gguf_export.py $(ARGS)

# What TPUs run, compiled by their compiler, which needs no TPU. An environment of its own: libtpu would look for a TPU in
# every other command.
PODS := TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-8 JAX_PLATFORMS=cpu .venv-tpu/bin/python
pods: .venv-tpu/tpu
	$(PODS) -m pytest -n 0 tests/test_blocked.py -k compiles
	$(PODS) -m benchmarks.pods $(ARGS)

.venv-tpu/tpu: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[experiments,tpu,pods]'
	touch $@

# The rows of README's table again, and where a figure left the kept one's interval; about 15 minutes.
reproduce: setup
	$(BIN)/python -m experiments.reproduce $(ARGS)

# Draws every figure of experiments/results/ anew from the kept rows; the same bytes on the same machine.
figures: setup
	$(BIN)/python -m paper_figures experiments/results

# Executes the notebooks anew, with the default model; ARGS names some of them.
notebooks: .venv/notebooks
	$(BIN)/python -m experiments.notebooks $(ARGS)

# Writes the tables of README.md and docs/ from result files, then the site: docs/_build/html/index.html.
docs: .venv/docs
	$(BIN)/python docs/tables.py
	rm -rf docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d docs/_build/doctrees . docs/_build/html

lint: .venv/test .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/tables.py --check

setup: .venv/$(ACCELERATOR)

# One stamp an extra: a set-up is repeated only when its requirements change.
.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jquant needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/%: pyproject.toml constraints.txt | .venv/python
	$(PIP) --editable '.[experiments,$*]'
	touch $@

clean:
	rm -rf .venv
