/* avx512_gemv.h -- products with one token: bound by memory, so the weights are read once and in order.
 *
 * The 16 lanes of a step are 16 superblocks that follow each other in memory: of one row, or of several short ones.
 * dot_<type>(w, x, at) is their values before x->d.  Integer sums stay spread over a vector for each superblock, and are
 * added up for all 16 by transposing.  The values wait in a buffer until 16 rows are done; then each row adds up its own.
 */
#ifndef MS4_AVX512_GEMV_H
#define MS4_AVX512_GEMV_H
#include "avx512_float.h"
#include "avx512_panel.h"

#define GEMV_SUPERBLOCKS 16     /* of a row in one pass */
#define GEMV_AHEAD 45056        /* bytes to prefetch ahead, into L2: L1 has too few outstanding misses for memory's speed */

/* The order of activations that a type's unpacking gives: of 16-byte chunks, or (QUAD_ORDER) byte i of vector j is
 * activation 4i + j, or (HALF_ORDER) vectors 0 and 2 have the first eight of each 16, vectors 1 and 3 the others. */
enum chunk_order { NATURAL, K_ORDER, BLOCK_ORDER, CRUMB_ORDER, QUAD_ORDER, HALF_ORDER };
static const uint8_t chunk_orders[4][16] = {
    [NATURAL] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 },
    [K_ORDER] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 },       /* first and second halves: even blocks, odd blocks */
    [BLOCK_ORDER] = { 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15 },   /* the same: blocks 0..3, 4..7 */
    [CRUMB_ORDER] = { 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15 },   /* blocks 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
};
struct x_superblock {
    __m512i v[4];
    __m512i start[4];           /* -offset * x, added up as the products will be; BLOCK_ORDER adds pairs of vectors */
};
/* Which sums of activations a type multiplies with its mins, or (OFFSET_SUMS: of blocks) with the offset of its weights. */
enum x_sums { NO_SUMS, BLOCK_SUMS, GROUP_SUMS, OFFSET_SUMS };
struct gemv_x {
    struct x_superblock superblock[GEMV_SUPERBLOCKS];
    __m512i grid[GRID_VECTORS];
    /* What follows repeats after the row's last superblock, so that 16 lanes can begin at any. */
    const struct x_superblock *of[2 * GEMV_SUPERBLOCKS];
    union {
        /* sums in two parts, as bytes: of blocks 0..3 and 4..7, or of 16-groups 0..3, 4..7, ... */
        struct { int32_t high[4][2 * GEMV_SUPERBLOCKS], low[4][2 * GEMV_SUPERBLOCKS]; };
        int32_t start[8][2 * GEMV_SUPERBLOCKS];     /* -offset * sum of block b */
    };
    float d[GEMV_SUPERBLOCKS];
};
/* Prefetching goes on past the last row, to m->next or what follows: a prefetch cannot fault.
 * ahead: where the lines to prefetch meanwhile begin, as many bytes as these 16 superblocks have */
typedef __m512 dot_fn(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead);

/* A quarter of a step's prefetches: they are spread out, because a burst of them holds up the loads behind it. */
static inline __attribute__((always_inline)) void prefetch_quarter(const uint8_t *ahead, int quarter, size_t bytes) {
    const char *p = (const char *)ahead + (size_t)quarter * 4 * bytes;
    for (size_t i = 0; i < 4 * bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

/* What a product of one type needs; bytes: of a superblock. */
struct gemv_type { dot_fn *dot; enum chunk_order order; enum x_sums sums; int offset; size_t bytes; pack_grid_fn *pack_grid; };

/* bytes[k] of each superblock: dword k / 4 of the lanes */
static inline void set_parts(int32_t (*part)[2 * GEMV_SUPERBLOCKS], int i, __m128i bytes) {
    int32_t dword[4];
    _mm_storeu_si128((void *)dword, bytes);
    for (int k = 0; k < 4; k++) part[k][i] = dword[k];
}
static void set_x_sums(struct gemv_x *x, int i, __m256i groups, enum x_sums sums, int offset) {
    const __m256i blocks = _mm256_madd_epi16(groups, _mm256_set1_epi16(1));
    if (sums == OFFSET_SUMS) {
        int32_t start[8];
        _mm256_storeu_si256((void *)start, _mm256_mullo_epi32(blocks, _mm256_set1_epi32(-offset)));
        for (int b = 0; b < 8; b++) x->start[b][i] = start[b];
    } else if (sums != NO_SUMS) {
        const __m256i words = sums == GROUP_SUMS ? groups : _mm256_castsi128_si256(_mm256_cvtepi32_epi16(blocks));
        set_parts(x->high, i, _mm256_cvtepi16_epi8(_mm256_srai_epi16(words, 7)));
        set_parts(x->low, i, _mm256_cvtepi16_epi8(_mm256_and_si256(words, _mm256_set1_epi16(127))));
    }
}
static void order_x(__m512i *v, const int8_t *qs, enum chunk_order order) {
    if (order < QUAD_ORDER) {
        for (int c = 0; c < 16; c++) memcpy((char *)v + 16 * c, qs + 16 * chunk_orders[order][c], 16);
    } else if (order == HALF_ORDER) {
        for (int c = 0; c < 32; c++) memcpy((char *)v + c / 16 * 128 + c % 2 * 64 + c % 16 / 2 * 8, qs + 8 * c, 8);
    } else {
        const uint8_t *rows[16];
        const __m512i quads = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        __m512i shuffled[4];
        for (int k = 0; k < 4; k++) shuffled[k] = _mm512_shuffle_epi8(_mm512_loadu_si512(qs + 64 * k), quads);
        for (int c = 0; c < 16; c++) rows[c] = (const uint8_t *)shuffled + 16 * c;
        load_transposed(v, rows, 0);
    }
}
static void gemv_x_of(struct gemv_x *x, const block_q8 *blocks, int n, const struct gemv_type *t) {
    const __m512i o = _mm512_set1_epi8((char)t->offset), zero = _mm512_setzero_si512();
    for (int i = 0; i < n; i++) {
        struct x_superblock *s = &x->superblock[i];
        order_x(s->v, blocks[i].qs, t->order);
        for (int k = 0; k < 4; k++) {
            const __m512i sum = t->order == BLOCK_ORDER ? _mm512_dpbusd_epi32(zero, o, s->v[k ^ 1]) : zero;
            s->start[k] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(sum, o, s->v[k]));
        }
        x->d[i] = blocks[i].d;
    }
    for (int i = 0; i < 2 * GEMV_SUPERBLOCKS; i++) {
        x->of[i] = &x->superblock[i % n];
        set_x_sums(x, i, load_256(blocks[i % n].sums), t->sums, t->offset);
    }
}
/* y[r] += d[i] * value[r * n + i], i ascending, for 16 rows.  Rows of 8 and 16 values are transposed, and then all rows
 * are added up side by side. */
static inline __attribute__((always_inline)) void gemv_add_columns(float *y, const float *d, const float *value, int n) {
    __m512 v[16], sum = _mm512_loadu_ps(y);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) v[r] = n == 16 ? _mm512_load_ps(value + r * 16) : _mm512_castps256_ps512(_mm256_load_ps(value + r * 8));
    transpose_16_512(v);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(d[i]), v[i], sum);
    _mm512_storeu_ps(y, sum);
}
static void gemv_add(float *y, const float *d, const float *value, int n) {
    if (n == 16) gemv_add_columns(y, d, value, 16);
    else if (n == 8) gemv_add_columns(y, d, value, 8);
    else
        for (int r = 0; r < PANEL_ROWS; r++)
            for (int i = 0; i < n; i++) y[r] = __builtin_fmaf(d[i], value[r * n + i], y[r]);
}
/* One pass over n superblocks, from the first-th, of all rows. */
static void gemv_pass(const struct ms4_mul *m, const struct gemv_type *t, const struct gemv_x *x, int first, int n) {
    const size_t bytes = t->bytes;
    const uint8_t *end = m->w + (size_t)m->n_rows * m->row_bytes;
    const int whole_rows = m->row_bytes == (size_t)n * bytes;        /* then superblocks follow each other across rows */
    for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
        const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS;
        float value[PANEL_ROWS * GEMV_SUPERBLOCKS] __attribute__((aligned(64))), y[PANEL_ROWS];
        const uint8_t *rows = m->w + (size_t)r0 * m->row_bytes + (size_t)first * bytes, *w[16];
        const int last = n_rows * n - 1;
        for (int at = 0; at <= last; at += 16) {
            if (whole_rows && at + 15 <= last)
#pragma GCC unroll 16
                for (int l = 0; l < 16; l++) w[l] = rows + (size_t)(at + l) * bytes;
            else
                for (int l = 0; l < 16; l++) {
                    const int one = at + l < last ? at + l : last;
                    w[l] = rows + (size_t)(one / n) * m->row_bytes + (size_t)(one % n) * bytes;
                }
            const uint8_t *ahead = w[0] + GEMV_AHEAD;
            if (m->next && ahead >= end) ahead = m->next + (ahead - end);
            _mm512_store_ps(value + at, t->dot(w, x, at % n, ahead));
        }
        float *out = m->y + r0;
        for (int r = 0; r < PANEL_ROWS; r++) y[r] = first && r < n_rows ? out[r] : 0;
        gemv_add(y, x->d, value, n);
        memcpy(out, y, (size_t)n_rows * sizeof *y);
    }
}
/* One token; n_cols must be a multiple of 256. */
static void gemv(const struct ms4_mul *m, const struct gemv_type *t) {
    struct gemv_x x;
    if (t->pack_grid) t->pack_grid(x.grid);
    const int n_superblocks = m->n_cols / SUPERBLOCK;
    for (int first = 0; first < n_superblocks; first += GEMV_SUPERBLOCKS) {
        const int n = n_superblocks - first < GEMV_SUPERBLOCKS ? n_superblocks - first : GEMV_SUPERBLOCKS;
        gemv_x_of(&x, x_row(m, 0) + first, n, t);
        gemv_pass(m, t, &x, first, n);
    }
}

/* Sums of four vectors: in each 128-bit lane the sums of the dwords of a[0], a[1], a[2], a[3] in that lane. */
static inline __m512i add_dwords(const __m512i *a) {
    const __m512i t0 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i t1 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(t0, t1), _mm512_unpackhi_epi64(t0, t1));
}
/* In each 128-bit lane: the sums of dwords 0 and 1, 2 and 3 of a, then of b.  (The casts are for the shuffle only.) */
static inline __m512i add_pairs(__m512 a, __m512 b) {
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
}
/* Lane l of the result: the sum of the lanes of a[l]. */
static inline __m512i add_lanes(const __m512i *a) {
    const __m512i t0 = _mm512_add_epi32(_mm512_shuffle_i64x2(a[0], a[1], 0x44), _mm512_shuffle_i64x2(a[0], a[1], 0xee));
    const __m512i t1 = _mm512_add_epi32(_mm512_shuffle_i64x2(a[2], a[3], 0x44), _mm512_shuffle_i64x2(a[2], a[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i64x2(t0, t1, 0x88), _mm512_shuffle_i64x2(t0, t1, 0xdd));
}
/* out[k]: lanes k of a[0..3] */
static inline void transpose_lanes(__m512i *out, const __m512i *a) {
    const __m512i t0 = _mm512_shuffle_i64x2(a[0], a[1], 0x44), t1 = _mm512_shuffle_i64x2(a[0], a[1], 0xee);
    const __m512i t2 = _mm512_shuffle_i64x2(a[2], a[3], 0x44), t3 = _mm512_shuffle_i64x2(a[2], a[3], 0xee);
    out[0] = _mm512_shuffle_i64x2(t0, t2, 0x88);
    out[1] = _mm512_shuffle_i64x2(t0, t2, 0xdd);
    out[2] = _mm512_shuffle_i64x2(t1, t3, 0x88);
    out[3] = _mm512_shuffle_i64x2(t1, t3, 0xdd);
}
/* Lane r of v[l] has 16 bytes of superblock 4l + r; after this v[j] has dword j of all of them, side by side. */
static inline void transpose_dwords(__m512i *v) {
    __m512i a[4];
    transpose_lanes(a, v);                  /* a[r], lane l: superblock 4l + r */
    const __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(a[2], a[3]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
    v[0] = _mm512_unpacklo_epi64(t0, t2);
    v[1] = _mm512_unpackhi_epi64(t0, t2);
    v[2] = _mm512_unpacklo_epi64(t1, t3);
    v[3] = _mm512_unpackhi_epi64(t1, t3);
}
/* --- Q4_K, Q5_K ------------------------------------------------------------------------------ */
/* The sums of mins times the sums of the blocks of x.  A block's sum has 13 bits: they go in two parts. */
static inline __m512i sum_k_mins(const __m512i *mins, const struct gemv_x *x, int at) {
    __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), mins[0], load_512(x->high[0] + at));
    __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), mins[0], load_512(x->low[0] + at));
    h = _mm512_dpbusd_epi32(h, mins[1], load_512(x->high[1] + at));
    l = _mm512_dpbusd_epi32(l, mins[1], load_512(x->low[1] + at));
    return _mm512_add_epi32(_mm512_slli_epi32(h, 7), l);
}
/* Blocks in the lanes of a pair of vectors: w0 and w1 are 16-byte chunks 0..3 and 4..7; even ones are first halves of
 * blocks, odd ones second halves, so that both halves of a block add up in one lane. */
static inline __m512i even_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0x88); }
static inline __m512i odd_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0xdd); }
static inline __m512i lane_bytes(int a, int b, int c, int d) {
    const __m256i low = _mm256_setr_m128i(_mm_set1_epi8((char)a), _mm_set1_epi8((char)b));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_setr_m128i(_mm_set1_epi8((char)c), _mm_set1_epi8((char)d)), 1);
}
/* The products of the 8 blocks of four superblocks: even blocks in the lanes of even[r], odd ones in those of odd[r].
 * The four go side by side through each step, so that neighbouring instructions do not wait for each other. */
static inline __attribute__((always_inline)) void dot_k_four(__m512i *even, __m512i *odd, panel_rows w,
                                                             const struct x_superblock *const *x, const int has_high) {
    const size_t at = has_high ? offsetof(block_q5_k, qs) : offsetof(block_q4_k, qs);
    __m512i v[2][4];
    for (int r = 0; r < 4; r++) {
        const __m512i w0 = load_512(w[r] + at), w1 = load_512(w[r] + at + 64);
        v[0][r] = even_chunks(w0, w1);
        v[1][r] = odd_chunks(w0, w1);
    }
    for (int h = 0; h < 2; h++) {
        __m512i low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = low_nibbles(v[h][r]);
        for (int r = 0; r < 4; r++) high[r] = high_nibbles(v[h][r]);
        for (int r = 0; r < 4 && has_high; r++) {
            const __m512i bits = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(w[r] + offsetof(block_q5_k, qh) + 16 * h)));
            low[r] = _mm512_mask_add_epi8(low[r], _mm512_test_epi8_mask(bits, lane_bytes(1, 4, 16, 64)), low[r], _mm512_set1_epi8(16));
            high[r] = _mm512_mask_add_epi8(high[r], _mm512_test_epi8_mask(bits, lane_bytes(2, 8, 32, 128)), high[r], _mm512_set1_epi8(16));
        }
        for (int r = 0; r < 4; r++) even[r] = _mm512_dpbusd_epi32(h ? even[r] : _mm512_setzero_si512(), low[r], x[r]->v[h]);
        for (int r = 0; r < 4; r++) odd[r] = _mm512_dpbusd_epi32(h ? odd[r] : _mm512_setzero_si512(), high[r], x[r]->v[2 + h]);
    }
}
/* Dwords hold at most 8 * 31 * 127, so those of two superblocks fit 16 bits, and one instruction scales and adds both.
 * scales: 8 of the first superblock, 8 of the second. */
static inline __m512i scale_k_two(const __m512i *even, const __m512i *odd, const void *scales, __m512i spread) {
    const __m512i s = _mm512_broadcast_i32x4(_mm_load_si128(scales));
    const __m512i acc = _mm512_madd_epi16(_mm512_packs_epi32(even[0], even[1]), _mm512_shuffle_epi8(s, spread));
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(odd[0], odd[1]), _mm512_shuffle_epi8(s, _mm512_add_epi16(spread, _mm512_set1_epi16(1))));
}
static inline __attribute__((always_inline)) __m512 dot_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead,
                                                          const int has_high) {
    const struct k_header k = load_k_header(w);
    /* lane l: byte 2l of the first superblock's scales in four words, then of the second's */
    const __m512i spread = _mm512_add_epi16(_mm512_broadcast_i32x4(_mm_setr_epi16(-32768, -32768, -32768, -32768, -32760, -32760, -32760, -32760)),
                                            _mm512_and_si512(lane_bytes(0, 2, 4, 6), _mm512_set1_epi16(255)));
    __m512i sums[4], scales[2];
    scales[0] = _mm512_unpacklo_epi32(k.scales[0], k.scales[1]);
    scales[1] = _mm512_unpackhi_epi32(k.scales[0], k.scales[1]);
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        __m512i even[4], odd[4];
        prefetch_quarter(ahead, l, has_high ? sizeof(block_q5_k) : sizeof(block_q4_k));
        dot_k_four(even, odd, w + 4 * l, x->of + at + 4 * l, has_high);
        const __m512 a = _mm512_castsi512_ps(scale_k_two(even, odd, (const char *)&scales[0] + 16 * l, spread));
        const __m512 b = _mm512_castsi512_ps(scale_k_two(even + 2, odd + 2, (const char *)&scales[1] + 16 * l, spread));
        sums[l] = add_pairs(a, b);
    }
    const __m512 t = _mm512_mul_ps(k.d, _mm512_cvtepi32_ps(add_lanes(sums)));
    return _mm512_fnmadd_ps(k.dmin, _mm512_cvtepi32_ps(sum_k_mins(k.mins, x, at)), t);
}
static __attribute__((noinline)) __m512 dot_q4_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead) { return dot_k(w, x, at, ahead, 0); }
static __attribute__((noinline)) __m512 dot_q5_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead) { return dot_k(w, x, at, ahead, 1); }

/* --- Q6_K ------------------------------------------------------------------------------------ */
/* Words a (4 times) and b (4 times) in the first 128-bit lane, those step, 2 * step, 3 * step further in the others. */
static inline __m512i words_to_lanes(__m512i words, int a, int b, int c, int d) {
    const __m512i index = _mm512_and_si512(lane_bytes(a, b, c, d), _mm512_set1_epi16(255));
    const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0, 0, 0, 16, 16, 16, 16));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(index, second), words);
}
/* Two superblocks.  dot[j][r] are the products of 32 columns of each half, one 16-group to a lane; dwords hold at most
 * 4 * 32 * 127, so those of two superblocks fit 16 bits. */
static inline __attribute__((always_inline)) __m512 dot_q6_k_two(panel_rows rows, const struct x_superblock *const *x) {
    const __m512i top = _mm512_set1_epi8(48);
    const size_t at = offsetof(block_q6_k, scales);
    const __m512i scales = _mm512_cvtepi8_epi16(load_two(rows[0] + at, rows[1] + at));
    __m512i dot[4][2], acc = _mm512_setzero_si512();
    for (int r = 0; r < 2; r++) {
        const block_q6_k *w = (const void *)rows[r];
        const __m512i first = load_512(w->ql), second = load_512(w->ql + 64), h = load_512(w->qh);
        const __m512i p0 = _mm512_shuffle_i64x2(first, second, 0x44), p1 = _mm512_shuffle_i64x2(first, second, 0xee);
        const __m512i q[4] = { _mm512_or_si512(low_nibbles(p0), _mm512_and_si512(_mm512_slli_epi16(h, 4), top)),
                               _mm512_or_si512(low_nibbles(p1), _mm512_and_si512(_mm512_slli_epi16(h, 2), top)),
                               _mm512_or_si512(high_nibbles(p0), _mm512_and_si512(h, top)),
                               _mm512_or_si512(high_nibbles(p1), _mm512_and_si512(_mm512_srli_epi16(h, 2), top)) };
        for (int j = 0; j < 4; j++) dot[j][r] = _mm512_dpbusd_epi32(x[r]->start[j], q[j], x[r]->v[j]);
    }
    for (int j = 0; j < 4; j++)
        acc = _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(dot[j][0], dot[j][1]), words_to_lanes(scales, 2 * j, 2 * j + 1, 2 * j + 8, 2 * j + 9));
    return _mm512_castsi512_ps(acc);
}
static __attribute__((noinline)) __m512 dot_q6_k(panel_rows w, const struct gemv_x *x, int at, const uint8_t *ahead) {
    __m512i sums[4];
    const __m512 d = load_halves(w, offsetof(block_q6_k, d));
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        prefetch_quarter(ahead, l, sizeof(block_q6_k));
        const __m512 first = dot_q6_k_two(w + 4 * l, x->of + at + 4 * l);
        sums[l] = add_pairs(first, dot_q6_k_two(w + 4 * l + 2, x->of + at + 4 * l + 2));
    }
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(add_lanes(sums)));
}
#endif
