/* avx512_gemv_crumbs.h -- products with one token for Q2_K and Q3_K.  Two bits of the 64 bytes of a superblock are one
 * vector of quants, in CRUMB_ORDER, and each of its 128-bit lanes is a 16-group. */
#ifndef MS4_AVX512_GEMV_CRUMBS_H
#define MS4_AVX512_GEMV_CRUMBS_H
#include "avx512_gemv.h"

/* One superblock, 256 times its sum, spread over the lanes.  Dwords hold at most 4 * 7 * 127, so those of two vectors fit
 * 16 bits, and one instruction scales and adds both.  Scales (16 bytes, in each lane) go to the high bytes of words:
 * that saves widening them, and the sum still fits: 256 * 256 * 4 * 127 * 32 < 2^31. */
static inline __attribute__((always_inline)) __m512i dot_crumbs(const uint8_t *qs, const uint8_t *hmask, __m128i scales, const struct x_superblock *x) {
    const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4), v = load_512(qs);
    /* lane l: the groups of vectors 0 and 1; two vectors later they are four further */
    const __m512i spread = _mm512_setr_epi32(0x00800080, 0x00800080, 0x02800280, 0x02800280, 0x01800180, 0x01800180, 0x03800380, 0x03800380,
                                             0x08800880, 0x08800880, 0x0a800a80, 0x0a800a80, 0x09800980, 0x09800980, 0x0b800b80, 0x0b800b80);
    const __m512i s = _mm512_broadcast_i32x4(scales);
    __m512i dot[4], high = _mm512_setzero_si512();
    if (hmask) high = _mm512_srlv_epi64(_mm512_broadcast_i64x4(load_256(hmask)), _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i q = _mm512_and_si512(j ? _mm512_srli_epi16(v, (unsigned)(2 * j)) : v, two);
        const __m512i h = j < 2 ? _mm512_slli_epi16(high, (unsigned)(2 - j)) : j == 2 ? high : _mm512_srli_epi16(high, 1);
        if (hmask) q = _mm512_ternarylogic_epi32(q, h, four, 0xf8);     /* q | (h & four) */
        dot[j] = _mm512_dpbusd_epi32(hmask ? x->start[j] : _mm512_setzero_si512(), q, x->v[j]);
    }
    const __m512i acc = _mm512_madd_epi16(_mm512_packs_epi32(dot[0], dot[1]), _mm512_shuffle_epi8(s, spread));
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(dot[2], dot[3]), _mm512_shuffle_epi8(s, _mm512_add_epi8(spread, _mm512_set1_epi16(0x0400))));
}
static __attribute__((noinline)) __m512 dot_q2_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead) {
    const __m128i nibble = _mm_set1_epi8(15);
    __m512i sums[4], v[4], h = _mm512_setzero_si512(), l = _mm512_setzero_si512();
    load_transposed(v, w, offsetof(block_q2_k, scales));
    for (int k = 0; k < 4; k++) {
        const __m512i mins = high_nibbles(v[k]);
        h = _mm512_dpbusd_epi32(h, mins, load_512(x->high[k] + at));
        l = _mm512_dpbusd_epi32(l, mins, load_512(x->low[k] + at));
    }
#pragma GCC unroll 1
    for (int r = 0; r < 4; r++) {
        __m512i acc[4];
        prefetch_quarter(ahead, r, sizeof(block_q2_k));
        for (int k = 0; k < 4; k++) {
            const uint8_t *p = w[4 * r + k];
            const __m128i scales = _mm_and_si128(_mm_loadu_si128((const void *)(p + offsetof(block_q2_k, scales))), nibble);
            acc[k] = dot_crumbs(p + offsetof(block_q2_k, qs), NULL, scales, x->of[at + 4 * r + k]);
        }
        sums[r] = add_dwords(acc);
    }
    load_transposed(v, w, sizeof(block_q2_k) - 16);         /* d and dmin come last */
    const __m512 t = _mm512_mul_ps(halves_to_floats(v[3]), _mm512_cvtepi32_ps(_mm512_srai_epi32(add_lanes(sums), 8)));
    const __m512i mins = _mm512_add_epi32(_mm512_slli_epi32(h, 7), l);
    return _mm512_fnmadd_ps(halves_to_floats(_mm512_srli_epi32(v[3], 16)), _mm512_cvtepi32_ps(mins), t);
}
static __attribute__((noinline)) __m512 dot_q3_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead) {
    __m512i sums[4], s[4], rows[4];
    const __m512 d = load_q3_k_header(s, w);
    /* Back to 16 bytes for each superblock: rows[k] has those of 4m + k in lane m. */
    for (int k = 0; k < 4; k++) s[k] = _mm512_sub_epi8(s[k], _mm512_set1_epi8(32));
    const __m512i t0 = _mm512_unpacklo_epi32(s[0], s[1]), t1 = _mm512_unpackhi_epi32(s[0], s[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(s[2], s[3]), t3 = _mm512_unpackhi_epi32(s[2], s[3]);
    rows[0] = _mm512_unpacklo_epi64(t0, t2);
    rows[1] = _mm512_unpackhi_epi64(t0, t2);
    rows[2] = _mm512_unpacklo_epi64(t1, t3);
    rows[3] = _mm512_unpackhi_epi64(t1, t3);
#pragma GCC unroll 1
    for (int r = 0; r < 4; r++) {
        __m512i acc[4];
        prefetch_quarter(ahead, r, sizeof(block_q3_k));
        for (int k = 0; k < 4; k++) {
            const uint8_t *p = w[4 * r + k];
            const __m128i scales = _mm_load_si128((const void *)((const char *)&rows[k] + 16 * r));
            acc[k] = dot_crumbs(p + offsetof(block_q3_k, qs), p + offsetof(block_q3_k, hmask), scales, x->of[at + 4 * r + k]);
        }
        sums[r] = add_dwords(acc);
    }
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(add_lanes(sums), 8)));
}
#endif
