PYTHON ?= python3
BIN := .venv/bin
FOLDERS := storage index triton_kernels engine runs explain networks cli bench

PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: install demo test test-all lint types docs tables clean

install: .venv/installed-dev

# What is needed to run: `make demo` stops here.
.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard engine/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv and compiling the kernels: some minutes without output."
	$(PIP_INSTALL) --editable .
	touch $@

# The package is there, so this adds what the extra names and compiles nothing again.
.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) 'els-machine[dev]'
	touch $@

# Build a database of real images, sample, and explain one sample: look into demo/.
demo: .venv/installed
	test -d demo/db || $(BIN)/els build embedded:fashion-mnist -o demo/db
	$(BIN)/els sample demo/db -n 8 --steps 20 --machine ELS --boundary zeros \
		--sizes fashion-mnist-resnet --seed 0 -o demo/run
	$(BIN)/els explain demo/run --sample 2 --step 12

# A process per core; more than four would mostly import torch. Whole files stay together as long
# as none is idle, since they share fixtures.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The contributor's tier: what pyproject.toml does not deselect.
test: install
	$(PYTEST)

# The rest, after it: together everything.
test-all: test
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror engine/csrc/*
	$(BIN)/python -m els.bench.tables tables --check

# mypy does not follow package_dir, so it is shown the packages where they will be installed.
types: install
	mkdir -p build/types/els
	for folder in $(FOLDERS); do ln -sfn $(CURDIR)/$$folder build/types/els/$$folder; done
	for name in __init__ __main__; do ln -sfn $(CURDIR)/root/$$name.py build/types/els/$$name.py; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases \
		-m els -m els.__main__ $(foreach folder,$(FOLDERS),-p els.$(folder))

# The site, in build/site; a warning is an error. EXECUTE_EXAMPLES=1 also shows what the examples draw.
docs: install
	$(BIN)/python -m mkdocs build --quiet
	@echo open build/site/index.html

# The docs' tables, from the result files in bench/results.
tables: install
	$(BIN)/python -m els.bench.tables tables

clean:
	rm -rf .venv build demo *.egg-info engine/*.so
