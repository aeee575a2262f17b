/* float.cuh -- weights that are floats: kernels mul_ and gemm_ of f32, f16 and bf16, in the sums of 16 of ops.h.
 *
 * Partial sum j of a result is a chain of its own, so half a warp takes a result, a lane a chain.  A row that ends
 * within 16 columns is filled up with zeros, as on CPUs.
 */
#ifndef MS4_FLOAT_CUH
#define MS4_FLOAT_CUH
#include "job.cuh"
#include "unpack.cuh"

/* j with j + 8, then + 4, + 2, + 1; the same in all 16 lanes. */
DEV float tree_of_16(float part) {
    for (int with = 8; with; with /= 2) part = __fadd_rn(part, __shfl_xor_sync(ALL, part, with));
    return part;
}
/* Half a warp: one row, two tokens. */
template <class T> DEV void mul_floats(const mul_args &a) {
    const tile &at = tile_of_block<MUL_FLOAT_ROWS, MUL_TOKENS>(a);
    if (!at.job.w) return;
    const mul_job &j = at.job;
    constexpr int TOKENS_APART = MUL_THREADS / 16 / MUL_FLOAT_ROWS;
    static_assert(MUL_TOKENS == 2 * TOKENS_APART, "two tokens for half a warp");
    const int lane = (int)threadIdx.x & 15, half = (int)threadIdx.x >> 4;
    const int row = at.row + half % MUL_FLOAT_ROWS, token = at.token + half / MUL_FLOAT_ROWS;
    const uint8_t *w = row_of_w(j, row);
    const float *x = (const float *)row_of_x(j, token), *x_2 = (const float *)row_of_x(j, token + TOKENS_APART);
    float part = 0, part_2 = 0;
    int k = lane;
#pragma unroll 16
    for (; k < j.n_cols / 16 * 16; k += 16) {
        const float v = T::at(w, k);
        part = __fmaf_rn(v, x[k], part);
        part_2 = __fmaf_rn(v, x_2[k], part_2);
    }
    if (j.n_cols % 16) {
        const bool here = k < j.n_cols;
        const float v = here ? T::at(w, k) : 0;
        part = __fmaf_rn(v, here ? x[k] : 0, part);
        part_2 = __fmaf_rn(v, here ? x_2[k] : 0, part_2);
    }
    part = tree_of_16(part);
    part_2 = tree_of_16(part_2);
    if (!lane) store(j, row, token, part);
    if (!lane) store(j, row, token + TOKENS_APART, part_2);
}

/* --- many tokens ------------------------------------------------------------------------------------------------ */
#define FLOAT_COLUMNS 64            /* staged at a time */
#define FLOAT_STRIDE 66             /* of a staged row: 8 rows on is 16 banks on, where the other half warp reads */
#define FLOAT_EACH 8                /* rows, and tokens, of half a warp */
/* Columns k to k + 63 of 32 rows to shared memory, as floats; beyond the last column zeros. */
template <class F> DEV void stage_floats(float *to, int k, int n_cols, F at) {
#pragma unroll 8
    for (int i = (int)threadIdx.x; i < GEMM_FLOAT_ROWS * FLOAT_COLUMNS; i += GEMM_THREADS) {
        const int r = i / FLOAT_COLUMNS, c = i % FLOAT_COLUMNS;
        to[r * FLOAT_STRIDE + c] = k + c < n_cols ? at(r, k + c) : 0;
    }
}
/* Half a warp: 8 rows times 8 tokens, its lanes the 16 partial sums of each. */
template <class T> DEV void gemm_floats(const mul_args &a) {
    SHARED(float, w, GEMM_FLOAT_ROWS * FLOAT_STRIDE);
    SHARED(float, x, GEMM_FLOAT_TOKENS * FLOAT_STRIDE);
    const tile &at = tile_of_block<GEMM_FLOAT_ROWS, GEMM_FLOAT_TOKENS>(a);
    const mul_job &j = at.job;
    static_assert(GEMM_FLOAT_ROWS == GEMM_FLOAT_TOKENS && GEMM_FLOAT_ROWS == 4 * FLOAT_EACH, "16 halves");
    const int lane = (int)threadIdx.x & 15, half = (int)threadIdx.x >> 4;
    const int row = half / 4 * FLOAT_EACH, token = half % 4 * FLOAT_EACH;
    float part[FLOAT_EACH][FLOAT_EACH] = {};
    for (int k = 0; k < j.n_cols; k += FLOAT_COLUMNS) {
        __syncthreads();
        stage_floats(w, k, j.n_cols, [&](int r, int c) { return T::at(row_of_w(j, at.row + r), c); });
        stage_floats(x, k, j.n_cols, [&](int t, int c) { return ((const float *)row_of_x(j, at.token + t))[c]; });
        __syncthreads();
        const int end = j.n_cols - k < FLOAT_COLUMNS ? j.n_cols - k : FLOAT_COLUMNS;
        for (int c = lane; c - lane < end; c += 16) {
            float of_w[FLOAT_EACH];
#pragma unroll
            for (int r = 0; r < FLOAT_EACH; r++) of_w[r] = w[(row + r) * FLOAT_STRIDE + c];
#pragma unroll
            for (int t = 0; t < FLOAT_EACH; t++) {
                const float of_x = x[(token + t) * FLOAT_STRIDE + c];
#pragma unroll
                for (int r = 0; r < FLOAT_EACH; r++) part[r][t] = __fmaf_rn(of_w[r], of_x, part[r][t]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < FLOAT_EACH; r++)
#pragma unroll
        for (int t = 0; t < FLOAT_EACH; t++) {
            const float y = tree_of_16(part[r][t]);
            if (lane == t) store(j, at.row + row + r, at.token + token + t, y);
        }
}
#endif
