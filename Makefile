# `make` alone lists every command. A training target is <paper>-<experiment>: a new <paper>/configs/<experiment>.yaml is a new target.

SEEDS ?= 0
DATA ?= data
RUNS ?= runs
DEVICE ?= auto
PRECISION ?= fp32
THREADS ?= 0
EPOCHS ?=
INCEPTION ?=
DATASET ?=
UNOFFICIAL ?=
ALL ?=
COMMANDS ?=
ENGINE ?= local
JOBS ?= 2
TIME ?= 240
STATUS ?=
FLAGS ?=

# A misspelt variable would be ignored in silence, and so would SEEDS="0,1".
KNOWN := SEEDS DATA RUNS DEVICE PRECISION THREADS EPOCHS INCEPTION DATASET UNOFFICIAL ALL COMMANDS FLAGS PYTHON ENGINE JOBS TIME STATUS
NEAREST = python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1, cutoff=0.5))'
$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $(v))),$(if $(filter $(v),$(KNOWN) MAKEFLAGS MAKEOVERRIDES -*-command-variables-*-),,\
  $(error unknown variable $(v); did you mean $(or $(shell $(NEAREST) $(v) $(KNOWN)),one of $(KNOWN))?))))
comma := ,
$(if $(or $(findstring $(comma),$(SEEDS)),$(if $(strip $(SEEDS)),,empty)),$(error SEEDS="$(SEEDS)": expected whole numbers between spaces, as SEEDS="0 1 2"))

HOW = --data "$(DATA)" --runs "$(RUNS)" --device $(DEVICE) --threads $(THREADS) --precision $(PRECISION) $(if $(INCEPTION),--inception "$(INCEPTION)")
MORE = $(if $(UNOFFICIAL),--unofficial-data) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(DATASET),--dataset "$(DATASET)") $(FLAGS)
CONFIGS := $(sort $(wildcard */configs/*.yaml))
TARGETS := $(foreach c,$(CONFIGS),$(firstword $(subst /, ,$(c)))-$(basename $(notdir $(c))))
SEEDED := $(foreach t,$(TARGETS),$(SEEDS:%=$(t)@%))
PAPERS := $(sort $(foreach c,$(CONFIGS),$(firstword $(subst /, ,$(c)))))

# `make … PYTHON=…` uses an environment of your own; without it, .venv is made once, and again when pyproject.toml changes.
ifeq ($(origin PYTHON),command line)
READY :=
$(if $(shell "$(PYTHON)" -c 'from importlib.util import find_spec as f; print(f("torch") and f("torchvision") and "yes")' 2>/dev/null | grep yes),,\
  $(error PYTHON=$(PYTHON) cannot import torch and torchvision; install this repository there: $(PYTHON) -m pip install -e '.[test]'))
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif

.DEFAULT_GOAL := help
COMMON := help setup test torture lint diff results pending farm clean bench
.PHONY: $(COMMON) $(TARGETS) $(SEEDED) $(PAPERS)

help:
	@echo "Train, evaluate and diff (what it takes: SEEDS=\"0 1 2\" DATA=folder DEVICE=cpu|cuda EPOCHS=n PRECISION=fp32|bf16 RUNS=folder THREADS=n INCEPTION=file UNOFFICIAL=1 DATASET=folder:path FLAGS=\"--any-field value\"):"
	@$(foreach c,$(CONFIGS),printf '  make %-34s %s\n' '$(firstword $(subst /, ,$(c)))-$(basename $(notdir $(c)))' "$$(sed -n '1s/^# *//p' $(c))";)
	@echo "Everything else:"
	@printf '  make %-34s %s\n' \
	  setup "make .venv (PYTHON=… uses an environment of your own instead)" \
	  test "set up, run the tests" \
	  torture "kills, damaged files, full disks by the thousand (about two minutes)" \
	  bench "milliseconds of a step and its share of the machine's ceiling; bench-<paper>-<experiment> for one" \
	  lint "ruff" \
	  diff "published vs reference vs yours (ALL=1: also the numbers without a run)" \
	  results "collect complete runs into the results that the pages show" \
	  pending "reference runs still missing, the most valuable first (COMMANDS=1: as commands)" \
	  farm "the pending seeds as jobs: ENGINE=local|slurm JOBS=at-once TIME=minutes; STATUS=1: what became of them" \
	  clean "delete .venv and caches; runs and data stay"

setup: $(READY)

.venv/ready: pyproject.toml
	@python=""; for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed; none was found on PATH. Install it, or name one: make PYTHON=…" >&2; exit 2; fi; \
	echo "setting up .venv (about 6 GB with PyTorch's CUDA libraries, once; a CPU-only environment of your own: PYTHON=…)" >&2; \
	$$python -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test]' || \
	  { echo "set-up with the versions of constraints.txt did not work (above): trying the newest that pyproject.toml allows"; .venv/bin/python -m pip install --quiet -e '.[test]'; }
	@touch $@

# One target a seed, <paper>-<experiment>@<seed>, so that `make -j 2` runs two of them at once; each is a process of its own.
# A baseline has a file of its own: mnist-m1m2 is trained by m1m2.py.
$(foreach t,$(TARGETS),$(eval $(t): $(SEEDS:%=$(t)@%)))
PAPER = $(firstword $(subst -, ,$@))
EXPERIMENT = $(firstword $(subst @, ,$(patsubst $(PAPER)-%,%,$@)))
THIS_SEED = $(lastword $(subst @, ,$@))
LAST = $(if $(findstring -,$(EXPERIMENT)),$(lastword $(subst -, ,$(EXPERIMENT))))
MODULE = $(or $(and $(LAST),$(wildcard $(PAPER)/$(LAST).py),$(LAST)),train)

$(SEEDED): $(READY)
	@"$(PYTHON)" -m $(PAPER).$(MODULE) $(EXPERIMENT) --seed $(THIS_SEED) $(HOW) $(MORE)
	@"$(PYTHON)" -m $(PAPER).eval $(EXPERIMENT) --seed $(THIS_SEED) $(HOW) $(MORE)

$(TARGETS):
	@"$(PYTHON)" -m common.diff show $(PAPER) --experiment $(EXPERIMENT) --runs "$(RUNS)"

$(PAPERS):
	@echo "$@ has these experiments:"
	@$(foreach c,$(filter $@/%,$(CONFIGS)),printf '  make %-34s %s\n' '$@-$(basename $(notdir $(c)))' "$$(sed -n '1s/^# *//p' $(c))";)

test: $(READY)
	@DATA="$(DATA)" OMP_NUM_THREADS=1 "$(PYTHON)" -m pytest -n 2

torture: $(READY)
	@"$(PYTHON)" -m tests.torture

BENCHES := $(addprefix bench-,$(TARGETS))
.PHONY: $(BENCHES)
bench: $(addprefix bench-,$(addsuffix -mnist,$(PAPERS)))

$(BENCHES): $(READY)
	@one=$(patsubst bench-%,%,$@); "$(PYTHON)" -m tests.bench $${one%%-*} $${one#*-} --device $(DEVICE) --threads $(THREADS) $(FLAGS)

lint: $(READY)
	@"$(PYTHON)" -m ruff check .

diff: $(READY)
	@"$(PYTHON)" -m common.diff show --runs "$(RUNS)" $(if $(ALL),--all)

results: $(READY)
	@"$(PYTHON)" -m common.diff collect --runs "$(RUNS)"

AS_COMMANDS = "$(PYTHON)" -m common.diff commands $(HOW) --flags='$(subst ','\'',$(MORE))'

pending: $(READY)
	@$(if $(COMMANDS),$(AS_COMMANDS),"$(PYTHON)" -m common.diff pending --runs "$(RUNS)")

farm: $(READY)
	@$(if $(STATUS),,$(AS_COMMANDS) |) "$(PYTHON)" -m common.farm --engine $(ENGINE) --jobs $(JOBS) --time $(TIME) --runs "$(RUNS)" $(if $(STATUS),--status)

.DEFAULT:
	@near="$$($(NEAREST) '$@' $(COMMON) $(TARGETS) $(PAPERS) $(BENCHES))"; \
	echo "error: there is no target $@$${near:+; did you mean $$near?} (make alone lists all)" >&2; exit 2

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
