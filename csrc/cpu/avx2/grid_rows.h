/* grid_rows.h -- the types whose weights are rows of a grid (IQ1, IQ2, IQ3), in AVX2 registers.
 *
 * Which rows, and which weights are negative, is found for a whole superblock at once, side by side in registers, and
 * waits in memory; the grid's rows are then loaded one by one.  (A gather takes longer, and bits that are moved in
 * general registers twice as long.)
 */
#ifndef MS4_AVX2_GRIDS_H
#define MS4_AVX2_GRIDS_H
#include "rows.h"
#include "cpu/plain/grids.h"

struct grid_row {
    uint16_t index[64] __attribute__((aligned(32)));        /* of the grid's rows */
    uint32_t negative[8] __attribute__((aligned(32)));      /* bit i of the c-th: weight 32 c + i */
    __m256i scale;                                          /* as in struct row */
};
/* The compiler would take the indices out of the registers again, word by word, which takes twice as long as loads. */
INLINE void leave_in_memory(struct grid_row *g) { __asm__("" : "+m"(g->index), "+m"(g->negative)); }

/* --- 32 weights -------------------------------------------------------------------------------------------- */
INLINE __m256i grid_8(const int8_t (*grid)[8], const uint16_t *i) {
    return _mm256_set_epi64x(load_64(grid[i[3]]), load_64(grid[i[2]]), load_64(grid[i[1]]), load_64(grid[i[0]]));
}
INLINE __m256i grid_4(const int8_t (*grid)[4], const uint16_t *i) {
    return _mm256_set_epi32((int)load_32(grid[i[7]]), (int)load_32(grid[i[6]]), (int)load_32(grid[i[5]]),
                            (int)load_32(grid[i[4]]), (int)load_32(grid[i[3]]), (int)load_32(grid[i[2]]),
                            (int)load_32(grid[i[1]]), (int)load_32(grid[i[0]]));
}
/* v with the signs, plus bias: none is negative */
INLINE __m256i biased(__m256i v, uint32_t negative, int bias) {
    const __m256i mask = bit_mask(negative);
    return _mm256_add_epi8(_mm256_sub_epi8(_mm256_xor_si256(v, mask), mask), _mm256_set1_epi8((char)bias));
}

/* --- indices ------------------------------------------------------------------------------------------------ */
INLINE void set_index(struct grid_row *o, int v, __m256i words) { _mm256_store_si256((__m256i *)o->index + v, words); }
INLINE __m256i bytes_to_words(const uint8_t *p) { return _mm256_cvtepu8_epi16(load_128(p)); }
/* Byte a in the first four words, then b, c and d, out of 16 in either half of v. */
INLINE __m256i four_bytes(__m256i v, int a, int b, int c, int d) {
    const long long zero = (long long)0x8000800080008000, every = 0x0001000100010001;
    return _mm256_shuffle_epi8(v, _mm256_set_epi64x(zero | d * every, zero | c * every, zero | b * every,
                                                    zero | a * every));
}
/* The same with words, from the first-th on. */
INLINE __m256i four_words(__m256i v, int first) {
    const __m256i words =
        _mm256_set_epi64x(0x0706070607060706, 0x0504050405040504, 0x0302030203020302, 0x0100010001000100);
    return _mm256_shuffle_epi8(v, _mm256_add_epi8(words, _mm256_set1_epi8((char)(2 * first))));
}
/* Words times a, b, c and d in turn: bits moved up by another number in each. */
INLINE __m256i times_four(__m256i v, int a, int b, int c, int d) {
    return _mm256_mullo_epi16(v, _mm256_set1_epi64x((long long)d << 48 | (long long)c << 32 | b << 16 | a));
}

/* --- signs and scales ----------------------------------------------------------------------------------------- */
/* Bytes of seven signs: the eighth makes their number even. */
INLINE void set_even_signs(struct grid_row *o, __m256i seven) {
    const __m128i is_odd = _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0);
    const __m256i odd = _mm256_broadcastsi128_si256(is_odd);
    const __m256i four = _mm256_and_si256(_mm256_xor_si256(seven, _mm256_srli_epi16(seven, 4)), _mm256_set1_epi8(15));
    _mm256_store_si256((__m256i *)o->negative, _mm256_or_si256(seven, _mm256_shuffle_epi8(odd, four)));
}
INLINE __m256i twice_plus_1(__m256i words) {
    return _mm256_add_epi16(_mm256_add_epi16(words, words), _mm256_set1_epi16(1));
}
/* Eight dwords of 4 x 7 signs and, on top, 4 bits of the scale of 32 weights. */
INLINE void set_signs_and_scale(struct grid_row *o, __m256i v) {
    __m256i seven = _mm256_and_si256(v, _mm256_set1_epi32(0x7f));
    for (int j = 1; j < 4; j++)
        seven = _mm256_or_si256(seven, _mm256_and_si256(_mm256_slli_epi32(v, j), _mm256_set1_epi32(0x7f << 8 * j)));
    set_even_signs(o, seven);
    const __m256i scale = _mm256_srli_epi32(v, 28);
    o->scale = twice_plus_1(_mm256_permute4x64_epi64(_mm256_packus_epi32(scale, scale), 0x88));
}
/* 1 + 2 * nibble for 16 nibbles in order. */
INLINE __m256i nibble_scales(const uint8_t *scales) {
    __m128i v = _mm_cvtsi64_si128(load_64(scales)), mask = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(v, mask), odd = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
    return twice_plus_1(_mm256_cvtepu8_epi16(_mm_unpacklo_epi64(even, odd)));
}

/* --- IQ2, IQ3 --------------------------------------------------------------------------------------------------- */
INLINE void find_iq2_xxs(struct grid_row *o, const uint8_t *w) {
    const block_iq2_xxs *p = (const block_iq2_xxs *)w;
    const __m256 a = _mm256_castsi256_ps(load_256(p->qs)), b = _mm256_castsi256_ps(load_256(p->qs + 16));
    const __m256i index = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
    set_index(o, 0, _mm256_cvtepu8_epi16(_mm256_castsi256_si128(index)));
    set_index(o, 1, _mm256_cvtepu8_epi16(_mm256_extracti128_si256(index, 1)));
    set_signs_and_scale(o, _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
INLINE void find_iq2_xs(struct grid_row *o, const uint8_t *w) {
    const block_iq2_xs *p = (const block_iq2_xs *)w;
    const __m256i a = load_256(p->qs), b = load_256(p->qs + 16), nine = _mm256_set1_epi16(511);
    set_index(o, 0, _mm256_and_si256(a, nine));
    set_index(o, 1, _mm256_and_si256(b, nine));
    const __m256i seven = _mm256_packus_epi16(_mm256_srli_epi16(a, 9), _mm256_srli_epi16(b, 9));
    set_even_signs(o, _mm256_permute4x64_epi64(seven, 0xd8));
    o->scale = nibble_scales(p->scales);
}
INLINE void find_iq2_s(struct grid_row *o, const uint8_t *w) {
    const block_iq2_s *p = (const block_iq2_s *)w;
    const __m256i high = _mm256_set1_epi64x(load_64(p->qh)), two = _mm256_set1_epi16(0x300);
    for (int v = 0; v < 2; v++) {
        const __m256i h = four_bytes(high, 4 * v, 4 * v + 1, 4 * v + 2, 4 * v + 3);
        set_index(o, v,
                  _mm256_or_si256(bytes_to_words(p->qs + 16 * v),
                                  _mm256_and_si256(times_four(h, 256, 64, 16, 4), two)));
    }
    _mm256_store_si256((__m256i *)o->negative, load_256(p->signs));
    o->scale = nibble_scales(p->scales);
}
INLINE void find_iq3_xxs(struct grid_row *o, const uint8_t *w) {
    const block_iq3_xxs *p = (const block_iq3_xxs *)w;
    for (int v = 0; v < 4; v++) set_index(o, v, bytes_to_words(p->qs + 16 * v));
    set_signs_and_scale(o, load_256(p->w));
}
INLINE void find_iq3_s(struct grid_row *o, const uint8_t *w) {
    const block_iq3_s *p = (const block_iq3_s *)w;
    const __m256i high = _mm256_set1_epi64x(load_64(p->qh)), one = _mm256_set1_epi16(0x100);
    const __m256i up = _mm256_broadcastsi128_si256(_mm_setr_epi16(256, 128, 64, 32, 16, 8, 4, 2));
    for (int v = 0; v < 4; v++) {
        const __m256i h = four_bytes(high, 2 * v, 2 * v, 2 * v + 1, 2 * v + 1);
        set_index(o, v,
                  _mm256_or_si256(bytes_to_words(p->qs + 16 * v), _mm256_and_si256(_mm256_mullo_epi16(h, up), one)));
    }
    _mm256_store_si256((__m256i *)o->negative, load_256(p->signs));
    const __m128i s = _mm_cvtsi32_si128((int)load_32(p->scales));
    const __m128i nibbles = _mm_and_si128(_mm_unpacklo_epi8(s, _mm_srli_epi16(s, 4)), _mm_set1_epi8(15));
    o->scale = twice_plus_1(twice(_mm_cvtepu8_epi16(nibbles)));
}
HALVES(iq2_xxs, d, 0.125f, d) HALVES(iq2_xs, d, 0.125f, d) HALVES(iq2_s, d, 0.125f, d) HALVES(iq3_xxs, d, 0.25f, d)
HALVES(iq3_s, d, 1, d)
/* X(type, span, bias, grid, weights of its rows) */
#define GRID_TYPES(X) \
    X(iq2_xxs, 1, 43, grid_iq2xxs, 8) X(iq2_xs, 1, 43, grid_iq2xs, 8) X(iq2_s, 1, 43, grid_iq2s, 8) \
    X(iq3_xxs, 1, 62, grid_iq3xxs, 4) X(iq3_s, 4, 15, grid_iq3s, 4)
/* magnitudes_<type>: those of weights 32 c to 32 c + 31; row_<type>: as in rows.h */
#define X(type, span, bias, grid, width) \
    INLINE __m256i magnitudes_##type(const struct grid_row *g, int c) { \
        return grid_##width(grid, g->index + 32 / width * c); \
    } \
    INLINE void row_##type(struct row *o, const uint8_t *w, int n) { \
        struct grid_row g; \
        (void)n; \
        find_##type(&g, w); \
        leave_in_memory(&g); \
        for (int c = 0; c < 8; c++) o->q[c] = biased(magnitudes_##type(&g, c), g.negative[c], bias); \
        o->scale = g.scale; \
    }
GRID_TYPES(X)
#undef X

/* --- IQ1 -------------------------------------------------------------------------------------------------------- */
/* 8 * grid + delta + 9 = 8 * (grid + 1) + (delta + 1); delta + 1: 0 where `minus` is all ones, else 2 */
INLINE __m256i shifted_grid(__m256i v, __m256i minus) {
    const __m256i delta_1 = _mm256_andnot_si256(minus, _mm256_set1_epi8(2));
    return _mm256_add_epi8(_mm256_slli_epi16(_mm256_add_epi8(v, _mm256_set1_epi8(1)), 3), delta_1);
}
/* up: words with the three upper bits of an index at bits 8 to 10 */
INLINE void set_iq1_index(struct grid_row *o, int v, const uint8_t *qs, __m256i up) {
    set_index(o, v, _mm256_or_si256(bytes_to_words(qs + 16 * v), _mm256_and_si256(up, _mm256_set1_epi16(0x700))));
}
INLINE void row_iq1_s(struct row *o, const uint8_t *w, int n) {
    const block_iq1_s *p = (const block_iq1_s *)w;
    const __m256i high = twice(load_128(p->qh));
    struct grid_row g;
    (void)n;
    for (int v = 0; v < 2; v++)
        set_iq1_index(&g, v, p->qs, _mm256_srli_epi16(times_four(four_words(high, 4 * v), 512, 64, 8, 1), 1));
    o->scale = twice_plus_1(_mm256_and_si256(_mm256_srli_epi16(high, 12), _mm256_set1_epi16(7)));
    leave_in_memory(&g);
    for (int c = 0; c < 8; c++)
        o->q[c] = shifted_grid(grid_8(grid_iq1, g.index + 4 * c), _mm256_set1_epi8((char)((int16_t)p->qh[c] >> 15)));
}
INLINE uint16_t d_of_iq1_m(const uint8_t *w) {
    const uint8_t *s = ((const block_iq1_m *)w)->scales;
    return (uint16_t)(s[1] >> 4 | (s[3] & 0xf0) | (s[5] & 0xf0) << 4 | (s[7] & 0xf0) << 8);
}
INLINE void row_iq1_m(struct row *o, const uint8_t *w, int n) {
    const block_iq1_m *p = (const block_iq1_m *)w;
    const __m256i high = twice(load_128(p->qh));
    const __m256i bits =
        _mm256_set_epi64x(0x8000800080008000, 0x0800080008000800, 0x0080008000800080, 0x0008000800080008);
    struct grid_row g;
    /* group g has bits 3 j to 3 j + 2 of word g / 4, j = g % 4: to the top, and from there to bit 1 */
    const __m128i word = _mm_set_epi8(7, 6, 7, 6, 5, 4, 5, 4, 3, 2, 3, 2, 1, 0, 1, 0);
    const __m256i shift = _mm256_set_m128i(_mm_set1_epi32(1024 | 16 << 16), _mm_set1_epi32(8192 | 128 << 16));
    (void)n;
    __m256i scale = twice(_mm_shuffle_epi8(_mm_cvtsi64_si128(load_64(p->scales)), word));
    scale = _mm256_slli_epi16(_mm256_srli_epi16(_mm256_mullo_epi16(scale, shift), 13), 1);
    o->scale = _mm256_add_epi16(scale, _mm256_set1_epi16(1));
    for (int v = 0; v < 2; v++)
        set_iq1_index(&g, v, p->qs, _mm256_srli_epi16(times_four(four_words(high, 4 * v), 4096, 256, 16, 1), 4));
    leave_in_memory(&g);
    for (int c = 0; c < 8; c++) {
        const __m256i h = _mm256_set1_epi16((short)unpack_u16(p->qh + 2 * c));
        o->q[c] = shifted_grid(grid_8(grid_iq1, g.index + 4 * c), _mm256_cmpeq_epi16(_mm256_and_si256(h, bits), bits));
    }
}
INLINE __m256 d_iq1_m(const uint8_t *const *rows, int b) {
    uint16_t h[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) h[r] = d_of_iq1_m(rows[r]);
    return (void)b, _mm256_mul_ps(from_halves(h), _mm256_set1_ps(0.125f));
}
NO_MIN(iq1_m)
HALVES(iq1_s, d, 0.125f, d)
#define IQ1_TYPES(X) X(iq1_s, 4, 9) X(iq1_m, 4, 9)
#define AVX2_TYPES(X) BLOCK_TYPES(X) K_TYPES(X) ROW_TYPES(X) GRID_TYPES(X) IQ1_TYPES(X)
#endif
