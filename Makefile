# make report: the whole report on the bundled crystals. make test: the tests. make check: what CI checks besides.
# make cluster-test: the pipeline on a one-node Slurm. make lock, make pins: for maintainers.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.PHONY: report test cluster-test check venv lock pins
.DELETE_ON_ERROR:

report: venv
	snakemake --cores all --show-failed-logs

test: venv
	pytest -n 2 --dist loadfile --no-loadscope-reorder tests/workflow tests/unit

cluster-test: venv
	pytest tests/cluster -rs $(if $(ONLY),-k $(ONLY))

check: venv
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint
	mypy

venv: .venv/made-from-lock

# In half the time that Python 3.11's own pip takes, which compiles one file after the other.
.venv/made-from-lock: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "castbench needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check pip==26.3
	.venv/bin/python -m pip install --quiet --no-compile --requirement requirements.lock
	.venv/bin/python -m compileall -qq -j 0 -x '/tests/|transformers/models/' .venv/lib || true # some are for a newer Python
	touch $@

# Needs uv. CUDA libraries are left out: torch pins its own, and its CPU build has none. Triton is not: its interpreter runs
# the kernels of a GPU in the tests.
lock:
	{ echo '# Every version of the environment; made from envs/requirements.in by `make lock`.'; \
	  uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header envs/requirements.in \
	  | grep -vE '^(nvidia-|cuda-)'; } > requirements.lock

# Needs conda and snakedeploy. Pins hold what conda installs; pip's part is pinned in envs/*.yaml.
pins:
	@command -v conda > /dev/null && command -v snakedeploy > /dev/null || \
		{ echo "make pins needs conda, its channels, and snakedeploy (pip install snakedeploy)" >&2; exit 1; }
	snakedeploy pin-conda-envs --conda-frontend conda $(wildcard envs/*.yaml)
