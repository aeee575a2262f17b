/* one.c -- products with one token on AArch64, or with so few that a panel is not worth its while: row by row. */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"

static void dot_groups_neon(int32_t *sums, const int8_t *q, const int8_t *x) {
    for (int g = 0; g < 16; g += 4) {
        int32x4_t v[4];
        for (int j = 0; j < 4; j++)
            v[j] = vdotq_s32(vdupq_n_s32(0), vld1q_s8(q + (g + j) * 16), vld1q_s8(x + (g + j) * 16));
        vst1q_s32(sums + g, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
    }
}
#define X(type, id, weights, bytes, family, ...) \
    void mul_one_##type##_neon(const struct ms4_mul *m) { \
        mul_opened_plain(m, unpack_##type, SUPERBLOCK_BYTES(type), FAMILY_##family, dot_groups_neon); \
    }
MS4_QUANTIZED_TYPES(X)
#undef X
#endif
