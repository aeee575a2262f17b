/* tiles.h -- products with many tokens on AVX2: of a panel, of all panels, and the table of them.
 *
 * The including file defines MUL(type), the name of a type's product; TILE, the tokens whose sums are held in registers
 * together; and tile_chunk(dots, p, x, n, c, f), which multiplies chunk c (32 weights) of n tokens: it adds the
 * products times their scales to dots, or, for 32-blocks, sets dots to them, of 16-blocks the second one at TILE.
 */
#ifndef MS4_AVX2_TILES_H
#define MS4_AVX2_TILES_H
#include "panel.h"

INLINE void tile_superblock(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, struct form f) {
    __m256i dots[TILE];
    for (int t = 0; t < n; t++) dots[t] = _mm256_setzero_si256();
    for (int c = 0; c < 8; c++) tile_chunk(dots, p, x, n, c, f);
    for (int t = 0; t < n; t++) {
        __m256i low = _mm256_setzero_si256();
        if (f.biased || f.family == FAMILY_MINS)
            for (int g = 0; g < 8; g++)
                low = _mm256_add_epi32(low, _mm256_madd_epi16(p->low[g], broadcast4(x[t]->sums + g * 2)));
        if (f.biased) dots[t] = _mm256_sub_epi32(dots[t], low);
        __m256 v = _mm256_mul_ps(p->d[0], _mm256_cvtepi32_ps(dots[t]));
        if (f.family == FAMILY_MINS) v = _mm256_fnmadd_ps(p->m[0], _mm256_cvtepi32_ps(low), v);
        y[t] = _mm256_fmadd_ps(_mm256_set1_ps(x[t]->d), v, y[t]);
    }
}
INLINE void tile_blocks(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, int n_blocks, struct form f) {
    const int wide = f.family != FAMILY_BLOCKS_16;
    __m256 v[TILE];
    for (int t = 0; t < n; t++) v[t] = _mm256_setzero_ps();
    for (int b = 0; b < n_blocks; b++) {
        __m256i dots[2 * TILE];
        tile_chunk(dots, p, x, n, b, f);
        for (int t = 0; t < n; t++) {
            __m256i sums = broadcast4(x[t]->sums + b * 2);
            if (wide) {
                if (f.biased) dots[t] = _mm256_sub_epi32(dots[t], _mm256_madd_epi16(sums, p->bias));
                v[t] = _mm256_fmadd_ps(p->d[b], _mm256_cvtepi32_ps(dots[t]), v[t]);
                if (f.family == FAMILY_BLOCKS_MIN)
                    v[t] = _mm256_fmadd_ps(p->m[b], _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))), v[t]);
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
/* All tokens times superblock i of the panel. */
typedef void tiles_fn(const struct ms4_mul *m, const struct panel *p, int i, int first);
#define X(name, family, span, scales, biased) \
    static __attribute__((noinline)) void tiles_##name(const struct ms4_mul *m, const struct panel *p, int i, int first) { \
        const struct form f = { family, span, scales, biased }; \
        int token = 0; \
        for (; token + TILE <= m->n_tokens; token += TILE) tile(m, p, token, TILE, i, first, f); \
        for (; TILE > 4 && token + 4 <= m->n_tokens; token += 4) tile(m, p, token, 4, i, first, f); \
        for (; token + 2 <= m->n_tokens; token += 2) tile(m, p, token, 2, i, first, f); \
        if (token < m->n_tokens) tile(m, p, token, 1, i, first, f); \
    } \
    enum { FAMILY_##name = family, SPAN_##name = span, SCALES_##name = scales, BIASED_##name = biased };
FORMS(X)
#undef X
INLINE void prefill(const struct ms4_mul *m, struct opener t, tiles_fn *tiles) {
    for (int first = 0; first < m->n_rows; first += ROWS) {
        const uint8_t *rows[ROWS];
        find_rows(rows, m, first);
        for (int i = 0; i * SUPERBLOCK < m->n_cols; i++) {
            struct panel p;
            open_panel(&p, rows, blocks_here(m, i), t);
            tiles(m, &p, i, first);
            next_superblock(rows, m, t.bytes);
        }
    }
}

#define X(type, name, bias) \
    void MUL(type)(const struct ms4_mul *m) { \
        const struct form form = { (enum family)FAMILY_##name, SPAN_##name, SCALES_##name, BIASED_##name }; \
        const struct opener t = { row_##type, d_##type, m_##type, SUPERBLOCK_BYTES(type), form, bias }; \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) avx2_gemv_##type(m); \
        else prefill(m, t, tiles_##name); \
    }
AVX2_TYPES(X)
#undef X
#endif
