/* table.cpp -- the kernels as g++ compiles their source, by name, from the lists of kernels.h.  One that nobody has
 * written is not found. */
#include "cuda/dev.cuh"
#include "launch.h"
#ifdef FEW_TYPES                            /* mutants.py compiles no others, to be quick */
#undef MS4_FLOAT_TYPES
#undef MS4_QUANTIZED_TYPES
#define MS4_FLOAT_TYPES(X) FEW_FLOATS(X)
#define MS4_QUANTIZED_TYPES(X) FEW_QUANTIZED(X)
#endif
#define WEAK(name, type, threads) extern "C" __attribute__((weak)) void name(const type a);
#define WEAK_MUL(name, ...) WEAK(mul_##name, mul_args, MUL_THREADS) WEAK(gemm_##name, mul_args, GEMM_THREADS)
CUDA_ROW_KERNELS(WEAK)
MS4_TYPES(WEAK_MUL)
#include "cuda/kernels.cu"

namespace emu {
#define ROW(name, type, threads) \
    { #name, sizeof(type), threads, [](const void *p) { name(*(const type *)p); }, (const void *)name },
#define ROW_MUL(name, ...) ROW(mul_##name, mul_args, MUL_THREADS) ROW(gemm_##name, mul_args, GEMM_THREADS)
const kernel kernels[] = { CUDA_ROW_KERNELS(ROW) MS4_TYPES(ROW_MUL) { nullptr, 0, 0, nullptr, nullptr } };
}
