/* one_crumbs.c -- products with one token on AVX-512: Q2_K, Q3_K and Q6_K.
 *
 * Two bits of the 64 bytes of a superblock are one vector of quants, in CRUMB_ORDER, and each of its 128-bit lanes is a
 * 16-group.  Two superblocks go together: their products fit 16 bits, so they share the vectors that are scaled.
 */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "one.h"

static inline __m256i fours_in_turn(void) { return _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); }
/* 16 bytes of each of two superblocks, four in turn; widened to words they are in the order of one_x's groups. */
static inline __m256i pair_bytes(const uint8_t *a, const uint8_t *b) {
    return _mm256_permutevar8x32_epi32(load_two(a, b), fours_in_turn());
}
/* The words of the groups of vector j: in each lane four times that of the first superblock, then of the second. */
static inline __m512i spread_groups(__m512i words, int j) {
    const __m512i first = _mm512_setr_epi64(0, 0x4000400040004, 0x1000100010001, 0x5000500050005, 0x10001000100010,
                                            0x14001400140014, 0x11001100110011, 0x15001500150015);
    return _mm512_permutexvar_epi16(_mm512_add_epi16(first, _mm512_set1_epi16((short)(j / 2 * 8 + j % 2 * 2))), words);
}
/* Adds scale * product; dot[j][r]: of vector j of superblock r.  Dwords of the result: two of the first superblock, two
 * of the second in each lane. */
INLINE __m512i scale_groups_two(__m512i acc, __m512i (*dot)[2], __m512i words) {
    for (int j = 0; j < 4; j++)
        acc = _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(dot[j][0], dot[j][1]), spread_groups(words, j));
    return acc;
}
/* A factor for the words of each vector's groups. */
static inline __m512i group_factors(int a, int b, int c, int d) {
    const int64_t low = a * 0x10001LL | b * 0x1000100000000LL, high = c * 0x10001LL | d * 0x1000100000000LL;
    return _mm512_setr_epi64(low, low, high, high, low, low, high, high);
}
/* --- Q2_K ------------------------------------------------------------------------------------ */
/* Four times the sum of two superblocks: the upper two bits of each nibble stay where they are. */
INLINE __m512i dot_q2_k_two(__m512i *mins, const uint8_t *w, const __m512i (*x)[4], const int16_t (*sums)[16],
                            const uint8_t *ahead) {
    const size_t size = sizeof(block_q2_k);
    const __m512i low = _mm512_set1_epi8(3), high = _mm512_set1_epi8(12), zero = _mm512_setzero_si512();
    const __m512i words =
        _mm512_cvtepu8_epi16(pair_bytes(w + offsetof(block_q2_k, scales), w + size + offsetof(block_q2_k, scales)));
    __m512i dot[4][2];
    for (size_t r = 0; r < 2; r++) {
        const __m512i v = load_once(w + r * size + offsetof(block_q2_k, qs)), upper = _mm512_srli_epi16(v, 4);
        dot[0][r] = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, low), x[r][0]);
        dot[1][r] = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, high), x[r][1]);
        prefetch_after(dot[1][r], ahead, r, 3, 2 * size);
        dot[2][r] = _mm512_dpbusd_epi32(zero, _mm512_and_si512(upper, low), x[r][2]);
        dot[3][r] = _mm512_dpbusd_epi32(zero, _mm512_and_si512(upper, high), x[r][3]);
    }
    *mins = _mm512_madd_epi16(_mm512_srli_epi16(words, 4), load_512(sums));
    prefetch_after(*mins, ahead, 2, 3, 2 * size);
    return scale_groups_two(zero, dot,
                            _mm512_mullo_epi16(_mm512_and_si512(words, _mm512_set1_epi16(15)),
                                               group_factors(4, 1, 4, 1)));
}
static __m512 dot_q2_k(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) {
    const size_t size = sizeof(block_q2_k);
    __m512i sums[4], mins[4];
    uint32_t d[16];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++, w += 4 * size, ahead += 4 * size) {
        __m512i m[2];
        const __m512i a = dot_q2_k_two(m, w, x->v + 4 * l, x->group + 4 * l, ahead);
        const __m512i b = dot_q2_k_two(m + 1, w + 2 * size, x->v + 4 * l + 2, x->group + 4 * l + 2, ahead + 2 * size);
        for (int r = 0; r < 4; r++) memcpy(d + 4 * l + r, w + (size_t)r * size + offsetof(block_q2_k, d), sizeof *d);
        sums[l] = add_pairs(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
        mins[l] = add_pairs(_mm512_castsi512_ps(m[0]), _mm512_castsi512_ps(m[1]));
    }
    const __m512i ds = load_512(d);
    const __m512 t = _mm512_mul_ps(halves_to_floats(ds), _mm512_cvtepi32_ps(_mm512_srai_epi32(add_lanes(sums), 2)));
    return _mm512_fnmadd_ps(halves_to_floats(_mm512_srli_epi32(ds, 16)), _mm512_cvtepi32_ps(add_lanes(mins)), t);
}
/* --- Q3_K ------------------------------------------------------------------------------------ */
/* The scales of two superblocks: 6 bits each, as words in the order of one_x's groups. */
static inline __m512i q3_k_scales(const uint8_t *w) {
    const size_t at = sizeof(block_q3_k) - 16;      /* two bytes that do not matter, 12 of scales, d */
    const __m256i v = load_two(w + at, w + sizeof(block_q3_k) + at);
    const __m128i first = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9);
    const __m128i last = _mm_setr_epi8(10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12, 13);
    const __m256i low = _mm256_srlv_epi32(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(first)),
                                          _mm256_setr_epi32(0, 0, 4, 4, 0, 0, 4, 4));
    const __m256i top = _mm256_rolv_epi32(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(last)),
                                          _mm256_setr_epi32(4, 2, 0, 30, 4, 2, 0, 30));
    /* low | (top & 48) */
    const __m256i bytes =
        _mm256_ternarylogic_epi32(_mm256_and_si256(low, _mm256_set1_epi8(15)), top, _mm256_set1_epi8(48), 0xf8);
    return _mm512_cvtepi8_epi16(_mm256_sub_epi8(_mm256_permutevar8x32_epi32(bytes, fours_in_turn()),
                                                _mm256_set1_epi8(32)));
}
/* Eight times the sum of two superblocks: the quants of vector j come 2^j times, so that their high bits need not be
 * moved one by one.  sums: -16 times those of the activations. */
INLINE __m512i dot_q3_k_two(const uint8_t *w, const __m512i (*x)[4], const int16_t (*sums)[16], const uint8_t *ahead) {
    const size_t size = sizeof(block_q3_k);
    const __m512i scales = q3_k_scales(w);
    __m512i dot[4][2];
    for (size_t r = 0; r < 2; r++) {
        /* bits 0..3 of the first half, 4..7 of the second go to 2..5; what comes from other bytes is masked out */
        const __m512i h =
            _mm512_rolv_epi64(_mm512_broadcast_i64x4(load_256(w + r * size + offsetof(block_q3_k, hmask))),
                              _mm512_setr_epi64(2, 2, 2, 2, 62, 62, 62, 62));
        __m512i v = load_once(w + r * size + offsetof(block_q3_k, qs));
        prefetch_after(v, ahead, 2 * r, 4, 2 * size);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i q =
                _mm512_and_si512(j ? _mm512_srli_epi16(v, (unsigned)j) : v, _mm512_set1_epi8((char)(3 << j)));
            /* q | (h & four) */
            dot[j][r] =
                _mm512_dpbusd_epi32(_mm512_setzero_si512(),
                                    _mm512_ternarylogic_epi32(q, h, _mm512_set1_epi8((char)(4 << j)), 0xf8), x[r][j]);
        }
        prefetch_after(dot[3][r], ahead, 2 * r + 1, 4, 2 * size);
    }
    const __m512i acc = _mm512_dpwssd_epi32(_mm512_madd_epi16(scales, load_512(sums)), scales, load_512(sums));
    return scale_groups_two(acc, dot, _mm512_mullo_epi16(scales, group_factors(8, 4, 2, 1)));
}
/* --- Q6_K ------------------------------------------------------------------------------------ */
/* Two superblocks; sums: -16 times those of the activations. */
INLINE __m512i dot_q6_k_two(const uint8_t *w, const __m512i (*x)[4], const int16_t (*sums)[16], const uint8_t *ahead) {
    const size_t size = sizeof(block_q6_k), at = offsetof(block_q6_k, scales);
    const __m512i top = _mm512_set1_epi8(48), zero = _mm512_setzero_si512();
    const __m512i scales = _mm512_cvtepi8_epi16(pair_bytes(w + at, w + size + at));
    __m512i dot[4][2];
    for (size_t r = 0; r < 2; r++) {
        const block_q6_k *b = (const void *)(w + r * size);
        const __m512i first = load_once(b->ql), second = load_once(b->ql + 64);
        __m512i h = load_once(b->qh);
        prefetch_after(h, ahead, 3 * r, 7, 2 * size);
        const __m512i p0 = _mm512_shuffle_i64x2(first, second, 0x44), p1 = _mm512_shuffle_i64x2(first, second, 0xee);
        /* 0xf8: a | (b & c) */
        const __m512i q[4] = { _mm512_ternarylogic_epi32(low_nibbles(p0), _mm512_slli_epi16(h, 4), top, 0xf8),
                               _mm512_ternarylogic_epi32(low_nibbles(p1), _mm512_slli_epi16(h, 2), top, 0xf8),
                               _mm512_ternarylogic_epi32(high_nibbles(p0), h, top, 0xf8),
                               _mm512_ternarylogic_epi32(high_nibbles(p1), _mm512_srli_epi16(h, 2), top, 0xf8) };
        for (int j = 0; j < 4; j++) dot[j][r] = _mm512_dpbusd_epi32(zero, q[j], x[r][j]);
        prefetch_after(dot[0][r], ahead, 3 * r + 1, 7, 2 * size);
        prefetch_after(dot[3][r], ahead, 3 * r + 2, 7, 2 * size);
    }
    __m512i acc = _mm512_dpwssd_epi32(_mm512_madd_epi16(scales, load_512(sums)), scales, load_512(sums));
    prefetch_after(acc, ahead, 6, 7, 2 * size);
    return scale_groups_two(acc, dot, scales);
}
/* Two types without mins; shift: what their sums have too much. */
#define DOT_PAIRS(type, shift) \
    static __m512 dot_##type(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) { \
        const size_t size = sizeof(block_##type); \
        __m512i sums[4]; \
        uint16_t d[16]; \
        _Pragma("GCC unroll 1") \
        for (int l = 0; l < 4; l++, w += 4 * size, ahead += 4 * size) { \
            const __m512i a = dot_##type##_two(w, x->v + 4 * l, x->group + 4 * l, ahead); \
            const __m512i b = \
                dot_##type##_two(w + 2 * size, x->v + 4 * l + 2, x->group + 4 * l + 2, ahead + 2 * size); \
            for (int r = 0; r < 4; r++) \
                memcpy(d + 4 * l + r, w + (size_t)r * size + offsetof(block_##type, d), sizeof *d); \
            sums[l] = add_pairs(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)); \
        } \
        return _mm512_mul_ps(_mm512_cvtph_ps(load_256(d)), \
                             _mm512_cvtepi32_ps(_mm512_srai_epi32(add_lanes(sums), shift))); \
    }
DOT_PAIRS(q3_k, 3)
DOT_PAIRS(q6_k, 0)

MUL_ONE(q2_k, CRUMB_ORDER, 1, NULL)
MUL_ONE(q3_k, CRUMB_ORDER, -16, NULL)
MUL_ONE(q6_k, CRUMB_ORDER, -16, NULL)
#endif
