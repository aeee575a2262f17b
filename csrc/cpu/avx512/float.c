/* float.c -- products with float weights on AVX-512.  The order of arithmetic is the one of ops.h. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "avx512.h"
#include "cpu/plain/plain.h"
#include "cpu/plain/prefetch.h"

/* Sums of 16 accumulators as a vector, each by the tree j with j + 8, + 4, + 2, + 1. */
static inline __m512 sum_16_512(const __m512 *a) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xee));
    for (int i = 0; i < 4; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++) {
        __m512d x = _mm512_castps_pd(c[2 * i]), y = _mm512_castps_pd(c[2 * i + 1]);
        d[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
    /* in each 128-bit lane i: accumulators i, 4 + i, 8 + i, 12 + i */
    return _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
}
typedef __m512 load_weights_512(const uint8_t *w, int k, __mmask16 lanes);
static inline __m512 weights_f32_512(const uint8_t *w, int k, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, (const float *)w + k);
}
static inline __m512 weights_f16_512(const uint8_t *w, int k, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)w + k));
}
static inline __m512 weights_bf16_512(const uint8_t *w, int k, __mmask16 lanes) {
    __m256i h = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)w + k);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
/* `rows` rows times `tokens` tokens, rows * tokens == 16; beyond the last row or token the last one is taken again
 * and its result dropped. */
INLINE void float_tile_512(const struct ms4_mul *m, load_weights_512 *load, int r, int t, int rows, int tokens) {
    const uint8_t *w[16];
    const float *x[16];
    __m512 acc[16];
    int n_rows = m->n_rows - r < rows ? m->n_rows - r : rows;
    int n_tokens = m->n_tokens - t < tokens ? m->n_tokens - t : tokens;
    for (int i = 0; i < rows; i++) w[i] = m->w + (size_t)(r + (i < n_rows ? i : n_rows - 1)) * m->row_bytes;
    for (int j = 0; j < tokens; j++) x[j] = mul_floats(m, t + (j < n_tokens ? j : n_tokens - 1));
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    for (int k = 0; k < m->n_cols; k += 16) {
        __mmask16 lanes = lanes_512(m->n_cols - k);
        __m512 xs[16];
        for (int j = 0; j < tokens; j++) xs[j] = _mm512_maskz_loadu_ps(lanes, x[j] + k);
        for (int i = 0; i < rows; i++) {
            __m512 ws = load(w[i], k, lanes);
            for (int j = 0; j < tokens; j++) acc[j * rows + i] = _mm512_fmadd_ps(ws, xs[j], acc[j * rows + i]);
        }
    }
    float sums[16];
    _mm512_storeu_ps(sums, sum_16_512(acc));
    for (int j = 0; j < n_tokens; j++)
        for (int i = 0; i < n_rows; i++) m->y[(size_t)(t + j) * m->y_stride + (size_t)(r + i)] = sums[j * rows + i];
}
/* The products of four rows with the columns `lanes` from k on; of the rows from `ahead` on, as many bytes are asked
 * for. */
INLINE void float_step_512(__m512 *sum, const uint8_t *const *w, const uint8_t *ahead, const float *x, int k,
                           __mmask16 lanes, load_weights_512 *load, size_t size) {
    ahead += (size_t)k * 4 * size;
    const __m512 xs = _mm512_maskz_loadu_ps(lanes, x + k);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        sum[i] = _mm512_fmadd_ps(load(w[i], k, lanes), xs, sum[i]);
        prefetch_after(sum[i], ahead, i, 4, 64 * size);
    }
}
/* 16 rows times one token, 4 rows at a time: more streams side by side make memory slower, not faster. */
INLINE void float_rows_512(const struct ms4_mul *m, load_weights_512 *load, size_t size, int r, int t) {
    int n_rows = m->n_rows - r < 16 ? m->n_rows - r : 16, k;
    const float *x = mul_floats(m, t);
    __m512 acc[16];
    for (int g = 0; g < 16; g += 4) {
        const uint8_t *w[4];
        __m512 sum[4] = { _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps() };
        for (int i = 0; i < 4; i++) w[i] = m->w + (size_t)(r + (g + i < n_rows ? g + i : n_rows - 1)) * m->row_bytes;
        const uint8_t *ahead = w[3] + m->row_bytes;
        for (k = 0; k + 16 <= m->n_cols; k += 16) float_step_512(sum, w, ahead, x, k, 0xffff, load, size);
        if (k < m->n_cols) float_step_512(sum, w, ahead, x, k, lanes_512(m->n_cols - k), load, size);
        for (int i = 0; i < 4; i++) acc[g + i] = sum[i];
    }
    float sums[16];
    _mm512_storeu_ps(sums, sum_16_512(acc));
    for (int i = 0; i < n_rows; i++) m->y[(size_t)t * m->y_stride + (size_t)(r + i)] = sums[i];
}
INLINE void mul_floats_512(const struct ms4_mul *m, load_weights_512 *load, size_t size) {
    int t = 0;
    for (; m->n_tokens - t >= 3; t += 4)
        for (int r = 0; r < m->n_rows; r += 4) float_tile_512(m, load, r, t, 4, 4);
    for (; t < m->n_tokens; t++)
        for (int r = 0; r < m->n_rows; r += 16) float_rows_512(m, load, size, r, t);
}
void mul_f32_avx512(const struct ms4_mul *m) { mul_floats_512(m, weights_f32_512, 4); }
void mul_f16_avx512(const struct ms4_mul *m) { mul_floats_512(m, weights_f16_512, 2); }
void mul_bf16_avx512(const struct ms4_mul *m) { mul_floats_512(m, weights_bf16_512, 2); }
#endif
