# Everything a change needs: `make help` lists it. CI runs `make test`, the same as by hand.

VENV := .venv
BIN := $(VENV)/bin
# Handed to both tiers of `make test`, for example PYTEST_ARGS="-k config -x".
PYTEST_ARGS ?=
# One thread for each process: the tests start many of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
# Older processors than the one at hand: what ATen's kernels, oneDNN (and with it vLLM) and MKL are held to.
PROCESSORS := default/SSE41/SSE4_2 avx2/AVX2/AVX2 avx512/AVX512_CORE/AVX512
# pytest ends with 5 when it has collected nothing, which is right for a tier that PYTEST_ARGS deselects.
NONE_IS_FINE := || { status=$$?; $(if $(PYTEST_ARGS),[ $$status -eq 5 ] ||,) exit $$status; }

.DEFAULT_GOAL := help
.PHONY: help env launch-env gpu-env gpu-env-full quickstart test test-processors test-megatron-latest test-gpu-stack invariance check format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## create or update .venv (CPU, Python 3.11): about 2 minutes, 3.5 GB
	@bash tools/make_env.sh

launch-env: ## create or update .venv-launch, which `megatron-r1z launch` needs (nemo-run, no torch): about 1 minute, 0.6 GB
	@bash tools/make_env.sh .venv-launch launch

gpu-env: ## create or update .venv-gpu (Python 3.12): what runs on GPUs, but for what is compiled: about 10 minutes, 11 GB
	@bash tools/make_env.sh .venv-gpu gpu-host,dev python3.12

gpu-env-full: ## the same with Transformer Engine compiled, as on a cluster: 20 to 40 minutes more on two cores
	@bash tools/make_env.sh .venv-gpu gpu,dev python3.12

quickstart: env ## train a small model on this machine's CPU, from nothing to a report
	@bash examples/quickstart/run.sh

test: env ## unit tests, then the whole loop on CPU; PYTEST_ARGS="-k name -x" goes to both
	@echo "== unit tests (tests/unit) =="
	@$(PYTEST) --numprocesses auto --dist loadfile tests/unit $(PYTEST_ARGS) $(NONE_IS_FINE)
	@echo "== loop tests (tests/loop) =="
	@$(PYTEST) --numprocesses 2 --dist loadfile tests/loop $(PYTEST_ARGS) $(NONE_IS_FINE)

test-processors: env ## `make test` as on older processors: SSE4, AVX2, AVX-512 without AMX
	@for processor in $(PROCESSORS); do \
		others=$${processor#*/}; \
		export ATEN_CPU_CAPABILITY=$${processor%%/*} ONEDNN_MAX_CPU_ISA=$${others%/*} MKL_ENABLE_INSTRUCTIONS=$${others#*/}; \
		echo "== $$processor =="; MKL_VERBOSE=1 $(BIN)/python tools/instruction_sets.py || exit 1; \
		$(MAKE) --no-print-directory test || exit 1; \
	done

invariance: env ## measure every layout against the float64 reference and write docs/invariance.md (4 minutes)
	@$(PYTEST) tests/loop/test_layouts.py --invariance docs/invariance.md

test-megatron-latest: ## the layouts and the table with the megatron-core of the GPU environment (Python 3.12, no vLLM; 6 GB)
	@bash tools/make_env.sh .venv-latest latest,dev python3.12
	@OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -q tests/unit/layout tests/unit/fp8 tests/loop/test_layouts.py tests/loop/test_fp8.py $(PYTEST_ARGS)

test-gpu-stack: gpu-env ## everything of a GPU but kernels, on a machine without one: unit tests, layouts, whole steps, engines
	@echo "== unit tests (tests/unit) =="
	@PYTHONPATH=tests/gpu_stack/hidden OMP_NUM_THREADS=1 .venv-gpu/bin/python -m pytest -q --numprocesses auto --dist loadfile tests/unit $(PYTEST_ARGS) $(NONE_IS_FINE)
	@echo "== rehearsals (tests/gpu_stack) =="
	@OMP_NUM_THREADS=1 .venv-gpu/bin/python -m pytest -q tests/gpu_stack $(PYTEST_ARGS) $(NONE_IS_FINE)

check: env ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env ## put the format right, and the lint that can be fixed safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
