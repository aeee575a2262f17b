/* many.h -- products with many tokens: weights are unpacked once for all tokens.
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
#define PANELS 2                /* multiplied side by side: what is loaded of the activations serves 32 rows */
#define TILE 8                  /* tokens of a register tile, at most */
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
    const __m512i *grid;            /* set before the first panel is filled */
};
/* The parts of a superblock whose sums get a scale of their own; with SCALED_BYTES one sum goes through all of them. */
static inline int parts_of(enum scaling s) { return s == SCALED_GROUPS || s == FLOAT_GROUPS ? 16 : 8; }
struct layout { enum scaling scaling; int has_min, has_offset; };

static inline __m512i broadcast_dword(const void *p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }

/* vpdpbusd, written out because GCC moves each sum to another register and back. */
static inline __attribute__((always_inline)) __m512i dot_add(__m512i sum, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
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

/* Rows read side by side make memory several times slower than rows read in order, so they are prefetched in order:
 * the next rows while these are multiplied, one prefetch for each column of a panel, as those in a row hold up the loads
 * behind them.  step: bytes from one to the next; where it is less than a line, some ask for the same. */
struct ahead { const uint8_t *at; size_t step; };
/* As prefetch_after, but of an address: naming the memory itself makes the tiles 3 % slower. */
static inline __attribute__((always_inline)) void prefetch_step(struct ahead *a, __m512i *sum) {
    __asm__ volatile("prefetcht1 (%1)" : "+v"(*sum) : "r"(a->at));
    a->at += a->step;
}
/* The rows that come after the ones at row r0 of chunk t0; the last rows are followed by themselves for other tokens. */
static inline const uint8_t *rows_ahead(const struct ms4_mul *m, int t0, int r0) {
    if (r0 < m->n_rows) return m->w + (size_t)r0 * m->row_bytes;
    if (t0 < m->n_tokens) return m->w;
    return m->next ? m->next : m->w + (size_t)m->n_rows * m->row_bytes;
}

#define FOR_EACH(k, m) for (int k = 0; k < n; k++) for (int m = 0; m < PANELS; m++)
/* Adds one superblock to the results of n tokens (a constant, at most TILE) and the rows of the panels p. */
static inline __attribute__((always_inline)) void tile_add(const struct panel *p, const block_q8 *const *rows, size_t i,
                                                           float *y, const struct layout l, int offset, const int n, struct ahead *next) {
    const int parts = parts_of(l.scaling);
    const int is_float = l.scaling == FLOAT_BLOCKS || l.scaling == FLOAT_GROUPS;
    struct tile_sums s[TILE];
    const block_q8 *x[TILE];
    __m512i dot[TILE][PANELS], odd[TILE][PANELS], total[TILE][PANELS];
    __m512 t[TILE][PANELS];
    for (int k = 0; k < n; k++) {
        x[k] = rows[k] + i;
        if (l.has_offset || (l.has_min && l.scaling != SCALED_BYTES)) tile_sums_of(&s[k], x[k], l, offset);
    }
    FOR_EACH(k, m) {
        total[k][m] = l.scaling == SCALED_BYTES && l.has_offset ? _mm512_set1_epi32(s[k].start[0]) : _mm512_setzero_si512();
        t[k][m] = _mm512_setzero_ps();
    }
#pragma GCC unroll 1
    for (int b = 0; b < parts; b++) {
        /* few tokens: two sums each, as one alone would wait for its own last addition */
        FOR_EACH(k, m) {
            dot[k][m] = l.scaling == SCALED_BYTES ? total[k][m] : l.has_offset ? _mm512_set1_epi32(s[k].start[b]) : _mm512_setzero_si512();
            odd[k][m] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int j = 64 / parts * b; j < 64 / parts * (b + 1); j++) {
            __m512i w[PANELS];
            for (int m = 0; m < PANELS; m++) w[m] = p[m].q[j];
            for (int k = 0; k < n; k++) {
                const __m512i v = broadcast_dword(x[k]->qs + 4 * j);
                __m512i *sums = j % 2 && n < 3 ? odd[k] : dot[k];
                for (int m = 0; m < PANELS; m++) {
                    sums[m] = dot_add(sums[m], w[m], v);
                    if (k == m * (n / PANELS)) prefetch_step(next, sums + m);
                }
            }
        }
        FOR_EACH(k, m) {
            const __m512i sum = n < 3 ? _mm512_add_epi32(dot[k][m], odd[k][m]) : dot[k][m];
            if (l.scaling == SCALED_BYTES) total[k][m] = sum;
            else if (!is_float) total[k][m] = _mm512_add_epi32(total[k][m], _mm512_mullo_epi32(sum, p[m].scale[b]));
            else {
                t[k][m] = _mm512_fmadd_ps(p[m].factor[b], _mm512_cvtepi32_ps(sum), t[k][m]);
                if (l.has_min) t[k][m] = _mm512_fmadd_ps(p[m].add[b], _mm512_set1_ps(s[k].block[b]), t[k][m]);
            }
        }
    }
    FOR_EACH(k, m) {
        if (!is_float) t[k][m] = _mm512_mul_ps(p[m].d, _mm512_cvtepi32_ps(total[k][m]));
        if (l.has_min && !is_float) {
            __m512i mins = _mm512_setzero_si512();
            for (int b = 0; b < (l.scaling == SCALED_BYTES ? 8 : 4); b++)
                mins = _mm512_dpwssd_epi32(mins, p[m].min[b], broadcast_dword(l.scaling == SCALED_BYTES ? x[k]->sums + 2 * b : s[k].pair + 2 * b));
            t[k][m] = _mm512_fnmadd_ps(p[m].dmin, _mm512_cvtepi32_ps(mins), t[k][m]);
        }
        float *sum = y + (k * PANELS + m) * PANEL_ROWS;
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_set1_ps(x[k]->d), t[k][m], _mm512_load_ps(sum)));
    }
}
/* All tokens of a chunk, in tiles of nearly equal size. */
#define TILES(name, scaling, has_min, has_offset) \
    static void tiles_##name(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int offset, struct ahead next) { \
        const struct layout l = { scaling, has_min, has_offset }; \
        int tiles = (n_tokens + TILE - 1) / TILE; \
        next.step /= (size_t)(PANELS * 64 * tiles); \
        for (; tiles > 0; tiles--) { \
            const int n = n_tokens / tiles; \
            switch (n) { \
                case 1: tile_add(p, x, i, y, l, offset, 1, &next); break; \
                case 2: tile_add(p, x, i, y, l, offset, 2, &next); break; \
                case 3: tile_add(p, x, i, y, l, offset, 3, &next); break; \
                case 4: tile_add(p, x, i, y, l, offset, 4, &next); break; \
                case 5: tile_add(p, x, i, y, l, offset, 5, &next); break; \
                case 6: tile_add(p, x, i, y, l, offset, 6, &next); break; \
                case 7: tile_add(p, x, i, y, l, offset, 7, &next); break; \
                default: tile_add(p, x, i, y, l, offset, 8, &next); break; \
            } \
            n_tokens -= n; \
            x += n; \
            y += PANELS * PANEL_ROWS * n; \
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
typedef void tiles_fn(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int offset, struct ahead next);

/* Fills the panel from superblock data at rows[0..15]; blocks: how many blocks are there (32-blocks only). */
typedef void fill_fn(struct panel *p, const uint8_t *const *rows, int blocks);

static inline const block_q8 *x_row(const struct ms4_mul *m, int t) {
    return (const void *)((const char *)m->x + (size_t)(m->x_rows ? m->x_rows[t] : t) * m->x_stride);
}
/* bytes: of a superblock of weights; pack_grid: NULL for types without a grid */
static void gemm(const struct ms4_mul *m, fill_fn *fill, tiles_fn *tiles, int offset, size_t bytes, pack_grid_fn *pack_grid) {
    enum { ROWS = PANELS * PANEL_ROWS };
    const int n_superblocks = (m->n_cols + SUPERBLOCK - 1) / SUPERBLOCK;
    struct panel p[PANELS];
    __m512i grid[GRID_VECTORS];
    float y[CHUNK * ROWS] __attribute__((aligned(64)));
    const block_q8 *x[CHUNK];
    if (pack_grid) pack_grid(grid);
    for (int k = 0; k < PANELS; k++) p[k].grid = grid;
    for (int t0 = 0; t0 < m->n_tokens; t0 += CHUNK) {
        const int n_tokens = m->n_tokens - t0 < CHUNK ? m->n_tokens - t0 : CHUNK;
        for (int t = 0; t < n_tokens; t++) x[t] = x_row(m, t0 + t);
        for (int r0 = 0; r0 < m->n_rows; r0 += ROWS) {
            const int n_rows = m->n_rows - r0 < ROWS ? m->n_rows - r0 : ROWS;
            const uint8_t *ahead = rows_ahead(m, t0 + CHUNK, r0 + ROWS);
            const uint8_t *rows[ROWS];
            for (int r = 0; r < ROWS; r++) rows[r] = m->w + (size_t)(r0 + (r < n_rows ? r : n_rows - 1)) * m->row_bytes;
            memset(y, 0, (size_t)n_tokens * ROWS * sizeof *y);
            for (int i = 0; i < n_superblocks; i++) {
                const int blocks = (m->n_cols - i * SUPERBLOCK) / 32;
                for (int k = 0; k < PANELS; k++) fill(p + k, rows + k * PANEL_ROWS, blocks < 8 ? blocks : 8);
                tiles(p, x, (size_t)i, y, n_tokens, offset, (struct ahead){ ahead, bytes * ROWS });
                ahead += bytes * ROWS;
                for (int r = 0; r < ROWS; r++) rows[r] += bytes;
            }
            for (int t = 0; t < n_tokens; t++)
                for (int k = 0; k < PANELS; k++) {
                    const int left = n_rows - k * PANEL_ROWS;
                    const __mmask16 mask = (__mmask16)(left >= PANEL_ROWS ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
                    _mm512_mask_storeu_ps(m->y + (size_t)(t0 + t) * m->y_stride + r0 + k * PANEL_ROWS, mask, _mm512_load_ps(y + ROWS * t + PANEL_ROWS * k));
                }
        }
    }
}
#endif
