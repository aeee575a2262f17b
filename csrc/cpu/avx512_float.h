/* avx512_float.h -- AVX-512 kernels on floats: float weights, transposition.
 * Included by avx512.c only.  The order of arithmetic is the one of ops.h. */
#ifndef MS4_AVX512_FLOAT_H
#define MS4_AVX512_FLOAT_H
#include "plain.h"
#include "prefetch.h"
#include <immintrin.h>

static inline __mmask16 lanes_512(int n) { return n >= 16 ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* --- float weights ------------------------------------------------------------------------ */
/* Sums of 16 accumulators as a vector, each by the tree j with j + 8, + 4, + 2, + 1. */
static inline __m512 sum_16_512(const __m512 *a) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xee));
    for (int i = 0; i < 4; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++) {
        __m512d x = _mm512_castps_pd(c[2 * i]), y = _mm512_castps_pd(c[2 * i + 1]);
        d[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
    /* in each 128-bit lane i: accumulators i, 4 + i, 8 + i, 12 + i */
    return _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
}
typedef __m512 load_weights_512(const uint8_t *w, int k, __mmask16 lanes);
static inline __m512 weights_f32_512(const uint8_t *w, int k, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, (const float *)w + k); }
static inline __m512 weights_f16_512(const uint8_t *w, int k, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)w + k));
}
static inline __m512 weights_bf16_512(const uint8_t *w, int k, __mmask16 lanes) {
    __m256i h = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)w + k);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
/* `rows` rows times `tokens` tokens, rows * tokens == 16; beyond the last row or token the last one is taken again
 * and its result dropped. */
static inline __attribute__((always_inline)) void float_tile_512(const struct ms4_mul *m, load_weights_512 *load, int r, int t,
                                                                 int rows, int tokens) {
    const uint8_t *w[16];
    const float *x[16];
    __m512 acc[16];
    int n_rows = m->n_rows - r < rows ? m->n_rows - r : rows, n_tokens = m->n_tokens - t < tokens ? m->n_tokens - t : tokens;
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
/* The products of four rows with the columns `lanes` from k on; of the rows from `ahead` on, as many bytes are asked for. */
static inline __attribute__((always_inline)) void float_step_512(__m512 *sum, const uint8_t *const *w, const uint8_t *ahead, const float *x,
                                                                 int k, __mmask16 lanes, load_weights_512 *load, size_t size) {
    ahead += (size_t)k * 4 * size;
    const __m512 xs = _mm512_maskz_loadu_ps(lanes, x + k);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        sum[i] = _mm512_fmadd_ps(load(w[i], k, lanes), xs, sum[i]);
        prefetch_after(sum[i], ahead, i, 4, 64 * size);
    }
}
/* 16 rows times one token, 4 rows at a time: more streams side by side make memory slower, not faster. */
static inline __attribute__((always_inline)) void float_rows_512(const struct ms4_mul *m, load_weights_512 *load, size_t size, int r, int t) {
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
static inline __attribute__((always_inline)) void mul_floats_512(const struct ms4_mul *m, load_weights_512 *load, size_t size) {
    int t = 0;
    for (; m->n_tokens - t >= 3; t += 4)
        for (int r = 0; r < m->n_rows; r += 4) float_tile_512(m, load, r, t, 4, 4);
    for (; t < m->n_tokens; t++)
        for (int r = 0; r < m->n_rows; r += 16) float_rows_512(m, load, size, r, t);
}
/* --- transposition ------------------------------------------------------------------------ */
/* 16 vectors of 16 floats: element j of vector i <-> element i of vector j */
static inline void transpose_16_512(__m512 *v) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    for (int i = 0; i < 4; i++) {              /* b[4 g + i]: rows 4 g .. 4 g + 3, columns i, 4 + i, 8 + i, 12 + i */
        __m512 x = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), y = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        __m512 z = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), w = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        v[i] = _mm512_shuffle_f32x4(x, y, 0x88);
        v[8 + i] = _mm512_shuffle_f32x4(x, y, 0xdd);
        v[4 + i] = _mm512_shuffle_f32x4(z, w, 0x88);
        v[12 + i] = _mm512_shuffle_f32x4(z, w, 0xdd);
    }
}
static void transpose_keys_avx512(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (int32_t i = 0; i < d; i += 16)
        for (int32_t key = 0; key < ATTEND_KEYS; key += 16) {
            __m512 v[16];
            __mmask16 lanes = lanes_512(d - i);
            for (int j = 0; j < 16; j++)
                v[j] = key + j < n_keys ? _mm512_maskz_loadu_ps(lanes, k + (size_t)(key + j) * k_stride + (size_t)i) : _mm512_setzero_ps();
            transpose_16_512(v);
            for (int j = 0; j < 16 && i + j < d; j++) _mm512_storeu_ps(kt + (size_t)(i + j) * ATTEND_KEYS + (size_t)key, v[j]);
        }
}
/* --- dequantisation that attention waits for ---------------------------------------------- */
static void dequantize_q8_0_avx512(float *out, const void *w, size_t n) {
    const block_q8_0 *b = w;
    for (size_t i = 0; i < n / 32; i++, out += 32) {
        __m512 d = _mm512_set1_ps(_cvtsh_ss(b[i].d));
        for (int h = 0; h < 32; h += 16)
            _mm512_storeu_ps(out + h, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(b[i].qs + h))))));
    }
}
#endif
