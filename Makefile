PYTHON ?= python3.11
# A folder for each version, so that one does not undo another.
VENV ?= $(if $(filter python3.11,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# curvlinops is an oracle in the tests. It asks for torchvision by way of backpack, but does not
# use it, and a torchvision that was built for another torch breaks `import transformers`. So these
# two come without their dependencies, and what they do use is named.
ORACLE := curvlinops-for-pytorch backpack-for-pytorch
ORACLE_NEEDS := einconv einops linear_operator opt-einsum scipy tqdm unfoldNd

.DEFAULT_GOAL := help
.PHONY: help install chromium run demo test test-slow test-all notebooks docs lint bench speed wheel \
	check-fresh audit-dependencies clean

help: ## show this text
	@echo "make <target> [PYTHON=python3.11]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

install: $(STAMP) ## make a virtual environment with the package (editable) and what its tests need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]' $(ORACLE_NEEDS)
	$(BIN)/pip install -c constraints.txt --no-deps $(ORACLE)
	touch $@

# The tests of the app drive a browser. Without one they are skipped, and the rest is not.
chromium: ## install the browser of the tests, where that is possible
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends chromium >/dev/null; } \
		|| echo "*** NO CHROMIUM: the tests in a browser will be SKIPPED. Install it: apt-get install chromium ***"

run: install ## audit the demo: the report and the cleaned data go to runs/demo
	$(BIN)/hf-ecif audit --model spaces_demo/model --dataset spaces_demo/data --split train \
		--query spaces_demo/data --query-split validation --truth-column is_misaligned \
		--output runs/demo --overwrite

demo: install ## look at the demo's audit in a browser
	$(BIN)/hf-ecif demo

# Two at a time with a thread each: tiny models gain nothing from threads of their own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
SLOW := $(PYTEST) --dist loadfile -m slow tests
NOTEBOOKS := $(PYTEST) --nbmake notebooks

test: install chromium ## run the fast tests and the examples in docstrings, in minutes; print the coverage
	$(PYTEST) --dist loadfile -m "not slow" --doctest-modules --cov --cov-report=term hf_ecif tests

test-slow: install chromium ## run the others: kills, processes, the whole app, benchmarks, notebooks
	status=0; $(SLOW) || status=1; $(NOTEBOOKS) || status=1; exit $$status

test-all: test test-slow ## run all tests

notebooks: install ## run the notebooks and keep their outputs
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbmake --overwrite notebooks

docs: install ## build the guides and the reference, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: install ## check style, formatting, types and the order of the packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

BENCHES := detection detection_peers natural ablations threshold cleaning fidelity leverage edit curves trace words suggestions

bench: install ## run every experiment in brief, into runs/bench; in full: python -m tests.benchmarks.NAME
	@for name in $(BENCHES); do \
		echo "$$name"; \
		$(BIN)/python -m tests.benchmarks.$$name --quick --output runs/bench/$$name.json || exit 1; \
	done

speed: install ## measure what the engine costs, beside its floors (half an hour, nothing beside it)
	$(BIN)/python -m tests.benchmarks.engine

wheel: install ## build the wheel and the source distribution, into dist
	$(BIN)/pip install -q -c constraints.txt build
	$(BIN)/python -m build

# All that a newcomer does first, on what is committed: the README's commands, the pages, the wheel.
check-fresh: ## clone into a temporary folder, and there run, build the docs, and audit from the wheel
	fresh=$$(mktemp -d) && git clone -q . $$fresh/clone && cd $$fresh/clone \
		&& $(MAKE) run docs wheel PYTHON=$(PYTHON) \
		&& $(PYTHON) -m venv $$fresh/empty && $$fresh/empty/bin/pip install -q dist/*.whl \
		&& cd $$fresh && empty/bin/hf-ecif audit --demo --output audit && rm -rf $$fresh

audit-dependencies: install ## look up the pinned versions among known vulnerabilities (needs a network)
	$(BIN)/pip install -q pip-audit && $(BIN)/pip-audit --no-deps --disable-pip -r constraints.txt

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
