PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED := $(VENV)/installed
# Tests that use the APIs of other libraries, about five minutes: loading, a few steps, resume, push, handler, ONNX. The
# test of fixed random numbers is deselected, because the same seed gives other numbers in other versions of torch.
RANGE := --deselect tests/test_model.py::test_a_seed_gives_the_same_student_as_ever \
	tests/test_model.py tests/test_trunks.py tests/test_tuning.py tests/test_inherited.py tests/test_training.py tests/test_paco.py \
	tests/test_probing.py tests/test_frozen_teacher.py tests/test_tail_teacher.py tests/test_teacher_cache.py \
	tests/test_pretraining.py \
	tests/test_resume.py::test_interrupted_and_undisturbed_runs_end_alike \
	tests/test_push.py::test_command_pushes_what_loads_in_three_ways tests/test_push.py::test_trainer_checks_before_training \
	tests/test_handler.py::test_scores_are_those_of_the_native_pipeline tests/test_handler.py::test_a_model_of_timm \
	tests/test_onnx.py::test_every_way_gives_the_same_scores tests/test_onnx.py::test_int8_agrees_and_is_smaller \
	tests/test_shards.py::test_a_folder_holds_the_answers_of_the_native_pipeline \
	tests/test_streaming.py::test_parquet_is_streamed_with_its_class_names
TOOLS := hypothesis matplotlib peft psutil pytest pytest-timeout pytest-xdist

.PHONY: install demo docs test test-fast test-oldest test-newest docs-check research-check lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install  ## Train a teacher and a student on the embedded digits and print the table of accuracies.
	$(BIN)/python scripts/distill.py --recipe digits_lt_fast --overwrite

# One thread per worker: workers with several threads each compete for the same cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: install
	$(PYTEST)

test-fast: install  ## The tests that do not train, start processes or take seconds, in two minutes.
	$(PYTEST) -m "not slow"

docs-check: install  ## Check README, docs/ and model_cards/ against code and records, and run the tutorials.
	$(PYTEST) tests/docs

research-check: install  ## Check the claims, pages and pictures against the records in research/, and test its programs.
	$(PYTEST) research

docs: install  ## Build the documentation in build/site; a missing page, link or reference is an error.
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build

# Each of the two targets creates a separate environment of 6 GB and keeps it for the next run.
test-oldest: VENV := .venv-oldest
test-oldest:  ## Run the tests in RANGE with the oldest versions that setup.py allows.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints-oldest.txt --editable ".[onnx]" $(TOOLS)
	$(PYTEST) $(RANGE)

test-newest: VENV := .venv-newest
test-newest:  ## Run the tests in RANGE with the newest versions that setup.py allows.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade --upgrade-strategy eager --editable ".[onnx]" $(TOOLS)
	$(PYTEST) $(RANGE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build src/*.egg-info
