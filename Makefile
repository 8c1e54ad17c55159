# `make help` lists the targets: what stands behind `##` is their line there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CARD ?= params/tiny.yaml
CORES ?= 2
BIN := $(VENV)/bin
# nbval in one sequence (03 reads what 02 wrote) beside the unit tests: conftest.py schedules it so
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with=tests/nbval.cfg --nbval-cell-timeout=300
unexport MPLBACKEND

.PHONY: help demo test lab retrain bench report rehearse rehearse-all preflight clean

help:  ## this list
	@echo 'make demo runs the whole argument on the embedded model, make test checks everything. All targets:'
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.installed  ## run all notebooks of a card, then the report (CARD=params/tiny.yaml CORES=2)
	$(BIN)/python -m icl_lib.commands.demo "$(CARD)" --cores $(CORES)

test: $(VENV)/.installed-test  ## run all tests, and the notebooks against their outputs
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(NBVAL) tests notebooks

lab: $(VENV)/.installed  ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

retrain: $(VENV)/.installed  ## make the embedded model and its SAEs again from nothing
	$(BIN)/python -m icl_lib.commands.retrain

# common.py and sae_peers.py are parts of the others
bench: $(VENV)/.installed-bench  ## measure speed beside other libraries
	for script in $(filter-out %/common.py %/sae_peers.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# the card on small stand-ins, offline (torch writes some SAE formats): `make rehearse CARD=gemma-2-9b`
rehearse: $(VENV)/.installed-test  ## run a card on small stand-ins, offline (CARD=gemma-2-9b)
	$(BIN)/python -m icl_lib.commands.rehearse "$(CARD)"

rehearse-all: $(VENV)/.installed-test  ## the same for every card but the embedded model's
	$(BIN)/python -m icl_lib.commands.rehearse --all

# what the card needs: `make preflight CARD=params/gemma-2-9b.yaml DEVICES=8xv5e`
preflight: $(VENV)/.installed  ## what a card needs, and whether it fits (CARD=... DEVICES=8xv5e)
	$(BIN)/python -m icl_lib.commands.preflight "$(CARD)" --devices $(or $(DEVICES),cpu)

report: $(VENV)/.installed  ## make the report of the last run of a card again (CARD=...)
	$(BIN)/python -m icl_lib.commands.report "$(CARD)"

clean:  ## delete all results (runs/) and the state of snakemake
	rm -rf runs .snakemake

# A stamp a set of packages, so that only a change of what is needed installs again.
$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# transformer-lens, a part of sae-lens, may bring a torchvision that does not fit the CPU build of torch; nothing here needs one
$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@ $(VENV)/.installed
