/* float.c -- products with float weights on AVX2: the 16 partial sums of ops.h are two registers. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "cpu/plain/plain.h"

#define ROWS_MOST 2
#define TOKENS_MOST 3       /* 2 rows x 3 tokens x 2 registers of sums, 6 left for operands */

typedef __m256 load_fn(const uint8_t *w, size_t k);        /* weights k to k + 7 of a row */
INLINE __m256 load_f32(const uint8_t *w, size_t k) { return _mm256_loadu_ps((const float *)w + k); }
INLINE __m256 load_f16(const uint8_t *w, size_t k) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + k * 2)));
}
INLINE __m256 load_bf16(const uint8_t *w, size_t k) {
    const __m128i h = _mm_loadu_si128((const void *)(w + k * 2));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
/* j with j + 8, then + 4, + 2, + 1 */
INLINE float sum_tree(__m256 low, __m256 high) {
    __m256 v = _mm256_add_ps(low, high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/* Many tokens are done in blocks that stay in the cache: so many rows and tokens, and so many columns at a time, the
 * 16 sums of each output waiting in memory meanwhile. */
#define BLOCK_ROWS 16
#define BLOCK_TOKENS 24
#define BLOCK_COLUMNS 256
typedef __m256 float_sums[BLOCK_ROWS][BLOCK_TOKENS][2];

/* Columns k to `end` of n_rows rows and n_tokens tokens; those beyond the last multiple of 16 are copied out and
 * filled up with zeros. */
INLINE void tile_floats(float_sums sums, int row, int token, const uint8_t *const *w, const float *const *x, int n_rows,
                        int n_tokens, size_t k, size_t end, size_t size, load_fn *load) {
    __m256 sum[ROWS_MOST][TOKENS_MOST][2];
    for (int i = 0; i < n_rows * n_tokens * 2; i++)
        sum[i / 2 / n_tokens][i / 2 % n_tokens][i % 2] = sums[row + i / 2 / n_tokens][token + i / 2 % n_tokens][i % 2];
    for (; k + 16 <= end; k += 16)
        for (size_t half = 0; half < 2; half++)
            for (int r = 0; r < n_rows; r++) {
                __m256 v = load(w[r], k + half * 8);
                for (int t = 0; t < n_tokens; t++)
                    sum[r][t][half] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[t] + k + half * 8), sum[r][t][half]);
            }
    for (int i = 0; i < n_rows * n_tokens && k < end; i++) {
        int r = i / n_tokens, t = i % n_tokens;
        uint8_t w_end[64] = { 0 };
        float x_end[16] = { 0 };
        memcpy(w_end, w[r] + k * size, (end - k) * size);
        memcpy(x_end, x[t] + k, (end - k) * sizeof(float));
        for (size_t half = 0; half < 2; half++)
            sum[r][t][half] =
                _mm256_fmadd_ps(load(w_end, half * 8), _mm256_loadu_ps(x_end + half * 8), sum[r][t][half]);
    }
    for (int i = 0; i < n_rows * n_tokens * 2; i++)
        sums[row + i / 2 / n_tokens][token + i / 2 % n_tokens][i % 2] = sum[i / 2 / n_tokens][i / 2 % n_tokens][i % 2];
}
/* One row or two, times all tokens of the block. */
INLINE void rows_floats(float_sums sums, int row, const uint8_t *const *w, const float *const *x, int n_rows,
                        int n_tokens, size_t k, size_t end, size_t size, load_fn *load) {
    int t = 0;
    for (; t + 3 <= n_tokens; t += 3) tile_floats(sums, row, t, w, x + t, n_rows, 3, k, end, size, load);
    for (; t < n_tokens; t++) tile_floats(sums, row, t, w, x + t, n_rows, 1, k, end, size, load);
}
INLINE void block_floats(const struct ms4_mul *m, int row, int token, int n_rows, int n_tokens, size_t size,
                         load_fn *load) {
    const uint8_t *w[BLOCK_ROWS];
    const float *x[BLOCK_TOKENS];
    float_sums sums;
    size_t n = (size_t)m->n_cols, step = n_tokens > 1 ? BLOCK_COLUMNS : n;
    for (int r = 0; r < n_rows; r++) w[r] = m->w + (size_t)(row + r) * m->row_bytes;
    for (int t = 0; t < n_tokens; t++) x[t] = mul_floats(m, token + t);
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++) sums[r][t][0] = sums[r][t][1] = _mm256_setzero_ps();
    for (size_t k = 0; k < n; k += step) {
        size_t end = n - k < step ? n : k + step;
        int r = 0;
        for (; r + 2 <= n_rows; r += 2) rows_floats(sums, r, w + r, x, 2, n_tokens, k, end, size, load);
        if (r < n_rows) rows_floats(sums, r, w + r, x, 1, n_tokens, k, end, size, load);
    }
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++)
            m->y[(size_t)(token + t) * m->y_stride + (size_t)(row + r)] = sum_tree(sums[r][t][0], sums[r][t][1]);
}
INLINE void mul_floats_avx2(const struct ms4_mul *m, size_t size, load_fn *load) {
    for (int row = 0; row < m->n_rows; row += BLOCK_ROWS)
        for (int token = 0; token < m->n_tokens; token += BLOCK_TOKENS) {
            int n_rows = m->n_rows - row, n_tokens = m->n_tokens - token;
            block_floats(m, row, token, n_rows < BLOCK_ROWS ? n_rows : BLOCK_ROWS,
                         n_tokens < BLOCK_TOKENS ? n_tokens : BLOCK_TOKENS, size, load);
        }
}
void mul_f32_avx2(const struct ms4_mul *m) { mul_floats_avx2(m, 4, load_f32); }
void mul_f16_avx2(const struct ms4_mul *m) { mul_floats_avx2(m, 2, load_f16); }
void mul_bf16_avx2(const struct ms4_mul *m) { mul_floats_avx2(m, 2, load_bf16); }
#endif
