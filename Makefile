# Everything runs from one virtual environment; `make demo` and `make test` need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo serve test gpu-test gpu-memcheck check bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## one concurrent batch: the base and three fine-tunes, side by side
	$(BIN)/motet demo

serve: $(STAMP)  ## the same server, staying up on port 8000; MODEL=... serves another model
	$(BIN)/motet serve $(if $(MODEL),$(MODEL),--demo-adapters)

test: $(STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup  # one thread for each of two workers

gpu-test:  ## what needs a GPU, with the Python that has torch for it: kernels, whole steps, replays, a busy engine
	PYTHONPATH=src:. $(PYTHON) -m pytest -q -p no:cacheprovider tests/kernels/gpu tests/gpu

gpu-memcheck:  ## the same kernels' tests under NVIDIA's memory checker, every tensor an allocation of its own
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:. compute-sanitizer --target-processes application-only \
		--error-exitcode 1 $(PYTHON) -m pytest -q -p no:cacheprovider tests/kernels/gpu \
		-k "not replays and not steps and not hopper and not ablation"

check: $(STAMP)  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## Motet against transformers + PEFT on this CPU
	$(BIN)/python benchmarks/cpu_vs_peft.py

clean:
	rm -rf $(VENV) build dist *.egg-info
