PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED := $(VENV)/installed
# What touches other people's APIs, in about five minutes: loading, a few steps, resume, push, handler, ONNX. Random
# numbers are another matter: those of a seed change between versions of torch.
RANGE := --deselect tests/test_model.py::test_a_seed_gives_the_same_student_as_ever \
	tests/test_model.py tests/test_inherited.py tests/test_training.py tests/test_paco.py \
	tests/test_resume.py::test_interrupted_and_undisturbed_runs_end_alike \
	tests/test_push.py::test_command_pushes_what_loads_in_three_ways tests/test_push.py::test_trainer_checks_before_training \
	tests/test_handler.py::test_scores_are_those_of_the_native_pipeline tests/test_handler.py::test_a_model_of_timm \
	tests/test_onnx.py::test_every_way_gives_the_same_scores tests/test_onnx.py::test_int8_agrees_and_is_smaller \
	tests/test_streaming.py::test_parquet_is_streamed_with_its_class_names
TOOLS := hypothesis matplotlib peft psutil pytest pytest-timeout pytest-xdist

.PHONY: install demo test test-oldest test-newest research-check lint format clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install  ## Teacher, student and table on the embedded digits.
	$(BIN)/python scripts/distill.py --recipe digits_lt_fast --overwrite

# One thread a worker: two workers with two threads each wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: install
	$(PYTEST)

research-check: install  ## That docs/claims.md says what the records in research/ say, and that its peer is one.
	$(PYTEST) research

# Both in environments of their own, of 6 GB each; they stay there for the next time.
test-oldest: VENV := .venv-oldest
test-oldest:  ## The part that touches other people's APIs, with the floors of setup.py.
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints-oldest.txt --editable ".[onnx]" $(TOOLS)
	$(PYTEST) $(RANGE)

test-newest: VENV := .venv-newest
test-newest:  ## The same, with the newest versions that setup.py allows.
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
