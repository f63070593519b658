PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8501

.DEFAULT_GOAL := help
.PHONY: help setup run test bench lint clean

help:  ## list every target
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# The stamp is as new as the requirements it was made from: a second run installs nothing.
$(VENV)/app.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/app.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

setup: $(VENV)/app.stamp  ## build the environment in .venv, nothing else

run: setup  ## open the app on http://localhost:8501
	$(BIN)/python -m streamlit run app.py --server.port $(PORT)

test: $(VENV)/dev.stamp  ## run every test; real cells from BLASTOSCOPE_DATA, Chromium where one is found
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/dev.stamp  ## check and format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/dev.stamp  ## print the benchmark tables (needs BLASTOSCOPE_DATA)
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.runtimes
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.input_pipeline
	$(BIN)/python -m benchmarks.training_speed
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.size_alone
	$(BIN)/python -m benchmarks.folds
	$(BIN)/python -m benchmarks.patients
	$(BIN)/python -m benchmarks.intervals
	$(BIN)/python -m benchmarks.imaging
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.unlike

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
