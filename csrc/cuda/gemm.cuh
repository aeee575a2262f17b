/* gemm.cuh -- quantized weights times many tokens, on tensor cores: kernels gemm_<type>.
 *
 * A block: 128 rows times 64 tokens, 8 warps of 32 x 32.  Half a superblock at a time is opened into shared memory as
 * int8_t, so that two blocks fit a multiprocessor and one opens while the other multiplies.  Products of 32 or 16
 * columns, whatever shares a scale, come exact from mma.m16n8k32 or k16, and are folded by integers, or as a chain of
 * floats for 32-blocks.  Mins: sum of min * x.sums by two mma.m16n8k16 more, with
 * sums = 16 high + low, as both fit a byte then.
 */
#ifndef MS4_GEMM_CUH
#define MS4_GEMM_CUH
#include "job.cuh"
#include "unpack.cuh"

#define GEMM_COLUMNS (SUPERBLOCK / 2)
#define GEMM_STRIDE 144             /* bytes of an opened row: 4 banks further, so 8 rows by 4 words do not conflict */
/* Of a half: opened weights and tokens, scales by group of columns, then by row (int32_t, or float for 32-blocks), and
 * for 32-blocks mins and sums of x by block, then by row or token.  Of the superblock: mins and sums of K types, in
 * bytes, and all d. */
template <class T> struct gemm_stage {
    static constexpr int GROUPS = GEMM_COLUMNS / form<T>::WIDTH;
    static constexpr bool FLOAT_MINS = T::FAMILY == FAMILY_blocks_min;
    uint8_t w[GEMM_ROWS * GEMM_STRIDE], x[GEMM_TOKENS * GEMM_STRIDE];
    unsigned scale[GROUPS * GEMM_ROWS];
    union {
        uint8_t min[GEMM_ROWS * 16];
        float block_m[FLOAT_MINS ? 4 * GEMM_ROWS : 1];
    };
    union {
        uint8_t sums[2 * GEMM_TOKENS * 16];     /* low nibbles, then the rest, by token */
        float block_sums[FLOAT_MINS ? 4 * GEMM_TOKENS : 1];
    };
    float d[GEMM_ROWS], dmin[GEMM_ROWS], x_d[GEMM_TOKENS];
    const uint8_t *row[GEMM_ROWS];              /* where rows and tokens begin */
    const block_q8 *token[GEMM_TOKENS];
};
template <class T> DEV void find_rows(gemm_stage<T> *s, const tile &at) {
    const int i = (int)threadIdx.x;
    if (i < GEMM_ROWS) s->row[i] = row_of_w(at.job, at.row + i);
    else if (i < GEMM_ROWS + GEMM_TOKENS)
        s->token[i - GEMM_ROWS] = (const block_q8 *)row_of_x(at.job, at.token + i - GEMM_ROWS);
}
/* What is staged: half h of superblock i, of which n columns exist. */
struct gemm_half { int i, h, n; };
template <class T> DEV void stage_weights(gemm_stage<T> *s, gemm_half half) {
    const int u = (int)threadIdx.x % 16, r = (int)threadIdx.x % GEMM_ROWS, part = (int)threadIdx.x / GEMM_ROWS;
    const size_t before = (size_t)half.i * T::BYTES;
#pragma unroll 2
    for (int row = (int)threadIdx.x / 16; row < GEMM_ROWS; row += GEMM_THREADS / 16) {
        uint2 q = { 0, 0 };
        if (8 * u < half.n) q = T::quants(s->row[row] + before, 16 * half.h + u, T::book());
        *(uint2 *)(s->w + row * GEMM_STRIDE + 8 * u) = q;
    }
    const uint8_t *p = s->row[r] + before;
    constexpr int GROUPS = gemm_stage<T>::GROUPS, EACH = GROUPS / 2;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int g = part * EACH + k, all = half.h * GROUPS + g;       /* of the half, of the superblock */
        if constexpr (form<T>::BLOCKS) {
            if (g * form<T>::WIDTH >= half.n) break;
            s->scale[g * GEMM_ROWS + r] = __float_as_uint(T::block_d(p, all));
            if constexpr (form<T>::MINS) s->block_m[g * GEMM_ROWS + r] = T::block_m(p, all);
        } else {
            s->scale[g * GEMM_ROWS + r] = (unsigned)T::scale(p, all * form<T>::WIDTH / 16);
        }
    }
    if constexpr (!form<T>::BLOCKS) {
        if (half.h) return;
        if constexpr (form<T>::MINS)
            for (int g = part * 8; g < part * 8 + 8; g++) s->min[r * 16 + g] = (uint8_t)T::min(p, g);
        if (!part) s->d[r] = T::d(p);
        if (part) s->dmin[r] = T::dmin(p);
    }
}
template <class T> DEV void stage_tokens(gemm_stage<T> *s, gemm_half half) {
#pragma unroll
    for (int k = (int)threadIdx.x; k < GEMM_TOKENS * 8; k += GEMM_THREADS) {
        const block_q8 *x = s->token[k / 8] + half.i;
        *(uint4 *)(s->x + k / 8 * GEMM_STRIDE + k % 8 * 16) =
            *(const uint4 *)(x->qs + half.h * GEMM_COLUMNS + k % 8 * 16);
    }
    const int t = (int)threadIdx.x % GEMM_TOKENS, part = (int)threadIdx.x / GEMM_TOKENS;
    const block_q8 *x = s->token[t] + half.i;
    if constexpr (gemm_stage<T>::FLOAT_MINS) {
        const int16_t *sums = x->sums + 8 * half.h + 2 * part;
        s->block_sums[part * GEMM_TOKENS + t] = __int2float_rn(sums[0] + sums[1]);
    }
    if (half.h) return;
    if (!part) s->x_d[t] = x->d;
    if constexpr (form<T>::MINS && !form<T>::BLOCKS)
        for (int g = part * 4; g < part * 4 + 4; g++) {
            s->sums[t * 16 + g] = (uint8_t)(x->sums[g] & 15);
            s->sums[(GEMM_TOKENS + t) * 16 + g] = (uint8_t)(x->sums[g] >> 4);
        }
}
/* A warp's place in the tile, and a lane's: rows row + 16 m + 8 h, tokens token + 8 n + e. */
struct gemm_lane { int row, token, w_row, c; };
typedef int gemm_ints[2][4][4];     /* by m, n, and 2 h + e, as mma gives them */
typedef float gemm_floats_of[2][4][4];

/* Products of the columns of group g, by tile of 16 rows and 8 tokens. */
template <int WIDTH> DEV void fragment_of_w(unsigned (*a)[4], const uint8_t *w, int g, const gemm_lane &l) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int k = 0; k < WIDTH / 8; k++) {
            const int row = l.row + 16 * m + k % 2 * 8;
            a[m][k] = *(const unsigned *)(w + row * GEMM_STRIDE + WIDTH * g + k / 2 * 16 + 4 * l.c);
        }
}
template <int WIDTH> DEV void multiply(int *p, const unsigned *a, const unsigned *x) {
    if (WIDTH == 16) mma_k16_first<true, true>(p, a, x[0]);
    else mma_k32_first<true, true>(p, a, x);
}
/* f(m, n, i, product) for all results of a lane, of group g. */
template <class T, class F> DEV void for_products(const gemm_stage<T> *s, int g, const gemm_lane &l, F f) {
    constexpr int WIDTH = form<T>::WIDTH;
    unsigned a[2][4];
    fragment_of_w<WIDTH>(a, s->w, g, l);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint8_t *x = s->x + (l.w_row + 8 * n) * GEMM_STRIDE + WIDTH * g + 4 * l.c;
        const unsigned of_x[2] = { *(const unsigned *)x, WIDTH == 32 ? *(const unsigned *)(x + 16) : 0 };
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int p[4];
            multiply<WIDTH>(p, a[m], of_x);
#pragma unroll
            for (int i = 0; i < 4; i++) f(m, n, i, p[i]);
        }
    }
}
template <class T> DEV void scales_of(unsigned *scale, const gemm_stage<T> *s, int g, const gemm_lane &l) {
#pragma unroll
    for (int r = 0; r < 4; r++) scale[r] = s->scale[g * GEMM_ROWS + l.row + 8 * r];
}
/* Types with integer scales. */
template <class T> DEV void fold_integers(gemm_ints &I, const gemm_stage<T> *s, int g, const gemm_lane &l) {
    unsigned scale[4];
    scales_of(scale, s, g, l);
    for_products(s, g, l, [&](int m, int n, int i, int p) { I[m][n][i] += (int)scale[2 * m + i / 2] * p; });
}
/* 32-blocks, or of 16: the next step of the chain. */
template <class T> DEV void fold_blocks(gemm_floats_of &v, const gemm_stage<T> *s, int g, const gemm_lane &l) {
    unsigned scale[4];
    scales_of(scale, s, g, l);
    for_products(s, g, l, [&](int m, int n, int i, int p) {
        float t = __fmaf_rn(__uint_as_float(scale[2 * m + i / 2]), __int2float_rn(p), v[m][n][i]);
        if constexpr (form<T>::MINS)
            t = __fmaf_rn(s->block_m[g * GEMM_ROWS + l.row + 16 * m + i / 2 * 8],
                          s->block_sums[g * GEMM_TOKENS + l.token + 8 * n + i % 2], t);
        v[m][n][i] = t;
    });
}
/* y = fma(x.d, t, y) with t = d * (float)I, and with mins t = fma(-dmin, (float)J, that). */
template <class T>
DEV void add_integers(gemm_floats_of &y, const gemm_ints &I, const gemm_stage<T> *s, const gemm_lane &l) {
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
                float t = __fmul_rn(s->d[r], __int2float_rn(I[m][n][i]));
                if constexpr (form<T>::MINS)
                    t = __fmaf_rn(-s->dmin[r], __int2float_rn(low[i] + 16 * high[i]), t);
                y[m][n][i] = __fmaf_rn(s->x_d[l.token + 8 * n + i % 2], t, y[m][n][i]);
            }
        }
    }
}
template <class T>
DEV void add_blocks(gemm_floats_of &y, const gemm_floats_of &v, const gemm_stage<T> *s, const gemm_lane &l) {
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int k = 0; k < 8; k++)
            y[k / 4][n][k % 4] = __fmaf_rn(s->x_d[l.token + 8 * n + k % 2], v[k / 4][n][k % 4], y[k / 4][n][k % 4]);
}
template <class T> DEV void gemm_quantized(const mul_args &args) {
    SMEM(shared);
    static_assert(sizeof(gemm_stage<T>) <= GEMM_SHARED, "what the host gives");
    gemm_stage<T> *s = (gemm_stage<T> *)shared;
    const tile &at = tile_of_block<GEMM_ROWS, GEMM_TOKENS>(args);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const gemm_lane l = { warp % 4 * 32 + lane / 4, warp / 4 * 32 + lane % 4 * 2, warp / 4 * 32 + lane / 4, lane % 4 };
    find_rows(s, at);
    gemm_floats_of y = {}, v;                   /* v, I: of the superblock, without x's own scales */
    gemm_ints I;
#pragma unroll 1
    for (int column = 0; column < at.job.n_cols; column += GEMM_COLUMNS) {
        const int left = at.job.n_cols - column, h = column / GEMM_COLUMNS % 2;
        const gemm_half half = { column / SUPERBLOCK, h, left < GEMM_COLUMNS ? left : GEMM_COLUMNS };
        if (!h)
#pragma unroll
            for (int k = 0; k < 32; k++) v[k / 16][k / 4 % 4][k % 4] = 0, I[k / 16][k / 4 % 4][k % 4] = 0;
        __syncthreads();
        stage_weights(s, half);
        stage_tokens(s, half);
        __syncthreads();
#pragma unroll 1
        for (int g = 0; g < half.n / form<T>::WIDTH; g++) {
            if constexpr (form<T>::BLOCKS) fold_blocks(v, s, g, l);
            else fold_integers(I, s, g, l);
        }
        if (!h && left > GEMM_COLUMNS) continue;
        if constexpr (form<T>::BLOCKS) add_blocks(y, v, s, l);
        else add_integers(y, I, s, l);
    }
#pragma unroll
    for (int k = 0; k < 32; k++)
        store(at.job, at.row + l.row + k / 16 * 16 + k % 4 / 2 * 8, at.token + l.token + k / 4 % 4 * 8 + k % 2,
              y[k / 16][k / 4 % 4][k % 4]);
}
#endif
