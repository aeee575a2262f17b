/* avx512_float.h -- AVX-512 kernels on floats: attention, float weights, small products, halves.
 * Included by avx512.c only.  The order of arithmetic is the one of ops.h. */
#ifndef MS4_AVX512_FLOAT_H
#define MS4_AVX512_FLOAT_H
#include "plain.h"
#include <immintrin.h>

static inline __mmask16 lanes_512(int n) { return n >= 16 ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* e^x for x <= 0 (smaller than -104 gives 0; NaN stays NaN): 2^n * e^r, |r| <= ln 2 / 2, Taylor to degree 7. */
static inline __m512 exp_512(__m512 x) {
    x = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.0f), _CMP_LT_OQ), x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);           /* ln 2 in two parts */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, n);
}
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
static inline __attribute__((always_inline)) void mul_floats_512(const struct ms4_mul *m, load_weights_512 *load) {
    int t = 0;
    for (; m->n_tokens - t >= 3; t += 4)
        for (int r = 0; r < m->n_rows; r += 4) float_tile_512(m, load, r, t, 4, 4);
    for (; t < m->n_tokens; t++)
        for (int r = 0; r < m->n_rows; r += 16) float_tile_512(m, load, r, t, 16, 1);
}
/* --- small products ----------------------------------------------------------------------- */
/* c[8 rows][2 vectors]: rows beyond n take the last one again, with the same result. */
static inline __attribute__((always_inline)) void product_tile_512(const float *const *a, const float *b, size_t b_stride, int k,
                                                                   __mmask16 l0, __mmask16 l1, __m512 *acc) {
    for (int p = 0; p < k; p++, b += b_stride) {
        __m512 b0 = _mm512_maskz_loadu_ps(l0, b), b1 = _mm512_maskz_loadu_ps(l1, b + 16);
        for (int i = 0; i < 8; i++) {
            __m512 s = _mm512_set1_ps(a[i][p]);
            acc[2 * i] = _mm512_fmadd_ps(s, b0, acc[2 * i]);
            acc[2 * i + 1] = _mm512_fmadd_ps(s, b1, acc[2 * i + 1]);
        }
    }
}
static void product_avx512(float *c, size_t c_stride, const float *a, size_t a_stride, const float *b, size_t b_stride, int32_t m,
                           int32_t n, int32_t k) {
    for (int32_t i = 0; i < m; i += 8) {
        const float *rows[8];
        int32_t left = m - i < 8 ? m - i : 8;
        for (int r = 0; r < 8; r++) rows[r] = a + (size_t)(i + (r < left ? r : left - 1)) * a_stride;
        for (int32_t j = 0; j < n; j += 32) {
            __mmask16 l0 = lanes_512(n - j), l1 = lanes_512(n - j - 16);
            __m512 acc[16];
            for (int r = 0; r < 16; r++) acc[r] = _mm512_setzero_ps();
            product_tile_512(rows, b + j, b_stride, k, l0, l1, acc);
            for (int r = 0; r < left; r++) {
                float *to = c + (size_t)(i + r) * c_stride + (size_t)j;
                _mm512_mask_storeu_ps(to, l0, acc[2 * r]);
                _mm512_mask_storeu_ps(to + 16, l1, acc[2 * r + 1]);
            }
        }
    }
}
/* --- attention ---------------------------------------------------------------------------- */
/* Scores of the rows -> p, the weights of the values, and `keep`, what the old output is multiplied with. */
static inline void softmax_rows_512(const struct ms4_attend *a, const __m512 *s, float (*p)[ATTEND_KEYS], float *keep) {
    const __m512 never = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < a->n_q; i++) {
        __mmask16 l0 = lanes_512(a->n_keys[i]), l1 = lanes_512(a->n_keys[i] - 16);
        __m512 s0 = _mm512_mask_blend_ps(l0, never, s[2 * i]), s1 = _mm512_mask_blend_ps(l1, never, s[2 * i + 1]);
        __mmask16 bad = _mm512_cmp_ps_mask(s0, s0, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(s1, s1, _CMP_UNORD_Q);
        float most = bad ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(s0, s1)), m = a->m[i];   /* max would lose a NaN */
        keep[i] = 1;
        if (a->n_keys[i] > 0 && !(most <= m)) {
            keep[i] = _mm512_cvtss_f32(exp_512(_mm512_set1_ps(m - most)));
            a->m[i] = m = most;
        }
        __m512 top = _mm512_set1_ps(m);
        __m512 p0 = _mm512_maskz_mov_ps(l0, exp_512(_mm512_sub_ps(s0, top))), p1 = _mm512_maskz_mov_ps(l1, exp_512(_mm512_sub_ps(s1, top)));
        _mm512_storeu_ps(p[i], p0);
        _mm512_storeu_ps(p[i] + 16, p1);
        if (a->n_keys[i] > 0) a->l[i] = a->l[i] * keep[i] + _mm512_reduce_add_ps(_mm512_add_ps(p0, p1));
    }
}
static void attend_avx512(const struct ms4_attend *a) {
    float p[ATTEND_ROWS][ATTEND_KEYS], keep[ATTEND_ROWS];
    const float *q[ATTEND_ROWS], *weights[ATTEND_ROWS];
    __m512 s[2 * ATTEND_ROWS];
    for (int i = 0; i < ATTEND_ROWS; i++) {
        q[i] = a->q + (size_t)(i < a->n_q ? i : a->n_q - 1) * a->q_stride;
        weights[i] = p[i < a->n_q ? i : a->n_q - 1];
        s[2 * i] = s[2 * i + 1] = _mm512_setzero_ps();
    }
    product_tile_512(q, a->kt, ATTEND_KEYS, a->d_k, 0xffff, 0xffff, s);
    softmax_rows_512(a, s, p, keep);
    for (int d = 0; d < a->d_v; d += 32) {
        __mmask16 l0 = lanes_512(a->d_v - d), l1 = lanes_512(a->d_v - d - 16);
        __m512 o[2 * ATTEND_ROWS];
        for (int i = 0; i < ATTEND_ROWS; i++) {
            int row = i < a->n_q ? i : a->n_q - 1;
            const float *at = a->o + (size_t)row * a->o_stride + (size_t)d;
            o[2 * i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(l0, at), _mm512_set1_ps(keep[row]));
            o[2 * i + 1] = _mm512_mul_ps(_mm512_maskz_loadu_ps(l1, at + 16), _mm512_set1_ps(keep[row]));
        }
        product_tile_512(weights, a->v + d, a->v_stride, ATTEND_KEYS, l0, l1, o);
        for (int i = 0; i < a->n_q; i++) {
            if (a->n_keys[i] < 1) continue;
            float *at = a->o + (size_t)i * a->o_stride + (size_t)d;
            _mm512_mask_storeu_ps(at, l0, o[2 * i]);
            _mm512_mask_storeu_ps(at + 16, l1, o[2 * i + 1]);
        }
    }
}
/* --- halves, transposition ---------------------------------------------------------------- */
static void from_half_avx512(float *out, const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes_512(n - i > 16 ? 16 : (int)(n - i));
        _mm512_mask_storeu_ps(out + i, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x + i)));
    }
}
static void to_half_avx512(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes_512(n - i > 16 ? 16 : (int)(n - i));
        __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
        _mm256_mask_storeu_epi16(out + i, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}
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
