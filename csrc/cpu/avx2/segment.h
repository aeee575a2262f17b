/* segment.h -- attention over a segment of the kv cache: segment.h's arithmetic, bit for bit.  Included with
 * ADD_PAIRS(sum, a, b): sum plus the products of pairs of 16-bit numbers. */
#ifndef MS4_AVX2_SEGMENT_H
#define MS4_AVX2_SEGMENT_H
#include "avx2.h"
#include "cpu/plain/segment.h"

#define SEGMENT_ROWS 4      /* whose sums are held in registers together, 16 columns each */

INLINE void half_block_avx2(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs, int n,
                            const uint8_t *next, int n_lines) {
    __m256i sum[SEGMENT_ROWS][2];
    for (int r = 0; r < n; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int i = 0; i < n_pairs; i++, b += 2 * SEGMENT_BLOCK) {
        if (i < n_lines) _mm_prefetch((const char *)next + (size_t)i * 64, _MM_HINT_T1);
        const __m256i b0 = _mm256_loadu_si256((const void *)b), b1 = _mm256_loadu_si256((const void *)(b + 16));
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, a[r] + 2 * i, sizeof pair);
            const __m256i x = _mm256_set1_epi32(pair);
            sum[r][0] = ADD_PAIRS(sum[r][0], x, b0);
            sum[r][1] = ADD_PAIRS(sum[r][1], x, b1);
        }
    }
    for (int r = 0; r < n; r++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((void *)(c + (size_t)r * c_stride + h * 8), sum[r][h]);
}
static inline void block_product_avx2(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b,
                                      int n_pairs, int n_rows, const uint8_t *next, int n_lines) {
    for (int half = 0; half < SEGMENT_BLOCK; half += 16, b += 32, c += 16, n_lines = 0) {
        if (n_rows == SEGMENT_ROWS) half_block_avx2(c, c_stride, a, b, n_pairs, SEGMENT_ROWS, next, n_lines);
        else
            for (int r = 0; r < n_rows; r++)
                half_block_avx2(c + (size_t)r * c_stride, c_stride, a + r, b, n_pairs, 1, next, n_lines);
    }
}
#endif
