# Everything from a bare checkout: `make demo`, `make test`. `make help` lists the rest.

PYTHON  ?= python3
# Test processes: a number, or `auto` for one a core.
WORKERS ?= auto
# Which benchmarks `make bench` runs.
BENCH   ?= $(sort $(wildcard benchmarks/*.py))

VENV := .venv
BIN  := $(VENV)/bin
RUN  := runs/demo

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all lint format notebooks bench browser clean

help:
	@echo 'make demo      train the tiny model on eight devices and print a sample'
	@echo 'make test      the tests; WORKERS=N, ARGS="-k routing"'
	@echo 'make test-all  the slow ones too'
	@echo 'make lint      ruff format, ruff check, pyright; make format repairs'
	@echo 'make notebooks  run them, and write what they print beside them'
	@echo 'make bench     the benchmarks, or BENCH=benchmarks/NAME.py'
	@echo 'make clean     remove builds and caches (not runs/, not $(VENV)/)'

# ---- The demo's recipe --------------------------------------------------------------------------
demo: $(VENV)/.runtime
	rm -rf $(RUN)
	$(BIN)/gshard-moe train --model tiny --sharding expert_data --run $(RUN)
	$(BIN)/gshard-moe sample --run $(RUN) --prompt 'def ' --temperature 0.5
# -------------------------------------------------------------------------------------------------

test: $(VENV)/.dev browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(ARGS)

test-all: $(VENV)/.dev browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(VENV)/.dev
	@for file in notebooks/*.py; do $(BIN)/python tests/run_notebook.py $$file --write || exit 1; done

bench: $(VENV)/.dev
	@for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- Set-up -------------------------------------------------------------------------------------
# A stamp a stage, so that the demo waits only for what it runs, and a second run for nothing.
# `.unfinished` is there while pip works: an environment in which it was killed is made anew.
PIP    := $(BIN)/python -m pip -qq install -c constraints.txt
# The build backend is constrained too; only the newer pip knows how to.
BUILD  := --build-constraint constraints.txt
EXTRAS := data,aot,aot-gpu,notebooks
STAMPS := $(addprefix $(VENV)/,.ready .runtime .dev)

define install
@rm -f $(STAMPS) && touch $(VENV)/.unfinished
@trap 'exit 130' INT TERM; $(PIP) $(1); status=$$?; \
touch $(VENV)/.ready && rm $(VENV)/.unfinished && exit $$status
endef

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.ready
	@echo 'Setting up $(VENV) to run the library; the first time takes a minute or two.'
	$(call install,$(BUILD) -e .)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.ready
	@echo 'Setting up $(VENV) to run the tests; the first time takes a minute or two.'
	$(call install,$(BUILD) -e '.[$(EXTRAS)]' --group dev)
	@touch $(VENV)/.runtime $@

# The timeline's page is tested in a real browser. Where none can be installed, that test says so.
BROWSERS := chromium chromium-browser google-chrome chrome
APT      := apt-get -qq -o=Dpkg::Use-Pty=0
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	echo 'Installing Chromium for the tests.'; \
	{ $(APT) update && DEBIAN_FRONTEND=noninteractive $(APT) install -y --no-install-recommends chromium; \
	} >/dev/null 2>&1 || echo 'Chromium could not be installed; one must be, for the tests.' >&2

# An environment that is already there and works is used; pip is brought to one that knows groups.
USABLE := -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))'

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { echo \
	"Python must be 3.12 or newer; got $(PYTHON) = $$($(PYTHON) -V 2>&1);" \
	"put a newer one first on PATH, or say: make PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(VENV)/.unfinished ] || ! $(BIN)/python $(USABLE) 2>/dev/null; \
	then $(PYTHON) -m venv --clear $(VENV); fi
	$(call install,pip)
