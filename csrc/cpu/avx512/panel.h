/* panel.h -- how each quantised type fills the panel of many.h.
 *
 * Packed bytes are transposed first, 16 bytes of 16 rows at a time, and unpacked after that: fewer bytes to move, and
 * one instruction unpacks the same column of all rows.
 */
#ifndef MS4_AVX512_PANEL_H
#define MS4_AVX512_PANEL_H
#include "many.h"
#include "cpu/plain/unpack.h"

typedef const uint8_t *const *panel_rows;

static inline __m512i load_512(const void *p) { return _mm512_loadu_si512(p); }
static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
/* 16 bytes at two addresses, side by side */
static inline __m256i load_two(const uint8_t *a, const uint8_t *b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)a)), _mm_loadu_si128((const void *)b), 1);
}
/* out[j] = dword j of the 16 bytes at rows[r] + at, r = 0..15 side by side */
static inline __attribute__((always_inline)) void load_transposed(__m512i *out, panel_rows rows, size_t at) {
    __m512i a[4];
    for (int k = 0; k < 4; k++)
        a[k] = _mm512_inserti64x4(_mm512_castsi256_si512(load_two(rows[k] + at, rows[k + 4] + at)),
                                  load_two(rows[k + 8] + at, rows[k + 12] + at), 1);
    const __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(a[2], a[3]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(t0, t2);
    out[1] = _mm512_unpackhi_epi64(t0, t2);
    out[2] = _mm512_unpacklo_epi64(t1, t3);
    out[3] = _mm512_unpackhi_epi64(t1, t3);
}
static inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
static inline __m512i byte_of(__m512i v, int b) { return _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)b * 8), _mm512_set1_epi32(255)); }
static inline __m512 halves_to_floats(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
/* The half at rows[r] + at, as a float. */
static inline __m512 load_halves(panel_rows rows, size_t at) {
    uint16_t h[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) memcpy(h + r, rows[r] + at, sizeof *h);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
}

/* --- Q4_K, Q5_K ------------------------------------------------------------------------------ */
/* The header of 16 superblocks: d, dmin, and the 6-bit scales and mins, four blocks to a dword. */
struct k_header { __m512 d, dmin; __m512i scales[2], mins[2]; };
static inline __attribute__((always_inline)) struct k_header load_k_header(panel_rows rows) {
    struct k_header k;
    __m512i h[4];
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), top = _mm512_set1_epi8(48);
    load_transposed(h, rows, 0);
    k.d = halves_to_floats(h[0]);
    k.dmin = halves_to_floats(_mm512_srli_epi32(h[0], 16));
    k.scales[0] = _mm512_and_si512(h[1], six);
    k.mins[0] = _mm512_and_si512(h[2], six);
    k.scales[1] = _mm512_or_si512(_mm512_and_si512(h[3], four), _mm512_and_si512(_mm512_srli_epi32(h[1], 2), top));
    k.mins[1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(h[3], 4), four), _mm512_and_si512(_mm512_srli_epi32(h[2], 2), top));
    return k;
}
/* Bytes 0 and 1, then 2 and 3, of each dword, widened to 16 bits. */
static inline void set_min_pairs(__m512i *pairs, __m512i mins) {
    pairs[0] = _mm512_shuffle_epi8(mins, _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1)));
    pairs[1] = _mm512_shuffle_epi8(mins, _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1)));
}
static inline __attribute__((always_inline)) void fill_k_header(struct panel *p, panel_rows rows) {
    const struct k_header k = load_k_header(rows);
    p->d = k.d;
    p->dmin = k.dmin;
    for (int h = 0; h < 2; h++) {
        for (int b = 0; b < 4; b++) p->scale[4 * h + b] = byte_of(k.scales[h], b);
        set_min_pairs(p->min + 2 * h, k.mins[h]);
    }
}
static inline void fill_q4_k(struct panel *p, panel_rows rows, int blocks) {
    (void)blocks;
    fill_k_header(p, rows);
    for (int c = 0; c < 8; c++) {
        __m512i v[4], *q = p->q + c / 2 * 16 + c % 2 * 4;
        load_transposed(v, rows, offsetof(block_q4_k, qs) + (size_t)c * 16);
        for (int j = 0; j < 4; j++) { q[j] = low_nibbles(v[j]); q[j + 8] = high_nibbles(v[j]); }
    }
}
static inline void fill_q5_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i high[8];
    const __m512i bit = _mm512_set1_epi8(16);
    (void)blocks;
    fill_k_header(p, rows);
    load_transposed(high, rows, offsetof(block_q5_k, qh));
    load_transposed(high + 4, rows, offsetof(block_q5_k, qh) + 16);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++)
        for (int half = 0; half < 2; half++) {
            __m512i v[4], *q = p->q + pair * 16 + half * 4;
            load_transposed(v, rows, offsetof(block_q5_k, qs) + (size_t)(pair * 32 + half * 16));
            for (int j = 0; j < 4; j++) {
                const __m512i h = high[half * 4 + j];
                const __m512i h0 = pair < 2 ? _mm512_slli_epi16(h, (unsigned)(4 - 2 * pair)) : _mm512_srli_epi16(h, (unsigned)(2 * pair - 4));
                const __m512i h1 = pair < 2 ? _mm512_slli_epi16(h, (unsigned)(3 - 2 * pair)) : _mm512_srli_epi16(h, (unsigned)(2 * pair - 3));
                q[j] = _mm512_or_si512(low_nibbles(v[j]), _mm512_and_si512(h0, bit));
                q[j + 8] = _mm512_or_si512(high_nibbles(v[j]), _mm512_and_si512(h1, bit));
            }
        }
}

/* --- Q6_K ------------------------------------------------------------------------------------ */
static inline void fill_q6_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i scales[4];
    const __m512i top = _mm512_set1_epi8(48);
    (void)blocks;
    p->d = load_halves(rows, offsetof(block_q6_k, d));
    load_transposed(scales, rows, offsetof(block_q6_k, scales));
    for (int g = 0; g < 16; g++) p->scale[g] = _mm512_srai_epi32(_mm512_slli_epi32(scales[g / 4], (unsigned)(24 - g % 4 * 8)), 24);
    for (int c = 0; c < 4; c++) {
        /* ql at 64h + 16e, e = 0..3: low nibbles are elements 128h + 16e.., high ones 64 later; qh at 32h + 16(e % 2) */
        __m512i v[4], h[4], *q = p->q + c / 2 * 32 + c % 2 * 4;
        load_transposed(h, rows, offsetof(block_q6_k, qh) + (size_t)c * 16);
        load_transposed(v, rows, offsetof(block_q6_k, ql) + (size_t)(c / 2 * 64 + c % 2 * 16));
        for (int j = 0; j < 4; j++) {
            q[j] = _mm512_or_si512(low_nibbles(v[j]), _mm512_and_si512(_mm512_slli_epi16(h[j], 4), top));
            q[j + 16] = _mm512_or_si512(high_nibbles(v[j]), _mm512_and_si512(h[j], top));
        }
        load_transposed(v, rows, offsetof(block_q6_k, ql) + (size_t)(c / 2 * 64 + c % 2 * 16 + 32));
        for (int j = 0; j < 4; j++) {
            q[j + 8] = _mm512_or_si512(low_nibbles(v[j]), _mm512_and_si512(_mm512_slli_epi16(h[j], 2), top));
            q[j + 24] = _mm512_or_si512(high_nibbles(v[j]), _mm512_and_si512(_mm512_srli_epi16(h[j], 2), top));
        }
    }
}

/* --- Q2_K, Q3_K: the scales go into the bytes, as scale * quant fits 8 bits --------------------- */
/* Byte g % 4 of each dword: the scale of 16-group g of each row; times the four bytes of `table`. */
static inline __m512i scale_table(const __m512i *scales, int g, int32_t table) {
    return _mm512_mullo_epi32(byte_of(scales[g / 4], g % 4), _mm512_set1_epi32(table));
}
/* Bits 2j and 2j + 1 of each byte as an index into the four bytes of its own dword. */
static inline __m512i crumb_index(__m512i v, int j) {
    const __m512i dword = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    return _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(v, (unsigned)(2 * j)), _mm512_set1_epi8(3)), dword);
}
static inline void fill_q2_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i scales[4], v[4];
    (void)blocks;
    load_transposed(v, rows, sizeof(block_q2_k) - 16);
    p->d = halves_to_floats(v[3]);
    p->dmin = halves_to_floats(_mm512_srli_epi32(v[3], 16));
    load_transposed(scales, rows, offsetof(block_q2_k, scales));
    for (int k = 0; k < 4; k++) {
        set_min_pairs(p->min + 2 * k, high_nibbles(scales[k]));
        scales[k] = low_nibbles(scales[k]);
    }
    for (int c = 0; c < 4; c++) {
        load_transposed(v, rows, offsetof(block_q2_k, qs) + (size_t)c * 16);
        for (int j = 0; j < 4; j++) {
            const int g = c / 2 * 8 + 2 * j + c % 2;
            const __m512i table = scale_table(scales, g, 0x03020100);
            for (int k = 0; k < 4; k++) p->q[4 * g + k] = _mm512_shuffle_epi8(table, crumb_index(v[k], j));
        }
    }
}
/* Sixteen 6-bit scales, four to a dword, still 32 too large. */
static inline __m512 load_q3_k_header(__m512i *scales, panel_rows rows) {
    const __m512i two = _mm512_set1_epi8(3);
    __m512i v[4], w[3];
    load_transposed(v, rows, sizeof(block_q3_k) - 16);        /* two bytes that do not matter, 12 of scales, d */
    for (int k = 0; k < 3; k++) w[k] = _mm512_or_si512(_mm512_srli_epi32(v[k], 16), _mm512_slli_epi32(v[k + 1], 16));
    for (int k = 0; k < 4; k++) {
        const __m512i top = _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(w[2], (unsigned)(2 * k)), two), 4);
        scales[k] = _mm512_or_si512(k < 2 ? low_nibbles(w[k]) : high_nibbles(w[k - 2]), top);
    }
    return halves_to_floats(_mm512_srli_epi32(v[3], 16));
}
/* The bytes are scale * (quant - 4) + 124, 0..252: from tables of scale * (0..3) + 124, less 4 * scale where the high
 * bit is 0.  All of it modulo 256. */
static inline void fill_q3_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i scales[4], high[8];
    (void)blocks;
    p->d = load_q3_k_header(scales, rows);
    load_transposed(high, rows, offsetof(block_q3_k, hmask));
    load_transposed(high + 4, rows, offsetof(block_q3_k, hmask) + 16);
    for (int c = 0; c < 4; c++) {
        __m512i v[4];
        load_transposed(v, rows, offsetof(block_q3_k, qs) + (size_t)c * 16);
        for (int j = 0; j < 4; j++) {
            const int g = c / 2 * 8 + 2 * j + c % 2;
            const __m512i table = _mm512_add_epi8(scale_table(scales, g, 0x03020100), _mm512_set1_epi32(0x1c3c5c7c));
            const __m512i four = _mm512_xor_si512(scale_table(scales, g, 0x04040404), _mm512_set1_epi8(-128));
            const __m512i bit = _mm512_set1_epi8((char)(1 << (c / 2 * 4 + j)));
            for (int k = 0; k < 4; k++) {
                const __m512i q = _mm512_shuffle_epi8(table, crumb_index(v[k], j));
                p->q[4 * g + k] = _mm512_mask_sub_epi8(q, _mm512_testn_epi8_mask(high[c % 2 * 4 + k], bit), q, four);
            }
        }
    }
}

/* --- IQ4_XS ---------------------------------------------------------------------------------- */
static inline __m512i identity_table(void) { return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)); }
static inline __m512i kv_table(void) { return _mm512_broadcast_i32x4(_mm_xor_si128(_mm_loadu_si128((const void *)unpack_kv), _mm_set1_epi8(-128))); }
static inline __m512i e2m1_table(void) { return _mm512_broadcast_i32x4(_mm_add_epi8(_mm_loadu_si128((const void *)unpack_e2m1), _mm_set1_epi8(12))); }
/* The low nibbles of four dwords to q[0..3], the high ones to q[4..7], through a table. */
static inline void look_up_nibbles(__m512i *q, const __m512i *v, __m512i table) {
    for (int j = 0; j < 4; j++) {
        q[j] = _mm512_shuffle_epi8(table, low_nibbles(v[j]));
        q[4 + j] = _mm512_shuffle_epi8(table, high_nibbles(v[j]));
    }
}
static inline void fill_iq4_xs(struct panel *p, panel_rows rows, int blocks) {
    __m512i h[4], v[4];
    (void)blocks;
    load_transposed(h, rows, 0);            /* d and scales_h, scales_l */
    p->d = halves_to_floats(h[0]);
    for (int b = 0; b < 8; b++) {
        const __m512i low = _mm512_and_si512(_mm512_srli_epi32(h[1], (unsigned)(4 * b)), _mm512_set1_epi32(15));
        const __m512i top = _mm512_and_si512(_mm512_srli_epi32(h[0], (unsigned)(16 + 2 * b)), _mm512_set1_epi32(3));
        p->scale[b] = _mm512_sub_epi32(_mm512_or_si512(low, _mm512_slli_epi32(top, 4)), _mm512_set1_epi32(32));
        load_transposed(v, rows, offsetof(block_iq4_xs, qs) + (size_t)b * 16);
        look_up_nibbles(p->q + 8 * b, v, kv_table());
    }
}

/* --- 32-blocks ------------------------------------------------------------------------------- */
static inline void clear_block(struct panel *p, int b) {
    for (int j = 0; j < 8; j++) p->q[8 * b + j] = _mm512_setzero_si512();
    p->factor[b] = p->add[b] = _mm512_setzero_ps();
}
static inline void fill_q8_0(struct panel *p, panel_rows rows, int blocks) {
    for (int b = blocks; b < 8; b++) clear_block(p, b);
    for (int b = 0; b < blocks; b++) {
        const size_t at = (size_t)b * sizeof(block_q8_0);
        p->factor[b] = load_halves(rows, at);
        load_transposed(p->q + 8 * b, rows, at + offsetof(block_q8_0, qs));
        load_transposed(p->q + 8 * b + 4, rows, at + offsetof(block_q8_0, qs) + 16);
        for (int j = 0; j < 8; j++) p->q[8 * b + j] = _mm512_xor_si512(p->q[8 * b + j], _mm512_set1_epi8(-128));
    }
}
/* Blocks of 32 nibbles, `size` bytes each, through a table; the caller sets the factors. */
static inline __attribute__((always_inline)) void fill_nibbles(struct panel *p, panel_rows rows, int blocks, size_t size, size_t at, __m512i table) {
    for (int b = blocks; b < 8; b++) clear_block(p, b);
    for (int b = 0; b < blocks; b++) {
        __m512i v[4];
        load_transposed(v, rows, (size_t)b * size + at);
        look_up_nibbles(p->q + 8 * b, v, table);
    }
}
static inline void fill_q4_0(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_q4_0), offsetof(block_q4_0, qs), identity_table());
    for (int b = 0; b < blocks; b++) p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q4_0));
}
static inline void fill_q4_1(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_q4_1), offsetof(block_q4_1, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q4_1));
        p->add[b] = load_halves(rows, (size_t)b * sizeof(block_q4_1) + offsetof(block_q4_1, m));
    }
}
static inline void fill_iq4_nl(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_iq4_nl), offsetof(block_iq4_nl, qs), kv_table());
    for (int b = 0; b < blocks; b++) p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_iq4_nl));
}
static inline void fill_mxfp4(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_mxfp4), offsetof(block_mxfp4, qs), e2m1_table());
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < PANEL_ROWS; r++) ((float *)&p->factor[b])[r] = unpack_e8m0_half(rows[r][(size_t)b * sizeof(block_mxfp4)]);
}
/* Adds bit 4 of the quants: bit i of qh for quant i of the block. */
static inline void add_fifth_bits(__m512i *q, panel_rows rows, size_t at) {
    uint32_t bits[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) memcpy(bits + r, rows[r] + at, sizeof *bits);
    const __m512i v = _mm512_loadu_si512(bits);
    for (int j = 0; j < 8; j++) {
        /* four bits, one to a byte */
        const __m512i four = _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)(4 * j)), _mm512_set1_epi32(15));
        const __m512i spread = _mm512_and_si512(_mm512_mullo_epi32(four, _mm512_set1_epi32(0x00204081)), _mm512_set1_epi8(1));
        q[j] = _mm512_or_si512(q[j], _mm512_slli_epi32(spread, 4));
    }
}
static inline void fill_q5_0(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_q5_0), offsetof(block_q5_0, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q5_0));
        add_fifth_bits(p->q + 8 * b, rows, (size_t)b * sizeof(block_q5_0) + offsetof(block_q5_0, qh));
    }
}
static inline void fill_q5_1(struct panel *p, panel_rows rows, int blocks) {
    fill_nibbles(p, rows, blocks, sizeof(block_q5_1), offsetof(block_q5_1, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q5_1));
        p->add[b] = load_halves(rows, (size_t)b * sizeof(block_q5_1) + offsetof(block_q5_1, m));
        add_fifth_bits(p->q + 8 * b, rows, (size_t)b * sizeof(block_q5_1) + offsetof(block_q5_1, qh));
    }
}
#endif
