# Everything runs in .venv, which `make setup` makes and keeps current.
.PHONY: help setup demo test test-all test-matrix drills lint docs clean
PYTHON_IN_VENV := .venv/bin/python

help:
	@echo "make setup     .venv with vLLM for CPU, this package (editable) and the test tools"
	@echo "make demo      reinforcement learning against a live server (about a minute)"
	@echo "make test      lint, format, types, tests on CPU: what CI runs"
	@echo "make test-all  the same with the whole test matrix"
	@echo "make drills    soak, fuzzer and chaos in their long forms (twenty minutes), into out/drills/"
	@echo "make test-matrix VLLM=0.31  the tests that meet vLLM's insides, on that version"
	@echo "make lint      lint, format and types alone"
	@echo "make docs      the site, into site/ (warnings are errors)"
	@echo "make clean     remove caches and outputs; .venv and .venv-docs stay"

setup:
	@scripts/setup.sh

demo: setup
	@$(PYTHON_IN_VENV) examples/rl_loop.py

test:
	@scripts/test.sh

test-all:
	@scripts/test.sh "not gpu and not drill"

drills: setup
	$(PYTHON_IN_VENV) -m pytest tests/drills -m drill -n 2 --dist loadfile --durations=9

test-matrix:
	@scripts/matrix.sh $(VLLM)

lint: setup
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy --strict vllm_wt_plugin examples

docs:
	@scripts/docs.sh

clean:
	rm -rf out dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vllm_wt_plugin tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
