/* attend.c -- attention in floats on AVX2, for the vision tower. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "cpu/plain/plain.h"

#define ATTEND_TILE 4       /* rows whose sums are held in registers together, 16 columns each */

/* c[r] += a[r] times b: n_rows rows of n numbers, and n rows of 8 * width numbers, in ascending order. */
INLINE void tile_product(__m256 (*c)[2], const float *const *a, const float *b, size_t b_stride, size_t n, int n_rows,
                         int width) {
    for (size_t i = 0; i < n; i++)
        for (int h = 0; h < width; h++) {
            __m256 v = _mm256_loadu_ps(b + i * b_stride + (size_t)h * 8);
            for (int r = 0; r < n_rows; r++) c[r][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(a[r] + i), v, c[r][h]);
        }
}
/* o = o * factor + s v for 8 * width columns. */
INLINE void add_values(float *const *o, const float *const *s, const float *factor, const float *v, size_t v_stride,
                       int n_rows, int width) {
    __m256 c[ATTEND_TILE][2];
    for (int i = 0; i < n_rows * width; i++)
        c[i / width][i % width] =
            _mm256_mul_ps(_mm256_loadu_ps(o[i / width] + i % width * 8), _mm256_set1_ps(factor[i / width]));
    tile_product(c, s, v, v_stride, ATTEND_KEYS, n_rows, width);
    for (int i = 0; i < n_rows * width; i++) _mm256_storeu_ps(o[i / width] + i % width * 8, c[i / width][i % width]);
}
INLINE void attend_rows(const struct ms4_attend *a, const int *rows, int n_rows) {
    const float *q[ATTEND_TILE], *weights[ATTEND_TILE];
    float s[ATTEND_TILE][ATTEND_KEYS], factor[ATTEND_TILE], *o[ATTEND_TILE];
    for (int r = 0; r < n_rows; r++) q[r] = a->q + (size_t)rows[r] * a->q_stride;
    for (int half = 0; half < ATTEND_KEYS; half += 16) {
        __m256 c[ATTEND_TILE][2];
        for (int r = 0; r < n_rows; r++) c[r][0] = c[r][1] = _mm256_setzero_ps();
        tile_product(c, q, a->kt + half, ATTEND_KEYS, (size_t)a->d_k, n_rows, 2);
        for (int i = 0; i < n_rows * 2; i++) _mm256_storeu_ps(s[i / 2] + half + i % 2 * 8, c[i / 2][i % 2]);
    }
    for (int r = 0; r < n_rows; r++) {
        factor[r] = attend_softmax_plain(s[r], a->n_keys[rows[r]], a->m + rows[r], a->l + rows[r]);
        weights[r] = s[r];
    }
    for (int i = 0; i < a->d_v; i += 16) {
        for (int r = 0; r < n_rows; r++) o[r] = a->o + (size_t)rows[r] * a->o_stride + i;
        if (i + 16 <= a->d_v) add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 2);
        else add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 1);
    }
}
void attend_avx2(const struct ms4_attend *a) {
    int rows[ATTEND_ROWS], n = 0, i = 0;
    for (int r = 0; r < a->n_q; r++)
        if (a->n_keys[r] > 0) rows[n++] = r;
    for (; i + 4 <= n; i += 4) attend_rows(a, rows + i, 4);
    if (n - i == 3) attend_rows(a, rows + i, 3);
    else if (n - i == 2) attend_rows(a, rows + i, 2);
    else if (n - i == 1) attend_rows(a, rows + i, 1);
}
void transpose_keys_avx2(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (int j = 0; j < ATTEND_KEYS; j += 8)
        for (int i = 0; i < d; i += 8) {
            __m256i v[8];
            for (int r = 0; r < 8; r++)
                v[r] = j + r < n_keys ? _mm256_loadu_si256((const void *)(k + (size_t)(j + r) * k_stride + i))
                    : _mm256_setzero_si256();
            transpose_8(v);
            for (int r = 0; r < 8; r++) _mm256_storeu_si256((void *)(kt + (size_t)(i + r) * ATTEND_KEYS + j), v[r]);
        }
}
#endif
