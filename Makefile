PYTHON ?= python3
BIN := .venv/bin
FOLDERS := index engine triton_kernels networks bench

.PHONY: install demo test lint types tables clean

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard engine/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Build a database of real images, sample, and explain one sample: look into demo/.
demo: install
	test -d demo/db || $(BIN)/els build embedded:fashion-mnist -o demo/db
	$(BIN)/els sample demo/db -n 16 --steps 20 --machine ELS --boundary zeros \
		--sizes fashion-mnist-resnet --seed 0 -o demo/run
	$(BIN)/els explain demo/run --sample 2 --step 9

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror engine/csrc/*
	$(BIN)/python -m els.bench.report tables --check

# mypy does not follow package_dir, so it is shown the packages where they will be installed.
types: install
	mkdir -p build/types/els
	for folder in $(FOLDERS); do ln -sfn $(CURDIR)/$$folder build/types/els/$$folder; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases \
		$(foreach folder,$(FOLDERS),-p els.$(folder))

# The docs' tables, from the result files in bench/results.
tables: install
	$(BIN)/python -m els.bench.report tables

clean:
	rm -rf .venv build demo *.egg-info engine/*.so
