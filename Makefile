# Each target sets up what it needs. PYTHON may name any Python >= 3.11; EXTRA=gpu installs faiss-gpu instead of faiss-cpu.
PYTHON ?= python3
EXTRA  ?= cpu
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-cluster lint bench image clean

demo: $(VENV)/.installed
	$(BIN)/manymodes run digits --out runs/digits

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# A node that dies; two Ray nodes, S3 storage and MLflow on PostgreSQL, all on loopback; needs PostgreSQL's server.
test-cluster: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),test,services]'
	timeout 600 $(BIN)/python -m pytest -m slow tests/cluster
	timeout 1500 $(BIN)/python tests/cluster/two_nodes.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed-test
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

image:
	deploy/image/build.sh $(EXTRA)

# The stamps make a second call free; a changed pyproject.toml or constraints.txt installs again.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "manymodes needs Python >= 3.11; call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),test]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
