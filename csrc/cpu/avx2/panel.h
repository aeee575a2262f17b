/* panel.h -- a superblock of eight rows, opened for products with many tokens on AVX2.
 *
 * The including file defines ALL_UNSIGNED: whether quants of signed types get a bias of 128 too.
 */
#ifndef MS4_AVX2_PANEL_H
#define MS4_AVX2_PANEL_H
#include "avx2.h"
#include "grid_rows.h"
#include "rows.h"
#include "cpu/plain/plain.h"

#define ROWS 8              /* rows of a panel, and rows computed together for one token: the lanes of a register */

/* What a type's quants are like.  span: how many products of pairs, each at most 127 * (2 * the largest quant), fit 16
 * bits when added up; 0: the quants are signed.  scales: of 32 weights, one or two.  Those with a bias have it in their
 * panel too. */
struct form { enum family family; int span, scales, biased; };
/* X(form, family, span, scales, biased) */
#define FORMS(X) \
    X(mins_8, FAMILY_MINS, 8, 1, 0) X(mins_4, FAMILY_MINS, 4, 1, 0) X(half_mins_8, FAMILY_MINS, 8, 2, 0) \
    X(scales_4, FAMILY_SCALES, 4, 1, 1) X(scales_1, FAMILY_SCALES, 1, 1, 1) \
    X(scales_signed, FAMILY_SCALES, 0, 1, ALL_UNSIGNED) X(half_scales_8, FAMILY_SCALES, 8, 2, 1) \
    X(half_scales_4, FAMILY_SCALES, 4, 2, 1) X(half_scales_2, FAMILY_SCALES, 2, 2, 1) \
    X(half_scales_1, FAMILY_SCALES, 1, 2, 1) X(blocks_8, FAMILY_BLOCKS, 8, 1, 1) X(blocks_4, FAMILY_BLOCKS, 4, 1, 1) \
    X(blocks_signed, FAMILY_BLOCKS, 0, 1, ALL_UNSIGNED) X(blocks_min_8, FAMILY_BLOCKS_MIN, 8, 1, 0) \
    X(blocks_min_4, FAMILY_BLOCKS_MIN, 4, 1, 0) X(blocks_16, FAMILY_BLOCKS_16, 4, 2, 1)
/* X(type, form, bias if it has one) */
#define AVX2_TYPES(X) \
    X(q4_0, blocks_8, 8) X(q4_1, blocks_min_8, 0) X(q5_0, blocks_4, 16) X(q5_1, blocks_min_4, 0) \
    X(q8_0, blocks_signed, 128) X(iq4_nl, blocks_signed, 128) X(mxfp4, blocks_4, 12) X(nvfp4, blocks_16, 12) \
    X(q2_k, half_mins_8, 0) X(q3_k, half_scales_8, 4) X(q4_k, mins_8, 0) X(q5_k, mins_4, 0) X(q6_k, half_scales_2, 32) \
    X(iq4_xs, scales_signed, 128) X(iq2_xxs, scales_1, 43) X(iq2_xs, half_scales_1, 43) X(iq2_s, half_scales_1, 43) \
    X(iq3_xxs, scales_1, 62) X(iq3_s, scales_4, 15) X(iq1_s, scales_4, 9) X(iq1_m, half_scales_4, 9)

typedef void row_fn(struct row *o, const uint8_t *w, int n_blocks);
typedef __m256 scale_fn(const uint8_t *const *rows, int b);
/* The superblock of eight rows at once; b: the block whose scale or min is meant. */
struct opener { row_fn *row; scale_fn *d, *m; size_t bytes; struct form form; int bias; };

INLINE int is_blocks(enum family f) { return f != FAMILY_SCALES && f != FAMILY_MINS; }

/* --- float scales of eight rows ------------------------------------------------------------------ */
INLINE __m256 from_halves(const uint16_t *h) {
    return _mm256_cvtph_ps(_mm_set_epi16((short)h[7], (short)h[6], (short)h[5], (short)h[4], (short)h[3], (short)h[2],
                                         (short)h[1], (short)h[0]));
}
INLINE __m256 halves_at(const uint8_t *const *rows, size_t at) {
    uint16_t h[ROWS];
    for (int r = 0; r < ROWS; r++) memcpy(h + r, rows[r] + at, 2);
    return from_halves(h);
}
/* X(type, offset of d, factor, offset of the min) */
#define HALVES(type, d_at, factor, m_at) \
    INLINE __m256 d_##type(const uint8_t *const *rows, int b) { \
        return _mm256_mul_ps(halves_at(rows, (size_t)b * sizeof(block_##type) + (d_at)), _mm256_set1_ps(factor)); \
    } \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { \
        return halves_at(rows, (size_t)b * sizeof(block_##type) + (m_at)); \
    }
HALVES(q4_0, 0, 1, 0) HALVES(q4_1, 0, 1, 2) HALVES(q5_0, 0, 1, 0) HALVES(q5_1, 0, 1, 2) HALVES(q8_0, 0, 1, 0)
HALVES(iq4_nl, 0, 1, 0) HALVES(q2_k, 80, 1, 82) HALVES(q3_k, 108, 1, 0) HALVES(q4_k, 0, 1, 2) HALVES(q5_k, 0, 1, 2)
HALVES(q6_k, 208, 1, 0) HALVES(iq4_xs, 0, 1, 0) HALVES(iq2_xxs, 0, 0.125f, 0) HALVES(iq2_xs, 0, 0.125f, 0)
HALVES(iq2_s, 0, 0.125f, 0) HALVES(iq3_xxs, 0, 0.25f, 0) HALVES(iq3_s, 0, 1, 0) HALVES(iq1_s, 0, 0.125f, 0)

INLINE __m256 d_iq1_m(const uint8_t *const *rows, int b) {
    uint16_t h[ROWS];
    for (int r = 0; r < ROWS; r++) h[r] = d_of_iq1_m(rows[r]);
    return (void)b, _mm256_mul_ps(from_halves(h), _mm256_set1_ps(0.125f));
}
/* Four bytes of each row. */
INLINE __m256i words_at(const uint8_t *const *rows, size_t at) {
    uint32_t v[ROWS];
    for (int r = 0; r < ROWS; r++) v[r] = load32(rows[r] + at);
    return _mm256_set_epi32((int)v[7], (int)v[6], (int)v[5], (int)v[4], (int)v[3], (int)v[2], (int)v[1], (int)v[0]);
}
INLINE __m256 d_mxfp4(const uint8_t *const *rows, int b) { return floats_e8m0(words_at(rows, (size_t)b * sizeof(block_mxfp4))); }
INLINE __m256 d_nvfp4(const uint8_t *const *rows, int b) {
    return floats_e4m3(words_at(rows, (size_t)(b / 4) * sizeof(block_nvfp4)), b % 4);
}
#define NO_MIN(type) \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { return (void)rows, (void)b, _mm256_setzero_ps(); }
NO_MIN(iq1_m) NO_MIN(mxfp4) NO_MIN(nvfp4)

/* --- moving lanes ---------------------------------------------------------------------------------- */
/* Copies between y and a register; the last rows may be fewer than eight. */
INLINE __m256 load_rows(const float *y, int n) {
    float part[ROWS] = { 0 };
    if (n >= ROWS) return _mm256_loadu_ps(y);
    memcpy(part, y, (size_t)n * sizeof *y);
    return _mm256_loadu_ps(part);
}
INLINE void store_rows(float *y, __m256 v, int n) {
    float part[ROWS];
    _mm256_storeu_ps(n >= ROWS ? y : part, v);
    if (n < ROWS) memcpy(y, part, (size_t)n * sizeof *y);
}
/* Where the rows of a group begin; rows beyond the last one repeat it, and their results are not stored. */
INLINE void find_rows(const uint8_t **rows, const struct ms4_mul *m, int first) {
    for (int r = 0; r < ROWS; r++) {
        int row = first + r < m->n_rows ? first + r : m->n_rows - 1;
        rows[r] = m->w + (size_t)row * m->row_bytes;
    }
}
/* Eight rows are too many streams for the hardware's prefetchers: asks for the same superblock of the next group. */
INLINE void next_superblock(const uint8_t **rows, const struct ms4_mul *m, size_t bytes) {
    for (int r = 0; r < ROWS; r++) {
        const char *ahead = (const char *)rows[r] + ROWS * m->row_bytes;
        for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T1);
        rows[r] += bytes;
    }
}
INLINE int blocks_here(const struct ms4_mul *m, int i) {
    int n = m->n_cols - i * SUPERBLOCK;
    return n >= SUPERBLOCK ? 8 : n / 32;
}

/* --- many tokens ---------------------------------------------------------------------------------------- */
/* One superblock of eight rows, opened, with the rows in the lanes: four weights (or two 16-bit numbers) of each. */
struct panel {
    __m256i q[SUPERBLOCK / 4];
    __m256i scale[16];          /* of group g, twice */
    __m256i low[8];             /* of groups 2 p and 2 p + 1: the min, or scale * bias */
    __m256i bias;               /* in every 16-bit lane */
    __m256 d[16], m[8];
};
INLINE void open_panel(struct panel *p, const uint8_t *const *rows, int n_blocks, struct opener t) {
    const int blocks = is_blocks(t.form.family);
    __m256i scale[ROWS], low[ROWS], q[ROWS][8];
    const __m256i top = _mm256_set1_epi8((char)(t.form.span ? 0 : ALL_UNSIGNED * 128));
    p->bias = _mm256_set1_epi16((short)t.bias);
    for (int r = 0; r < ROWS; r++) {
        struct row o;
        t.row(&o, rows[r], n_blocks);
        for (int c = 0; c < 8; c++) q[r][c] = _mm256_xor_si256(o.q[c], top);
        if (blocks) continue;
        __m256i even = o.scale, odd = _mm256_permute2x128_si256(even, even, 0x11);
        scale[r] = _mm256_inserti128_si256(_mm256_unpacklo_epi16(even, odd), _mm256_castsi256_si128(_mm256_unpackhi_epi16(even, odd)), 1);
        even = t.form.family == FAMILY_MINS ? o.min : _mm256_mullo_epi16(o.scale, p->bias);
        odd = _mm256_permute2x128_si256(even, even, 0x11);
        low[r] = _mm256_inserti128_si256(_mm256_unpacklo_epi16(even, odd), _mm256_castsi256_si128(_mm256_unpackhi_epi16(even, odd)), 1);
    }
    for (int c = 0; c < 8; c++) {
        __m256i v[8];
        for (int r = 0; r < ROWS; r++) v[r] = q[r][c];
        transpose_8(v);
        for (int j = 0; j < 8; j++) p->q[c * 8 + j] = v[j];
    }
    if (blocks) {
        int n_scales = t.form.family == FAMILY_BLOCKS_16 ? 2 * n_blocks : n_blocks;
        for (int b = 0; b < n_scales; b++) p->d[b] = t.d(rows, b);
        if (t.form.family == FAMILY_BLOCKS_MIN) for (int b = 0; b < n_blocks; b++) p->m[b] = t.m(rows, b);
        return;
    }
    transpose_8(scale);
    transpose_8(low);
    for (int g = 0; g < 8; g++) {
        p->scale[2 * g] = _mm256_blend_epi16(scale[g], _mm256_slli_epi32(scale[g], 16), 0xaa);
        p->scale[2 * g + 1] = _mm256_blend_epi16(scale[g], _mm256_srli_epi32(scale[g], 16), 0x55);
        p->low[g] = low[g];
    }
    p->d[0] = t.d(rows, 0);
    if (t.form.family == FAMILY_MINS) p->m[0] = t.m(rows, 0);
}
INLINE __m256i broadcast4(const void *p) { return _mm256_set1_epi32((int)load32(p)); }
#endif
