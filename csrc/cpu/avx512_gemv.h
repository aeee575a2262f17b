/* avx512_gemv.h -- products with one or two tokens: weights are read once, a row at a time, as they lie in memory.
 *
 * dot_<type>(rows, x, blocks) is the value of one superblock of 16 rows before x->d: the integer sums of a row stay
 * spread over a vector, and are added up for 16 rows together by transposing.
 */
#ifndef MS4_AVX512_GEMV_H
#define MS4_AVX512_GEMV_H
#include "avx512_panel.h"

typedef __m512 dot_fn(panel_rows rows, const block_q8 *x, int blocks);

static void gemv(const struct ms4_mul *m, dot_fn *dot, size_t bytes) {
    const int n_superblocks = (m->n_cols + SUPERBLOCK - 1) / SUPERBLOCK;
    for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
        const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS;
        const size_t ahead = r0 + 2 * PANEL_ROWS <= m->n_rows ? PANEL_ROWS * m->row_bytes : 0;
        const uint8_t *rows[PANEL_ROWS];
        __m512 y[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };
        for (int r = 0; r < PANEL_ROWS; r++) rows[r] = m->w + (size_t)(r0 + (r < n_rows ? r : n_rows - 1)) * m->row_bytes;
        for (int i = 0; i < n_superblocks; i++) {
            const int blocks = (m->n_cols - i * SUPERBLOCK) / 32;
            if (ahead) prefetch_rows(rows[0] + ahead + (size_t)i * bytes * (PANEL_ROWS - 1), bytes * PANEL_ROWS);
            for (int t = 0; t < m->n_tokens; t++) {
                const block_q8 *x = x_row(m, t) + i;
                y[t] = _mm512_fmadd_ps(_mm512_set1_ps(x->d), dot(rows, x, blocks < 8 ? blocks : 8), y[t]);
            }
            for (int r = 0; r < PANEL_ROWS; r++) rows[r] += bytes;
        }
        for (int t = 0; t < m->n_tokens; t++)
            _mm512_mask_storeu_ps(m->y + (size_t)t * m->y_stride + r0, (__mmask16)((1u << n_rows) - 1), y[t]);
    }
}

/* Sums of four rows: in each 128-bit lane the sums of the dwords of a[0], a[1], a[2], a[3] in that lane. */
static inline __m512i add_dwords(const __m512i *a) {
    const __m512i t0 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i t1 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(t0, t1), _mm512_unpackhi_epi64(t0, t1));
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
static inline __m512i load_512(const void *p) { return _mm512_loadu_si512(p); }
static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
/* 32 bytes at two addresses, side by side */
static inline __m512i load_halves_512(const void *a, const void *b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_256(a)), load_256(b), 1);
}
/* acc + products of 64 unsigned and signed bytes times scales in 16 bits.  The pair sums must fit 16 bits. */
static inline __m512i add_scaled_bytes(__m512i acc, __m512i q, __m512i x, __m512i scale) {
    return _mm512_dpwssd_epi32(acc, _mm512_maddubs_epi16(q, x), scale);
}

/* --- Q4_K, Q5_K ------------------------------------------------------------------------------ */
/* The sums of 16 rows' mins times the sums of the blocks of x.  A block's sum has 13 bits: they go in two parts. */
static inline __m512i sum_k_mins(const __m512i *mins, const block_q8 *x) {
    const __m256i sums = _mm256_madd_epi16(load_256(x->sums), _mm256_set1_epi16(1));
    const __m128i high = _mm256_cvtepi32_epi8(_mm256_srai_epi32(sums, 7));
    const __m128i low = _mm256_cvtepi32_epi8(_mm256_and_si256(sums, _mm256_set1_epi32(127)));
    __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), mins[0], _mm512_broadcastd_epi32(high));
    __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), mins[0], _mm512_broadcastd_epi32(low));
    h = _mm512_dpbusd_epi32(h, mins[1], _mm512_broadcastd_epi32(_mm_srli_epi64(high, 32)));
    l = _mm512_dpbusd_epi32(l, mins[1], _mm512_broadcastd_epi32(_mm_srli_epi64(low, 32)));
    return _mm512_add_epi32(_mm512_slli_epi32(h, 7), l);
}
/* Blocks of one row in the lanes of a pair of vectors: w0 and w1 are 16-byte chunks 0..3 and 4..7; even ones are first
 * halves of blocks, odd ones second halves, so that both halves of a block add up in one lane. */
static inline __m512i even_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0x88); }
static inline __m512i odd_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0xdd); }
static inline __m512i lane_bytes(int a, int b, int c, int d) {
    const __m256i low = _mm256_setr_m128i(_mm_set1_epi8((char)a), _mm_set1_epi8((char)b));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_setr_m128i(_mm_set1_epi8((char)c), _mm_set1_epi8((char)d)), 1);
}
/* The products of the 8 blocks of four rows: even blocks in the lanes of even[r], odd ones in those of odd[r].  The rows
 * go side by side through each step, so that neighbouring instructions do not wait for each other. */
static inline __attribute__((always_inline)) void dot_k_rows(__m512i *even, __m512i *odd, panel_rows rows, const __m512i *x,
                                                             const int has_high) {
    const size_t at = has_high ? offsetof(block_q5_k, qs) : offsetof(block_q4_k, qs);
    __m512i v[2][4];
    for (int r = 0; r < 4; r++) {
        const __m512i w0 = load_512(rows[r] + at), w1 = load_512(rows[r] + at + 64);
        v[0][r] = even_chunks(w0, w1);
        v[1][r] = odd_chunks(w0, w1);
    }
    for (int h = 0; h < 2; h++) {
        __m512i low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = low_nibbles(v[h][r]);
        for (int r = 0; r < 4; r++) high[r] = high_nibbles(v[h][r]);
        for (int r = 0; r < 4 && has_high; r++) {
            const __m512i bits = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(rows[r] + offsetof(block_q5_k, qh) + 16 * h)));
            low[r] = _mm512_mask_add_epi8(low[r], _mm512_test_epi8_mask(bits, lane_bytes(1, 4, 16, 64)), low[r], _mm512_set1_epi8(16));
            high[r] = _mm512_mask_add_epi8(high[r], _mm512_test_epi8_mask(bits, lane_bytes(2, 8, 32, 128)), high[r], _mm512_set1_epi8(16));
        }
        for (int r = 0; r < 4; r++) even[r] = _mm512_dpbusd_epi32(h ? even[r] : _mm512_setzero_si512(), low[r], x[h]);
        for (int r = 0; r < 4; r++) odd[r] = _mm512_dpbusd_epi32(h ? odd[r] : _mm512_setzero_si512(), high[r], x[2 + h]);
    }
}
/* Dwords hold at most 8 * 31 * 127, so two rows' fit 16 bits, and one instruction scales and adds both.
 * scales: 8 of the first row, 8 of the second. */
static inline __m512i scale_k_rows(const __m512i *even, const __m512i *odd, const void *scales, __m512i spread) {
    const __m512i s = _mm512_broadcast_i32x4(_mm_load_si128(scales));
    const __m512i acc = _mm512_madd_epi16(_mm512_packs_epi32(even[0], even[1]), _mm512_shuffle_epi8(s, spread));
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(odd[0], odd[1]), _mm512_shuffle_epi8(s, _mm512_add_epi16(spread, _mm512_set1_epi16(1))));
}
static inline __attribute__((always_inline)) __m512 dot_k(panel_rows rows, const block_q8 *block, const int has_high) {
    const struct k_header k = load_k_header(rows);
    const __m512i natural[4] = { load_512(block->qs), load_512(block->qs + 64), load_512(block->qs + 128), load_512(block->qs + 192) };
    __m512i x[4], sums[4], scales[2];
    transpose_lanes(x, natural);
    scales[0] = _mm512_unpacklo_epi32(k.scales[0], k.scales[1]);
    scales[1] = _mm512_unpackhi_epi32(k.scales[0], k.scales[1]);
    /* lane l: byte 2l of the first row's scales in four words, then of the second row's */
    const __m512i spread = _mm512_add_epi16(_mm512_broadcast_i32x4(_mm_setr_epi16(-32768, -32768, -32768, -32768, -32760, -32760, -32760, -32760)),
                                            _mm512_and_si512(lane_bytes(0, 2, 4, 6), _mm512_set1_epi16(255)));
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        __m512i even[4], odd[4];
        dot_k_rows(even, odd, rows + 4 * l, x, has_high);
        const __m512 a = _mm512_castsi512_ps(scale_k_rows(even, odd, (const char *)&scales[0] + 16 * l, spread));
        const __m512 b = _mm512_castsi512_ps(scale_k_rows(even + 2, odd + 2, (const char *)&scales[1] + 16 * l, spread));
        sums[l] = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
    }
    const __m512 t = _mm512_mul_ps(k.d, _mm512_cvtepi32_ps(add_lanes(sums)));
    return _mm512_fnmadd_ps(k.dmin, _mm512_cvtepi32_ps(sum_k_mins(k.mins, block)), t);
}
static __attribute__((noinline)) __m512 dot_q4_k(panel_rows rows, const block_q8 *x, int blocks) { (void)blocks; return dot_k(rows, x, 0); }
static __attribute__((noinline)) __m512 dot_q5_k(panel_rows rows, const block_q8 *x, int blocks) { (void)blocks; return dot_k(rows, x, 1); }

/* --- Q6_K ------------------------------------------------------------------------------------ */
static __attribute__((noinline)) __m512 dot_q6_k(panel_rows rows, const block_q8 *x, int blocks) {
    const __m256i x_sums = load_256(x->sums);
    const __m512i lane_words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi16(0), _mm_set1_epi16(1))),
                                                  _mm256_setr_m128i(_mm_set1_epi16(2), _mm_set1_epi16(3)), 1);
    const __m512i top = _mm512_set1_epi8(48);
    __m512i sums[4], v[4];
    (void)blocks;
    for (int i = 0; i < 4; i++) v[i] = load_512(x->qs + 64 * i);
    for (int r = 0; r < PANEL_ROWS; r += 4) {
        __m512i acc[4];
        for (int j = 0; j < 4; j++) {
            const block_q6_k *w = (const void *)rows[r + j];
            const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)w->scales));
            /* what the offset of 32 adds */
            const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(scales, x_sums), 5);
            acc[j] = _mm512_setzero_si512();
            for (int h = 0; h < 2; h++) {
                /* elements 128h + 0..63 are low nibbles, 64..127 high ones; two bits each in 32 bytes of qh */
                const __m512i low = load_512(w->ql + 64 * h);
                const __m512i high = _mm512_broadcast_i64x4(load_256(w->qh + 32 * h));
                const __m512i h0 = _mm512_mask_slli_epi16(_mm512_slli_epi16(high, 4), 0xffff0000, high, 2);
                const __m512i h1 = _mm512_mask_srli_epi16(high, 0xffff0000, high, 2);
                const __m512i q0 = _mm512_or_si512(low_nibbles(low), _mm512_and_si512(h0, top));
                const __m512i q1 = _mm512_or_si512(high_nibbles(low), _mm512_and_si512(h1, top));
                const __m512i s = _mm512_castsi256_si512(scales);
                acc[j] = add_scaled_bytes(acc[j], q0, v[2 * h], _mm512_permutexvar_epi16(_mm512_add_epi16(lane_words, _mm512_set1_epi16((short)(8 * h))), s));
                acc[j] = add_scaled_bytes(acc[j], q1, v[2 * h + 1], _mm512_permutexvar_epi16(_mm512_add_epi16(lane_words, _mm512_set1_epi16((short)(8 * h + 4))), s));
            }
            acc[j] = _mm512_sub_epi32(acc[j], _mm512_zextsi256_si512(offset));
        }
        sums[r / 4] = add_dwords(acc);
    }
    return _mm512_mul_ps(load_halves(rows, offsetof(block_q6_k, d)), _mm512_cvtepi32_ps(add_lanes(sums)));
}
#endif
