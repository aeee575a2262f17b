/* grid_rows.h -- opens superblocks of the types whose weights are rows of a grid (IQ1, IQ2, IQ3).
 *
 * A row of an IQ2 or IQ3 grid packs into a word, and a grid of words into few vectors: permutations look up 32 rows at
 * once, where a gather takes them one by one.  The packed grid is made anew for each product, which is quickly done.
 * Both kinds of product take the result: panels transpose it, single tokens multiply it as it is.
 */
#ifndef MS4_AVX512_GRID_ROWS_H
#define MS4_AVX512_GRID_ROWS_H
#include "rows.h"

/* 256 weights: unsigned magnitudes, and which are negative; or weight + IQ1_BIAS (IQ1).
 * IQ2 has them in QUAD_ORDER, IQ3 in BLOCK_ORDER, IQ1 in order. */
struct grid_row {
    __m512i q[4];
    __mmask64 negative[4];
};
#define IQ1_BIAS 16
/* Opens two superblocks, which share the loads of the packed grid. */
typedef void grid_rows_fn(struct grid_row *out, panel_rows w, const __m512i *grid);
/* The scales of a superblock: bytes, one for each 16-group */
typedef __m128i grid_scales_fn(const uint8_t *w);

/* --- packed grids ---------------------------------------------------------------------------- */
/* IQ2: a word has eight weights, two bits each.  The weights are 8, 25 and 43, so bits 4 and 5 tell them apart. */
static inline void pack_pairs(__m512i *grid, const int8_t (*rows)[8], int n) {
    for (int i = 0; i < n; i += 8) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi16(load_512(rows[i]), 4), _mm512_set1_epi8(3));
        const __m512i four =
            _mm512_madd_epi16(_mm512_maddubs_epi16(code, _mm512_set1_epi16(0x0401)), _mm512_set1_epi32(0x00100001));
        _mm_storeu_si128((void *)((char *)grid + 2 * i), _mm512_cvtepi32_epi8(four));
    }
}
/* IQ3: a word has four weights, four bits each: the weight itself, or for IQ3_XXS an eighth of it. */
static inline void pack_nibbles(__m512i *grid, const int8_t (*rows)[4], int n, unsigned shift) {
    for (int i = 0; i < n; i += 16) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi16(load_512(rows[i]), shift), _mm512_set1_epi8(15));
        const __m512i two = _mm512_maddubs_epi16(code, _mm512_set1_epi16(0x1001));
        _mm256_storeu_si256((void *)((char *)grid + 2 * i), _mm512_cvtepi16_epi8(two));
    }
}
static void pack_iq2_xxs(__m512i *grid) { pack_pairs(grid, grid_iq2xxs, 256); }
static void pack_iq2_xs(__m512i *grid) { pack_pairs(grid, grid_iq2xs, 512); }
static void pack_iq2_s(__m512i *grid) { pack_pairs(grid, grid_iq2s, 1024); }
static void pack_iq3_xxs(__m512i *grid) { pack_nibbles(grid, grid_iq3xxs, 256, 3); }
static void pack_iq3_s(__m512i *grid) { pack_nibbles(grid, grid_iq3s, 512, 0); }
/* Replaces each word of two vectors of indices (0..n - 1) by that word of the grid. */
INLINE void look_up_words(__m512i *index, const __m512i *grid, const int n) {
    __m512i t[2][8];
    __mmask32 upper[2][4];
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 2; i++) upper[i][j] = _mm512_test_epi16_mask(index[i], _mm512_set1_epi16((short)(64 << j)));
#pragma GCC unroll 8
    for (int k = 0; k < n / 128; k++) {
        const __m512i a = grid[4 * k], b = grid[4 * k + 1], c = grid[4 * k + 2], d = grid[4 * k + 3];
        for (int i = 0; i < 2; i++) {
            const __m512i low = _mm512_permutex2var_epi16(a, index[i], b),
                high = _mm512_permutex2var_epi16(c, index[i], d);
            t[i][k] = _mm512_mask_blend_epi16(upper[i][0], low, high);
        }
    }
    for (int i = 0; i < 2; i++) {
        for (int left = n / 256, j = 1; left > 0; left /= 2, j++)
            for (int k = 0; k < left; k++) t[i][k] = _mm512_mask_blend_epi16(upper[i][j], t[i][2 * k], t[i][2 * k + 1]);
        index[i] = t[i][0];
    }
}

/* --- signs and scales ------------------------------------------------------------------------ */
/* Eight dwords of 4 x 7 signs (and 4 bits of scale): 32 bytes of signs.  The eighth of each makes their number even. */
static inline __m256i spread_signs(__m256i w) {
    const __m128i is_odd = _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0);
    const __m256i parity = _mm256_broadcastsi128_si256(is_odd);
    /* 0xca: bits of the second where the first has ones, else of the third */
    w = _mm256_ternarylogic_epi32(_mm256_set1_epi32(0x00003fff), w, _mm256_slli_epi32(w, 2), 0xca);
    w = _mm256_ternarylogic_epi32(_mm256_set1_epi32(0x007f007f), w, _mm256_slli_epi32(w, 1), 0xca);
    w = _mm256_and_si256(w, _mm256_set1_epi8(127));
    const __m256i four = _mm256_and_si256(_mm256_xor_si256(w, _mm256_srli_epi16(w, 4)), _mm256_set1_epi8(15));
    return _mm256_or_si256(w, _mm256_shuffle_epi8(parity, four));
}
/* Signs for QUAD_ORDER: bit j of byte i goes with byte i of vector j. */
static inline void set_quad_signs(struct grid_row *out, __m512i signs) {
    for (int j = 0; j < 4; j++) out->negative[j] = _mm512_test_epi8_mask(signs, _mm512_set1_epi8((char)(1 << j)));
}
static inline __m512i quad_signs(__m256i bytes) {
    const __m512i words = _mm512_cvtepu8_epi16(bytes);
    return _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
}
/* 32 bytes of signs for BLOCK_ORDER */
static inline void set_block_signs(struct grid_row *out, __m256i bytes) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i signs = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    _mm256_storeu_si256((void *)out->negative, signs);
}
/* 2 * nibble + 1, the low nibble of each byte first */
static inline __m128i nibble_scales(__m128i bytes) {
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15)),
        high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m128i s = _mm_unpacklo_epi8(low, high);
    return _mm_add_epi8(_mm_add_epi8(s, s), _mm_set1_epi8(1));
}

/* 2 * x + 1, x in the top four bits of dwords */
static inline __m128i top_scales(__m256i words) {
    const __m128i s = _mm256_cvtepi32_epi8(_mm256_or_si256(_mm256_srli_epi32(words, 27), _mm256_set1_epi32(1)));
    return _mm_unpacklo_epi8(s, s);
}
static inline __m128i scales_iq2_xxs(const uint8_t *w) {
    return top_scales(_mm512_cvtepi64_epi32(_mm512_srli_epi64(load_512(w + offsetof(block_iq2_xxs, qs)), 32)));
}
static inline __m128i scales_iq2_xs(const uint8_t *w) {
    return nibble_scales(_mm_loadl_epi64((const void *)(w + offsetof(block_iq2_xs, scales))));
}
static inline __m128i scales_iq2_s(const uint8_t *w) {
    return nibble_scales(_mm_loadl_epi64((const void *)(w + offsetof(block_iq2_s, scales))));
}
static inline __m128i scales_iq3_xxs(const uint8_t *w) { return top_scales(load_256(w + offsetof(block_iq3_xxs, w))); }
static inline __m128i scales_iq3_s(const uint8_t *w) {
    int32_t scales;
    memcpy(&scales, w + offsetof(block_iq3_s, scales), sizeof scales);
    const __m128i s = nibble_scales(_mm_cvtsi32_si128(scales));
    return _mm_unpacklo_epi8(s, s);
}

/* --- IQ2 ------------------------------------------------------------------------------------- */
/* Four bits at once are looked up for their lower and for their upper two. */
static inline void set_pairs(struct grid_row *out, __m512i words) {
    const __m512i lower = _mm512_set1_epi32(8 | 25 << 8 | 43 << 16);
    const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi32(0x08080808, 0x19191919, 0x2b2b2b2b, 0));
    const __m512i even = low_nibbles(words), odd = high_nibbles(words);
    out->q[0] = _mm512_shuffle_epi8(lower, even);
    out->q[1] = _mm512_shuffle_epi8(upper, even);
    out->q[2] = _mm512_shuffle_epi8(lower, odd);
    out->q[3] = _mm512_shuffle_epi8(upper, odd);
}
INLINE void rows_iq2_xxs(struct grid_row *out, panel_rows w, const __m512i *grid) {
    __m512i index[2];
    for (int r = 0; r < 2; r++) {
        const __m512i v = load_512(w[r] + offsetof(block_iq2_xxs, qs));
        index[r] = _mm512_cvtepu8_epi16(_mm512_cvtepi64_epi32(v));
        set_quad_signs(&out[r], quad_signs(spread_signs(_mm512_cvtepi64_epi32(_mm512_srli_epi64(v, 32)))));
    }
    look_up_words(index, grid, 256);
    for (int r = 0; r < 2; r++) set_pairs(&out[r], index[r]);
}
INLINE void rows_iq2_xs(struct grid_row *out, panel_rows w, const __m512i *grid) {
    const __m512i parity = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 8, 0, 8, 0, 0, 8, 8, 0, 0, 8, 0, 8, 8, 0));
    const __m512i high = _mm512_set1_epi16(0x0f00);
    __m512i index[2];
    for (int r = 0; r < 2; r++) {
        const __m512i v = load_512(w[r] + offsetof(block_iq2_xs, qs));
        /* signs 0..3 to the low byte, 4..6 to the high byte, where their parity with 0..3 joins them */
        const __m512i first = _mm512_srli_epi16(v, 9), rest = _mm512_srli_epi16(v, 5);
        const __m512i four = _mm512_and_si512(_mm512_xor_si512(rest, _mm512_srli_epi16(v, 1)), high);
        const __m512i signs = _mm512_or_si512(first, _mm512_and_si512(rest, high));
        set_quad_signs(&out[r], _mm512_or_si512(signs, _mm512_shuffle_epi8(parity, four)));
        index[r] = v;
    }
    look_up_words(index, grid, 512);
    for (int r = 0; r < 2; r++) set_pairs(&out[r], index[r]);
}
/* Lane g (of 32 words): g / 4 or g / 2; and shifts that go with g % 4 or g % 2 */
static inline __m512i words_of_four(void) {
    return _mm512_setr_epi32(0, 0, 0x10001, 0x10001, 0x20002, 0x20002, 0x30003, 0x30003, 0x40004, 0x40004,
                             0x50005, 0x50005, 0x60006, 0x60006, 0x70007, 0x70007);
}
static inline __m512i words_of_two(void) {
    return _mm512_setr_epi32(0, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007, 0x80008, 0x90009,
                             0xa000a, 0xb000b, 0xc000c, 0xd000d, 0xe000e, 0xf000f);
}
static inline __m512i shifts_of_four(int step) {
    return _mm512_set1_epi64((int64_t)step << 16 | (int64_t)(2 * step) << 32 | (int64_t)(3 * step) << 48);
}

/* qs[g] with two (three) more bits from each of eight words */
static inline __m512i index_with_high(const uint8_t *qs, __m512i words, int step, int mask) {
    const __m512i high =
        _mm512_and_si512(_mm512_srlv_epi16(words, shifts_of_four(step)), _mm512_set1_epi16((short)mask));
    return _mm512_or_si512(_mm512_cvtepu8_epi16(load_256(qs)), _mm512_slli_epi16(high, 8));
}
INLINE void rows_iq2_s(struct grid_row *out, panel_rows w, const __m512i *grid) {
    __m512i index[2];
    for (int r = 0; r < 2; r++) {
        const __m128i qh = _mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)(w[r] + offsetof(block_iq2_s, qh))));
        const __m512i words = _mm512_permutexvar_epi16(words_of_four(), _mm512_castsi128_si512(qh));
        index[r] = index_with_high(w[r] + offsetof(block_iq2_s, qs), words, 2, 3);
        set_quad_signs(&out[r], quad_signs(load_256(w[r] + offsetof(block_iq2_s, signs))));
    }
    look_up_words(index, grid, 1024);
    for (int r = 0; r < 2; r++) set_pairs(&out[r], index[r]);
}

/* --- IQ3 ------------------------------------------------------------------------------------- */
/* The words of 128 weights: four bits each. */
static inline void set_nibbles(__m512i *q, __m512i words) {
    const __m512i even = low_nibbles(words), odd = high_nibbles(words);
    q[0] = _mm512_unpacklo_epi8(even, odd);
    q[1] = _mm512_unpackhi_epi8(even, odd);
}
INLINE void rows_iq3_xxs(struct grid_row *out, panel_rows w, const __m512i *grid) {
    const __m512i values = _mm512_broadcast_i32x4(_mm_setr_epi8(4, 12, 20, 28, 36, 44, 52, 62, 0, 0, 0, 0, 0, 0, 0, 0));
    for (int r = 0; r < 2; r++) {
        const uint8_t *qs = w[r] + offsetof(block_iq3_xxs, qs);
        __m512i index[2] = { _mm512_cvtepu8_epi16(load_256(qs)), _mm512_cvtepu8_epi16(load_256(qs + 32)) };
        look_up_words(index, grid, 256);
        set_nibbles(out[r].q, index[0]);
        set_nibbles(out[r].q + 2, index[1]);
        for (int i = 0; i < 4; i++) out[r].q[i] = _mm512_shuffle_epi8(values, out[r].q[i]);
        set_block_signs(&out[r], spread_signs(load_256(w[r] + offsetof(block_iq3_xxs, w))));
    }
}
INLINE void rows_iq3_s(struct grid_row *out, panel_rows w, const __m512i *grid) {
    const __m512i bit = _mm512_set1_epi16(256);
    for (int r = 0; r < 2; r++) {
        const uint8_t *qs = w[r] + offsetof(block_iq3_s, qs);
        uint64_t high;
        memcpy(&high, w[r] + offsetof(block_iq3_s, qh), sizeof high);
        const __m512i low[2] = { _mm512_cvtepu8_epi16(load_256(qs)), _mm512_cvtepu8_epi16(load_256(qs + 32)) };
        __m512i index[2] = { _mm512_mask_add_epi16(low[0], (__mmask32)high, low[0], bit),
                             _mm512_mask_add_epi16(low[1], (__mmask32)(high >> 32), low[1], bit) };
        look_up_words(index, grid, 512);
        set_nibbles(out[r].q, index[0]);
        set_nibbles(out[r].q + 2, index[1]);
        set_block_signs(&out[r], load_256(w[r] + offsetof(block_iq3_s, signs)));
    }
}

/* --- IQ1 ------------------------------------------------------------------------------------- */
/* 32 rows of eight bytes, one by one: a gather is slower. */
static inline void look_up_eight(struct grid_row *out, const int8_t (*grid)[8], __m512i index) {
    uint16_t at[32];
    int64_t row[8];
    _mm512_storeu_si512(at, index);
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 8; k++) memcpy(&row[k], grid[at[8 * i + k]], sizeof *row);
        out->q[i] = _mm512_set_epi64(row[7], row[6], row[5], row[4], row[3], row[2], row[1], row[0]);
    }
}
/* Weights 8 * G + 1, or - 1 where a bit of minus (one for each 8 weights) is set; + IQ1_BIAS. */
static inline void finish_iq1(struct grid_row *out, uint32_t minus) {
    for (int i = 0; i < 4; i++) {
        const __m512i eight = _mm512_and_si512(_mm512_slli_epi16(out->q[i], 3), _mm512_set1_epi8(-8));
        const __m512i delta =
            _mm512_mask_blend_epi64((__mmask8)(minus >> 8 * i), _mm512_set1_epi8(IQ1_BIAS + 1),
                                    _mm512_set1_epi8(IQ1_BIAS - 1));
        out->q[i] = _mm512_add_epi8(eight, delta);
        out->negative[i] = 0;
    }
}
static inline void row_iq1_s(struct grid_row *out, const uint8_t *w) {
    const __m128i qh = _mm_loadu_si128((const void *)(w + offsetof(block_iq1_s, qh)));
    const __m512i words = _mm512_permutexvar_epi16(words_of_four(), _mm512_castsi128_si512(qh));
    look_up_eight(out, grid_iq1, index_with_high(w + offsetof(block_iq1_s, qs), words, 3, 7));
    finish_iq1(out, _mm512_movepi16_mask(words));
}
static inline __m128i scales_iq1_s(const uint8_t *w) {
    const __m128i qh = _mm_loadu_si128((const void *)(w + offsetof(block_iq1_s, qh)));
    const __m128i s = _mm_and_si128(_mm_srli_epi16(qh, 12), _mm_set1_epi16(7));
    const __m128i bytes = _mm_cvtepi16_epi8(_mm_add_epi16(_mm_add_epi16(s, s), _mm_set1_epi16(1)));
    return _mm_unpacklo_epi8(bytes, bytes);
}
static inline void row_iq1_m(struct grid_row *out, const uint8_t *w) {
    const __m256i qh = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(w + offsetof(block_iq1_m, qh))));
    const __m512i words =
        _mm512_srlv_epi16(_mm512_permutexvar_epi16(words_of_two(), _mm512_castsi256_si512(qh)),
                          _mm512_set1_epi32(4 << 16));
    const __m512i high = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(7)), 8);
    look_up_eight(out, grid_iq1, _mm512_or_si512(_mm512_cvtepu8_epi16(load_256(w + offsetof(block_iq1_m, qs))), high));
    finish_iq1(out, _mm512_test_epi16_mask(words, _mm512_set1_epi16(8)));
}
static inline __m128i scales_iq1_m(const uint8_t *w) {
    const __m512i t = _mm512_castsi128_si512(_mm_loadl_epi64((const void *)(w + offsetof(block_iq1_m, scales))));
    const __m512i s =
        _mm512_and_si512(_mm512_srlv_epi16(_mm512_permutexvar_epi16(words_of_four(), t), shifts_of_four(3)),
                         _mm512_set1_epi16(7));
    return _mm256_castsi256_si128(_mm512_cvtepi16_epi8(_mm512_add_epi16(_mm512_add_epi16(s, s), _mm512_set1_epi16(1))));
}
static inline void rows_iq1_s(struct grid_row *out, panel_rows w, const __m512i *grid) {
    (void)grid;
    row_iq1_s(&out[0], w[0]);
    row_iq1_s(&out[1], w[1]);
}
static inline void rows_iq1_m(struct grid_row *out, panel_rows w, const __m512i *grid) {
    (void)grid;
    row_iq1_m(&out[0], w[0]);
    row_iq1_m(&out[1], w[1]);
}
/* d of 16 superblocks, times `factor`; IQ1_M has its bits spread over the scales. */
static inline __m512 grid_d(panel_rows w, float factor) {
    return _mm512_mul_ps(load_halves(w, 0), _mm512_set1_ps(factor));
}
static inline __m512 grid_d_iq1_m(panel_rows w) {
    uint16_t d[16];
    for (int l = 0; l < 16; l++) {
        const uint8_t *s = w[l] + offsetof(block_iq1_m, scales);
        d[l] = (uint16_t)(s[1] >> 4 | (s[3] >> 4) << 4 | (s[5] >> 4) << 8 | (s[7] >> 4) << 12);
    }
    return _mm512_mul_ps(_mm512_cvtph_ps(load_256(d)), _mm512_set1_ps(0.125f));
}
static inline __m512i signed_bytes(__m512i q, __mmask64 negative) {
    return _mm512_mask_sub_epi8(q, negative, _mm512_setzero_si512(), q);
}
/* X(type, order, d of 16 rows) */
#define GRID_TYPES(X) \
    X(iq2_xxs, QUAD_ORDER, grid_d(w, 0.125f)) X(iq2_xs, QUAD_ORDER, grid_d(w, 0.125f)) \
    X(iq2_s, QUAD_ORDER, grid_d(w, 0.125f)) X(iq3_xxs, BLOCK_ORDER, grid_d(w, 0.25f)) \
    X(iq3_s, BLOCK_ORDER, grid_d(w, 1.0f))
#endif
