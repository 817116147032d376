# `make demo` and `make test` are all a newcomer needs; each sets up .venv if it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.installed
# Compiling all of torch and its like takes longer than installing it; Python compiles what it imports, and keeps
# that (else every start would compile all of it once more). The last line of setting up has numba compile
# what searches for drafts, so that nothing that is tried first waits for that.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo bench results test lint types links imports tour docs package versions oldest newest clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          four tiny models with and without drafts, and a real model's size"
	@echo "make test          run the whole test suite"
	@echo "make bench         every way of drafting side by side: README's table, docs/results.md"
	@echo "make results       measure the other tables in docs/ again (hours)"
	@echo "     GSM8K=FILE    for both: its JSONL file; tables with its prompts are left out without"
	@echo "make lint types    ruff and who may import whom; mypy --strict on the installed layout"
	@echo "make imports       which room of the package imports which"
	@echo "make docs          the pages in docs/ and the API reference as a site, in .work/site"
	@echo "make package       build sdist and wheel, check them, use the wheel in a clean environment"
	@echo "make versions      a fast part of the tests with the oldest and the newest dependencies"
	@echo "make oldest newest the same with the oldest and the newest torch (gigabytes)"

# A .venv that was not finished, or is of a Python that is too old, is made again.
USABLE := import pip, sys; sys.exit(sys.version_info < (3, 11))
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -c '$(USABLE)' 2> /dev/null || $(BIN)/python -m ensurepip > /dev/null 2>&1 || rm -rf .venv
	test -d .venv || $(PYTHON) -m venv .venv || { rm -rf .venv; python3 -m venv .venv; }
	@$(BIN)/python -c '$(USABLE)' || { rm -rf .venv; echo "error: this takes Python 3.11 or newer with" \
		"venv and pip: install it (Debian: apt install python3-venv), or name it: make PYTHON=..."; exit 2; }
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	$(BIN)/python -W ignore -c 'from spiffy.runtime.draft import fastest_search; fastest_search()' 2> /dev/null
	touch $@

demo: $(READY)
	$(BIN)/python studies/demo.py

# GSM8K=FILE is a JSONL file with its prompts: its hub is not always at hand. What pages have of them, and say
# about them, stays as it is without.
KEPT = @echo "without GSM8K=FILE, what it is a part of stays as it is:"
bench: $(READY)
	$(BIN)/python studies/bench.py $(if $(GSM8K),--gsm8k $(GSM8K)) --into README.md $(if $(GSM8K),docs/results.md)
	$(if $(GSM8K),,$(KEPT) docs/results.md)

results: $(READY)
	$(BIN)/python studies/losslessness.py $(if $(GSM8K),--dataset $(GSM8K),--tables losslessness company) \
		--into docs/losslessness.md
	$(BIN)/python studies/edges.py --into docs/results-edges.md
	$(BIN)/python studies/graphs.py --into docs/results-drafting.md --plot docs/results-drafting.svg
	$(if $(GSM8K),$(BIN)/python studies/domains.py --dataset $(GSM8K) --into docs/results-drafting.md)
	$(if $(GSM8K),$(BIN)/python studies/rival.py --dataset $(GSM8K) --into docs/rival.md)
	$(if $(GSM8K),,$(KEPT) domains in docs/results-drafting.md, docs/rival.md, sharing in docs/losslessness.md)
	$(BIN)/python studies/ablations.py --into docs/results-drafting.md
	$(BIN)/python studies/auto.py --into docs/results-time.md
	$(BIN)/python studies/auto.py --busy --into docs/results-time.md
	$(BIN)/python studies/overhead.py --into docs/results-time.md
	$(BIN)/python studies/launched.py --into docs/gpu.md
	$(BIN)/python studies/regret.py --into docs/auto.md
	$(BIN)/python studies/threads.py --into docs/cpu.md
	$(BIN)/python studies/prepack.py --into docs/cpu.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b,qwen3-0.6b --models tiny-sdar \
		--into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b --models tiny-sdar --blocks 4 --policies static,threshold \
		--prompts 6 --repeats 1 --budgets 2,4 --key real-sizes-threshold --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes qwen3-1.7b --models tiny-sdar --prompts 1 --budgets 2,4 \
		--key real-sizes-1.7b --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b --models tiny-llada,tiny-dream --prompts 1 --budgets 1,2,4 \
		--key real-sizes-block-32 --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes qwen3-0.6b,qwen3-1.7b --models tiny-llada,tiny-dream --prompts 1 \
		--budgets 1,2,4 --key real-sizes-block-32-larger --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b,qwen3-0.6b --models tiny-sdar --dtypes bfloat16 \
		--prompts 3 --key real-sizes-bfloat16 --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes qwen3-1.7b --models tiny-sdar --dtypes bfloat16 --prompts 2 \
		--key real-sizes-bfloat16-1.7b --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b,qwen3-0.6b --models tiny-llada,tiny-dream --dtypes bfloat16 \
		--prompts 1 --budgets 1,2,4,8 --key real-sizes-bfloat16-block-32 --into docs/results-time.md
	$(BIN)/python studies/real_sizes.py --shapes 0.3b --models tiny-sdar --blocks 8 --weights disk --prompts 1 \
		--budgets 2,8 --key real-sizes-disk --into docs/results-time.md
	$(BIN)/python studies/prefix.py --into docs/results-time.md
	$(BIN)/python studies/compiled.py --prompts 8 --into docs/results-time.md
	$(BIN)/python studies/compiled.py --shape 0.3b --models tiny-sdar --prompts 4 --into docs/results-time.md
	$(BIN)/python studies/mixture.py --into docs/results.md
	$(BIN)/python studies/load.py --model tiny-sdar --cache block --servers 6 --seconds 48 --turns 12 --warm-up 5 \
		--into docs/results-serving.md
	$(BIN)/python studies/load.py --model tiny-llada --cache dual --clients 1 2 4 --lengths 64 32 96 --servers 6 \
		--seconds 48 --turns 12 --warm-up 20 --into docs/results-serving.md
	$(BIN)/python studies/load.py --model tiny-sdar --cache block --shape 0.3b --clients 1 4 16 --lengths 32 16 24 \
		--seconds 48 --turns 6 --warm-up 16 --into docs/results-serving.md
	$(BIN)/python studies/soak.py --into docs/results-serving.md
	$(BIN)/python studies/harness.py --into docs/integrations.md

test: $(READY)
	$(BIN)/pytest -q -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

imports: $(READY)
	$(BIN)/python studies/imports.py

# mypy and mkdocstrings cannot follow the import hook of an editable install: give them the installed
# layout as links.
FOLDERS := bench calib cli graphs integrations runtime schemas
links:
	mkdir -p .work/types/spiffy
	for folder in $(FOLDERS); do ln -sfn $(CURDIR)/$$folder .work/types/spiffy/$$folder; done

types: $(READY) links
	MYPYPATH=.work/types $(BIN)/mypy --explicit-package-bases --namespace-packages -p spiffy

# The notebook runs in a folder of its own, and what comes out becomes a page.
tour: $(READY)
	rm -rf .work/tour && mkdir -p .work/tour && cp docs/tour.ipynb .work/tour
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --log-level WARN --execute --to markdown .work/tour/tour.ipynb

# A link that leads nowhere, or a page that is not in the navigation, ends the build.
docs: $(READY) links tour
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the pages are in .work/site; .venv/bin/mkdocs serve shows them at http://127.0.0.1:8000"

package: $(READY)
	$(BIN)/python .ci/package.py

# Beside the installed torch; the other two install their own, which on Linux comes with CUDA, and
# need no .venv.
versions: $(READY)
	$(BIN)/python .ci/versions.py oldest newest

oldest newest:
	$(or $(shell command -v $(PYTHON)),python3) .ci/versions.py --with-torch $@

clean:
	rm -rf .venv .work build *.egg-info
