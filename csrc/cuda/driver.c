/* driver.c -- finds the CUDA driver and its entry points, and says in words what a call of it came to. */
#include "cuda/driver.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

struct cuda_driver cuda;

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static int is_open;

static int find_entries(void *library) {
    const struct { void **entry; const char *symbol; } entries[] = {
#define ENTRY(name, symbol, parameters) { (void **)&cuda.name, #symbol },
        CUDA_DRIVER(ENTRY)
#undef ENTRY
    };
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        *entries[i].entry = dlsym(library, entries[i].symbol);
        FAIL_IF(!*entries[i].entry, MS4_EDEVICE, "the NVIDIA driver is too old: it has no %s", entries[i].symbol);
    }
    return MS4_OK;
}
static int open_once(void) {
    const char *given = getenv("MS4_LIBCUDA"), *name = given && *given ? given : "libcuda.so.1";
    if (is_open) return MS4_OK;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);      /* stays open: the driver has threads of its own */
    FAIL_IF(!library, MS4_EDEVICE, "there is no NVIDIA driver (%.200s)", dlerror());
    TRY(find_entries(library));
    int n = 0;
    const CUresult begun = cuda.cuInit(0);
    FAIL_IF(begun == CUDA_ERROR_NO_DEVICE, MS4_EDEVICE, "the NVIDIA driver finds no GPU");
    TRY(cuda_check("cuInit", begun));
    TRY(CU(cuDeviceGetCount, &n));
    FAIL_IF(!n, MS4_EDEVICE, "the NVIDIA driver finds no GPU");
    is_open = 1;
    return MS4_OK;
}
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
