/* avx512_panel.h -- how each quantised type fills the panel of avx512_gemm.h.
 *
 * Packed bytes are transposed first, 16 bytes of 16 rows at a time, and unpacked after that: fewer bytes to move, and
 * one instruction unpacks the same column of all rows.
 */
#ifndef MS4_AVX512_PANEL_H
#define MS4_AVX512_PANEL_H
#include "avx512_gemm.h"
#include "unpack.h"

typedef const uint8_t *const *panel_rows;

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

/* --- any type, through unpack.h -------------------------------------------------------------- */
static inline __attribute__((always_inline)) void fill_opened(struct panel *p, panel_rows rows, int blocks, unpack_fn *unpack,
                                                              enum family family) {
    struct opened o[PANEL_ROWS];
    const uint8_t *q[PANEL_ROWS];
    const int has_min = family == FAMILY_MINS || family == FAMILY_BLOCKS_MIN;
    for (int r = 0; r < PANEL_ROWS; r++) {
        unpack(&o[r], rows[r], blocks * 32);
        q[r] = (const uint8_t *)o[r].q;
        ((float *)&p->d)[r] = o[r].d;
        if (family == FAMILY_MINS) ((float *)&p->dmin)[r] = o[r].dmin;
        for (int g = 0; g < 16; g++) {
            if (family == FAMILY_BLOCKS_16) ((float *)&p->factor[g])[r] = g < 2 * blocks ? o[r].block_d[g] : 0;
            else if (family == FAMILY_SCALES || family == FAMILY_MINS) ((int32_t *)&p->scale[g])[r] = o[r].scale[g];
        }
        for (int b = 0; b < 8; b++) {
            if (family == FAMILY_BLOCKS || family == FAMILY_BLOCKS_MIN) ((float *)&p->factor[b])[r] = b < blocks ? o[r].block_d[b] : 0;
            if (family == FAMILY_BLOCKS_MIN) ((float *)&p->add[b])[r] = b < blocks ? o[r].block_m[b] : 0;
        }
    }
    for (int c = 0; c < 16; c++) {
        load_transposed(p->q + 4 * c, q, (size_t)c * 16);
        if (!has_min) for (int j = 0; j < 4; j++) p->q[4 * c + j] = _mm512_xor_si512(p->q[4 * c + j], _mm512_set1_epi8(-128));
    }
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
static inline __attribute__((always_inline)) void fill_k_header(struct panel *p, panel_rows rows) {
    const struct k_header k = load_k_header(rows);
    /* bytes 0 and 1 (2 and 3) of each dword, widened to 16 bits */
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
    const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
    p->d = k.d;
    p->dmin = k.dmin;
    for (int h = 0; h < 2; h++) {
        for (int b = 0; b < 4; b++) p->scale[4 * h + b] = byte_of(k.scales[h], b);
        p->min[2 * h] = _mm512_shuffle_epi8(k.mins[h], first);
        p->min[2 * h + 1] = _mm512_shuffle_epi8(k.mins[h], second);
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
#endif
