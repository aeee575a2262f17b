# ms4: every target makes its own virtual environment (.venv) and builds what it needs.
# make           build the extension in place (only what changed)
# make demo      set up, then a prompt, a sum with reasoning and an image on the checkpoint that comes with ms4
# make train-demo, make skills   train the demonstration checkpoint (hours on two cores; stopped, it goes on where it
#                was), and what the shipped one can do on fresh cases of each skill: models/training/Makefile
# make test      set up, then the tests for every minute: at most two minutes of CPU time
# make test-all  the same and those marked slow: every block type in every role, what the shipped checkpoint can do
# make test-rare    an emulated GPU under the whole engine, downloads that are killed: an hour
# make wheel     a wheel in dist/ for machines without a compiler: its name says which glibc they need, and which Python
# make bench     reading and writing speed on a file of the real shape (4 GB, written into build/)
# make gpu       on a machine with a GPU, nvcc, gcc and a Python with NumPy, without pip: builds, compares the GPU with
#                the CPU, measures it on a file of the real shape, in 8 minutes; prints one block to paste into an issue
# make screens   the drawings in docs/screens: what ms4 shows on a terminal, from real runs of the demonstration
# make kernels   every fast kernel against the reference, with timings
# make san       the same kernels under AddressSanitizer and UBSan
# make san-engine, make tsan   the engine's tests under those, and under ThreadSanitizer
# make cuda-check  the CUDA part without a GPU: kernels and whole models, emulated, as g++ and as nvcc compile them;
#                targets, roofline, mutants; a quarter of an hour; CUDA_CHECK=all: with every case and fault, hours
# make arch      the same kernels as other CPUs would run them (qemu): old x86, AVX2 only, ARM without and with dotprod
# make lint      ruff, mypy, and the warnings of the C compiler
# make ci        what CI runs
PYTHON ?= python3
PY = .venv/bin/python
DIST = dist
PIP = $(PY) -m pip install -q --disable-pip-version-check
KERNELS = csrc/types.c csrc/cpu/dispatch.c build/glue/grids.c $(wildcard csrc/cpu/*/*.c)
CHECK = -std=gnu11 -ffp-contract=off -fno-math-errno -Icsrc tests/checkkernels.c
# The tests start Python a hundred times: it keeps its bytecode, even where the environment says that it shall not.
CACHED = PYTHONDONTWRITEBYTECODE=
SAN = -O1 -g -w -fsanitize=address,undefined -fno-sanitize-recover=undefined
SAN_TEST = $(PY) -m pytest -q -s -p no:cacheprovider --hypothesis-profile=few
runtime = $$($(CC) -print-file-name=lib$(1).so)

.PHONY: all wheel demo skills train-demo test test-all test-rare bench gpu screens kernels san san-engine tsan arch cuda-check lint ci clean \
    FORCE

all: .venv/ready
	@$(PY) csrc/build_core.py

# What a build needs, looked for before pip makes fifty lines of what is missing.
define needs
import importlib.util, os, shutil, sys, sysconfig
cc = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc").split()[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if sys.version_info < (3, 10):
    sys.exit(f"ms4 needs Python 3.10 or newer, and {sys.executable} is older: make PYTHON=python3.12")
if not shutil.which(cc):
    sys.exit(f"ms4 is built with a C compiler, and there is no {cc}: install gcc (sudo apt install gcc), or a wheel")
if not os.path.exists(header):
    sys.exit(f"ms4 is built with the headers of Python, and there is no {header}: sudo apt install python3-dev")
if not importlib.util.find_spec("ensurepip"):
    sys.exit("ms4 is built in a virtual environment, and Python has none: sudo apt install python3-venv")
endef
export needs

.venv/ready: pyproject.toml
	@$(PYTHON) -c "$$needs"
	$(PYTHON) -m venv .venv
	$(PIP) "setuptools>=77"
	$(PIP) --no-build-isolation cffi
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

# --- using it

demo: all
	@$(PY) tests/demo.py

skills train-demo: all
	@$(MAKE) --no-print-directory -f models/training/Makefile $@

wheel: all
	@rm -rf build/wheel
	$(PY) -m pip wheel -q --disable-pip-version-check -w build/wheel --no-deps --no-build-isolation .
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair -w $(DIST) build/wheel/*.whl
	@ls $(DIST)/*.whl

bench: all
	@mkdir -p build
	@[ -f build/shape.gguf ] || $(PY) tests/make_shape.py build/shape.gguf --layers 2
	.venv/bin/ms4 bench -m build/shape.gguf --pp 512 --tg 32

screens: all
	$(PY) docs/screens/draw.py

gpu:
	@$(if $(wildcard .venv/ready),$(PY),$(PYTHON)) tests/gpu.py $(GPU)

# --- checking it

test: all
	$(CACHED) $(PY) -m pytest -n 2 --dist worksteal -m "not slow and not rare" --hypothesis-profile=some

test-all: all
	$(CACHED) $(PY) -m pytest -n 2 --dist worksteal -m "not rare"

test-rare: all
	$(CACHED) $(PY) -m pytest -n 2 --dist loadfile -m rare

lint: all
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(CC) -fsyntax-only -std=gnu11 -Wall -Wextra -Werror -Icsrc $(wildcard csrc/*.c csrc/cpu/*.c csrc/cpu/*/*.c csrc/cuda/*.c)
	$(PY) -c "import sys; sys.path.insert(0, 'csrc'); import build_core, pathlib; \
	    build_core.link_package(pathlib.Path('build/types'))"
	MYPYPATH=build/types $(PY) -m mypy -p ms4

build/glue/grids.c: quant/grids.py csrc/build_core.py | .venv/ready
	$(PY) csrc/build_core.py glue

kernels: all
	$(CC) -O3 -Wall -Wextra -Werror -o build/checkkernels $(CHECK) $(KERNELS:%.c=build/obj/%.o) -lm -pthread
	build/checkkernels --bench

# Runs the kernels' check as another CPU and keeps what it prints; all get the same seed, and must see the same bits.
SEED = $(or $(MS4_TEST_SEED),$(shell date +%s))
emulated = @echo "$(2)"; $(2) --seed=$(SEED) >build/arch-$(1).txt 2>/dev/null; code=$$?; cat build/arch-$(1).txt; exit $$code

arch: all
	@rm -f build/arch-*.txt
	$(CC) -O3 -static -o build/checkstatic $(CHECK) $(KERNELS:%.c=build/obj/%.o) -lm -pthread
	$(call emulated,old,qemu-x86_64 -cpu Nehalem build/checkstatic)
	$(call emulated,avx2,qemu-x86_64 -cpu Haswell build/checkstatic --isa=avx2 --slack=16)
	aarch64-linux-gnu-gcc -O2 -Wall -Wextra -Werror -c -o build/checkarm.o $(CHECK)   # with -O3 GCC 12 crashes
	aarch64-linux-gnu-gcc -O3 -Wall -Wextra -Werror -static -o build/checkarm $(filter-out %.c,$(CHECK)) build/checkarm.o $(KERNELS) -lm -pthread
	$(call emulated,a53,qemu-aarch64 -cpu cortex-a53 build/checkarm)
	$(call emulated,neon,qemu-aarch64 -cpu max build/checkarm --isa=neon)
	@set -- $$(sed -n 's/.* bits \([0-9a-f]*\):.*/\1/p' build/arch-*.txt); echo "bits of $$# tables: $$*"; \
	[ $$# -ge 2 ] && [ "$$(echo $$* | tr ' ' '\n' | sort -u | wc -l)" = 1 ] || { echo "arch: other bits on another CPU"; exit 1; }

cuda-check: all
	@! command -v nvcc >/dev/null || $(PIP) nvidia-cuda-nvdisasm || echo "no nvdisasm: SASS will not be looked at"
	$(PY) tests/cuda/cuda_check.py $(CUDA_CHECK:%=--%)

# --- sanitizers

build/asan: .venv/ready FORCE
	CFLAGS="$(SAN)" LDFLAGS="-fsanitize=address,undefined" $(PY) csrc/build_core.py $@

san: build/asan
	$(CC) $(SAN) -o build/checksan $(CHECK) $(KERNELS:%.c=build/asan/obj/%.o) -lm -pthread
	ASAN_OPTIONS=handle_segv=0 build/checksan

san-engine: build/asan
	LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan)" PYTHONMALLOC=malloc PYTHONPATH=build/asan \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:allocator_may_return_null=1 \
	$(SAN_TEST) -m "not slow" tests/test_engine.py tests/test_steps.py tests/test_vision.py tests/test_bits.py \
	tests/test_sampling.py tests/test_faults.py tests/test_stream.py \
	-k "not reads_that_fail and not does_not_fit"     # these look at calls and memory that are the sanitizer's own

tsan: .venv/ready
	CFLAGS="-O1 -g -w -fsanitize=thread" LDFLAGS="-fsanitize=thread" $(PY) csrc/build_core.py build/tsan
	OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$(call runtime,tsan)" PYTHONPATH=build/tsan \
	TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
	$(SAN_TEST) tests/test_engine.py tests/test_steps.py tests/test_stream.py -m "not slow" \
	-k "many_threads or cancel or same_bits or never_shows or waits or stop_ends or push_out"

# --- the rest

ci:
	.ci/run

clean:
	rm -rf build csrc/_core*.so
