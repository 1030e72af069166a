# Each target sets up what it needs and can be repeated. `PYTHON=python3` uses that interpreter as it is: no .venv, no network.
#   make test        lint and the test-suite          make speedrun    train a GPT on real text
#   make native      build the native kernels         make bench       measure everything on this machine's CPU
#   make gpu         build, GPU tests and benchmarks on a machine with a CUDA device
#   make sanitize    the kernels' GPU tests under compute-sanitizer
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
OUT ?= results

ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := .venv/bin/python
READY := .venv/.ready
endif

.PHONY: test test-triton-oldest speedrun native bench gpu sanitize clean

# What `native` builds: everything; for tests, the kernels that only they run as well; for the speedrun, the tokenizer.
TARGETS := all
test gpu sanitize: TARGETS := all test_kernels
speedrun: TARGETS := _bpe

# Most tests run in one process each, of one thread: two at once where pytest-xdist is installed. The others start many
# processes and watch clocks, and go alone.
two_at_once = $$($(RUN) -c 'import xdist' 2>/dev/null && echo "-n 2 --dist worksteal")
IN_ONE := tests/cuda tests/autograd tests/minigpt tests/lora

test: native
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(two_at_once) $(IN_ONE)
	$(RUN) -m pytest $(addprefix --ignore ,$(IN_ONE))
	@$(MAKE) --no-print-directory test-triton-oldest

# The tests of the kernels in Triton once more, with the oldest Triton that is supported, in a folder of its own. Not with
# PYTHON=...: that interpreter is used as it is.
OLDEST := build/triton-3.6.0
test-triton-oldest: $(READY)
ifdef PYTHON
	@echo "make $@: skipped, PYTHON=$(PYTHON) is tested with the Triton that it has"
else
	@[ -e $(OLDEST)/.ready ] || { rm -rf $(OLDEST); \
	  $(RUN) -m pip install --quiet --no-deps --target $(OLDEST) triton==3.6.0 && touch $(OLDEST)/.ready; } || \
	  echo "make $@: skipped, pip cannot install Triton 3.6.0 here"
	@[ ! -e $(OLDEST)/.ready ] || PYTHONPATH=$(CURDIR)/$(OLDEST) $(RUN) -m pytest $(two_at_once) tests/cuda -k triton -m "not slow"
endif

# A run that was killed goes on, a finished one only says again what it reached; ARGS="--folder runs/second" starts another.
speedrun: native
	$(RUN) -m speedrun.train \
	  $(or $(ARGS),--folder runs/speedrun $(if $(wildcard runs/speedrun/checkpoints/step_*),--resume))

# Without a C++ compiler the Python versions do the work; with one, a build that fails is an error. One build folder for
# each kind of interpreter; configured once, after that CMake itself sees what has changed.
native: $(READY)
	@if ! command -v "$${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then \
	  echo "make native: no C++ compiler found, the pure-Python versions will be used"; exit 0; \
	fi; \
	python="$$($(RUN) -c 'import sys; print(sys.executable)')"; \
	export PATH="$$(dirname "$$python"):$$PATH"; \
	command -v cmake >/dev/null || { echo "make native: no cmake found: pip install cmake" >&2; exit 2; }; \
	folder="build/native-$$("$$python" -c 'import sys; print(sys.implementation.cache_tag)')"; \
	if [ ! -e "$$folder/.configured" ]; then \
	  rm -rf "$$folder"; \
	  cmake -S . -B "$$folder" $$(command -v ninja >/dev/null && echo -G Ninja) -DPython_EXECUTABLE="$$python"; \
	  touch "$$folder/.configured"; \
	fi; \
	cmake --build "$$folder" --parallel --target $(TARGETS)

bench: native
	$(RUN) -m common.timing --device cpu --out $(OUT)
	$(RUN) -m autograd.bench --out $(OUT)
	$(RUN) -m minigpt.bench_tokenizer --out $(OUT)
	$(RUN) -m minigpt.bench --device cpu --out $(OUT)
	$(RUN) -m minigpt.twins --out $(OUT)
	$(RUN) -m cuda.bench_matmul --device cpu --out $(OUT)
	$(RUN) -m cuda.bench_attention --device cpu --out $(OUT)
	$(RUN) -m cuda.bench_fused --device cpu --out $(OUT)
	$(RUN) -m cuda.bench_triton --out $(OUT)
	$(RUN) -m parallel.bench --out $(OUT)
	$(RUN) -m lora.bench --device cpu --out $(OUT)
	$(RUN) -m speedrun.breakdown --preset laptop --out $(OUT)
	rm -rf build/scaling
	$(RUN) -m minigpt.scaling --folder build/scaling --out $(OUT)

# The tests of kernels in Triton compile more than a thousand of them: a process for each file, eight at once (5: no test
# in it is for a GPU).
gpu: native
	$(RUN) -m pytest -m gpu --ignore-glob 'tests/cuda/test_triton_*'
	ls tests/cuda/test_triton_*.py | xargs -P 8 -I{} sh -c '$(RUN) -m pytest -q -m gpu {} || [ $$? -eq 5 ]'
	$(RUN) -m common.timing --device cuda --out $(OUT)
	$(RUN) -m cuda.bench_matmul --device cuda --budget-s 110 --out $(OUT)
	$(RUN) -m cuda.bench_attention --device cuda --budget-s 90 --out $(OUT)
	$(RUN) -m cuda.bench_fused --device cuda --out $(OUT)
	$(RUN) -m cuda.bench_other_products --device cuda --budget-s 50 --out $(OUT)
	$(RUN) -m minigpt.bench --device cuda --rounds 7 --out $(OUT)
	$(RUN) -m parallel.bench --device cuda --rounds 7 --out $(OUT)
	$(RUN) -m lora.bench --device cuda --out $(OUT)
	$(RUN) -m speedrun.winners --measured $(OUT)
	rm -rf build/speedrun build/speedrun-torch
	$(RUN) -m speedrun.train --preset one-gpu --corpus stdlib --steps 75 --attention torch --kernels torch \
	  --folder build/speedrun-torch
	$(RUN) -m speedrun.train --preset one-gpu --steps 400 --measured $(OUT) --folder build/speedrun
	$(RUN) -m speedrun.record --folder build/speedrun --out $(OUT)

# The kernels' GPU tests under NVIDIA's own checks, which take long: what the model finds, and what it cannot.
SANITIZED := tests/cuda/test_matmul.py tests/cuda/test_attention_best.py tests/cuda/test_attention_backward_hopper.py
sanitize: native
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize: no compute-sanitizer found: it comes with the CUDA toolkit" >&2; exit 2; }
	for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(RUN) -m pytest -m gpu $(SANITIZED); \
	done

.venv/.ready: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11: put a newer one first on the PATH" >&2; exit 2; }
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test,bench]'
	touch $@

clean:
	rm -rf build .pytest_cache .ruff_cache
