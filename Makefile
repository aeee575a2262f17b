# ms4: every target makes its own virtual environment (.venv) and builds what it needs.
# make           build the extension in place (only what changed)
# make demo      set up, then a prompt, a sum with reasoning and an image on the checkpoint that comes with ms4
# make train-demo   trains the demonstration checkpoint: hours on two cores; stopped, it goes on where it was
# make skills    what the shipped checkpoint can do, on fresh cases of each skill
# make test      set up, then all tests that need no model and no GPU
# make bench     reading and writing speed on a file of the real shape (4 GB, written into build/)
# make kernels   every fast kernel against the reference, with timings
# make san       the same kernels under AddressSanitizer and UBSan
# make san-engine, make tsan   the engine's tests under those, and under ThreadSanitizer
# make arch      the same kernels as other CPUs would run them (qemu): old x86, AVX2 only, ARM without and with dotprod
# make lint      ruff, mypy, and the warnings of the C compiler
# make ci        what CI runs
PYTHON ?= python3
PY = .venv/bin/python
TRAIN = build/demo-train
# What a step of the training frees, the next one asks for again: kept in huge pages it comes without page faults.
KEEP = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 MALLOC_ARENA_MAX=1 THP_MEM_ALLOC_ENABLE=1
KERNELS = csrc/types.c csrc/cpu/dispatch.c build/glue/grids.c $(wildcard csrc/cpu/*/*.c)
CHECK = -std=gnu11 -ffp-contract=off -fno-math-errno -Icsrc tests/checkkernels.c
SAN = -O1 -g -w -fsanitize=address,undefined -fno-sanitize-recover=undefined

.PHONY: all demo skills train-demo test bench kernels san san-engine tsan arch lint ci clean FORCE
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
.venv/fonts: .venv/ready
	$(PY) -m pip install -q --disable-pip-version-check --no-deps matplotlib sphinx-rtd-theme
	@touch $@
skills: all .venv/fonts
	@$(PY) -m ms4.models.training.table -n 200
.venv/train: .venv/ready
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[train]"
	@touch $@
train-demo: all .venv/train
	@mkdir -p $(TRAIN)
	OMP_NUM_THREADS=1 $(PY) -m ms4.models.training.tower $(TRAIN) & tower=$$!; OMP_NUM_THREADS=1 $(PY) -m ms4.models.training.train_text $(TRAIN) && wait $$tower
	$(KEEP) $(PY) -m ms4.models.training.train_joint $(TRAIN)
	$(PY) -m ms4.models.training.train_joint $(TRAIN) --export $(TRAIN)/hf
	$(PY) -m ms4.models.convert $(TRAIN)/hf $(TRAIN)/ms4-demo.gguf --type Q4_K_M --mmproj $(TRAIN)/ms4-demo-mmproj.gguf --name "ms4 demo"
test: all
	$(PY) -m pytest
build/glue/grids.c: quant/grids.py csrc/build_core.py | .venv/ready
	$(PY) csrc/build_core.py glue
bench: all
	@mkdir -p build
	@[ -f build/shape.gguf ] || $(PY) tests/make_shape.py build/shape.gguf --layers 2
	.venv/bin/ms4 bench -m build/shape.gguf --pp 512 --tg 32
kernels: all
	$(CC) -O3 -Wall -Wextra -Werror -o build/checkkernels $(CHECK) $(KERNELS:%.c=build/obj/%.o) -lm -pthread && build/checkkernels --bench
build/asan: .venv/ready FORCE
	CFLAGS="$(SAN)" LDFLAGS="-fsanitize=address,undefined" $(PY) csrc/build_core.py $@
san: build/asan
	$(CC) $(SAN) -o build/checksan $(CHECK) $(KERNELS:%.c=build/asan/obj/%.o) -lm -pthread && ASAN_OPTIONS=handle_segv=0 build/checksan
arch: all
	$(CC) -O3 -static -o build/checkstatic $(CHECK) $(KERNELS:%.c=build/obj/%.o) -lm -pthread
	qemu-x86_64 -cpu Nehalem build/checkstatic 2>/dev/null
	qemu-x86_64 -cpu Haswell build/checkstatic --isa=avx2 --slack=16 2>/dev/null
	aarch64-linux-gnu-gcc -O3 -Wall -Wextra -Werror -static -o build/checkarm $(CHECK) $(KERNELS) -lm -pthread
	qemu-aarch64 -cpu cortex-a53 build/checkarm
	qemu-aarch64 -cpu max build/checkarm --isa=neon
san-engine: build/asan
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" PYTHONMALLOC=malloc PYTHONPATH=build/asan ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:allocator_may_return_null=1 $(PY) -m pytest -q -s -p no:cacheprovider tests/test_engine.py tests/test_vision.py
tsan: .venv/ready
	CFLAGS="-O1 -g -w -fsanitize=thread" LDFLAGS="-fsanitize=thread" $(PY) csrc/build_core.py build/tsan
	OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so)" PYTHONPATH=build/tsan TSAN_OPTIONS="halt_on_error=1 exitcode=66" $(PY) -m pytest -q -s -p no:cacheprovider tests/test_engine.py -k "many_threads or cancel or same_bits"
lint: all
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(CC) -fsyntax-only -std=gnu11 -Wall -Wextra -Werror -Icsrc $(wildcard csrc/*.c csrc/cpu/*.c csrc/cpu/*/*.c)
	$(PY) -c "import sys; sys.path.insert(0, 'csrc'); import build_core, pathlib; build_core.link_package(pathlib.Path('build/types'))"
	MYPYPATH=build/types $(PY) -m mypy -p ms4
ci:
	.ci/run
clean:
	rm -rf build csrc/_core*.so
