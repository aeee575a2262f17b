/* tiles.h -- panels times many tokens on AVX2: the innermost loops of prefill.
 *
 * The including file defines TILES, the name of their table; ALL_UNSIGNED; TILE, the tokens whose sums are held in
 * registers together; and tile_chunk(dots, p, x, n, c, f), which multiplies chunk c (32 weights) of n tokens: it adds
 * the products times their scales to dots, or, for 32-blocks, sets dots to them, of 16-blocks the second one at TILE.
 */
#ifndef MS4_AVX2_TILES_H
#define MS4_AVX2_TILES_H
#include "panel.h"

/* Those with a bias have it in their panel too. */
INLINE int has_bias(struct form f) { return !has_min(f.family) && (f.span || ALL_UNSIGNED); }
/* Copies between y and a register; the last rows may be fewer than eight. */
INLINE __m256 load_rows(const float *y, int n) {
    float part[PANEL_ROWS] = { 0 };
    if (n >= PANEL_ROWS) return _mm256_loadu_ps(y);
    memcpy(part, y, (size_t)n * sizeof *y);
    return _mm256_loadu_ps(part);
}
INLINE void store_rows(float *y, __m256 v, int n) {
    float part[PANEL_ROWS];
    _mm256_storeu_ps(n >= PANEL_ROWS ? y : part, v);
    if (n < PANEL_ROWS) memcpy(y, part, (size_t)n * sizeof *y);
}
INLINE void tile_superblock(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, struct form f) {
    __m256i dots[TILE];
    for (int t = 0; t < n; t++) dots[t] = _mm256_setzero_si256();
    for (int c = 0; c < 8; c++) tile_chunk(dots, p, x, n, c, f);
    for (int t = 0; t < n; t++) {
        __m256i low = _mm256_setzero_si256();
        if (has_bias(f) || has_min(f.family))
            for (int g = 0; g < 8; g++)
                low = _mm256_add_epi32(low, _mm256_madd_epi16(p->low[g], broadcast4(x[t]->sums + g * 2)));
        if (has_bias(f)) dots[t] = _mm256_sub_epi32(dots[t], low);
        __m256 v = _mm256_mul_ps(p->d[0], _mm256_cvtepi32_ps(dots[t]));
        if (has_min(f.family)) v = _mm256_fnmadd_ps(p->m[0], _mm256_cvtepi32_ps(low), v);
        y[t] = _mm256_fmadd_ps(_mm256_set1_ps(x[t]->d), v, y[t]);
    }
}
INLINE void tile_blocks(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, int n_blocks,
                        struct form f) {
    const int wide = f.family != FAMILY_blocks_16;
    __m256 v[TILE];
    for (int t = 0; t < n; t++) v[t] = _mm256_setzero_ps();
    for (int b = 0; b < n_blocks; b++) {
        __m256i dots[2 * TILE];
        tile_chunk(dots, p, x, n, b, f);
        for (int t = 0; t < n; t++) {
            __m256i sums = broadcast4(x[t]->sums + b * 2);
            if (wide) {
                if (has_bias(f)) dots[t] = _mm256_sub_epi32(dots[t], _mm256_madd_epi16(sums, p->bias));
                v[t] = _mm256_fmadd_ps(p->d[b], _mm256_cvtepi32_ps(dots[t]), v[t]);
                if (has_min(f.family))
                    v[t] = _mm256_fmadd_ps(p->m[b], _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))),
                                           v[t]);
                continue;
            }
            __m256i even = _mm256_madd_epi16(_mm256_and_si256(sums, _mm256_set1_epi32(0xffff)), p->bias);
            __m256i odd = _mm256_madd_epi16(_mm256_andnot_si256(_mm256_set1_epi32(0xffff), sums), p->bias);
            v[t] = _mm256_fmadd_ps(p->d[2 * b], _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[t], even)), v[t]);
            v[t] = _mm256_fmadd_ps(p->d[2 * b + 1], _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[TILE + t], odd)), v[t]);
        }
    }
    for (int t = 0; t < n; t++) y[t] = _mm256_fmadd_ps(_mm256_set1_ps(x[t]->d), v[t], y[t]);
}
/* n tokens from `token` on, times superblock i of the panel; y begins at zero. */
INLINE void tile(const struct ms4_mul *m, const struct panel *p, int token, int n, int i, int first, struct form f) {
    const block_q8 *x[TILE];
    __m256 y[TILE];
    float *out[TILE];
    int n_lanes = m->n_rows - first;
    for (int t = 0; t < n; t++) {
        x[t] = mul_blocks(m, token + t) + i;
        out[t] = m->y + (size_t)(token + t) * m->y_stride + first;
        y[t] = i == 0 ? _mm256_setzero_ps() : load_rows(out[t], n_lanes);
    }
    if (is_blocks(f.family)) tile_blocks(p, x, y, n, blocks_here(m, i), f);
    else tile_superblock(p, x, y, n, f);
    for (int t = 0; t < n; t++) store_rows(out[t], y[t], n_lanes);
}
#define FORMS(X) \
    X(mins_16, 8) X(mins_32, 8) X(mins_32, 4) X(scales_32, 4) X(scales_32, 1) X(scales_32, 0) X(scales_16, 8) \
    X(scales_16, 4) X(scales_16, 2) X(scales_16, 1) X(blocks, 8) X(blocks, 4) X(blocks, 0) X(blocks_min, 8) \
    X(blocks_min, 4) X(blocks_16, 4)
#define X(family, span) \
    static void tiles_##family##_##span(const struct ms4_mul *m, const struct panel *p, int i, int first) { \
        const struct form f = { FAMILY_##family, span }; \
        int token = 0; \
        for (; token + TILE <= m->n_tokens; token += TILE) tile(m, p, token, TILE, i, first, f); \
        for (; TILE > 4 && token + 4 <= m->n_tokens; token += 4) tile(m, p, token, 4, i, first, f); \
        for (; token + 2 <= m->n_tokens; token += 2) tile(m, p, token, 2, i, first, f); \
        if (token < m->n_tokens) tile(m, p, token, 1, i, first, f); \
    }
FORMS(X)
#undef X
const struct tiles TILES = {
    {
#define X(family, span) [FAMILY_##family][span] = tiles_##family##_##span,
        FORMS(X)
#undef X
    },
    ALL_UNSIGNED
};
#endif
