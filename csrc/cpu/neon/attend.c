/* attend.c -- attention in floats on AArch64, for the vision tower: four rows by 16 columns in registers. */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"

/* c[r] += a[r] times b: n_rows rows of n numbers, and n rows of 4 * width numbers, in ascending order. */
INLINE void tile_product(float32x4_t (*c)[4], const float *const *a, const float *b, size_t b_stride, size_t n,
                         int n_rows, int width) {
    for (size_t i = 0; i < n; i++)
        for (int h = 0; h < width; h++) {
            float32x4_t v = vld1q_f32(b + i * b_stride + (size_t)h * 4);
            for (int r = 0; r < n_rows; r++) c[r][h] = vfmaq_n_f32(c[r][h], v, a[r][i]);
        }
}
INLINE void add_values(float *const *o, const float *const *s, const float *factor, const float *v, size_t v_stride,
                       int n_rows, int width) {
    float32x4_t c[TILE][4];
    for (int r = 0; r < n_rows; r++)
        for (int h = 0; h < width; h++) c[r][h] = vmulq_n_f32(vld1q_f32(o[r] + h * 4), factor[r]);
    tile_product(c, s, v, v_stride, ATTEND_KEYS, n_rows, width);
    for (int r = 0; r < n_rows; r++)
        for (int h = 0; h < width; h++) vst1q_f32(o[r] + h * 4, c[r][h]);
}
INLINE void attend_rows(const struct ms4_attend *a, const int *rows, int n_rows) {
    const float *q[TILE], *weights[TILE];
    float s[TILE][ATTEND_KEYS], factor[TILE], *o[TILE];
    for (int r = 0; r < n_rows; r++) q[r] = a->q + (size_t)rows[r] * a->q_stride;
    for (int half = 0; half < ATTEND_KEYS; half += 16) {
        float32x4_t c[TILE][4];
        for (int i = 0; i < n_rows * 4; i++) c[i / 4][i % 4] = vdupq_n_f32(0);
        tile_product(c, q, a->kt + half, ATTEND_KEYS, (size_t)a->d_k, n_rows, 4);
        for (int i = 0; i < n_rows * 4; i++) vst1q_f32(s[i / 4] + half + i % 4 * 4, c[i / 4][i % 4]);
    }
    for (int r = 0; r < n_rows; r++) {
        factor[r] = attend_softmax_plain(s[r], a->n_keys[rows[r]], a->m + rows[r], a->l + rows[r]);
        weights[r] = s[r];
    }
    for (int i = 0; i < a->d_v; i += 16) {
        for (int r = 0; r < n_rows; r++) o[r] = a->o + (size_t)rows[r] * a->o_stride + i;
        if (i + 16 <= a->d_v) add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 4);
        else add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 2);
    }
}
void attend_neon(const struct ms4_attend *a) {
    int rows[ATTEND_ROWS], n = 0, i = 0;
    for (int r = 0; r < a->n_q; r++)
        if (a->n_keys[r] > 0) rows[n++] = r;
    for (; i + TILE <= n; i += TILE) attend_rows(a, rows + i, TILE);
    for (; i < n; i++) attend_rows(a, rows + i, 1);
}
#endif
