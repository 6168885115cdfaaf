# The commands of this repository, from a clean clone on; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install protos format check check-code check-protos test demo bench
.PHONY: prove-attacks prove-batch prove-bundles prove-continued prove-durability prove-freshness prove-gpu prove-hosts
.PHONY: prove-log prove-node prove-pages prove-reading prove-redis prove-resume prove-rolls prove-skew prove-soak
.PHONY: prove-tuning
.PHONY: bench-sizing clean

VENV := .venv
BIN := $(VENV)/bin
VENV_PROTOS := .venv-protos
BUNDLE ?= build/demo/bundle
PROTOS := $(wildcard protos/penchant/v1/*.proto)
BUILD := build

# The first of these that is new enough; PYTHON=/path/to/python says another.
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell $(p) -c \
	'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

# OpenMP threads that spin while they wait take the cores of everything else.
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.ready-dev  ## everything that development needs, into .venv
	@echo 'ready: $(BIN)/penchant --help'

protos: $(VENV_PROTOS)/.ready  ## the stubs in penchant/v1, from protos/
	$(call generate,.)

format: $(VENV)/.ready-dev  ## format the code and correct what the linter can correct
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

check: check-code check-protos  ## format, lint, types, import rules, protos; changes nothing

check-code: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/architecture_rules.py
	$(BIN)/python tests/shape.py --check
	$(BIN)/python tests/lua_syntax.py
	$(BIN)/python -m benchmarks.tables --check

check-protos: $(VENV)/.ready-dev $(VENV_PROTOS)/.ready
	$(BIN)/buf lint
	.ci/buf-breaking $(BIN)/buf
	rm -rf $(BUILD)/stubs && mkdir -p $(BUILD)/stubs
	$(call generate,$(BUILD)/stubs)
	@diff -r --exclude=__init__.py --exclude=__pycache__ $(BUILD)/stubs/penchant/v1 penchant/v1 \
		|| { echo 'penchant/v1 is not what protos/ makes: run `make protos`' >&2; exit 1; }

# A file's tests stay together, for they share servers and models. JOBS=0 runs them all in one process.
JOBS ?= 2
test: $(VENV)/.ready-dev  ## every test, two files at a time; TESTS='tests/features -k fold' runs some, JOBS=N more at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

demo: $(VENV)/.ready-demo  ## everything in minutes: data, training, bundle, service, measurement
	$(BIN)/penchant demo

bench: $(VENV)/.ready-demo  ## the cost of a request, stage by stage; BUNDLE=PATH takes another bundle than the demo's
	@[ -e $(BUNDLE)/manifest.json ] || $(MAKE) demo
	$(BIN)/penchant bench stages $(BUNDLE)

prove-redis: $(VENV)/.ready-dev  ## Redis in trouble, a cluster, 10,000 calls that end early: the tests at full size
	$(BIN)/python -m benchmarks.report redis-trouble 'Redis in trouble' -- $(BIN)/python -m tests.proofs.redis_trouble

prove-log: $(VENV)/.ready-dev  ## bytes of an event and a slate, and that the memory of the log levels off; ENTRIES=N, SECONDS=N
	$(BIN)/python -m benchmarks.report log-size 'What the log holds' -- \
		$(BIN)/python -m tests.proofs.log_size $(or $(ENTRIES),50000) $(or $(SECONDS),40)

prove-resume: $(VENV)/.ready-dev  ## 20 random kills of a training, which must end like an undisturbed one
	$(BIN)/python -m benchmarks.report training_resume 'A training killed again and again' -- $(BIN)/penchant bench kills

prove-tuning: $(VENV)/.ready-dev  ## 5 random kills of a search for settings, which must end like an undisturbed one; DATA=TABLES
	$(BIN)/python -m benchmarks.report tuning 'A search for settings killed again and again' -- \
		$(BIN)/python -m tests.proofs.tuning $(if $(DATA),--data $(DATA)) --trials $(or $(TRIALS),8) --kills 5

prove-continued: $(VENV)/.ready-dev  ## a day of new events: a training from yesterday's run against a full one; DATA=TABLES, TEST_DAYS=N
	$(BIN)/python -m benchmarks.report training-continued 'A day of new events' -- \
		$(BIN)/penchant bench continued $(DATA) --out $(BUILD)/continued --test-days $(or $(TEST_DAYS),1)

prove-durability: $(VENV)/.ready-dev  ## 200 kills, 20 power losses, 1,000 lost replies: nothing lost, nothing doubled
	$(BIN)/python -m benchmarks.report durability-replies 'Replies lost after Redis did the work' \
		-- $(BIN)/python -m tests.proofs.lost_replies
	$(BIN)/python -m benchmarks.report durability-power 'Power losses of the events Redis' \
		-- $(BIN)/python -m tests.proofs.power_loss
	$(BIN)/python -m benchmarks.report durability-kills 'Everything killed at random while events come in' \
		-- $(BIN)/python -m tests.proofs.kills

prove-batch: $(VENV)/.ready-dev  ## a batch answers as the service does; USERS=N
	$(BIN)/python -m benchmarks.report batch 'A batch answers as the service does' -- \
		$(BIN)/python -m tests.proofs.batch --users $(or $(USERS),1000)

COUNT ?= 2000
prove-bundles: $(VENV)/.ready-dev  ## hostile bundles: each is refused by name, or is sound; COUNT=N, SEED=N
	$(BIN)/python -m benchmarks.report bundles 'Bundles that were tampered with' -- \
		$(BIN)/python -m tests.proofs.bundles --count $(COUNT) --seed $(or $(SEED),1) --exported

LIVES ?= 2000
prove-skew: $(VENV)/.ready-dev  ## thousands of random lives: online, replayed from Parquet, by an oracle; LIVES=N, SEED=N
	$(BIN)/python -m benchmarks.report no-skew 'One history, read five ways' -- \
		$(BIN)/python -m tests.proofs.skew --lives $(LIVES) --seed $(or $(SEED),1)

FILES ?= 2000
prove-reading: $(VENV)/.ready-dev  ## tables in every form, read by Penchant and by pyarrow or polars; FILES=N, SEED=N
	$(BIN)/python -m benchmarks.report reading 'Tables in every form, read by two readers' -- \
		$(BIN)/python -m tests.proofs.reading --files $(FILES) --seed $(or $(SEED),1)

EXAMPLES ?= 2000
prove-pages: $(VENV)/.ready-dev  ## generated users, rules and catalogues: every page is full or says why; EXAMPLES=N, SEED=N
	$(BIN)/python -m benchmarks.report pages 'Every page is full, or says why it is not' -- \
		$(BIN)/python -m tests.proofs.pages --examples $(EXAMPLES) --seed $(or $(SEED),1)

prove-node: $(VENV)/.ready-dev  ## the JavaScript of docs/backend.md against a service; needs node and npm
	npm install --silent --no-fund --no-audit --prefix $(BUILD)/node @grpc/grpc-js@1 @grpc/proto-loader@0
	$(BIN)/python -m tests.proofs.node $(BUILD)/node

SIZES ?= 1000 50000
bench-sizing: $(VENV)/.ready-demo  ## the resources to provide: memory, disk and processor time; SIZES='ITEMS ITEMS'
	for items in $(SIZES); do \
		out=$(BUILD)/sizing/$$items; \
		[ -e $$out/bundle/manifest.json ] && continue; \
		$(BIN)/penchant data simulated --out $$out/data --set users=2000 --set items=$$items; \
		$(BIN)/penchant train $$out/data --out $$out/run --set epochs=1; \
		$(BIN)/penchant export $$out/run --out $$out/bundle; \
	done
	$(BIN)/python -m benchmarks.report sizing 'Resources to provide' -- \
		$(BIN)/penchant bench sizing $(foreach items,$(SIZES),$(BUILD)/sizing/$(items)/bundle)

MINUTES ?= 60
prove-soak: $(VENV)/.ready-dev  ## an hour at 100 requests a second with all logging on: nothing grows; MINUTES=N, RATE=N
	$(BIN)/python -m benchmarks.report soak 'An hour with all logging on' -- \
		$(BIN)/python -m tests.proofs.soak --minutes $(MINUTES) --rate $(or $(RATE),100)
prove-rolls: $(VENV)/.ready-dev  ## 100 stops, 20 rolling changes, kills, under load: no call is lost; NODE=node_modules
	$(BIN)/python -m benchmarks.report rolls 'Stops and rolling changes under load' -- \
		$(BIN)/python -m tests.proofs.rolls --stops $(or $(STOPS),100) --rolls $(or $(ROLLS),20) \
		$(if $(NODE),--node $(NODE))
SECONDS ?= 60
prove-attacks: $(VENV)/.ready-dev  ## a service under every known attack, and an hour later; SECONDS=N for each, LATER=MINUTES
	$(BIN)/python -m benchmarks.report attacks 'A service under attack' -- \
		$(BIN)/python -m tests.proofs.attacks --seconds $(SECONDS) --settle $(or $(SETTLE),30) --later $(or $(LATER),60)

prove-freshness: $(VENV)/.ready-demo  ## 100,000 events, each in the very next answer of another worker
	@[ -e $(BUNDLE)/manifest.json ] || $(MAKE) demo
	$(BIN)/python -m benchmarks.report read-your-writes 'What one worker writes, the other one answers with' -- \
		$(BIN)/penchant bench freshness $(BUNDLE) --pairs 100000 --callers 8
	$(BIN)/python -m benchmarks.report freshness 'From an event to the next answer' -- \
		$(BIN)/penchant bench freshness $(BUNDLE) --pairs 5000

prove-gpu: $(VENV)/.ready-dev  ## a GPU gives the answers of a CPU, and how fast; DATA=TABLES to train on, BUNDLE_ON_GPU=PATH
	$(BIN)/python -m benchmarks.report gpu 'On a GPU' -- $(BIN)/python -m benchmarks.gpu \
		$(if $(DATA),--data $(DATA)) $(if $(BUNDLE_ON_GPU),--bundle $(BUNDLE_ON_GPU)) || [ $$? -eq 3 ]

HOSTS ?= 3
KILLS ?= 20
prove-hosts: $(VENV)/.ready-dev  ## several hosts on one log, killed at random: one warehouse, erased everywhere; HOSTS=N, KILLS=N
	$(BIN)/python -m benchmarks.report hosts 'Several hosts on one pair of Redis' -- \
		$(BIN)/python -m tests.proofs.hosts --hosts $(HOSTS) --kills $(KILLS) --seed $(or $(SEED),1)

clean:  ## remove what builds, tests and tools left; .venv stays
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# One generator call: $(1) is the folder that receives penchant/v1.
define generate
PATH="$(abspath $(VENV_PROTOS))/bin:$$PATH" $(VENV_PROTOS)/bin/python -m grpc_tools.protoc -I protos \
	--python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
endef

# A stamp stands for an environment that is complete for its purpose; it is rebuilt when what it came from changes.
$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $(VENV)/.ready-demo $@

$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV_PROTOS)/.ready: protos/requirements.txt | $(VENV_PROTOS)/bin/python
	$(VENV_PROTOS)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	touch $@

%/bin/python:
	@if [ -z '$(PYTHON)' ]; then \
		echo "Penchant needs Python 3.11 or newer; found $$(python3 --version 2>&1 || echo none)." >&2; \
		echo 'Install it, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; fi
	@$(PYTHON) -m venv $* || { rm -rf $*; \
		echo 'That Python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
