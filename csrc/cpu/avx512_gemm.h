/* avx512_gemm.h -- products with many tokens: weights are unpacked once for all tokens.
 *
 * A panel is one superblock of 16 rows, transposed: dword k holds columns 4k..4k+3 of every row side by side, so that
 * vpdpbusd with a broadcast dword of activations adds 4 columns to 16 results.  The bytes are unsigned: weight + offset;
 * the sums begin at -offset * (sum of activations), so they are exact and the offset costs nothing.
 * The panel and the activations of a tile stay in L1; a type supplies only the function that fills the panel.
 */
#ifndef MS4_AVX512_GEMM_H
#define MS4_AVX512_GEMM_H
#include <immintrin.h>
#include <string.h>
#include "ops.h"

#define PANEL_ROWS 16
#define TILE 8                  /* tokens of a register tile */
#define CHUNK 64                /* tokens that share one unpacking */

/* How the integer sums of a superblock become its float: one sum with the scales inside the bytes; integer scales for
 * each 16-group or each block; or float scales for each block or each 16-group (32-blocks and NVFP4). */
enum scaling { SCALED_BYTES, SCALED_GROUPS, SCALED_BLOCKS, FLOAT_BLOCKS, FLOAT_GROUPS };

/* Packed grids of the IQ2 and IQ3 types: at most 1024 words. */
#define GRID_VECTORS 32
typedef void pack_grid_fn(__m512i *grid);

struct panel {
    __m512i q[64];
    union { __m512i scale[16]; __m512 factor[16]; };
    /* mins of K types: pairs of int16, of 16-groups (SCALED_BYTES) or of blocks; of 32-blocks: floats */
    union { __m512i min[8]; __m512 add[8]; };
    __m512 d, dmin;
    __m512i grid[GRID_VECTORS];     /* set before the first panel is filled */
};
struct layout { enum scaling scaling; int has_min, has_offset; };

static inline __m512i broadcast_dword(const void *p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }

/* Where the sums of a token begin (starts) and the sums that its mins multiply (for dpwssd: pairs of int16). */
struct tile_sums { int32_t start[16]; float block[8]; int16_t pair[8]; };

static inline __attribute__((always_inline)) void tile_sums_of(struct tile_sums *s, const block_q8 *x,
                                                               const struct layout l, int offset) {
    const __m256i sums = _mm256_load_si256((const void *)x->sums);
    const __m256i blocks = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    if (l.has_offset) {
        if (l.scaling == SCALED_GROUPS || l.scaling == FLOAT_GROUPS)
            _mm512_storeu_si512(s->start, _mm512_mullo_epi32(_mm512_cvtepi16_epi32(sums), _mm512_set1_epi32(-offset)));
        else if (l.scaling == SCALED_BYTES) {
            __m128i t = _mm_add_epi32(_mm256_castsi256_si128(blocks), _mm256_extracti128_si256(blocks, 1));
            t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
            s->start[0] = -offset * _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
        } else _mm256_storeu_si256((void *)s->start, _mm256_mullo_epi32(blocks, _mm256_set1_epi32(-offset)));
    }
    if (l.has_min && l.scaling == FLOAT_BLOCKS) _mm256_storeu_ps(s->block, _mm256_cvtepi32_ps(blocks));
    if (l.has_min && l.scaling == SCALED_BLOCKS) _mm_storeu_si128((void *)s->pair, _mm256_cvtepi32_epi16(blocks));
}

/* Adds one superblock to the results of n tokens (a constant, at most TILE) and 16 rows. */
static inline __attribute__((always_inline)) void tile_add(const struct panel *p, const block_q8 *const *rows, size_t i,
                                                           float *y, const struct layout l, int offset, const int n) {
    const int parts = l.scaling == SCALED_BYTES ? 1 : l.scaling == SCALED_BLOCKS || l.scaling == FLOAT_BLOCKS ? 8 : 16;
    const int is_float = l.scaling == FLOAT_BLOCKS || l.scaling == FLOAT_GROUPS;
    struct tile_sums s[TILE];
    const block_q8 *x[TILE];
    __m512i dot[TILE], odd[TILE], total[TILE];
    __m512 t[TILE];
    for (int k = 0; k < n; k++) {
        x[k] = rows[k] + i;
        if (l.has_offset || (l.has_min && l.scaling != SCALED_BYTES)) tile_sums_of(&s[k], x[k], l, offset);
        total[k] = _mm512_setzero_si512();
        t[k] = _mm512_setzero_ps();
    }
#pragma GCC unroll 1
    for (int b = 0; b < parts; b++) {
        /* few tokens: two sums each, as one alone would wait for its own last addition */
        for (int k = 0; k < n; k++) {
            dot[k] = l.has_offset ? _mm512_set1_epi32(s[k].start[b]) : _mm512_setzero_si512();
            odd[k] = _mm512_setzero_si512();
        }
#pragma GCC unroll 4
        for (int j = 64 / parts * b; j < 64 / parts * (b + 1); j += 2) {
            const __m512i w0 = p->q[j], w1 = p->q[j + 1];
            for (int k = 0; k < n; k++) dot[k] = _mm512_dpbusd_epi32(dot[k], w0, broadcast_dword(x[k]->qs + 4 * j));
            for (int k = 0; k < n; k++) {
                const __m512i v = broadcast_dword(x[k]->qs + 4 * j + 4);
                if (n < 4) odd[k] = _mm512_dpbusd_epi32(odd[k], w1, v);
                else dot[k] = _mm512_dpbusd_epi32(dot[k], w1, v);
            }
        }
        for (int k = 0; k < n && n < 4; k++) dot[k] = _mm512_add_epi32(dot[k], odd[k]);
        for (int k = 0; k < n; k++) {
            if (l.scaling == SCALED_BYTES) total[k] = dot[k];
            else if (!is_float) total[k] = _mm512_add_epi32(total[k], _mm512_mullo_epi32(dot[k], p->scale[b]));
            else {
                t[k] = _mm512_fmadd_ps(p->factor[b], _mm512_cvtepi32_ps(dot[k]), t[k]);
                if (l.has_min) t[k] = _mm512_fmadd_ps(p->add[b], _mm512_set1_ps(s[k].block[b]), t[k]);
            }
        }
    }
    for (int k = 0; k < n; k++) {
        if (!is_float) t[k] = _mm512_mul_ps(p->d, _mm512_cvtepi32_ps(total[k]));
        if (l.has_min && !is_float) {
            __m512i mins = _mm512_setzero_si512();
            for (int b = 0; b < (l.scaling == SCALED_BYTES ? 8 : 4); b++)
                mins = _mm512_dpwssd_epi32(mins, p->min[b], broadcast_dword(l.scaling == SCALED_BYTES ? x[k]->sums + 2 * b : s[k].pair + 2 * b));
            t[k] = _mm512_fnmadd_ps(p->dmin, _mm512_cvtepi32_ps(mins), t[k]);
        }
        _mm512_store_ps(y + 16 * k, _mm512_fmadd_ps(_mm512_set1_ps(x[k]->d), t[k], _mm512_load_ps(y + 16 * k)));
    }
}
/* All tokens of a chunk, in tiles of nearly equal size. */
#define TILES(name, scaling, has_min, has_offset) \
    static void tiles_##name(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int offset) { \
        const struct layout l = { scaling, has_min, has_offset }; \
        for (int tiles = (n_tokens + TILE - 1) / TILE; tiles > 0; tiles--) { \
            const int n = n_tokens / tiles; \
            switch (n) { \
                case 1: tile_add(p, x, i, y, l, offset, 1); break; \
                case 2: tile_add(p, x, i, y, l, offset, 2); break; \
                case 3: tile_add(p, x, i, y, l, offset, 3); break; \
                case 4: tile_add(p, x, i, y, l, offset, 4); break; \
                case 5: tile_add(p, x, i, y, l, offset, 5); break; \
                case 6: tile_add(p, x, i, y, l, offset, 6); break; \
                case 7: tile_add(p, x, i, y, l, offset, 7); break; \
                default: tile_add(p, x, i, y, l, offset, 8); break; \
            } \
            n_tokens -= n; \
            x += n; \
            y += PANEL_ROWS * n; \
        } \
    }
TILES(bytes, SCALED_BYTES, 0, 1)
TILES(bytes_min, SCALED_BYTES, 1, 0)
TILES(groups, SCALED_GROUPS, 0, 1)
TILES(blocks, SCALED_BLOCKS, 0, 1)
TILES(blocks_min, SCALED_BLOCKS, 1, 0)
TILES(float_blocks, FLOAT_BLOCKS, 0, 1)
TILES(float_blocks_min, FLOAT_BLOCKS, 1, 0)
TILES(float_groups, FLOAT_GROUPS, 0, 1)
typedef void tiles_fn(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int offset);

/* Fills the panel from superblock data at rows[0..15]; blocks: how many blocks are there (32-blocks only). */
typedef void fill_fn(struct panel *p, const uint8_t *const *rows, int blocks);

static inline const block_q8 *x_row(const struct ms4_mul *m, int t) {
    return (const void *)((const char *)m->x + (size_t)(m->x_rows ? m->x_rows[t] : t) * m->x_stride);
}
/* Rows read side by side make memory several times slower than rows read in order, so their lines are prefetched in
 * order: the next 16 rows, a share at a time, while these are multiplied. */
static inline void prefetch_lines(const uint8_t *w, size_t n) {
    for (size_t i = 0; i < n; i += 64) _mm_prefetch((const char *)w + i, _MM_HINT_T1);
}
/* bytes: of a superblock of weights; pack_grid: NULL for types without a grid */
static void gemm(const struct ms4_mul *m, fill_fn *fill, tiles_fn *tiles, int offset, size_t bytes, pack_grid_fn *pack_grid) {
    const int n_superblocks = (m->n_cols + SUPERBLOCK - 1) / SUPERBLOCK;
    struct panel p;
    float y[CHUNK * PANEL_ROWS] __attribute__((aligned(64)));
    const block_q8 *x[CHUNK];
    if (pack_grid) pack_grid(p.grid);
    prefetch_lines(m->w, m->row_bytes * (size_t)(m->n_rows < PANEL_ROWS ? m->n_rows : PANEL_ROWS));
    for (int t0 = 0; t0 < m->n_tokens; t0 += CHUNK) {
        const int n_tokens = m->n_tokens - t0 < CHUNK ? m->n_tokens - t0 : CHUNK;
        for (int t = 0; t < n_tokens; t++) x[t] = x_row(m, t0 + t);
        for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
            const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS;
            const size_t ahead = r0 + 2 * PANEL_ROWS <= m->n_rows ? PANEL_ROWS * m->row_bytes : 0;
            const uint8_t *rows[PANEL_ROWS];
            for (int r = 0; r < PANEL_ROWS; r++) rows[r] = m->w + (size_t)(r0 + (r < n_rows ? r : n_rows - 1)) * m->row_bytes;
            memset(y, 0, (size_t)n_tokens * PANEL_ROWS * sizeof *y);
            for (int i = 0; i < n_superblocks; i++) {
                const int blocks = (m->n_cols - i * SUPERBLOCK) / 32;
                if (ahead) prefetch_lines(rows[0] + ahead + (size_t)i * bytes * (PANEL_ROWS - 1), bytes * PANEL_ROWS);
                fill(&p, rows, blocks < 8 ? blocks : 8);
                tiles(&p, x, (size_t)i, y, n_tokens, offset);
                for (int r = 0; r < PANEL_ROWS; r++) rows[r] += bytes;
            }
            const __mmask16 mask = (__mmask16)((1u << n_rows) - 1);
            for (int t = 0; t < n_tokens; t++)
                _mm512_mask_storeu_ps(m->y + (size_t)(t0 + t) * m->y_stride + r0, mask, _mm512_load_ps(y + PANEL_ROWS * t));
        }
    }
}
#endif
