/* segment.c -- attention over the kv cache on AArch64: four rows by 16 columns in registers, two pairs of numbers at a
 * time. */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"
#include "cpu/plain/segment.h"

INLINE void half_block_neon(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs, int n,
                            const uint8_t *next, int n_lines) {
    int32x4_t sum[TILE][4];
    for (int i = 0; i < n * 4; i++) sum[i / 4][i % 4] = vdupq_n_s32(0);
    for (int i = 0; i < n_pairs; i++, b += 2 * SEGMENT_BLOCK) {
        if (i < n_lines) __builtin_prefetch(next + (size_t)i * 64, 0, 2);
        for (int h = 0; h < 2; h++) {
            int16x8x2_t v = vld2q_s16(b + h * 16);      /* the first numbers of eight pairs, the second ones */
            for (int r = 0; r < n; r++) {
                int16_t x = a[r][2 * i], y = a[r][2 * i + 1];
                int32x4_t low = vmlal_n_s16(sum[r][2 * h], vget_low_s16(v.val[0]), x);
                int32x4_t high = vmlal_high_n_s16(sum[r][2 * h + 1], v.val[0], x);
                sum[r][2 * h] = vmlal_n_s16(low, vget_low_s16(v.val[1]), y);
                sum[r][2 * h + 1] = vmlal_high_n_s16(high, v.val[1], y);
            }
        }
    }
    for (int r = 0; r < n; r++)
        for (int h = 0; h < 4; h++) vst1q_s32(c + (size_t)r * c_stride + h * 4, sum[r][h]);
}
static inline void block_product_neon(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b,
                                      int n_pairs, int n_rows, const uint8_t *next, int n_lines) {
    for (int half = 0; half < SEGMENT_BLOCK; half += 16, b += 32, c += 16, n_lines = 0) {
        if (n_rows == TILE) half_block_neon(c, c_stride, a, b, n_pairs, TILE, next, n_lines);
        else
            for (int r = 0; r < n_rows; r++)
                half_block_neon(c + (size_t)r * c_stride, c_stride, a + r, b, n_pairs, 1, next, n_lines);
    }
}
void attend_segment_neon(const struct ms4_attend_segment *a) {
    attend_segment_16(a, TILE, block_product_neon, segment_weights_plain);
}
#endif
