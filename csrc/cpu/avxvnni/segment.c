/* segment.c -- attention over the kv cache on AVX-VNNI: two products of 16-bit numbers and their sum are one
 * instruction. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define ADD_PAIRS(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
#include "cpu/avx2/segment.h"

void attend_segment_avxvnni(const struct ms4_attend_segment *a) {
    attend_segment_16(a, SEGMENT_ROWS, block_product_avx2, segment_weights_plain);
}
#endif
