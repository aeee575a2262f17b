/* module.c -- finds the code of the kernels: MS4_GPU_CODE, or what was built with ms4. */
#include "cuda/module.h"
#include "memory.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The bytes of a file, and a zero behind them (PTX is text); *out NULL: there is no such file. */
static int read_file(const char *path, char **out, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    *out = NULL;
    FAIL_IF(!file && errno != ENOENT && errno != ENOTDIR, MS4_EIO, "%s: %s", path, strerror(errno));
    if (!file) return MS4_OK;
    long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    char *text = size < 0 ? NULL : memory_take((size_t)size + 1, 1);
    rewind(file);
    int good = text && fread(text, 1, (size_t)size, file) == (size_t)size;
    fclose(file);
    if (!good) memory_give(text);
    FAIL_IF(!good, MS4_EIO, "%s: it cannot be read", path);
    *out = text;
    *bytes = (size_t)size;
    return MS4_OK;
}
static int find_code(const char *from, char **out) {
    const char *given = getenv("MS4_GPU_CODE");
    char path[1024];
    struct stat status;
    size_t bytes;
    if (given && *given) {
        TRY(read_file(given, out, &bytes));
        FAIL_IF(!*out, MS4_EIO, "MS4_GPU_CODE=%.200s: no such file; unset it", given);
        return MS4_OK;
    }
    const int is_file = from && !stat(from, &status) && S_ISREG(status.st_mode);
    snprintf(path, sizeof path, "%s%s", from ? from : "", is_file ? "" : "/cuda/kernels.fatbin");
    TRY(read_file(path, out, &bytes));
    FAIL_IF(!*out, MS4_EDEVICE, "this ms4 was built without kernels for GPUs (there was no nvcc), and finds no NVRTC; "
            "pip install nvidia-cuda-nvrtc-cu12");
    return MS4_OK;
}
int module_open(const char *from, CUmodule *out) {
    char *code;
    TRY(find_code(from, &code));
    CUresult result = cuda.cuModuleLoadData(out, code);
    memory_give(code);
    switch (result) {
    case CUDA_ERROR_INVALID_IMAGE: case CUDA_ERROR_INVALID_SOURCE:       /* of a newer CUDA, in a form it cannot read */
    case CUDA_ERROR_NO_BINARY_FOR_GPU: case CUDA_ERROR_INVALID_PTX: case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
        return error_set(MS4_EDEVICE, "ms4 was built for other GPUs than this one, or for a newer driver; update the "
                         "driver, or build ms4 anew (%d)", result);
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND: case CUDA_ERROR_JIT_COMPILATION_DISABLED:
        return error_set(MS4_EDEVICE, "ms4 was built for other GPUs than this one, and the driver may not compile for "
                         "it (libnvidia-ptxjitcompiler.so.1, CUDA_DISABLE_PTX_JIT); build ms4 anew (%d)", result);
    default:
        return cuda_check("cuModuleLoadData", result);
    }
}
