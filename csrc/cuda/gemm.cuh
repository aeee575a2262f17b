/* gemm.cuh -- quantised weights times many tokens, on tensor cores: kernels gemm_<type>.
 *
 * A block: 128 rows times 64 tokens, 8 warps of 32 x 32.  Superblock by superblock all of it is opened into shared
 * memory as int8_t; products of 32 or 16 columns, whatever shares a scale, come exact from mma.m16n8k32 or k16, and are
 * folded by integers, or as a chain of floats for 32-blocks.  Mins: sum of min * x.sums by two mma.m16n8k16 more, with
 * sums = 16 high + low, as both fit a byte then.
 */
#ifndef MS4_GEMM_CUH
#define MS4_GEMM_CUH
#include "job.cuh"
#include "unpack.cuh"

#define GEMM_STRIDE 272             /* bytes of an opened row: 4 banks further, so 8 rows by 4 words do not conflict */
/* Scales by group of columns, then by row: int32_t, or float for 32-blocks.  mins: bytes of a row for K types; floats
 * by block, then row, for 32-blocks. */
template <class T> struct gemm_stage {
    static constexpr int GROUPS = SUPERBLOCK / form<T>::WIDTH;
    static constexpr bool FLOAT_MINS = T::FAMILY == FAMILY_blocks_min;
    uint8_t w[GEMM_ROWS * GEMM_STRIDE], x[GEMM_TOKENS * GEMM_STRIDE];
    unsigned scale[GROUPS * GEMM_ROWS];
    union {
        uint8_t min[GEMM_ROWS * 16];
        float block_m[FLOAT_MINS ? 8 * GEMM_ROWS : 1];
    };
    union {
        uint8_t sums[2 * GEMM_TOKENS * 16];     /* low nibbles, then the rest, by token */
        float block_sums[FLOAT_MINS ? 8 * GEMM_TOKENS : 1];
    };
    float d[GEMM_ROWS], dmin[GEMM_ROWS], x_d[GEMM_TOKENS];
};
template <class T> DEV void stage_weights(gemm_stage<T> *s, const tile &at, int i, int n) {
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, r = (int)threadIdx.x % GEMM_ROWS;
    const int part = (int)threadIdx.x / GEMM_ROWS;
#pragma unroll 4
    for (int row = warp; row < GEMM_ROWS; row += GEMM_THREADS / 32) {
        uint2 q = { 0, 0 };
        if (8 * lane < n) q = T::quants(row_of_w(at.job, at.row + row) + (size_t)i * T::BYTES, lane, T::book());
        *(uint2 *)(s->w + row * GEMM_STRIDE + 8 * lane) = q;
    }
    const uint8_t *p = row_of_w(at.job, at.row + r) + (size_t)i * T::BYTES;
    constexpr int EACH = gemm_stage<T>::GROUPS / 2;
    for (int g = part * EACH; g < part * EACH + EACH; g++) {
        if constexpr (form<T>::BLOCKS) {
            if (g * form<T>::WIDTH >= n) break;
            s->scale[g * GEMM_ROWS + r] = __float_as_uint(T::block_d(p, g));
            if constexpr (form<T>::MINS) s->block_m[g * GEMM_ROWS + r] = T::block_m(p, g);
        } else {
            s->scale[g * GEMM_ROWS + r] = (unsigned)T::scale(p, g * (16 / gemm_stage<T>::GROUPS));
        }
    }
    if constexpr (!form<T>::BLOCKS) {
        if constexpr (form<T>::MINS)
            for (int g = part * 8; g < part * 8 + 8; g++) s->min[r * 16 + g] = (uint8_t)T::min(p, g);
        if (!part) s->d[r] = T::d(p);
        if (part) s->dmin[r] = T::dmin(p);
    }
}
template <class T> DEV void stage_tokens(gemm_stage<T> *s, const tile &at, int i) {
#pragma unroll 4
    for (int k = (int)threadIdx.x; k < GEMM_TOKENS * 16; k += GEMM_THREADS) {
        const block_q8 *x = (const block_q8 *)row_of_x(at.job, at.token + k / 16) + i;
        *(uint4 *)(s->x + k / 16 * GEMM_STRIDE + k % 16 * 16) = *(const uint4 *)(x->qs + k % 16 * 16);
    }
    const int t = (int)threadIdx.x % GEMM_TOKENS, part = (int)threadIdx.x / GEMM_TOKENS;
    const block_q8 *x = (const block_q8 *)row_of_x(at.job, at.token + t) + i;
    if (!part) s->x_d[t] = x->d;
    if constexpr (form<T>::MINS)
        for (int g = part * 4; g < part * 4 + 4; g++) {
            if constexpr (gemm_stage<T>::FLOAT_MINS) {
                if (g % 2 == 0) s->block_sums[g / 2 * GEMM_TOKENS + t] = __int2float_rn(x->sums[g] + x->sums[g + 1]);
            } else {
                s->sums[t * 16 + g] = (uint8_t)(x->sums[g] & 15);
                s->sums[(GEMM_TOKENS + t) * 16 + g] = (uint8_t)(x->sums[g] >> 4);
            }
        }
}
/* A warp's place in the tile, and a lane's: rows row + 16 m + 8 h, tokens token + 8 n + e. */
struct gemm_lane { int row, token, w_row, c; };
typedef int gemm_ints[2][4][4];     /* by m, n, and 2 h + e, as mma gives them */
typedef float gemm_floats_of[2][4][4];

DEV void fragment_of_w(unsigned (*a)[4], const uint8_t *w, int column, const gemm_lane &l) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            a[m][k] =
                *(const unsigned *)(w + (l.row + 16 * m + k % 2 * 8) * GEMM_STRIDE + column + k / 2 * 16 + 4 * l.c);
}
template <class T> DEV void scales_of(unsigned *scale, const gemm_stage<T> *s, int group, const gemm_lane &l) {
#pragma unroll
    for (int r = 0; r < 4; r++) scale[r] = s->scale[group * GEMM_ROWS + l.row + 8 * r];
}
/* Types with integer scales: columns 32 b to 32 b + 31. */
template <class T> DEV void fold_integers(gemm_ints &I, const gemm_stage<T> *s, int b, const gemm_lane &l) {
    unsigned a[2][4], scale[4], second[4];
    constexpr bool HALVES = form<T>::WIDTH == 16;
    fragment_of_w(a, s->w, 32 * b, l);
    scales_of(scale, s, HALVES ? 2 * b : b, l);
    if (HALVES) scales_of(second, s, HALVES ? 2 * b + 1 : 0, l);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint8_t *x = s->x + (l.w_row + 8 * n) * GEMM_STRIDE + 32 * b + 4 * l.c;
        const unsigned of_x[2] = { *(const unsigned *)x, *(const unsigned *)(x + 16) };
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int p[4], q[4];
            if (HALVES) mma_k16_first<true, true>(p, a[m], of_x[0]), mma_k16_first<true, true>(q, a[m] + 2, of_x[1]);
            else mma_k32_first<true, true>(p, a[m], of_x);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                I[m][n][i] += (int)scale[2 * m + i / 2] * p[i];
                if (HALVES) I[m][n][i] += (int)second[2 * m + i / 2] * q[i];
            }
        }
    }
}
/* 32-blocks: the chain over block b (of NVFP4: two of 16). */
template <class T> DEV void fold_blocks(gemm_floats_of &v, const gemm_stage<T> *s, int b, const gemm_lane &l) {
    unsigned a[2][4], scale[4], second[4];
    constexpr bool HALVES = form<T>::WIDTH == 16;
    fragment_of_w(a, s->w, 32 * b, l);
    scales_of(scale, s, HALVES ? 2 * b : b, l);
    if (HALVES) scales_of(second, s, HALVES ? 2 * b + 1 : 0, l);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint8_t *x = s->x + (l.w_row + 8 * n) * GEMM_STRIDE + 32 * b + 4 * l.c;
        const unsigned of_x[2] = { *(const unsigned *)x, *(const unsigned *)(x + 16) };
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int p[4], q[4];
            if (HALVES) mma_k16_first<true, true>(p, a[m], of_x[0]), mma_k16_first<true, true>(q, a[m] + 2, of_x[1]);
            else mma_k32_first<true, true>(p, a[m], of_x);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float t = __fmaf_rn(__uint_as_float(scale[2 * m + i / 2]), __int2float_rn(p[i]), v[m][n][i]);
                if (HALVES) t = __fmaf_rn(__uint_as_float(second[2 * m + i / 2]), __int2float_rn(q[i]), t);
                if constexpr (form<T>::MINS)
                    t = __fmaf_rn(s->block_m[b * GEMM_ROWS + l.row + 16 * m + i / 2 * 8],
                                  s->block_sums[b * GEMM_TOKENS + l.token + 8 * n + i % 2], t);
                v[m][n][i] = t;
            }
        }
    }
}
/* v = d * (float)I, and with mins fma(-dmin, (float)J, that). */
template <class T> DEV void value_of_integers(gemm_floats_of &v, const gemm_ints &I, const gemm_stage<T> *s,
                                              const gemm_lane &l) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        unsigned mins[2] = { 0, 0 };
        if constexpr (form<T>::MINS)
            for (int h = 0; h < 2; h++) mins[h] = *(const unsigned *)(s->min + (l.row + 16 * m + 8 * h) * 16 + 4 * l.c);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int low[4] = {}, high[4] = {};
            if constexpr (form<T>::MINS) {
                const uint8_t *sums = s->sums + (l.w_row + 8 * n) * 16 + 4 * l.c;
                mma_k16_first<true, true>(low, mins, *(const unsigned *)sums);
                mma_k16_first<true, true>(high, mins, *(const unsigned *)(sums + GEMM_TOKENS * 16));
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = l.row + 16 * m + i / 2 * 8;
                v[m][n][i] = __fmul_rn(s->d[r], __int2float_rn(I[m][n][i]));
                if constexpr (form<T>::MINS)
                    v[m][n][i] = __fmaf_rn(-s->dmin[r], __int2float_rn(low[i] + 16 * high[i]), v[m][n][i]);
            }
        }
    }
}
/* The value of the staged superblock, without x's own scales. */
template <class T> DEV void value_of_stage(gemm_floats_of &v, const gemm_stage<T> *s, const gemm_lane &l, int n) {
    if constexpr (form<T>::BLOCKS) {
#pragma unroll
        for (int i = 0; i < 32; i++) v[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll 1
        for (int b = 0; b < n / 32; b++) fold_blocks(v, s, b, l);
    } else {
        gemm_ints I = {};
#pragma unroll 2
        for (int b = 0; b < 8; b++) fold_integers(I, s, b, l);
        value_of_integers(v, I, s, l);
    }
}
template <class T> DEV void gemm_quantised(const mul_args &args) {
    SMEM(shared);
    static_assert(sizeof(gemm_stage<T>) <= GEMM_SHARED, "what the host gives");
    gemm_stage<T> *s = (gemm_stage<T> *)shared;
    const tile at = tile_of_block<GEMM_ROWS, GEMM_TOKENS>(args);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const gemm_lane l = { warp % 4 * 32 + lane / 4, warp / 4 * 32 + lane % 4 * 2, warp / 4 * 32 + lane / 4, lane % 4 };
    gemm_floats_of y = {};
    for (int i = 0; i * SUPERBLOCK < at.job.n_cols; i++) {
        const int left = at.job.n_cols - i * SUPERBLOCK, n = left < SUPERBLOCK ? left : SUPERBLOCK;
        __syncthreads();
        stage_weights(s, at, i, n);
        stage_tokens(s, at, i);
        __syncthreads();
        gemm_floats_of v;
        value_of_stage(v, s, l, n);
#pragma unroll
        for (int k = 0; k < 32; k++)
            y[k / 16][k / 4 % 4][k % 4] =
                __fmaf_rn(s->x_d[l.token + k / 4 % 4 * 8 + k % 2], v[k / 16][k / 4 % 4][k % 4],
                          y[k / 16][k / 4 % 4][k % 4]);
    }
#pragma unroll
    for (int k = 0; k < 32; k++)
        store(at.job, at.row + l.row + k / 16 * 16 + k % 4 / 2 * 8, at.token + l.token + k / 4 % 4 * 8 + k % 2,
              y[k / 16][k / 4 % 4][k % 4]);
}
#endif
