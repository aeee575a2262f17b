/* small_kernels.cpp -- right and wrong kernels that show what the emulation and its driver notice
 * (tests/test_cuda_emulation.py). */
#include "cuda/dev.cuh"
#include "launch.h"

struct small_args { const float *x; float *y; int32_t n, what; };

/* y = x backwards, block by block. */
KERNEL(reverse, small_args, 256) {
    SMEM(shared);
    float *values = (float *)shared;
    values[threadIdx.x] = a.x[blockIdx.x * blockDim.x + threadIdx.x];
    if (a.what != 1) __syncthreads();
    a.y[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
KERNEL(add_one, small_args, 256) {
    for (int i = (int)threadIdx.x; i < a.n; i += (int)blockDim.x) a.y[i] = __fadd_rn(a.x[i], 1.0f);
}
/* Reads or writes n floats from where it was told. */
KERNEL(touch, small_args, 32) {
    if (a.what) a.y[a.n] = 1.0f;
    else a.y[0] = a.x[a.n];
}
KERNEL(shared_memory, small_args, 64) {
    SMEM(dynamic);
    SHARED(float, fixed, 64);
    float *values = (float *)dynamic;
    if (a.what == 0) fixed[threadIdx.x] = a.x[threadIdx.x], values[threadIdx.x] = fixed[threadIdx.x];
    if (a.what == 1) values[64 + threadIdx.x % 4] = 1.0f;
    if (a.what == 2) fixed[64 + threadIdx.x % 4] = 1.0f;
    a.y[threadIdx.x] = a.what == 3 ? values[threadIdx.x] : a.x[threadIdx.x];
}
/* Threads that meet, or not. */
KERNEL(meeting, small_args, 64) {
    int lane = (int)threadIdx.x & 31;
    float v = a.x[threadIdx.x];
    if (a.what == 0 && threadIdx.x >= 40) return;                       /* allowed: who has exited is not waited for */
    if (a.what == 1 && threadIdx.x >= 40) __syncwarp();                 /* waits for those at the barrier, and they.. */
    __syncthreads();
    if (a.what == 2 && lane == 5) return;
    if (a.what == 2) v = __shfl_xor_sync(ALL, v, 1);                    /* lane 4 reads from who has exited */
    if (a.what == 3) v = __shfl_xor_sync(lane < 16 ? 0x1ffffu : ALL, v, 1);
    if (a.what == 4) {                                                  /* allowed: parts of a warp by themselves */
        unsigned part = lane < 8 ? 0xffu : 0xffffff00u;
        v = __shfl_xor_sync(part, v, 1);
        if (lane < 8) v = __shfl_xor_sync(part, v, 1);
    }
    a.y[threadIdx.x] = v;
}
KERNEL(copies, small_args, 32) {
    SMEM(shared);
    copy16_async(shared + 16 * threadIdx.x, a.x + 4 * threadIdx.x);
    copy_commit();
    copy16_part(shared + 512 + 16 * threadIdx.x, a.x + 4 * threadIdx.x, 4);
    copy_commit();
    if (a.what == 0) copy_wait<1>();
    float first = ((float *)shared)[4 * threadIdx.x];
    if (a.what != 2) copy_wait<0>();
    a.y[threadIdx.x] = first;
    a.y[32 + threadIdx.x] = ((float *)(shared + 512))[4 * threadIdx.x];
    a.y[64 + threadIdx.x] = ((float *)(shared + 512))[4 * threadIdx.x + 1];
}
/* y (16 x 8) = x (16 x 32 bytes) times the transposed of the next 8 x 32 bytes; `what` gives signs and width. */
KERNEL(tensor, small_args, 32) {
    const unsigned *left = (const unsigned *)a.x, *right = left + 16 * 8;
    int lane = (int)threadIdx.x, row = lane / 4, column = lane % 4, c[4];
    unsigned of_a[4] = { left[row * 8 + column], left[(row + 8) * 8 + column], left[row * 8 + column + 4],
                         left[(row + 8) * 8 + column + 4] };
    unsigned of_b[2] = { right[row * 8 + column], right[row * 8 + column + 4] };
    if (a.what == 0) mma_k32_first<false, true>(c, of_a, of_b);
    if (a.what == 1) mma_k32_first<true, false>(c, of_a, of_b);
    if (a.what == 2) {
        mma_k16_first<true, true>(c, of_a, of_b[0]);
        mma_k16<true, true>(c, of_a + 2, of_b[1]);
    }
    int *y = (int *)a.y;
    for (int j = 0; j < 4; j++) y[(row + 8 * (j / 2)) * 8 + 2 * column + j % 2] = c[j];
}
/* Four matrices of 8 x 8 halves through shared memory; what: transposed. */
KERNEL(matrices, small_args, 32) {
    SMEM(shared);
    int lane = (int)threadIdx.x;
    for (int i = 0; i < 4; i++) ((float *)shared)[lane * 4 + i] = a.x[lane * 4 + i];
    __syncwarp();
    unsigned r[4];
    if (a.what) ldmatrix_x4<true>(r, shared + 16 * lane);
    else ldmatrix_x4<false>(r, shared + 16 * lane);
    for (int m = 0; m < 4; m++) ((unsigned *)a.y)[m * 32 + lane] = r[m];
}

namespace emu {
#define ROW(name, threads) \
    { #name, sizeof(small_args), threads, [](const void *p) { name(*(const small_args *)p); }, (const void *)name },
const kernel kernels[] = {
    ROW(reverse, 256) ROW(add_one, 256) ROW(touch, 32) ROW(shared_memory, 64) ROW(meeting, 64) ROW(copies, 32)
    ROW(tensor, 32) ROW(matrices, 32) { nullptr, 0, 0, nullptr, nullptr }
};
}
