/* attend.c -- attention in floats on AVX-512, for the vision tower: up to 8 query rows over a tile of keys; plain.h's
 * arithmetic, bit for bit, with all rows' scores, then all rows' outputs, kept in registers. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "avx512.h"

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
INLINE void attend_columns(const struct ms4_attend *a, int row, int c, __mmask16 mask, const float (*p)[ATTEND_KEYS],
                           const float *factor, const int n_rows, const int n_vectors) {
    float *o = a->o + (size_t)row * a->o_stride + c;
    const float *v = a->v + c;
    __m512 sum[ATTEND_ROWS][2];
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < n_vectors; k++)
            sum[r][k] =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, o + (size_t)r * a->o_stride + 16 * k),
                              _mm512_set1_ps(factor[r]));
    for (int j = 0; j < ATTEND_KEYS; j++, v += a->v_stride) {
        __m512 x[2];
        for (int k = 0; k < n_vectors; k++) x[k] = _mm512_maskz_loadu_ps(mask, v + 16 * k);
        for (int r = 0; r < n_rows; r++)
            for (int k = 0; k < n_vectors; k++) sum[r][k] = _mm512_fmadd_ps(_mm512_set1_ps(p[r][j]), x[k], sum[r][k]);
    }
    for (int r = 0; r < n_rows; r++)
        for (int k = 0; k < n_vectors; k++)
            _mm512_mask_storeu_ps(o + (size_t)r * a->o_stride + 16 * k, mask, sum[r][k]);
}
/* n_rows rows that all see a key. */
INLINE void attend_rows(const struct ms4_attend *a, int row, const int n_rows) {
    float p[ATTEND_ROWS][ATTEND_KEYS] __attribute__((aligned(64))), factor[ATTEND_ROWS];
    __m512 s[ATTEND_ROWS][2];
    const float *q = a->q + (size_t)row * a->q_stride;
    for (int r = 0; r < n_rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
    for (int i = 0; i < a->d_k; i++) {
        const float *kt = a->kt + (size_t)i * ATTEND_KEYS;
        const __m512 k0 = _mm512_loadu_ps(kt), k1 = _mm512_loadu_ps(kt + 16);
        for (int r = 0; r < n_rows; r++) {
            const __m512 x = _mm512_set1_ps(q[(size_t)r * a->q_stride + (size_t)i]);
            s[r][0] = _mm512_fmadd_ps(x, k0, s[r][0]);
            s[r][1] = _mm512_fmadd_ps(x, k1, s[r][1]);
        }
    }
    for (int r = 0; r < n_rows; r++)
        factor[r] = attend_weights(p[r], s[r][0], s[r][1], a->n_keys[row + r], a->m + row + r, a->l + row + r);
    int c = 0;
    for (; c + 32 <= a->d_v; c += 32)
        attend_columns(a, row, c, 0xffff, (const float (*)[ATTEND_KEYS])p, factor, n_rows, 2);
    for (; c < a->d_v; c += 16)
        attend_columns(a, row, c, a->d_v - c >= 16 ? 0xffff : 0xff, (const float (*)[ATTEND_KEYS])p, factor, n_rows, 1);
}
void attend_avx512(const struct ms4_attend *a) {
    for (int row = 0; row < a->n_q;) {
        int n = 0;
        while (row + n < a->n_q && a->n_keys[row + n] > 0) n++;
        if (n >= 8) { attend_rows(a, row, 8); row += 8; }
        else if (n >= 4) { attend_rows(a, row, 4); row += 4; }
        else if (n >= 2) { attend_rows(a, row, 2); row += 2; }
        else { if (n) attend_rows(a, row, 1); row++; }
    }
}
void transpose_keys_avx512(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (int32_t i = 0; i < d; i += 16)
        for (int32_t key = 0; key < ATTEND_KEYS; key += 16) {
            __m512 v[16];
            __mmask16 lanes = lanes_512(d - i);
            for (int j = 0; j < 16; j++)
                v[j] = key + j < n_keys ? _mm512_maskz_loadu_ps(lanes, k + (size_t)(key + j) * k_stride + (size_t)i)
                    : _mm512_setzero_ps();
            transpose_16_512(v);
            for (int j = 0; j < 16 && i + j < d; j++)
                _mm512_storeu_ps(kt + (size_t)(i + j) * ATTEND_KEYS + (size_t)key, v[j]);
        }
}
#endif
