/* many.c -- products with many tokens on AVX-512: each type's panels (panel.h), opened once for all tokens.
 *
 * Packed bytes are transposed first, 16 bytes of 16 rows at a time, and unpacked after that: fewer bytes to move, and
 * one instruction unpacks the same column of all rows.  A panel and the activations of a tile stay in L1.
 */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "cpu/avx2/avx2.h"
#include "grid_rows.h"
#include "panel.h"
#include "rows.h"

/* --- Q4_K, Q5_K ------------------------------------------------------------------------------ */
/* The header of 16 superblocks: d, dmin, and the 6-bit scales and mins, four blocks to a dword. */
struct k_header { __m512 d, dmin; __m512i scales[2], mins[2]; };
INLINE struct k_header load_k_header(panel_rows rows) {
    struct k_header k;
    __m512i h[4];
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), top = _mm512_set1_epi8(48);
    load_transposed(h, rows, 0);
    k.d = halves_to_floats(h[0]);
    k.dmin = halves_to_floats(_mm512_srli_epi32(h[0], 16));
    k.scales[0] = _mm512_and_si512(h[1], six);
    k.mins[0] = _mm512_and_si512(h[2], six);
    k.scales[1] = _mm512_or_si512(_mm512_and_si512(h[3], four), _mm512_and_si512(_mm512_srli_epi32(h[1], 2), top));
    k.mins[1] =
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(h[3], 4), four),
                        _mm512_and_si512(_mm512_srli_epi32(h[2], 2), top));
    return k;
}
/* Bytes 0 and 1, then 2 and 3, of each dword, widened to 16 bits. */
static inline void set_min_pairs(__m512i *pairs, __m512i mins) {
    const __m128i low = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
    const __m128i high = _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
    pairs[0] = _mm512_shuffle_epi8(mins, _mm512_broadcast_i32x4(low));
    pairs[1] = _mm512_shuffle_epi8(mins, _mm512_broadcast_i32x4(high));
}
INLINE void open_k_header(struct panel *p, panel_rows rows) {
    const struct k_header k = load_k_header(rows);
    p->d = k.d;
    p->dmin = k.dmin;
    for (int h = 0; h < 2; h++) {
        for (int b = 0; b < 4; b++) p->scale[4 * h + b] = byte_of(k.scales[h], b);
        set_min_pairs(p->min + 2 * h, k.mins[h]);
    }
}
static inline void open_q4_k(struct panel *p, panel_rows rows, int blocks) {
    (void)blocks;
    open_k_header(p, rows);
    for (int c = 0; c < 8; c++) {
        __m512i v[4], *q = p->q + c / 2 * 16 + c % 2 * 4;
        load_transposed(v, rows, offsetof(block_q4_k, qs) + (size_t)c * 16);
        for (int j = 0; j < 4; j++) { q[j] = low_nibbles(v[j]); q[j + 8] = high_nibbles(v[j]); }
    }
}
static inline void open_q5_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i high[8];
    const __m512i bit = _mm512_set1_epi8(16);
    (void)blocks;
    open_k_header(p, rows);
    load_transposed(high, rows, offsetof(block_q5_k, qh));
    load_transposed(high + 4, rows, offsetof(block_q5_k, qh) + 16);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++)
        for (int half = 0; half < 2; half++) {
            __m512i v[4], *q = p->q + pair * 16 + half * 4;
            load_transposed(v, rows, offsetof(block_q5_k, qs) + (size_t)(pair * 32 + half * 16));
            for (int j = 0; j < 4; j++) {
                const __m512i h = high[half * 4 + j];
                const __m512i h0 = pair < 2 ? _mm512_slli_epi16(h, (unsigned)(4 - 2 * pair))
                    : _mm512_srli_epi16(h, (unsigned)(2 * pair - 4));
                const __m512i h1 = pair < 2 ? _mm512_slli_epi16(h, (unsigned)(3 - 2 * pair))
                    : _mm512_srli_epi16(h, (unsigned)(2 * pair - 3));
                q[j] = _mm512_or_si512(low_nibbles(v[j]), _mm512_and_si512(h0, bit));
                q[j + 8] = _mm512_or_si512(high_nibbles(v[j]), _mm512_and_si512(h1, bit));
            }
        }
}

/* --- Q6_K ------------------------------------------------------------------------------------ */
static inline void open_q6_k(struct panel *p, panel_rows rows, int blocks) {
    __m512i scales[4];
    const __m512i top = _mm512_set1_epi8(48);
    (void)blocks;
    p->d = load_halves(rows, offsetof(block_q6_k, d));
    load_transposed(scales, rows, offsetof(block_q6_k, scales));
    for (int g = 0; g < 16; g++)
        p->scale[g] = _mm512_srai_epi32(_mm512_slli_epi32(scales[g / 4], (unsigned)(24 - g % 4 * 8)), 24);
    for (int c = 0; c < 4; c++) {
        /* ql at 64h + 16e, e = 0..3: low nibbles are elements 128h + 16e.., high ones 64 later; qh at 32h + 16(e%2) */
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
static inline void open_q2_k(struct panel *p, panel_rows rows, int blocks) {
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
static inline void open_q3_k(struct panel *p, panel_rows rows, int blocks) {
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
/* The low nibbles of four dwords to q[0..3], the high ones to q[4..7], through a table. */
static inline void look_up_nibbles(__m512i *q, const __m512i *v, __m512i table) {
    for (int j = 0; j < 4; j++) {
        q[j] = _mm512_shuffle_epi8(table, low_nibbles(v[j]));
        q[4 + j] = _mm512_shuffle_epi8(table, high_nibbles(v[j]));
    }
}
static inline void open_iq4_xs(struct panel *p, panel_rows rows, int blocks) {
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
static inline void open_q8_0(struct panel *p, panel_rows rows, int blocks) {
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
INLINE void open_nibbles(struct panel *p, panel_rows rows, int blocks, size_t size, size_t at, __m512i table) {
    for (int b = blocks; b < 8; b++) clear_block(p, b);
    for (int b = 0; b < blocks; b++) {
        __m512i v[4];
        load_transposed(v, rows, (size_t)b * size + at);
        look_up_nibbles(p->q + 8 * b, v, table);
    }
}
static inline void open_q4_0(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_q4_0), offsetof(block_q4_0, qs), identity_table());
    for (int b = 0; b < blocks; b++) p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q4_0));
}
static inline void open_q4_1(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_q4_1), offsetof(block_q4_1, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q4_1));
        p->add[b] = load_halves(rows, (size_t)b * sizeof(block_q4_1) + offsetof(block_q4_1, m));
    }
}
static inline void open_iq4_nl(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_iq4_nl), offsetof(block_iq4_nl, qs), kv_table());
    for (int b = 0; b < blocks; b++) p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_iq4_nl));
}
static inline void open_mxfp4(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_mxfp4), offsetof(block_mxfp4, qs), e2m1_table());
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < PANEL_ROWS; r++)
            ((float *)&p->factor[b])[r] = unpack_e8m0_half(rows[r][(size_t)b * sizeof(block_mxfp4)]);
}
/* Adds bit 4 of the quants: bit i of qh for quant i of the block. */
static inline void add_fifth_bits(__m512i *q, panel_rows rows, size_t at) {
    uint32_t bits[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) memcpy(bits + r, rows[r] + at, sizeof *bits);
    const __m512i v = _mm512_loadu_si512(bits);
    for (int j = 0; j < 8; j++) {
        /* four bits, one to a byte */
        const __m512i four = _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)(4 * j)), _mm512_set1_epi32(15));
        const __m512i spread =
            _mm512_and_si512(_mm512_mullo_epi32(four, _mm512_set1_epi32(0x00204081)), _mm512_set1_epi8(1));
        q[j] = _mm512_or_si512(q[j], _mm512_slli_epi32(spread, 4));
    }
}
static inline void open_q5_0(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_q5_0), offsetof(block_q5_0, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q5_0));
        add_fifth_bits(p->q + 8 * b, rows, (size_t)b * sizeof(block_q5_0) + offsetof(block_q5_0, qh));
    }
}
static inline void open_q5_1(struct panel *p, panel_rows rows, int blocks) {
    open_nibbles(p, rows, blocks, sizeof(block_q5_1), offsetof(block_q5_1, qs), identity_table());
    for (int b = 0; b < blocks; b++) {
        p->factor[b] = load_halves(rows, (size_t)b * sizeof(block_q5_1));
        p->add[b] = load_halves(rows, (size_t)b * sizeof(block_q5_1) + offsetof(block_q5_1, m));
        add_fifth_bits(p->q + 8 * b, rows, (size_t)b * sizeof(block_q5_1) + offsetof(block_q5_1, qh));
    }
}

/* --- grids ------------------------------------------------------------------------------------ */
/* 256 weights in order, as signed bytes, from QUAD_ORDER: 16-byte chunk c is in lane c / 4 of out[c % 4]. */
static inline void join_quads(__m512i *out, const struct grid_row *g) {
    __m512i q[4];
    for (int j = 0; j < 4; j++) q[j] = signed_bytes(g->q[j], g->negative[j]);
    const __m512i t0 = _mm512_unpacklo_epi8(q[0], q[1]), t1 = _mm512_unpackhi_epi8(q[0], q[1]);
    const __m512i t2 = _mm512_unpacklo_epi8(q[2], q[3]), t3 = _mm512_unpackhi_epi8(q[2], q[3]);
    out[0] = _mm512_unpacklo_epi16(t0, t2);
    out[1] = _mm512_unpackhi_epi16(t0, t2);
    out[2] = _mm512_unpacklo_epi16(t1, t3);
    out[3] = _mm512_unpackhi_epi16(t1, t3);
}
INLINE void open_grid(struct panel *p, panel_rows rows, grid_rows_fn *open, grid_scales_fn *scales_of,
                      const enum x_order order) {
    __m512i q[PANEL_ROWS][4], scales[4];
    __m128i row_scales[PANEL_ROWS];
    const uint8_t *at[PANEL_ROWS], *scales_at[PANEL_ROWS];
    const __m512i top = _mm512_set1_epi8(order == NATURAL ? 0 : -128);
#pragma GCC unroll 1
    for (int r0 = 0; r0 < PANEL_ROWS; r0 += 2) {
        struct grid_row g[2];
        open(g, rows + r0, p->grid);
        for (int k = 0; k < 2; k++) {
            const int r = r0 + k;
            if (order == QUAD_ORDER) join_quads(q[r], &g[k]);
            else
                for (int i = 0; i < 4; i++)
                    q[r][i] = order == NATURAL ? g[k].q[i] : signed_bytes(g[k].q[i], g[k].negative[i]);
            for (int i = 0; i < 4; i++) q[r][i] = _mm512_xor_si512(q[r][i], top);
            row_scales[r] = scales_of(rows[r]);
            at[r] = (const uint8_t *)q[r];
            scales_at[r] = (const uint8_t *)&row_scales[r];
        }
    }
    for (size_t c = 0; c < 16; c++) {
        const size_t quad = 64 * (c % 4) + 16 * (c / 4), block = 128 * (c / 8) + 64 * (c % 2) + 16 * (c % 8 / 2);
        load_transposed(p->q + 4 * c, at, order == QUAD_ORDER ? quad : order == BLOCK_ORDER ? block : 16 * c);
    }
    load_transposed(scales, scales_at, 0);
    for (int g = 0; g < 16; g++) p->scale[g] = byte_of(scales[g / 4], g % 4);
}

#define GRID_PANEL(type, order, d_of_rows) \
    static void open_##type(struct panel *p, panel_rows w, int blocks) { \
        (void)blocks; \
        p->d = d_of_rows; \
        open_grid(p, w, rows_##type, scales_##type, order); \
    }
GRID_TYPES(GRID_PANEL) GRID_PANEL(iq1_s, NATURAL, grid_d(w, 0.125f)) GRID_PANEL(iq1_m, NATURAL, grid_d_iq1_m(w))

/* --- NVFP4 ----------------------------------------------------------------------------------- */
static void open_nvfp4(struct panel *p, panel_rows rows, int blocks) {
    for (int b = blocks; b < 8; b++) clear_block(p, b);
    for (int g = 2 * blocks; g < 16; g++) p->factor[g] = _mm512_setzero_ps();
    for (int g = 0; g < 2 * blocks; g += 2) {
        const size_t block = (size_t)g / 4 * sizeof(block_nvfp4), scale = block + (size_t)g % 4;
        __m512i v[4];
        load_transposed(v, rows, block + offsetof(block_nvfp4, qs) + (size_t)g % 4 * 8);
        for (int k = 0; k < 2; k++) {
            float d[PANEL_ROWS];
            for (int r = 0; r < PANEL_ROWS; r++) d[r] = unpack_e4m3_half(rows[r][scale + (size_t)k]);
            p->factor[g + k] = _mm512_loadu_ps(d);
            for (int j = 0; j < 2; j++) {
                p->q[4 * (g + k) + j] = _mm512_shuffle_epi8(e2m1_table(), low_nibbles(v[2 * k + j]));
                p->q[4 * (g + k) + 2 + j] = _mm512_shuffle_epi8(e2m1_table(), high_nibbles(v[2 * k + j]));
            }
        }
    }
}

/* The rows that come after those at row r0 of chunk t0; the last rows are followed by themselves for other tokens. */
static inline const uint8_t *rows_ahead(const struct ms4_mul *m, int t0, int r0) {
    if (r0 < m->n_rows) return m->w + (size_t)r0 * m->row_bytes;
    if (t0 < m->n_tokens) return m->w;
    return m->next ? m->next : m->w + (size_t)m->n_rows * m->row_bytes;
}

/* bytes: of a superblock of weights; pack_grid: NULL for types without a grid */
static void mul_many(const struct ms4_mul *m, open_fn *open, tiles_fn *tiles, int bias, size_t bytes,
                     pack_grid_fn *pack_grid) {
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
        for (int t = 0; t < n_tokens; t++) x[t] = mul_blocks(m, t0 + t);
        for (int r0 = 0; r0 < m->n_rows; r0 += ROWS) {
            const int n_rows = m->n_rows - r0 < ROWS ? m->n_rows - r0 : ROWS;
            const uint8_t *ahead = rows_ahead(m, t0 + CHUNK, r0 + ROWS);
            const uint8_t *rows[ROWS];
            for (int r = 0; r < ROWS; r++) rows[r] = m->w + (size_t)(r0 + (r < n_rows ? r : n_rows - 1)) * m->row_bytes;
            memset(y, 0, (size_t)n_tokens * ROWS * sizeof *y);
            for (int i = 0; i < n_superblocks; i++) {
                const int blocks = (m->n_cols - i * SUPERBLOCK) / 32;
                for (int k = 0; k < PANELS; k++) open(p + k, rows + k * PANEL_ROWS, blocks < 8 ? blocks : 8);
                tiles(p, x, (size_t)i, y, n_tokens, bias, (struct ahead){ ahead, bytes * ROWS });
                ahead += bytes * ROWS;
                for (int r = 0; r < ROWS; r++) rows[r] += bytes;
            }
            for (int t = 0; t < n_tokens; t++)
                for (int k = 0; k < PANELS; k++) {
                    const int left = n_rows - k * PANEL_ROWS;
                    const __mmask16 mask = (__mmask16)(left >= PANEL_ROWS ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
                    _mm512_mask_storeu_ps(m->y + (size_t)(t0 + t) * m->y_stride + r0 + k * PANEL_ROWS, mask,
                                          _mm512_load_ps(y + ROWS * t + PANEL_ROWS * k));
                }
        }
    }
}

/* X(type, form, bias, pack_grid, whose kernel for one token is faster).  The form is the type's family, but where the
 * scales are inside the bytes, and for grids, whose scales of 32 weights come twice. */
#define TYPES(X) \
    X(q4_0, blocks, 8, NULL, avx512) X(q4_1, blocks_min, 0, NULL, avx2) X(q5_0, blocks, 16, NULL, avx2) \
    X(q5_1, blocks_min, 0, NULL, avx2) X(q8_0, blocks, 128, NULL, avx512) X(iq4_nl, blocks, 128, NULL, avx512) \
    X(mxfp4, blocks, 12, NULL, avx512) X(nvfp4, blocks_16, 12, NULL, avx2) \
    X(q2_k, bytes_min, 0, NULL, avx512) X(q3_k, bytes, 124, NULL, avx512) X(q4_k, mins_32, 0, NULL, avx512) \
    X(q5_k, mins_32, 0, NULL, avx512) X(q6_k, scales_16, 32, NULL, avx512) X(iq4_xs, scales_32, 128, NULL, avx512) \
    X(iq2_xxs, scales_16, 128, pack_iq2_xxs, avx512) X(iq2_xs, scales_16, 128, pack_iq2_xs, avx512) \
    X(iq2_s, scales_16, 128, pack_iq2_s, avx512) X(iq3_xxs, scales_16, 128, pack_iq3_xxs, avx512) \
    X(iq3_s, scales_16, 128, pack_iq3_s, avx512) X(iq1_s, scales_16, IQ1_BIAS, NULL, avx2) \
    X(iq1_m, scales_16, IQ1_BIAS, NULL, avx2)
#define X(type, form, bias, pack_grid, one) \
    void mul_##type##_avx512(const struct ms4_mul *m) { \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) mul_one_##type##_##one(m); \
        else mul_many(m, open_##type, tiles_##form, bias, SUPERBLOCK_BYTES(type), pack_grid); \
    }
TYPES(X)
#undef X
#endif
