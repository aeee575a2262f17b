/* rows.h -- bytes of superblocks into AVX-512 registers: loads, transposed loads, nibbles, halves, tables. */
#ifndef MS4_AVX512_ROWS_H
#define MS4_AVX512_ROWS_H
#include "avx512.h"

typedef const uint8_t *const *panel_rows;
/* Packed grids of the IQ2 and IQ3 types: at most 1024 words. */
#define GRID_VECTORS 32
typedef void pack_grid_fn(__m512i *grid);
/* The order of activations that a type's unpacking gives: of 16-byte chunks, or (QUAD_ORDER) byte i of vector j is
 * activation 4i + j. */
enum x_order {
    NATURAL,        /* as they are */
    /* 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15: first and second halves of even blocks, of odd blocks */
    K_ORDER,
    BLOCK_ORDER,    /* 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15: the same of blocks 0..3, 4..7 */
    CRUMB_ORDER,    /* 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15: blocks 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
    QUAD_ORDER
};

static inline __m512i load_512(const void *p) { return _mm512_loadu_si512(p); }
static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
/* 16 bytes at two addresses, side by side */
static inline __m256i load_two(const uint8_t *a, const uint8_t *b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)a)),
                                   _mm_loadu_si128((const void *)b), 1);
}
/* out[j] = dword j of the 16 bytes at rows[r] + at, r = 0..15 side by side */
INLINE void load_transposed(__m512i *out, panel_rows rows, size_t at) {
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
static inline __m512i byte_of(__m512i v, int b) {
    return _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)b * 8), _mm512_set1_epi32(255));
}
static inline __m512 halves_to_floats(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
/* The half at rows[r] + at, as a float. */
static inline __m512 load_halves(panel_rows rows, size_t at) {
    uint16_t h[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) memcpy(h + r, rows[r] + at, sizeof *h);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)h));
}
/* For what is used more than once: the compiler would rather load it again, but a load across lines takes the time of
 * two. */
static inline __m512i load_once(const void *p) {
    __m512i v = load_512(p);
    __asm__("" : "+v"(v));
    return v;
}
/* Tables for shuffles of nibbles: quants plus their bias. */
static inline __m512i identity_table(void) {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
static inline __m512i kv_table(void) {
    return _mm512_broadcast_i32x4(_mm_xor_si128(_mm_loadu_si128((const void *)unpack_kv), _mm_set1_epi8(-128)));
}
static inline __m512i e2m1_table(void) {
    return _mm512_broadcast_i32x4(_mm_add_epi8(_mm_loadu_si128((const void *)unpack_e2m1), _mm_set1_epi8(12)));
}
#endif
