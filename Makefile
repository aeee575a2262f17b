# ms4: every target makes its own virtual environment (.venv) and builds what it needs.
# make           build the extension in place (only what changed)
# make demo      set up, then generate from a small checkpoint that ms4 writes itself
# make test      set up, then all tests that need no model and no GPU
# make kernels   every fast kernel against the reference, with timings
# make san       the same kernels under AddressSanitizer and UBSan
# make arch      the same kernels as other CPUs would run them (qemu): old x86, AVX2-only, ARM
# make lint      ruff and mypy
# make ci        what CI runs
PYTHON ?= python3
PY = .venv/bin/python
KERNELS = tests/checkkernels.c csrc/types.c build/glue/grids.c $(wildcard csrc/cpu/*.c)
CHECK = -std=gnu11 -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -Icsrc $(KERNELS) -lm -pthread

.PHONY: all demo test kernels san arch lint ci clean
all: .venv/ready
	@$(PY) csrc/build_core.py
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check "setuptools>=77"
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation cffi
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	@touch $@
demo: all
	@$(PY) tests/demo.py
test: all
	$(PY) -m pytest
build/glue/grids.c: quant/grids.py csrc/build_core.py | .venv/ready
	$(PY) csrc/build_core.py glue
kernels: build/glue/grids.c
	$(CC) -O3 -o build/checkkernels $(CHECK) && build/checkkernels --bench
san: build/glue/grids.c
	$(CC) -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o build/checksan $(CHECK) && ASAN_OPTIONS=handle_segv=0 build/checksan
arch: build/glue/grids.c
	$(CC) -O3 -static -o build/checkstatic $(CHECK)
	for cpu in Nehalem Haswell; do echo "== $$cpu"; qemu-x86_64 -cpu $$cpu build/checkstatic --slack=16 2>/dev/null || exit 1; done
	aarch64-linux-gnu-gcc -O3 -static -o build/checkarm $(CHECK)
	for cpu in cortex-a53 max; do echo "== $$cpu"; qemu-aarch64 -cpu $$cpu build/checkarm || exit 1; done
lint: all
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@mkdir -p build/types/ms4 && ln -sfn $(CURDIR)/csrc/__init__.py build/types/ms4/__init__.py
	@for d in cli models quant; do ln -sfn $(CURDIR)/$$d build/types/ms4/$$d; done
	MYPYPATH=build/types $(PY) -m mypy -p ms4
ci: lint test kernels san
clean:
	rm -rf build csrc/_core*.so
