# demo and test need nothing but Python 3.11+: each makes .venv, installs into it what it needs with
# the versions of constraints.txt, and does its work. From the second time on it starts at once, until
# pyproject.toml or constraints.txt change. VENV=path is an environment of your own: made if it is not
# there, else used as it is, and only what it lacks is installed.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_run
ARGS ?=

export OMP_NUM_THREADS ?= 2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.mimic_fast
# Ours to fill and to pin: the default one, and one that an earlier make created.
OURS := $(or $(filter file,$(origin VENV)),$(wildcard $(STAMP)),$(if $(wildcard $(VENV)),,absent))

.DEFAULT_GOAL := help
.PHONY: demo test test-gpu check bench bench-ops bench-scaling clean help core all venv

demo: core  ## purify a small backdoored encoder and write its report (minutes on two cores)
	@$(PY) -m mimic_fast demo --out "$(OUT)" $(ARGS)

test: all  ## run the tests, all but the slow ones, on all cores (ARGS='-n 0 -k name': part, on one)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: all  ## lint, formatting, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m basedpyright

bench: all  ## time a purification against a plain training loop
	@$(PY) benchmarks/bench_e2e.py $(ARGS)

bench-scaling: all  ## time two processes with and without synchronized gradients; project to 64 GPUs
	@$(PY) benchmarks/bench_scaling.py measure $(ARGS)
	@$(PY) benchmarks/bench_scaling.py project

bench-ops: all  ## time losses and mutual information against their peers on the CPU; count bytes
	@$(PY) benchmarks/bench_loss.py
	@$(PY) benchmarks/bench_mi.py
	@$(PY) benchmarks/bench_traffic.py

test-gpu: all  ## run the GPU's tests, and the benchmarks of losses and mutual information on it
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "error: make test-gpu needs a CUDA device, and torch sees none here" >&2; exit 2; }
	@env -u TRITON_INTERPRET $(PY) -m pytest -m gpu $(ARGS)
	@env -u TRITON_INTERPRET $(PY) benchmarks/bench_loss.py --device cuda
	@env -u TRITON_INTERPRET $(PY) benchmarks/bench_mi.py --device cuda

clean:  ## remove what builds, tests and the demo left (.venv stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_run
	@find . -name .venv -prune -o -name __pycache__ -exec rm -rf {} +

help:  ## this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

# $(call install,REQUIREMENT,STAMPS THAT WILL DO,PACKAGES IT BRINGS)
ifneq ($(OURS),)
define install
	@sum=$$(cat pyproject.toml constraints.txt | cksum); has=$$(cat "$(STAMP)" 2>/dev/null || :); \
	for enough in $(2); do [ "$$has" = "$$enough $$sum" ] && exit 0; done; \
	echo "installing $(1) into $(VENV); several GB and minutes the first time"; \
	$(PY) -m pip install -q -c constraints.txt -e '$(1)' && echo "$@ $$sum" > "$(STAMP)"
endef
else
define install
	@$(PY) -I -c 'import sys; from importlib.metadata import version; list(map(version, sys.argv[1:]))' \
	  $(3) 2>/dev/null || { \
	  echo "installing $(1) into $(VENV); what it has already stays, if in range"; \
	  $(PY) -m pip install -q -e '$(1)'; }
endef
endif

core: venv
	$(call install,.,core all,mimic_fast)

all: venv
	$(call install,.[all$(,)dev],all,mimic_fast pytest pytest-timeout pytest-xdist hypothesis beartype ruff basedpyright \
	  fast-histogram scikit-learn scikit-video scipy statsmodels playwright onnx)

# One that was only half made, or whose Python is gone, is made again; never one that is not ours.
venv:
	@[ -n "$(OURS)" ] || $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: VENV=$(VENV) has no Python 3.11 or newer at bin/python" >&2; exit 2; }
	@[ -z "$(OURS)" ] || $(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: Python 3.11 or newer is needed and '$(PYTHON)' is not;" \
	      "name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	  $(PYTHON) -m venv --clear "$(VENV)" && echo made > "$(STAMP)"; }

, := ,
