/* many.c -- products with many tokens on AVX2 and AVX-VNNI: a panel of eight rows is opened once for all of them.
 *
 * One token and many open rows with rows.h, sum integers exactly inside a superblock, and then do the same float
 * operations with one output row per lane, so they agree bit for bit.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "grid_rows.h"
#include "panel.h"

/* How a superblock of eight rows is opened; d, m: the scales and mins of block b. */
struct opener { row_fn *row; scale_fn *d, *m; size_t bytes; struct form form; int bias; };

/* Where the rows of a group begin; rows beyond the last one repeat it, and their results are not stored. */
INLINE void find_rows(const uint8_t **rows, const struct ms4_mul *m, int first) {
    for (int r = 0; r < PANEL_ROWS; r++) {
        int row = first + r < m->n_rows ? first + r : m->n_rows - 1;
        rows[r] = m->w + (size_t)row * m->row_bytes;
    }
}
/* Eight rows are too many streams for the hardware's prefetchers: asks for the same superblock of the next group. */
INLINE void next_superblock(const uint8_t **rows, const struct ms4_mul *m, size_t bytes) {
    for (int r = 0; r < PANEL_ROWS; r++) {
        const char *ahead = (const char *)rows[r] + PANEL_ROWS * m->row_bytes;
        for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T1);
        rows[r] += bytes;
    }
}
/* The words of the low halves, one of each in turn. */
INLINE __m256i interleave(__m256i even, __m256i odd) {
    const __m128i high = _mm256_castsi256_si128(_mm256_unpackhi_epi16(even, odd));
    return _mm256_inserti128_si256(_mm256_unpacklo_epi16(even, odd), high, 1);
}
INLINE void open_panel(struct panel *p, const uint8_t *const *rows, int n_blocks, struct opener t,
                       int all_unsigned) {
    const int blocks = is_blocks(t.form.family);
    __m256i scale[PANEL_ROWS], low[PANEL_ROWS], q[PANEL_ROWS][8];
    p->bias = _mm256_set1_epi16((short)t.bias);
    for (int r = 0; r < PANEL_ROWS; r++) {
        struct row o;
        t.row(&o, rows[r], n_blocks);
        for (int c = 0; c < 8; c++) q[r][c] = all_unsigned ? _mm256_xor_si256(o.q[c], _mm256_set1_epi8(-128)) : o.q[c];
        if (blocks) continue;
        __m256i even = o.scale, odd = _mm256_permute2x128_si256(even, even, 0x11);
        scale[r] = interleave(even, odd);
        even = has_min(t.form.family) ? o.min : _mm256_mullo_epi16(o.scale, p->bias);
        odd = _mm256_permute2x128_si256(even, even, 0x11);
        low[r] = interleave(even, odd);
    }
    for (int c = 0; c < 8; c++) {
        __m256i v[8];
        for (int r = 0; r < PANEL_ROWS; r++) v[r] = q[r][c];
        transpose_8(v);
        for (int j = 0; j < 8; j++) p->q[c * 8 + j] = v[j];
    }
    if (blocks) {
        int n_scales = t.form.family == FAMILY_blocks_16 ? 2 * n_blocks : n_blocks;
        for (int b = 0; b < n_scales; b++) p->d[b] = t.d(rows, b);
        if (has_min(t.form.family)) for (int b = 0; b < n_blocks; b++) p->m[b] = t.m(rows, b);
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
    if (has_min(t.form.family)) p->m[0] = t.m(rows, 0);
}
INLINE void mul_many(const struct ms4_mul *m, struct opener t, const struct tiles *tiles) {
    tiles_fn *const multiply = tiles->of[t.form.family][t.form.span];
    for (int first = 0; first < m->n_rows; first += PANEL_ROWS) {
        const uint8_t *rows[PANEL_ROWS];
        find_rows(rows, m, first);
        for (int i = 0; i * SUPERBLOCK < m->n_cols; i++) {
            struct panel p;
            if (!t.form.span && tiles->all_unsigned) open_panel(&p, rows, blocks_here(m, i), t, 1);
            else open_panel(&p, rows, blocks_here(m, i), t, 0);
            multiply(m, &p, i, first);
            next_superblock(rows, m, t.bytes);
        }
    }
}

/* One for both, as only the tiles differ. */
#define X(type, span, bias, ...) \
    static __attribute__((noinline, noclone)) void mul_many_##type(const struct ms4_mul *m, \
                                                                   const struct tiles *tiles) { \
        const struct opener t = { \
            row_##type, d_##type, m_##type, SUPERBLOCK_BYTES(type), { FAMILY_OF(type), span }, bias \
        }; \
        mul_many(m, t, tiles); \
    } \
    void mul_##type##_avx2(const struct ms4_mul *m) { \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) mul_one_##type##_avx2(m); \
        else mul_many_##type(m, &tiles_avx2); \
    } \
    void mul_##type##_avxvnni(const struct ms4_mul *m) { \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) mul_one_##type##_avx2(m); \
        else mul_many_##type(m, &tiles_avxvnni); \
    }
AVX2_TYPES(X)
#undef X
#endif
