/* float.c -- products with float weights on AArch64: the 16 partial sums of ops.h are four registers. */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"

typedef float32x4_t load_fn(const uint8_t *w, size_t k);
INLINE float32x4_t load_f32(const uint8_t *w, size_t k) { return vld1q_f32((const float *)w + k); }
INLINE float32x4_t load_f16(const uint8_t *w, size_t k) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)w + k)));
}
INLINE float32x4_t load_bf16(const uint8_t *w, size_t k) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)w + k), 16));
}
/* One row times n tokens. */
INLINE void tile_floats(const struct ms4_mul *m, int row, int token, int n_tokens, size_t size, load_fn *load) {
    const uint8_t *w = m->w + (size_t)row * m->row_bytes;
    size_t n = (size_t)m->n_cols, k = 0;
    float32x4_t sum[TILE][4];
    for (int i = 0; i < n_tokens * 4; i++) sum[i / 4][i % 4] = vdupq_n_f32(0);
    for (; k + 16 <= n; k += 16)
        for (size_t j = 0; j < 4; j++) {
            float32x4_t v = load(w, k + j * 4);
            for (int t = 0; t < n_tokens; t++)
                sum[t][j] = vfmaq_f32(sum[t][j], v, vld1q_f32(mul_floats(m, token + t) + k + j * 4));
        }
    for (int t = 0; t < n_tokens; t++) {
        uint8_t w_end[64] = { 0 };
        float x_end[16] = { 0 }, part[16];
        memcpy(w_end, w + k * size, (n - k) * size);
        memcpy(x_end, mul_floats(m, token + t) + k, (n - k) * sizeof(float));
        for (size_t j = 0; j < 4; j++) {
            if (k < n) sum[t][j] = vfmaq_f32(sum[t][j], load(w_end, j * 4), vld1q_f32(x_end + j * 4));
            vst1q_f32(part + j * 4, sum[t][j]);
        }
        m->y[(size_t)(token + t) * m->y_stride + (size_t)row] = sum_16_plain(part);
    }
}
INLINE void mul_floats_neon(const struct ms4_mul *m, size_t size, load_fn *load) {
    for (int row = 0; row < m->n_rows; row++) {
        int token = 0;
        for (; token + TILE <= m->n_tokens; token += TILE) tile_floats(m, row, token, TILE, size, load);
        for (; token < m->n_tokens; token++) tile_floats(m, row, token, 1, size, load);
    }
}
void mul_f32_neon(const struct ms4_mul *m) { mul_floats_neon(m, 4, load_f32); }
void mul_f16_neon(const struct ms4_mul *m) { mul_floats_neon(m, 2, load_f16); }
void mul_bf16_neon(const struct ms4_mul *m) { mul_floats_neon(m, 2, load_bf16); }
#endif
