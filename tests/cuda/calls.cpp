/* calls.cpp -- entry points of the emulated driver: devices, contexts, modules, memory, launches. */
#include "driver.h"
#include <dlfcn.h>
#include <sys/mman.h>

/* Leaked on purpose: its thread works until the process ends. */
driver_state &state() {
    static driver_state *d = new driver_state();
    return *d;
}
/* Of the thread: the number of its context, which is gone when the last user has released it; 0: it has none. */
static thread_local int own_context;
static bool has_context() { return own_context && state().context_users && own_context == state().n_contexts; }

static uint64_t number_of(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}
static void write_report() {
    driver_state &d = state();
    std::lock_guard<std::mutex> guard(d.lock);
    FILE *f = fopen(d.set.report.c_str(), "w");
    if (!f) return perror(d.set.report.c_str());
    fprintf(f, "calls %llu\nbytes copied %llu\nmost memory %zu\ncontexts made %d\n", (unsigned long long)d.n_calls,
            (unsigned long long)d.copied, memory_most(), d.n_contexts);
    fprintf(f, "left of memory %zu\nleft pinned %zu\n", memory_used(), memory_pinned());
    for (auto &c : d.calls) fprintf(f, "call %s %llu\n", c.first.c_str(), (unsigned long long)c.second);
    for (auto &p : d.places) {
        fprintf(f, "places %s %zu\n", p.first.c_str(), p.second.size());
        for (size_t i = 0; i < p.second.size(); i++) {
            Dl_info in = {};
            dladdr(p.second[i], &in);
            fprintf(f, "place %s %zu %s %#zx\n", p.first.c_str(), i + 1, in.dli_fname,
                    (size_t)((const char *)p.second[i] - (const char *)in.dli_fbase));
        }
    }
    for (auto &k : d.kernels_run) fprintf(f, "kernel %s %llu\n", k.first.c_str(), (unsigned long long)k.second);
    fclose(f);
}
/* "call:n:code" and its short forms. */
static void read_failure(settings *set, const char *text) {
    std::string word(text), rest;
    size_t colon = word.find(':');
    if (!word.empty() && !isdigit((unsigned char)word[0]) && colon != std::string::npos) {
        set->fail_call = word.substr(0, colon);
        word = word.substr(colon + 1);
        colon = word.find(':');
    }
    if (colon != std::string::npos) rest = word.substr(colon + 1);
    set->fail_always = word[0] == '*';
    set->fail_at = set->fail_always ? 1 : strtoull(word.c_str(), nullptr, 10);
    set->fail_lost = rest == "lost";
    set->fail_hangs = rest == "hang";
    set->fail_code = set->fail_lost || set->fail_hangs ? 0 : atoi(rest.c_str());
}
static void read_settings() {
    driver_state &d = state();
    d.set = {};
    d.set.seed = (uint32_t)number_of("MS4_EMU_SEED", 1);
    d.set.late = (uint32_t)number_of("MS4_EMU_LATE", 0);
    d.set.copies_first = number_of("MS4_EMU_COPIES_FIRST", 0) != 0;
    d.set.frees_early = number_of("MS4_EMU_FREE", 1) != 0;
    d.set.vram = number_of("MS4_EMU_VRAM", (uint64_t)1 << 30);
    d.set.pinned = number_of("MS4_EMU_PINNED", SIZE_MAX);
    d.set.capability = (int)number_of("MS4_EMU_CC", 86);
    d.set.n_devices = (int)number_of("MS4_EMU_DEVICES", 1);
    emu::n_threads = (int)number_of("MS4_EMU_THREADS", 2);
    if (getenv("MS4_EMU_FAIL")) read_failure(&d.set, getenv("MS4_EMU_FAIL"));
    if (const char *text = getenv("MS4_EMU_FORGET")) {
        const char *colon = strchr(text, ':');
        d.set.forget_call.assign(text, colon ? (size_t)(colon - text) : strlen(text));
        d.set.forget_place = colon ? strtoull(colon + 1, nullptr, 10) : 1;
    }
    if (getenv("MS4_EMU_REPORT")) {
        d.set.report = getenv("MS4_EMU_REPORT");
        atexit(write_report);
    }
    d.random.seed(d.set.seed);
    d.streams.push_back(&d.zero);
}
bool forgotten(const char *name, const void *place) {
    driver_state &d = state();
    auto &places = d.places[name];
    auto found = std::find(places.begin(), places.end(), place);
    size_t i = (size_t)(found - places.begin());
    if (found == places.end()) places.push_back(place);
    return d.set.forget_call == name && d.set.forget_place == i + 1;
}
entry::entry(const char *name, bool needs_context, bool takes_memory) : lock(state().lock), error(OK) {
    driver_state &d = state();
    if (!d.initialised) {
        if (d.streams.empty()) read_settings();
        if (strcmp(name, "cuInit")) error = NOT_INITIALIZED;
    }
    uint64_t nth = ++d.calls[name], of_all = ++d.n_calls;
    const std::string &call = d.set.fail_call;
    uint64_t at = call.empty() ? of_all : call == name ? nth : 0;
    if (d.set.fail_at && (d.set.fail_always ? at >= 1 : at == d.set.fail_at)) {
        if (d.set.fail_lost) work_lose(LAUNCH_FAILED);
        int otherwise = d.set.fail_lost ? LAUNCH_FAILED : takes_memory ? OUT_OF_MEMORY : UNKNOWN;
        error = d.set.fail_code ? d.set.fail_code : otherwise;
    } else if (d.lost) error = d.lost;
    else if (!error && needs_context && !has_context()) error = INVALID_CONTEXT;
}

/* --- the driver and its devices --------------------------------------------------------------------------------- */
EXPORT int cuInit(unsigned flags) {
    entry e("cuInit", false);
    if (e.error) return e.error;
    if (flags) return INVALID_VALUE;
    if (!state().set.n_devices) return NO_DEVICE;
    state().initialised = true;
    return OK;
}
EXPORT int cuDriverGetVersion(int *version) {
    *version = 13000;               /* allowed before cuInit */
    return OK;
}
EXPORT int cuDeviceGetCount(int *n) {
    entry e("cuDeviceGetCount", false);
    if (!e.error) *n = state().set.n_devices;
    return e.error;
}
EXPORT int cuDeviceGet(int *device, int i) {
    entry e("cuDeviceGet", false);
    if (e.error) return e.error;
    if (i < 0 || i >= state().set.n_devices) return INVALID_DEVICE;
    *device = i;
    return OK;
}
EXPORT int cuDeviceGetName(char *name, int length, int device) {
    entry e("cuDeviceGetName", false);
    if (!e.error) snprintf(name, (size_t)length, "emulated GPU %d", device);
    return e.error;
}
EXPORT int cuDeviceGetPCIBusId(char *id, int length, int device) {
    entry e("cuDeviceGetPCIBusId", false);
    if (!e.error) snprintf(id, (size_t)length, "0000:%02x:00.0", device + 1);
    return e.error;
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int) {
    entry e("cuDeviceTotalMem_v2", false);
    if (!e.error) *bytes = state().set.vram;
    return e.error;
}
/* CUdevice_attribute; what is not here is 0. */
static int attribute_of(int attribute) {
    switch (attribute) {
    case 1: return 1024;            /* threads of a block */
    case 5: return 0x7fffffff;      /* grid */
    case 6: case 7: return 65535;
    case 8: return 48 << 10;        /* shared memory of a block */
    case 10: return 32;             /* lanes of a warp */
    case 12: return 65536;          /* registers of a block */
    case 13: return 1695000;        /* clock, kHz */
    case 16: return 82;             /* multiprocessors */
    case 36: return 9751000;        /* clock of the memory, kHz */
    case 37: return 384;            /* bits of its bus */
    case 38: return 6 << 20;        /* L2 */
    case 39: return 1536;           /* threads of a multiprocessor */
    case 40: return 2;              /* copy engines */
    case 19: case 31: case 41: case 78: case 99: case 113: case 122: return 1;
                                    /* maps host memory, kernels side by side, one address space, priorities of streams,
                                     * pinning of what is there, read-only; memory operations of streams.  But not (91)
                                     * at the host's address, as under WSL: kernels do not see what was there */
    case 75: return state().set.capability / 10;
    case 76: return state().set.capability % 10;
    case 81: return 100 << 10;      /* shared memory of a multiprocessor */
    case 97: return 99 << 10;       /* shared memory of a block that asks for it */
    default: return 0;
    }
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int) {
    entry e("cuDeviceGetAttribute", false);
    if (!e.error) *value = attribute_of(attribute);
    return e.error;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    entry e("cuDevicePrimaryCtxRetain", false, true);
    if (e.error) return e.error;
    if (device < 0 || device >= state().set.n_devices) return INVALID_DEVICE;
    if (!state().context_users++) state().n_contexts++;
    *context = &state().context_users;
    return OK;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
    entry e("cuDevicePrimaryCtxRelease_v2", false);
    if (e.error) return e.error;
    if (!state().context_users) return INVALID_CONTEXT;
    state().context_users--;
    return OK;
}
EXPORT int cuCtxSetCurrent(void *context) {
    entry e("cuCtxSetCurrent", false);
    if (e.error) return e.error;
    if (context && context != &state().context_users) return INVALID_CONTEXT;
    if (context && !state().context_users) return INVALID_CONTEXT;
    own_context = context ? state().n_contexts : 0;
    return OK;
}
EXPORT int cuCtxSynchronize() {
    entry e("cuCtxSynchronize");
    if (e.error) return e.error;
    work_wait_all(e.lock);
    return state().lost;
}
EXPORT int cuGetErrorString(int code, const char **text) {
    static const std::map<int, const char *> texts = {
        { OK, "no error" }, { INVALID_VALUE, "invalid argument" }, { OUT_OF_MEMORY, "out of memory" },
        { NOT_INITIALIZED, "initialization error" }, { NO_DEVICE, "no CUDA-capable device is detected" },
        { INVALID_DEVICE, "invalid device ordinal" }, { INVALID_IMAGE, "device kernel image is invalid" },
        { INVALID_CONTEXT, "invalid device context" }, { INVALID_HANDLE, "invalid resource handle" },
        { NOT_FOUND, "named symbol not found" }, { NOT_READY, "device not ready" },
        { ILLEGAL_ADDRESS, "an illegal memory access was encountered" },
        { ALREADY_REGISTERED, "part or all of the requested memory range is already mapped" },
        { NOT_REGISTERED, "pointer does not correspond to a registered memory region" },
        { LAUNCH_FAILED, "unspecified launch failure" }, { NOT_SUPPORTED, "operation not supported" },
        { CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing" },
        { CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began" },
        { CAPTURE_UNJOINED, "capturing stream has unjoined work" },
        { CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream" }, { UNKNOWN, "unknown error" },
    };
    auto found = texts.find(code);
    *text = found == texts.end() ? nullptr : found->second;
    return found == texts.end() ? INVALID_VALUE : OK;
}

/* --- modules and kernels: those that were linked in ------------------------------------------------------------- */
EXPORT int cuModuleLoadData(void **module, const void *image) {
    entry e("cuModuleLoadData", true, true);
    if (e.error) return e.error;
    if (!image) return INVALID_IMAGE;
    *module = &state().module_loaded;
    return OK;
}
EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned, int *, void **) {
    return cuModuleLoadData(module, image);
}
EXPORT int cuModuleUnload(void *module) {
    entry e("cuModuleUnload");
    return e.error ? e.error : module == &state().module_loaded ? OK : INVALID_HANDLE;
}
/* Loads it, where modules are lazy. */
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    entry e("cuModuleGetFunction", true, true);
    if (e.error) return e.error;
    if (module != &state().module_loaded) return INVALID_HANDLE;
    const emu::kernel *k = emu::find(name);
    *function = (void *)k;
    return k ? OK : NOT_FOUND;
}
EXPORT int cuFuncSetAttribute(void *function, int attribute, int value) {
    entry e("cuFuncSetAttribute");
    if (e.error) return e.error;
    if (!function || value < 0 || (attribute == 8 && value > 99 << 10)) return INVALID_VALUE;
    if (attribute == 8) state().shared_allowed[(const emu::kernel *)function] = value;
    return OK;
}
EXPORT int cuFuncGetAttribute(int *value, int attribute, void *function) {
    entry e("cuFuncGetAttribute");
    if (e.error) return e.error;
    if (!function) return INVALID_HANDLE;
    *value = attribute == 0 ? ((const emu::kernel *)function)->threads : 0;
    return OK;
}
int launch_op(const void *function, dim3 grid, dim3 size, unsigned shared, void **parameters, op *what) {
    driver_state &d = state();
    const emu::kernel *k = (const emu::kernel *)function;
    if (!k) return INVALID_HANDLE;
    auto allowed = d.shared_allowed.find(k);
    size_t most = allowed == d.shared_allowed.end() ? 48 << 10 : (size_t)std::max(48 << 10, allowed->second);
    if (!parameters || !parameters[0] || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535
        || grid.z > 65535 || !size.x || size.y != 1 || size.z != 1 || size.x > (unsigned)k->threads || shared > most)
        return INVALID_VALUE;
    what->kind = op::KERNEL;
    what->kernel = k;
    what->grid = grid;
    what->threads = (int)size.x;
    what->shared = shared;
    what->bytes.assign((char *)parameters[0], (char *)parameters[0] + k->bytes);
    return OK;
}
EXPORT int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned size_x, unsigned size_y,
                          unsigned size_z, unsigned shared, void *handle, void **parameters, void **) {
    entry e("cuLaunchKernel");
    if (e.error) return e.error;
    stream *s = stream_of(handle);
    op what = {};
    int error = launch_op(function, dim3(x, y, z), dim3(size_x, size_y, size_z), shared, parameters, &what);
    return !s ? INVALID_HANDLE : error ? error : submit(s, std::move(what));
}

/* --- memory ----------------------------------------------------------------------------------------------------- */
EXPORT int cuMemGetInfo_v2(size_t *free, size_t *total) {
    entry e("cuMemGetInfo_v2");
    if (e.error) return e.error;
    *total = state().set.vram;
    *free = *total - memory_used();
    return OK;
}
EXPORT int cuMemAlloc_v2(uint64_t *at, size_t bytes) {
    entry e("cuMemAlloc_v2", true, true);
    return e.error ? e.error : memory_take(at, bytes);
}
static void wait_to_free(entry &e) {
    if (!state().set.frees_early) work_wait_all(e.lock);
}
EXPORT int cuMemFree_v2(uint64_t at) {
    entry e("cuMemFree_v2");
    if (e.error) return e.error;
    if (!at) return OK;
    wait_to_free(e);
    return state().lost ? state().lost : memory_give(at);
}
EXPORT int cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    entry e("cuMemHostAlloc", true, true);
    if (e.error) return e.error;
    if (!bytes) return INVALID_VALUE;
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return OUT_OF_MEMORY;
    int error = memory_pin(p, bytes, true, false);
    if (error) munmap(p, bytes);
    else memset(p, 0xff, bytes), *at = p;
    return error;
}
EXPORT int cuMemFreeHost(void *at) {
    entry e("cuMemFreeHost");
    if (e.error) return e.error;
    wait_to_free(e);
    return state().lost ? state().lost : memory_unpin(at, true);
}
EXPORT int cuMemHostRegister_v2(void *at, size_t bytes, unsigned flags) {
    entry e("cuMemHostRegister_v2", true, true);
    return e.error ? e.error : memory_pin(at, bytes, false, flags & 8);
}
EXPORT int cuMemHostUnregister(void *at) {
    entry e("cuMemHostUnregister");
    if (e.error) return e.error;
    wait_to_free(e);
    return state().lost ? state().lost : memory_unpin(at, false);
}
EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *at, void *host, unsigned) {
    entry e("cuMemHostGetDevicePointer_v2");
    if (e.error) return e.error;
    if (memory_place(host, 1) != PINNED) return INVALID_VALUE;      /* what it got itself: as the address is */
    *at = (uint64_t)(uintptr_t)host;
    return OK;
}
/* What CUDA says of pageable memory: what is read of it may be staged before the call returns, or later; what is
 * written to it is there when the call returns. */
static int copy(const char *name, uint64_t to, uint64_t from, size_t n, void *handle, bool waits) {
    entry e(name);
    if (e.error || !n) return e.error;
    stream *s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    op what = {};
    what.kind = op::COPY;
    what.to = (char *)(uintptr_t)to;
    what.from = (const char *)(uintptr_t)from;
    what.n = n;
    place of_from = memory_place(what.from, n), of_to = memory_place(what.to, n);
    if (of_from != DEVICE && of_to != DEVICE && !strstr(name, "cuMemcpyAsync")) return INVALID_VALUE;
    if (of_from == STRADDLES || of_to == STRADDLES) return INVALID_VALUE;
    if (of_from == PAGEABLE && !s->capture && (waits || state().random() % 2)) {
        what.bytes.assign(what.from, what.from + n);
        what.from = nullptr;
    }
    int error = submit(s, std::move(what));
    if (error || s->capture || (!waits && of_to != PAGEABLE)) return error;
    uint64_t number = s->last;
    work_wait(e.lock, [&] { return work_done(s, number); });
    return state().lost;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) {
    return copy("cuMemcpyHtoDAsync_v2", to, (uint64_t)(uintptr_t)from, n, stream, false);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *stream) {
    return copy("cuMemcpyDtoHAsync_v2", (uint64_t)(uintptr_t)to, from, n, stream, false);
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *stream) {
    return copy("cuMemcpyDtoDAsync_v2", to, from, n, stream, false);
}
EXPORT int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void *stream) {
    return copy("cuMemcpyAsync", to, from, n, stream, false);
}
EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) {
    return copy("cuMemcpyHtoD_v2", to, (uint64_t)(uintptr_t)from, n, nullptr, true);
}
EXPORT int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
    return copy("cuMemcpyDtoH_v2", (uint64_t)(uintptr_t)to, from, n, nullptr, true);
}
static int fill(const char *name, uint64_t to, uint32_t value, uint32_t width, size_t n, void *handle) {
    entry e(name);
    if (e.error || !n) return e.error;
    stream *s = stream_of(handle);
    op what = {};
    what.kind = op::FILL;
    what.to = (char *)(uintptr_t)to;
    what.value = value;
    what.width = width;
    what.n = n;
    if (to % width || memory_place(what.to, n * width) == PAGEABLE) return INVALID_VALUE;
    return s ? submit(s, std::move(what)) : INVALID_HANDLE;
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void *stream) {
    return fill("cuMemsetD8Async", to, value, 1, n, stream);
}
EXPORT int cuMemsetD32Async(uint64_t to, unsigned value, size_t n, void *stream) {
    return fill("cuMemsetD32Async", to, value, 4, n, stream);
}
