/* kernels.cu -- every kernel of kernels.h: the one file that is compiled, by nvcc, NVRTC, or g++ for the emulation. */
#include "dev.cuh"
#include "attend.cuh"
#include "attend_patches.cuh"
#include "float.cuh"
#include "gemm.cuh"
#include "highest.cuh"
#include "mul.cuh"
#include "patches.cuh"
#include "route.cuh"
#include "rows.cuh"

/* Their blocks on a multiprocessor are said so that the compiler has the registers that it wants, and spills none. */
#define X(type, ...) \
    KERNEL_BLOCKS(mul_##type, mul_args, MUL_THREADS, 3) { mul_floats<type_##type>(a); } \
    KERNEL_BLOCKS(gemm_##type, mul_args, GEMM_THREADS, 1) { gemm_floats<type_##type>(a); }
MS4_FLOAT_TYPES(X)
#undef X
#define X(type, ...) \
    KERNEL_BLOCKS(mul_##type, mul_args, MUL_THREADS, 2) { mul_quantized<type_##type>(a); } \
    KERNEL_BLOCKS(gemm_##type, mul_args, GEMM_THREADS, 2) { gemm_quantized<type_##type>(a); }
MS4_QUANTIZED_TYPES(X)
#undef X
