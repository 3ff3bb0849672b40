# The verbs of the project. `make demo` and `make test` need nothing but Python 3.11+ and make; both set up one shared .venv.
PYTHON ?= python3
# An extra index for torch, for people whose pip would take a CUDA build:  make demo TORCH_INDEX=URL
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BORDER := $(VENV)/.border

.PHONY: demo test test-slow lint same bench gpu evidence vllm docs clean

demo: $(READY) ## train five arms at equal parameters and FLOPs on bundled text, and judge (a few minutes)
	$(BIN)/nengram compare demo --out runs/demo --resume

test: $(BORDER) ## the default suite
	$(BIN)/python -m pytest

test-slow: $(BORDER) ## what the default suite leaves out
	$(BIN)/python -m pytest -m "slow and not network and not vllm"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

same: $(READY) ## 20 tiny steps of every arm against the committed losses: a refactor changes nothing
	$(BIN)/python scripts/same.py

bench: $(READY) ## ratios in one run; results land in benchmarks/results
	$(BIN)/python -m benchmarks

gpu: $(READY) ## addresses and losses on a CUDA device against the CPU's; writes benchmarks/results/gpu.json
	$(BIN)/python scripts/gpu.py

evidence: $(READY) ## every sweep of experiments/, about ten core-hours; what has a row is not run again, so stop and go on at will
	test -f data/facts/manifest.json || $(BIN)/nengram data fetch facts
	set -e; for sweep in $(wildcard experiments/*/sweep.toml); do $(BIN)/nengram sweep $$sweep --out $$(dirname $$sweep); done
	$(BIN)/python experiments/2026-11-22-history/run.py

vllm: ## our plug-in in vLLM on the CPU, in an environment of its own (3 GB): the exact tokens of our own model
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet uv
	.venv-vllm/bin/uv pip install --quiet --python .venv-vllm $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) --overrides environments/vllm/overrides.txt -r environments/vllm/requirements.txt -e .
	.venv-vllm/bin/python -m pytest -s -m vllm tests/hf/test_vllm.py

docs: $(READY) ## regenerate the tables that stand in README and docs
	$(BIN)/python scripts/docs.py

$(BORDER): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[test,border]"
	touch $(BORDER)

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nengram needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[test]"
	touch $(READY)
