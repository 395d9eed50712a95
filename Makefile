# Two commands matter: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= python3.11
VENV ?= .venv
PORT ?= 8080
DATA_DIR ?= $(HOME)/.local/share/spinebox
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help run test toolchains test-toolchains test-training check format golden bench train clean chromium

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp holds the environment: made again when the dependencies change. The device environment has no torch.
$(VENV)/.run-stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[onnxruntime,openvino]'
	@touch $@

$(VENV)/.dev-stamp: $(VENV)/.run-stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[onnxruntime,openvino,tflite,compile,dev]'
	@touch $@

.venv-train/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-train
	.venv-train/bin/pip install --quiet --disable-pip-version-check -e '.[train,compile,dev]'
	@touch $@

run: $(VENV)/.run-stamp ## install, bring the appliance up with a demonstration study, print the address (PORT=8080)
	$(BIN)/spinebox serve --demo --port $(PORT) --data-dir $(DATA_DIR)

chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; }

test: $(VENV)/.dev-stamp chromium check ## the whole suite: style, types, tests, a real browser
	$(BIN)/python -m pytest

toolchains: $(VENV)/.dev-stamp ## environments of the converters: TFLite, the TensorRT gate, Movidius (1.5 GB, once)
	$(BIN)/python -m appliance.compiler.toolchain

test-toolchains: toolchains ## the tests that call a converter
	$(BIN)/python -m pytest -m toolchain

test-training: .venv-train/.stamp ## the tests that train (torch, in an environment of its own)
	.venv-train/bin/python -m pytest -m training

check: $(VENV)/.dev-stamp ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev-stamp ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(VENV)/.dev-stamp ## write the golden files anew; read the diff before you commit it
	SPINEBOX_GOLDEN=write $(BIN)/python -m pytest tests/golden

bench: $(VENV)/.dev-stamp ## latency of this machine: engines, heatmap, end to end
	$(BIN)/python -m benchmarks.run

train: .venv-train/.stamp ## train every family from the start (DATA=folder that holds lumbar_mri/), minutes on a GPU, a night on 2 cores
	.venv-train/bin/python -m models.reproduce --data $(DATA)

clean: ## remove environments and caches
	rm -rf $(VENV) .venv-train build *.egg-info .pytest_cache .mypy_cache .ruff_cache
