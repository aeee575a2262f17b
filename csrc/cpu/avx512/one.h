/* one.h -- products with one token: bound by memory, so the weights are read once and in order.
 *
 * The 16 lanes of a step are 16 superblocks that follow each other in memory: of one row, or of several short ones.
 * dot_<type>(w, x, at) is their values before x->d.  Integer sums stay spread over a vector for each superblock, and are
 * added up for all 16 by transposing.  The values wait in a buffer until 16 rows are done; then each row adds up its own.
 */
#ifndef MS4_AVX512_GEMV_H
#define MS4_AVX512_GEMV_H
#include "avx512.h"
#include "panel.h"
#include "cpu/plain/prefetch.h"

#define GEMV_SUPERBLOCKS 16     /* of a row in one pass, and of one step */
/* The order of activations that a type's unpacking gives: of 16-byte chunks, or (QUAD_ORDER) byte i of vector j is
 * activation 4i + j. */
enum chunk_order {
    NATURAL,        /* as they are */
    K_ORDER,        /* 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15: first and second halves of even blocks, of odd blocks */
    BLOCK_ORDER,    /* 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15: the same of blocks 0..3, 4..7 */
    CRUMB_ORDER,    /* 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15: blocks 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
    QUAD_ORDER
};
/* Which sums of activations a type multiplies with its mins (MIN_SUMS: of blocks) or with the offset of its weights:
 * START_SUMS of what the products of a dword add up, OFFSET_SUMS of blocks, GROUP_SUMS of 16-groups as words. */
enum x_sums { NO_SUMS, MIN_SUMS, START_SUMS, OFFSET_SUMS, GROUP_SUMS };
/* The activations of the 16 superblocks of a step.  A row of n < 16 superblocks repeats. */
struct gemv_x {
    __m512i v[GEMV_SUPERBLOCKS][4];
    union {
        int16_t blocks[GEMV_SUPERBLOCKS][8] __attribute__((aligned(64)));   /* the sums of blocks */
        __m512i start[GEMV_SUPERBLOCKS][4];                         /* -offset * x */
        __m512i block[8];                                           /* -offset * sum of block b */
        int16_t group[GEMV_SUPERBLOCKS][16] __attribute__((aligned(64)));   /* factor * sum, in pairs as group_pair has them */
    };
    __m512i grid[GRID_VECTORS];
    float d[GEMV_SUPERBLOCKS];
};
/* The products of 16 superblocks that follow each other, before x->d.  Prefetching goes on past the last row, to
 * m->next or what follows: a prefetch cannot fault.
 * ahead: where the lines to prefetch meanwhile begin, as many bytes as these 16 superblocks have */
typedef __m512 dot_fn(const uint8_t *w, const struct gemv_x *x, const uint8_t *ahead);

/* For what is used more than once: the compiler would rather load it again, but a load across lines takes the time of two. */
static inline __m512i load_once(const void *p) {
    __m512i v = load_512(p);
    __asm__("" : "+v"(v));
    return v;
}

/* What a product of one type needs; bytes: of a superblock; factor: of the sums. */
struct gemv_type { dot_fn *dot; enum chunk_order order; enum x_sums sums; int factor; size_t bytes; pack_grid_fn *pack_grid; };

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
static inline void order_x(__m512i *v, const int8_t *qs, enum chunk_order order) {
    __m512i q[4];
    for (int k = 0; k < 4; k++) q[k] = load_512(qs + 64 * k);
    if (order == K_ORDER) transpose_lanes(v, q);
    else if (order == QUAD_ORDER) {
        const __m512i quads = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (int k = 0; k < 4; k++) v[k] = _mm512_shuffle_epi8(q[k], quads);
        transpose_dwords(v);
    } else
        for (int k = 0; k < 4; k += 2) {
            v[k] = order == NATURAL ? q[k] : order == BLOCK_ORDER ? _mm512_shuffle_i64x2(q[k], q[k + 1], 0x88) : _mm512_shuffle_i64x2(q[k / 2], q[k / 2 + 2], 0x44);
            v[k + 1] = order == NATURAL ? q[k + 1] : order == BLOCK_ORDER ? _mm512_shuffle_i64x2(q[k], q[k + 1], 0xdd) : _mm512_shuffle_i64x2(q[k / 2], q[k / 2 + 2], 0xee);
        }
}
/* Sets the sums of superblock i; those that are transposed later wait in rows. */
static inline void set_x_sums(struct gemv_x *x, __m128i (*rows)[GEMV_SUPERBLOCKS], int i, __m256i groups, const struct gemv_type *t) {
    const __m256i blocks = _mm256_madd_epi16(groups, _mm256_set1_epi16(1));
    if (t->sums == MIN_SUMS) {
        _mm_store_si128((void *)x->blocks[i], _mm256_cvtepi32_epi16(blocks));
    } else if (t->sums == OFFSET_SUMS) {
        const __m256i start = _mm256_mullo_epi32(blocks, _mm256_set1_epi32(t->factor));
        rows[0][i] = _mm256_castsi256_si128(start);
        rows[1][i] = _mm256_extracti128_si256(start, 1);
    } else if (t->sums == GROUP_SUMS)
        _mm256_store_si256((void *)x->group[i], _mm256_mullo_epi16(groups, _mm256_set1_epi16((short)t->factor)));
    else if (t->sums == START_SUMS)
        for (int k = 0; k < 4; k++) {
            const __m512i o = _mm512_set1_epi8((char)-t->factor), zero = _mm512_setzero_si512();
            const __m512i sum = _mm512_dpbusd_epi32(zero, o, x->v[i][k ^ 1]);
            x->start[i][k] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(sum, o, x->v[i][k]));
        }
}
/* n superblocks of activations, again and again. */
static void gemv_x_of(struct gemv_x *x, const block_q8 *blocks, int n, const struct gemv_type *t) {
    __m128i rows[2][GEMV_SUPERBLOCKS] __attribute__((aligned(64)));
    for (int i = 0; i < GEMV_SUPERBLOCKS; i++) {
        const block_q8 *b = blocks + i % n;
        order_x(x->v[i], b->qs, t->order);
        set_x_sums(x, rows, i, load_256(b->sums), t);
        x->d[i] = b->d;
    }
    if (t->sums == OFFSET_SUMS)
        for (int k = 0; k < 2; k++) {
            for (int l = 0; l < 4; l++) x->block[4 * k + l] = load_512(&rows[k][4 * l]);
            transpose_dwords(x->block + 4 * k);
        }
    else if (t->sums == GROUP_SUMS)
        for (int i = 0; i < GEMV_SUPERBLOCKS; i += 2) {
            const __m512i fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            _mm512_store_si512(x->group[i], _mm512_permutexvar_epi64(fours, load_512(x->group[i])));
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
    else {
        const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(n));
        __m512 sum = _mm512_loadu_ps(y);
        for (int i = 0; i < n; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(d[i]), _mm512_i32gather_ps(rows, value + i, 4), sum);
        _mm512_storeu_ps(y, sum);
    }
}
/* The 16 superblocks of a step where they do not follow each other: those of up to 16 / n rows, and zeros. */
static __attribute__((noinline)) void copy_superblocks(uint8_t *out, const uint8_t *rows, size_t row_bytes, int n_rows, size_t part_bytes, size_t bytes) {
    for (int r = 0; r < n_rows; r++) memcpy(out + (size_t)r * part_bytes, rows + (size_t)r * row_bytes, part_bytes);
    memset(out + (size_t)n_rows * part_bytes, 0, GEMV_SUPERBLOCKS * bytes - (size_t)n_rows * part_bytes);
}
/* One pass over n superblocks, from the first-th, of all rows: as many rows in a step as 16 superblocks are. */
static void gemv_pass(const struct ms4_mul *m, const struct gemv_type *t, const struct gemv_x *x, int first, int n) {
    const size_t bytes = t->bytes, part = (size_t)n * bytes;
    const uint8_t *end = m->w + (size_t)m->n_rows * m->row_bytes;
    const int step = GEMV_SUPERBLOCKS / n;
    for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
        const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS;
        float value[(PANEL_ROWS + 1) * GEMV_SUPERBLOCKS] __attribute__((aligned(64))), y[PANEL_ROWS];
        for (int r = 0; r < n_rows; r += step) {
            const uint8_t *w = m->w + (size_t)(r0 + r) * m->row_bytes + (size_t)first * bytes, *ahead = w + gemv_ahead;
            uint8_t copy[GEMV_SUPERBLOCKS * SUPERBLOCK_BYTES(q8_0)];
            if (m->next && ahead >= end) ahead = m->next + (ahead - end);
            if (m->row_bytes != part || (size_t)(end - w) < GEMV_SUPERBLOCKS * bytes) {
                copy_superblocks(copy, w, m->row_bytes, n_rows - r < step ? n_rows - r : step, part, bytes);
                w = copy;
            }
            _mm512_storeu_ps(value + r * n, t->dot(w, x, ahead));
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

/* Where the 16 superblocks of a step begin. */
static inline __attribute__((always_inline)) void rows_of(const uint8_t **rows, const uint8_t *w, size_t bytes) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) rows[r] = w + (size_t)r * bytes;
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
/* 16 bytes of each of four superblocks, one in each lane. */
static inline __attribute__((always_inline)) __m512i load_four(const uint8_t *w, size_t step) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_two(w, w + step)), load_two(w + 2 * step, w + 3 * step), 1);
}
/* Lane r of v[l] has the dword of superblock 4l + r first; returns these dwords in order. */
static inline __m512i first_dwords(const __m512i *v) {
    const __m512i t = _mm512_unpacklo_epi64(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpacklo_epi32(v[2], v[3]));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), t);
}
/* --- Q4_K, Q5_K ------------------------------------------------------------------------------ */
/* Blocks in the lanes of a pair of vectors: w0 and w1 are 16-byte chunks 0..3 and 4..7; even ones are first halves of
 * blocks, odd ones second halves, so that both halves of a block add up in one lane. */
static inline __m512i even_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0x88); }
static inline __m512i odd_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0xdd); }
static inline __m512i lane_bytes(int a, int b, int c, int d) {
    const __m256i low = _mm256_setr_m128i(_mm_set1_epi8((char)a), _mm_set1_epi8((char)b));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_setr_m128i(_mm_set1_epi8((char)c), _mm_set1_epi8((char)d)), 1);
}
/* From the headers of four superblocks, one in each lane: there the 8 scales, then the 8 mins. */
static inline __m512i k_scales(__m512i header) {
    /* dwords 1, 3, 2, 3 have the low bits, in the upper nibbles of 3 those of the last mins; two more come from 1 and 2 */
    const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi32(header, 0xed), _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0, 4)));
    const __m512i top = _mm512_srli_epi32(_mm512_shuffle_epi32(header, 0x95), 2);
    const __m512i bits = _mm512_broadcast_i32x4(_mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    return _mm512_ternarylogic_epi32(_mm512_and_si512(low, bits), top, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x30303030, 0, 0x30303030)), 0xf8);
}
/* The products of the 8 blocks of four superblocks: even blocks in the lanes of even[r], odd ones in those of odd[r].
 * The four go side by side through each step, so that neighbouring instructions do not wait for each other. */
static inline __attribute__((always_inline)) void dot_k_four(__m512i *even, __m512i *odd, const uint8_t *w, const __m512i (*x)[4], const uint8_t *ahead, const int has_high) {
    const size_t n = has_high ? 11 : 9, at = has_high ? offsetof(block_q5_k, qs) : offsetof(block_q4_k, qs), bytes = has_high ? sizeof(block_q5_k) : sizeof(block_q4_k);
    __m512i v[2][4];
    for (int r = 0; r < 4; r++) {
        const __m512i w0 = load_once(w + (size_t)r * bytes + at), w1 = load_once(w + (size_t)r * bytes + at + 64);
        v[0][r] = even_chunks(w0, w1);
        v[1][r] = odd_chunks(w0, w1);
        prefetch_after(v[1][r], ahead, (size_t)r, n, 4 * bytes);
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; h++) {
        __m512i low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = low_nibbles(v[h][r]);
        for (int r = 0; r < 4; r++) high[r] = high_nibbles(v[h][r]);
        if (has_high) prefetch_after(low[3], ahead, 9 + h, n, 4 * bytes);
        if (h) prefetch_after(high[3], ahead, 5, n, 4 * bytes);
        for (int r = 0; r < 4 && has_high; r++) {
            const __m512i bits = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(w + (size_t)r * bytes + offsetof(block_q5_k, qh) + 16 * h)));
            low[r] = _mm512_mask_add_epi8(low[r], _mm512_test_epi8_mask(bits, lane_bytes(1, 4, 16, 64)), low[r], _mm512_set1_epi8(16));
            high[r] = _mm512_mask_add_epi8(high[r], _mm512_test_epi8_mask(bits, lane_bytes(2, 8, 32, 128)), high[r], _mm512_set1_epi8(16));
        }
        for (int r = 0; r < 4; r++) even[r] = _mm512_dpbusd_epi32(h ? even[r] : _mm512_setzero_si512(), low[r], x[r][h]);
        if (!h) prefetch_after(even[3], ahead, 4, n, 4 * bytes);
        for (int r = 0; r < 4; r++) odd[r] = _mm512_dpbusd_epi32(h ? odd[r] : _mm512_setzero_si512(), high[r], x[r][2 + h]);
        if (h) prefetch_after(odd[3], ahead, 6, n, 4 * bytes);
    }
}
/* Dwords hold at most 8 * 31 * 127, so those of two superblocks fit 16 bits, and one instruction scales and adds both.
 * scales: 8 of the first superblock, 8 of the second, in every lane */
static inline __m512i scale_k_two(const __m512i *even, const __m512i *odd, __m512i scales, __m512i spread) {
    const __m512i acc = _mm512_madd_epi16(_mm512_packs_epi32(even[0], even[1]), _mm512_shuffle_epi8(scales, spread));
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(odd[0], odd[1]), _mm512_shuffle_epi8(scales, _mm512_add_epi16(spread, _mm512_set1_epi16(1))));
}
static inline __attribute__((always_inline)) __m512 dot_k(const uint8_t *w, const struct gemv_x *x, const uint8_t *ahead, const int has_high) {
    const size_t bytes = has_high ? sizeof(block_q5_k) : sizeof(block_q4_k), n = has_high ? 11 : 9;
    /* lane l: byte 2l of the first superblock's scales in four words, then of the second's */
    const __m512i spread = _mm512_add_epi16(_mm512_broadcast_i32x4(_mm_setr_epi16(-32768, -32768, -32768, -32768, -32760, -32760, -32760, -32760)),
                                            _mm512_and_si512(lane_bytes(0, 2, 4, 6), _mm512_set1_epi16(255)));
    const __m512i first = _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2), odd_fours = _mm512_setr_epi64(1, 3, 5, 7, 1, 3, 5, 7);
    __m512i sums[4], mins[4], header[4];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++, w += 4 * bytes, ahead += 4 * bytes) {
        __m512i even[4], odd[4];
        dot_k_four(even, odd, w, x->v + 4 * l, ahead, has_high);
        __asm__ volatile("" ::: "memory");
        header[l] = load_four(w, bytes);
        __m512i scales = k_scales(header[l]);
        prefetch_after(scales, ahead, 7, n, 4 * bytes);
        const __m512i min_words = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(_mm512_permutexvar_epi64(odd_fours, scales)));
        mins[l] = _mm512_madd_epi16(min_words, load_512(x->blocks[4 * l]));
        __m512i a = scale_k_two(even, odd, _mm512_permutexvar_epi64(first, scales), spread);
        prefetch_after(a, ahead, 8, n, 4 * bytes);
        const __m512i b = scale_k_two(even + 2, odd + 2, _mm512_permutexvar_epi64(_mm512_add_epi64(first, _mm512_set1_epi64(4)), scales), spread);
        sums[l] = add_pairs(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    }
    const __m512i d = first_dwords(header), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i min_sums = _mm512_permutexvar_epi32(order, add_dwords(mins));
    const __m512 t = _mm512_mul_ps(halves_to_floats(d), _mm512_cvtepi32_ps(add_lanes(sums)));
    return _mm512_fnmadd_ps(halves_to_floats(_mm512_srli_epi32(d, 16)), _mm512_cvtepi32_ps(min_sums), t);
}
static __attribute__((noinline)) __m512 dot_q4_k(const uint8_t *w, const struct gemv_x *x, const uint8_t *ahead) { return dot_k(w, x, ahead, 0); }
static __attribute__((noinline)) __m512 dot_q5_k(const uint8_t *w, const struct gemv_x *x, const uint8_t *ahead) { return dot_k(w, x, ahead, 1); }
#endif
