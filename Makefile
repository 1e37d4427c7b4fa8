# `make help` lists the commands. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# Stands when the installation is whole.
STAMP := $(VENV)/.installed
# Stands while pip is at work, so that an interrupted installation is not taken for a whole one.
UNFINISHED := $(VENV)/.unfinished

# For packages that are built from source, pip reads constraints from the environment only.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call step,what is done,command): says what is done, does it, says how long it took.
step = @echo "==> $(1)"; start=$$(date +%s); $(2) && echo "==> Done in $$(( $$(date +%s) - start )) s"

.PHONY: help install demo demo-pretrained test lint check-gpu

help:
	@echo "make demo     install, train the quickstart config on the embedded dataset, evaluate it and draw its masks"
	@echo "make demo-pretrained"
	@echo "              pretrain a classifier on crops of the digits, and show what a detector gains by its weights"
	@echo "make install  install everything into .venv (some 3 GB to download, 6 GB on disk); a second run does nothing"
	@echo "make test     install, then run the test suite in up to 4 processes (ARGS='-k name' picks tests)"
	@echo "make check-gpu"
	@echo "              install, then check in under ten minutes what needs a GPU, and print a table to paste into an issue"
	@echo "make lint     install, then run the linter"
	@echo "PYTHON=python3.12 picks the Python that .venv is made with: 3.10 to 3.13. To start over: rm -rf .venv"

install: $(STAMP)

demo: $(STAMP)
	@$(VENV_PYTHON) tools/demo.py

demo-pretrained: $(STAMP)
	@$(VENV_PYTHON) tools/demo_pretrained.py

test: $(STAMP)
	@$(VENV_PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check-gpu: $(STAMP)
	@$(VENV_PYTHON) tools/check_gpu.py $(ARGS)

lint: $(STAMP)
	@$(VENV_PYTHON) -m ruff check .

$(STAMP): requirements.txt constraints.txt setup.py tools/install_detectron2.py
	@if [ -e $(UNFINISHED) ]; then \
		echo "==> The last installation did not finish: removing $(VENV) and starting again"; rm -rf $(VENV); \
	fi
	@if [ ! -x $(VENV_PYTHON) ]; then $(MAKE) --no-print-directory $(VENV_PYTHON); fi
	@rm -f $(STAMP); touch $(UNFINISHED)
# The warning that is left out is setuptools' note on editable installations, which reads like a defect.
	$(call step,Installing PyTorch and everything else that constraints.txt pins: some 3 GB to download the first time,\
		$(VENV_PYTHON) -m pip install --quiet --upgrade pip && \
		PYTHONWARNINGS=ignore::UserWarning $(VENV_PYTHON) -m pip install --no-warn-conflicts --editable '.[test]')
	@rm $(UNFINISHED)
	$(call step,Installing Detectron2,$(VENV_PYTHON) tools/install_detectron2.py)
	$(call step,Compiling the attention for this CPU,$(VENV_PYTHON) tools/compile_attention.py)
	@touch $(STAMP)
	@echo "==> Installed into $(VENV), which takes $$(du -sh $(VENV) | cut -f1)"

$(VENV_PYTHON):
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || { \
		echo "'$(PYTHON)' does not run. Name a Python 3.10 to 3.13, as in: make install PYTHON=python3.12" >&2; exit 1; }; \
	case $$version in 3.10|3.11|3.12|3.13) ;; *) \
		echo "karat_det needs Python 3.10 to 3.13, and '$(PYTHON)' is Python $$version." >&2; \
		echo "Name another one, as in: make install PYTHON=python3.12" >&2; exit 1;; \
	esac; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: its ensurepip or venv module is missing." >&2; \
		echo "On Debian and Ubuntu: sudo apt install python$$version-venv" >&2; exit 1; }
	$(call step,Making the virtual environment $(VENV) with $$($(PYTHON) --version),$(PYTHON) -m venv --clear $(VENV))
