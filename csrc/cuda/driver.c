/* driver.c -- finds the CUDA driver and its entry points, and says in words what a call of it came to. */
#include "cuda/driver.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

struct cuda_driver cuda;

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static int is_open, is_absent;

static int find_entries(void *library) {
    const struct { void **entry; const char *symbol; } entries[] = {
#define ENTRY(name, symbol, parameters) { (void **)&cuda.name, #symbol },
        CUDA_DRIVER(ENTRY)
#undef ENTRY
    };
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        *entries[i].entry = dlsym(library, entries[i].symbol);
        FAIL_IF(!*entries[i].entry, MS4_EDEVICE, "the NVIDIA driver is too old: it has no %s; ms4 takes 525 and newer",
                entries[i].symbol);
    }
    return MS4_OK;
}
/* What cuInit came to, in words that say more than the driver's own. */
static int check_begun(CUresult result) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *text = NULL;
    is_absent = result == CUDA_ERROR_NO_DEVICE;
    switch (result) {
    case CUDA_SUCCESS:
        return MS4_OK;
    case CUDA_ERROR_NO_DEVICE:
        FAIL_IF(visible, MS4_EDEVICE, "the NVIDIA driver shows no GPU: CUDA_VISIBLE_DEVICES is \"%.60s\"", visible);
        return error_set(MS4_EDEVICE, "the NVIDIA driver finds no GPU");
    case CUDA_ERROR_STUB_LIBRARY:
        return error_set(MS4_EDEVICE, "there is no NVIDIA driver: the library found is the CUDA toolkit's stub of it");
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
        return error_set(MS4_EDEVICE, "the NVIDIA driver is too old for the CUDA library beside it (%d)", result);
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
        return error_set(MS4_EDEVICE, "the NVIDIA driver in the kernel and its library are of different versions");
    case CUDA_ERROR_SYSTEM_NOT_READY:
        return error_set(MS4_EDEVICE, "the NVIDIA driver is not ready yet (802)");
    default:
        if (cuda.cuGetErrorString(result, &text) || !text) text = "an error without a name";
        return error_set(MS4_EDEVICE, "the NVIDIA driver does not start (cuInit: %s, %d)", text, result);
    }
}
/* MS4_LIBCUDA, or else what the system finds, or else where containers, WSL and NixOS have it. */
static void *open_library(void) {
    static const char *const usual[] = { "/usr/local/nvidia/lib64/libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1",
                                         "/run/opengl-driver/lib/libcuda.so.1", "libcuda.so.1" };
    const char *given = getenv("MS4_LIBCUDA");
    if (given && *given) return dlopen(given, RTLD_NOW | RTLD_LOCAL);
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; !library && i < sizeof usual / sizeof *usual; i++)
        library = dlopen(usual[i], RTLD_NOW | RTLD_LOCAL);    /* the last one again, for dlerror */
    return library;
}
static int open_once(void) {
    if (is_open) return MS4_OK;
    void *library = open_library();                           /* stays open: the driver has threads of its own */
    is_absent = !library;
    FAIL_IF(!library, MS4_EDEVICE, "there is no NVIDIA driver (%.200s)", dlerror());
    TRY(find_entries(library));
    TRY(check_begun(cuda.cuInit(0)));
    int n = 0;
    TRY(CU(cuDeviceGetCount, &n));
    TRY(check_begun(n ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE));
    is_open = 1;
    return MS4_OK;
}
int cuda_is_absent(void) { return is_absent; }
int cuda_driver_open(void) {
    pthread_mutex_lock(&opening);
    int status = open_once();
    pthread_mutex_unlock(&opening);
    return status;
}
int cuda_check(const char *call, CUresult result) {
    const char *text = NULL;
    if (result == CUDA_SUCCESS) return MS4_OK;
    if (cuda.cuGetErrorString(result, &text) || !text) text = "an error without a name";
    FAIL_IF(result == CUDA_ERROR_OUT_OF_MEMORY, MS4_ENOMEM,
            "no memory on the GPU (%s: %s); use a smaller --vram, --ctx or batch", call, text);
    return error_set(MS4_EDEVICE, "the GPU failed (%s: %s, %d); --device cpu works without it", call, text, result);
}
