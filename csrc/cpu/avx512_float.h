/* avx512_float.h -- float products and attention with AVX-512. */
#ifndef MS4_AVX512_FLOAT_H
#define MS4_AVX512_FLOAT_H
#include "avx512_panel.h"
#include "plain.h"

/* --- float weights --------------------------------------------------------------------------- */
typedef __m512 load_fn(const uint8_t *w, size_t k, __mmask16 mask);
static inline __m512 load_f32_512(const uint8_t *w, size_t k, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, (const float *)(const void *)w + k); }
static inline __m512 load_f16_512(const uint8_t *w, size_t k, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)(const void *)w + k));
}
static inline __m512 load_bf16_512(const uint8_t *w, size_t k, __mmask16 mask) {
    const __m512i v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)(const void *)w + k));
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}
/* Lane j of an accumulator is partial sum j of ops.h; reduce_add adds them up in that tree's order. */
static inline __attribute__((always_inline)) void float_tile(const struct ms4_mul *m, load_fn *load, int r0, int t0, const int n_rows,
                                                             const int n_tokens) {
    const size_t n = (size_t)m->n_cols;
    const uint8_t *w[4];
    const float *x[4];
    __m512 sum[4][4];
    for (int r = 0; r < n_rows; r++) w[r] = m->w + (size_t)(r0 + r) * m->row_bytes;
    for (int t = 0; t < n_tokens; t++) x[t] = mul_floats(m, t0 + t);
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++) sum[r][t] = _mm512_setzero_ps();
    for (size_t k = 0; k < n; k += 16) {
        const __mmask16 mask = n - k >= 16 ? 0xffff : (__mmask16)((1u << (n - k)) - 1);
        __m512 v[4];
        for (int t = 0; t < n_tokens; t++) v[t] = _mm512_maskz_loadu_ps(mask, x[t] + k);
        for (int r = 0; r < n_rows; r++) {
            const __m512 a = load(w[r], k, mask);
            for (int t = 0; t < n_tokens; t++) sum[r][t] = _mm512_mask3_fmadd_ps(a, v[t], sum[r][t], mask);
        }
    }
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++) m->y[(size_t)(t0 + t) * m->y_stride + (size_t)(r0 + r)] = _mm512_reduce_add_ps(sum[r][t]);
}
static inline __attribute__((always_inline)) void mul_floats_512(const struct ms4_mul *m, load_fn *load) {
    for (int r = 0; r < m->n_rows;) {
        const int rows = m->n_rows - r >= 4 ? 4 : 1;
        for (int t = 0; t < m->n_tokens;) {
            const int tokens = m->n_tokens - t >= 4 ? 4 : 1;
            if (rows == 4 && tokens == 4) float_tile(m, load, r, t, 4, 4);
            else if (rows == 4) float_tile(m, load, r, t, 4, 1);
            else if (tokens == 4) float_tile(m, load, r, t, 1, 4);
            else float_tile(m, load, r, t, 1, 1);
            t += tokens;
        }
        r += rows;
    }
}

/* --- attention ------------------------------------------------------------------------------- */
/* exp_plain for 16 numbers. */
static inline __m512 exp_512(__m512 x) {
    const __m512 magic = _mm512_set1_ps(PLAIN_ROUND);
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));     /* NaN, as the second, stays */
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(0x1.715476p+0f), magic), magic);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(0x1.05c61p-29f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0x1.62e43p-1f), x));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.6a2432p-10f), r, _mm512_set1_ps(0x1.1239e4p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.5558f2p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555492p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffcp-2f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
/* Scores become weights p (16 + 16 keys); m and l of the row are brought up to date; returns the factor for its o. */
static inline float attend_weights(float *p, __m512 s0, __m512 s1, int32_t n_keys, float *m, float *l) {
    const uint32_t seen = n_keys >= 32 ? 0xffffffffu : (1u << n_keys) - 1;
    const __m512 none = _mm512_set1_ps(-INFINITY);
    s0 = _mm512_mask_mov_ps(none, (__mmask16)seen, s0);
    s1 = _mm512_mask_mov_ps(none, (__mmask16)(seen >> 16), s1);
    const float highest = _mm512_reduce_max_ps(_mm512_max_ps(s0, s1)), largest = *m > highest ? *m : highest;
    /* all scores -inf: nothing to add, and inf - inf would be NaN */
    const __m512 shift = _mm512_set1_ps(largest == -INFINITY ? 0 : largest);
    const float factor = _mm512_cvtss_f32(exp_512(_mm512_sub_ps(_mm512_set1_ps(*m), shift)));
    s0 = exp_512(_mm512_sub_ps(s0, shift));
    s1 = exp_512(_mm512_sub_ps(s1, shift));
    _mm512_store_ps(p, s0);
    _mm512_store_ps(p + 16, s1);
    *l = fmaf(*l, factor, _mm512_reduce_add_ps(_mm512_add_ps(s0, s1)));
    *m = largest;
    return factor;
}
/* o = o * factor + p v for 16 * n_vectors columns from column c; the last vector has only the masked ones. */
static inline __attribute__((always_inline)) void attend_columns(const struct ms4_attend *a, int row, int c, __mmask16 mask, const float (*p)[ATTEND_KEYS],
                                                                 const float *factor, const int n_rows, const int n_vectors) {
    float *o = a->o + (size_t)row * a->o_stride + c;
    const float *v = a->v + c;
    __m512 sum[ATTEND_ROWS][2];
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < n_vectors; k++)
            sum[r][k] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, o + (size_t)r * a->o_stride + 16 * k), _mm512_set1_ps(factor[r]));
    for (int j = 0; j < ATTEND_KEYS; j++, v += a->v_stride) {
        __m512 x[2];
        for (int k = 0; k < n_vectors; k++) x[k] = _mm512_maskz_loadu_ps(mask, v + 16 * k);
        for (int r = 0; r < n_rows; r++)
            for (int k = 0; k < n_vectors; k++) sum[r][k] = _mm512_fmadd_ps(_mm512_set1_ps(p[r][j]), x[k], sum[r][k]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < n_vectors; k++) _mm512_mask_storeu_ps(o + (size_t)r * a->o_stride + 16 * k, mask, sum[r][k]);
}
/* n_rows rows that all see a key. */
static inline __attribute__((always_inline)) void attend_rows(const struct ms4_attend *a, int row, const int n_rows) {
    float p[ATTEND_ROWS][ATTEND_KEYS] __attribute__((aligned(64))), factor[ATTEND_ROWS];
    __m512 s[ATTEND_ROWS][2];
    const float *q = a->q + (size_t)row * a->q_stride;
    for (int r = 0; r < n_rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    for (int i = 0; i < a->d_k; i++) {
        const __m512 k0 = _mm512_loadu_ps(a->kt + (size_t)i * ATTEND_KEYS), k1 = _mm512_loadu_ps(a->kt + (size_t)i * ATTEND_KEYS + 16);
        for (int r = 0; r < n_rows; r++) {
            const __m512 x = _mm512_set1_ps(q[(size_t)r * a->q_stride + (size_t)i]);
            s[r][0] = _mm512_fmadd_ps(x, k0, s[r][0]);
            s[r][1] = _mm512_fmadd_ps(x, k1, s[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++) factor[r] = attend_weights(p[r], s[r][0], s[r][1], a->n_keys[row + r], a->m + row + r, a->l + row + r);
    int c = 0;
    for (; c + 32 <= a->d_v; c += 32) attend_columns(a, row, c, 0xffff, (const float (*)[ATTEND_KEYS])p, factor, n_rows, 2);
    for (; c < a->d_v; c += 16)
        attend_columns(a, row, c, a->d_v - c >= 16 ? 0xffff : 0xff, (const float (*)[ATTEND_KEYS])p, factor, n_rows, 1);
}
static void attend_avx512(const struct ms4_attend *a) {
    for (int row = 0; row < a->n_q;) {
        int n = 0;
        while (row + n < a->n_q && a->n_keys[row + n] > 0) n++;
        if (n >= 8) { attend_rows(a, row, 8); row += 8; }
        else if (n >= 4) { attend_rows(a, row, 4); row += 4; }
        else if (n >= 2) { attend_rows(a, row, 2); row += 2; }
        else { if (n) attend_rows(a, row, 1); row++; }
    }
}
/* d: a multiple of 4 */
static void transpose_keys_avx512(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (int h = 0; h < ATTEND_KEYS; h += 16) {
        const __mmask16 mask = n_keys - h >= 16 ? 0xffff : n_keys > h ? (__mmask16)((1u << (n_keys - h)) - 1) : 0;
        const uint8_t *rows[16];
        for (int j = 0; j < 16; j++) rows[j] = (const uint8_t *)(k + (size_t)(mask >> j & 1 ? h + j : 0) * k_stride);
        for (int i = 0; i < d; i += 4) {
            __m512i v[4];
            if (mask) load_transposed(v, rows, (size_t)i * sizeof *k);
            for (int c = 0; c < 4; c++)
                _mm512_storeu_si512(kt + (size_t)(i + c) * ATTEND_KEYS + h, mask ? _mm512_maskz_mov_epi32(mask, v[c]) : _mm512_setzero_si512());
        }
    }
}

/* --- halves ---------------------------------------------------------------------------------- */
static void from_half_avx512(float *out, const uint16_t *x, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(x + i))));
    from_half_plain(out + i, x + i, n - i);
}
static void to_half_avx512(uint16_t *out, const float *x, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((void *)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    to_half_plain(out + i, x + i, n - i);
}
#endif
