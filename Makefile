# `make serve` and `make test` build what they need. The light environment is .venv; the engine's is in the user's cache directory.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := service/pins
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps

comma := ,

.PHONY: serve install test check soak bench bench-boot bench-gateway bench-gpu bench-readahead bench-weights bench-contract locks clean

serve: $(VENV)/light
	@$(BIN)/vllm-service up $(MODEL)

install: $(VENV)/light

# The containers of the contract tests mostly wait, so three of these files run at a time, in the order of their names: with the short
# ones of tests/fakes last, the three workers end at about the same time. The other tests keep engines busy, so two run at a time.
test: $(VENV)/dev
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/contract tests/fakes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --ignore tests/contract --ignore tests/fakes

check: $(VENV)/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo
	@find service -name '*.py' -exec awk 'END { if (NR > 300) print "note: " FILENAME " has " NR " lines; is it two modules?" }' {} \;

# Lifecycle tests that take too long for `make test`.
soak: $(VENV)/dev
	@$(BIN)/python -m bench.soak

bench: bench-boot bench-gateway bench-readahead bench-weights bench-contract

bench-boot: $(VENV)/dev
	@$(BIN)/python -m bench.boot

bench-gateway: $(VENV)/dev
	@$(BIN)/python -m bench.gateway

# Needs an NVIDIA GPU.
bench-gpu: $(VENV)/dev
	@$(BIN)/python -m bench.gpu_boot

bench-readahead: $(VENV)/dev
	@$(BIN)/python -m bench.readahead

bench-weights: $(VENV)/dev
	@$(BIN)/python -m bench.weights

bench-contract: $(VENV)/dev
	@$(BIN)/python -m bench.contract

# Lock files of every environment, with hashes and without index addresses.
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
locks: $(VENV)/light
	$(COMPILE) --extra install pyproject.toml -o $(PINS)/light.lock
	$(COMPILE) --extra install --extra dev pyproject.toml -o $(PINS)/dev.lock
	$(COMPILE) $(PINS)/engine-cuda.in -o $(PINS)/engine-cuda.lock
	$(COMPILE) tests/gateway/clients.in -o tests/gateway/clients.lock
	$(COMPILE) --override $(PINS)/engine-cpu-overrides.txt $(PINS)/engine-cpu.in -o $(PINS)/engine-cpu.lock

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
