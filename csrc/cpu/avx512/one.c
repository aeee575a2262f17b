/* one.c -- products with one token on AVX-512: bound by memory, so the weights are read once and in order.
 *
 * The values of a step (one.h) wait in a buffer until 16 rows are done; then each row adds up its own.
 */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "one.h"

static inline void order_x(__m512i *v, const int8_t *qs, enum x_order order) {
    __m512i q[4];
    for (int k = 0; k < 4; k++) q[k] = load_512(qs + 64 * k);
    if (order == K_ORDER) transpose_lanes(v, q);
    else if (order == QUAD_ORDER) {
        const __m512i quads =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (int k = 0; k < 4; k++) v[k] = _mm512_shuffle_epi8(q[k], quads);
        transpose_dwords(v);
    } else
        for (int k = 0; k < 4; k += 2) {
            /* BLOCK_ORDER: even chunks of two vectors, then odd ones; CRUMB_ORDER: halves of vectors */
            const __m512i a = q[order == CRUMB_ORDER ? k / 2 : k], b = q[order == CRUMB_ORDER ? k / 2 + 2 : k + 1];
            v[k] = order == NATURAL ? a : order == BLOCK_ORDER ? _mm512_shuffle_i64x2(a, b, 0x88)
                                                               : _mm512_shuffle_i64x2(a, b, 0x44);
            v[k + 1] = order == NATURAL ? b : order == BLOCK_ORDER ? _mm512_shuffle_i64x2(a, b, 0xdd)
                                                                   : _mm512_shuffle_i64x2(a, b, 0xee);
        }
}
/* Sets the sums of superblock i that the type's family multiplies with its mins, or with the bias of its weights; those
 * that are transposed later wait in rows.  Types with a grid have neither. */
static inline void set_x_sums(struct one_x *x, __m128i (*rows)[ONE_SUPERBLOCKS], int i, __m256i groups,
                              const struct one_type *t) {
    const __m256i blocks = _mm256_madd_epi16(groups, _mm256_set1_epi16(1));
    if (t->pack_grid) return;
    if (t->family == FAMILY_mins_32) {
        _mm_store_si128((void *)x->blocks[i], _mm256_cvtepi32_epi16(blocks));
    } else if (t->family == FAMILY_blocks) {
        const __m256i start = _mm256_mullo_epi32(blocks, _mm256_set1_epi32(t->factor));
        rows[0][i] = _mm256_castsi256_si128(start);
        rows[1][i] = _mm256_extracti128_si256(start, 1);
    } else if (scale_width(t->family) == 16)
        _mm256_store_si256((void *)x->group[i], _mm256_mullo_epi16(groups, _mm256_set1_epi16((short)t->factor)));
    else if (t->family == FAMILY_scales_32)
        for (int k = 0; k < 4; k++) {
            const __m512i o = _mm512_set1_epi8((char)-t->factor), zero = _mm512_setzero_si512();
            const __m512i sum = _mm512_dpbusd_epi32(zero, o, x->v[i][k ^ 1]);
            x->start[i][k] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(sum, o, x->v[i][k]));
        }
}
/* n superblocks of activations, again and again. */
static void open_x(struct one_x *x, const block_q8 *blocks, int n, const struct one_type *t) {
    __m128i rows[2][ONE_SUPERBLOCKS] __attribute__((aligned(64)));
    for (int i = 0; i < ONE_SUPERBLOCKS; i++) {
        const block_q8 *b = blocks + i % n;
        order_x(x->v[i], b->qs, t->order);
        set_x_sums(x, rows, i, load_256(b->sums), t);
        x->d[i] = b->d;
    }
    if (t->family == FAMILY_blocks)
        for (int k = 0; k < 2; k++) {
            for (int l = 0; l < 4; l++) x->block[4 * k + l] = load_512(&rows[k][4 * l]);
            transpose_dwords(x->block + 4 * k);
        }
    else if (scale_width(t->family) == 16 && !t->pack_grid)
        for (int i = 0; i < ONE_SUPERBLOCKS; i += 2) {
            const __m512i fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            _mm512_store_si512(x->group[i], _mm512_permutexvar_epi64(fours, load_512(x->group[i])));
        }
}
/* y[r] += d[i] * value[r * n + i], i ascending, for 16 rows.  Rows of 8 and 16 values are transposed, and then all rows
 * are added up side by side. */
INLINE void add_columns(float *y, const float *d, const float *value, int n) {
    __m512 v[16], sum = _mm512_loadu_ps(y);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        v[r] = n == 16 ? _mm512_load_ps(value + r * 16) : _mm512_castps256_ps512(_mm256_load_ps(value + r * 8));
    transpose_16_512(v);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(d[i]), v[i], sum);
    _mm512_storeu_ps(y, sum);
}
static void add_values(float *y, const float *d, const float *value, int n) {
    if (n == 16) add_columns(y, d, value, 16);
    else if (n == 8) add_columns(y, d, value, 8);
    else {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i rows = _mm512_mullo_epi32(lane, _mm512_set1_epi32(n));
        __m512 sum = _mm512_loadu_ps(y);
        for (int i = 0; i < n; i++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(d[i]), _mm512_i32gather_ps(rows, value + i, 4), sum);
        _mm512_storeu_ps(y, sum);
    }
}
/* The 16 superblocks of a step where they do not follow each other: those of up to 16 / n rows, and zeros. */
static __attribute__((noinline)) void copy_superblocks(uint8_t *out, const uint8_t *rows, size_t row_bytes, int n_rows,
                                                       size_t part_bytes, size_t bytes) {
    for (int r = 0; r < n_rows; r++) memcpy(out + (size_t)r * part_bytes, rows + (size_t)r * row_bytes, part_bytes);
    memset(out + (size_t)n_rows * part_bytes, 0, ONE_SUPERBLOCKS * bytes - (size_t)n_rows * part_bytes);
}
/* One pass over n superblocks, from the first-th, of all rows: as many rows in a step as 16 superblocks are. */
static void mul_pass(const struct ms4_mul *m, const struct one_type *t, const struct one_x *x, int first, int n) {
    const size_t bytes = t->bytes, part = (size_t)n * bytes;
    const uint8_t *end = m->w + (size_t)m->n_rows * m->row_bytes;
    const int step = ONE_SUPERBLOCKS / n;
    for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
        const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS;
        float value[(PANEL_ROWS + 1) * ONE_SUPERBLOCKS] __attribute__((aligned(64))), y[PANEL_ROWS];
        for (int r = 0; r < n_rows; r += step) {
            const uint8_t *w = m->w + (size_t)(r0 + r) * m->row_bytes + (size_t)first * bytes;
            const uint8_t *ahead = w + prefetch_ahead;
            uint8_t copy[ONE_SUPERBLOCKS * SUPERBLOCK_BYTES(q8_0)];
            if (m->next && ahead >= end) ahead = m->next + (ahead - end);
            if (m->row_bytes != part || (size_t)(end - w) < ONE_SUPERBLOCKS * bytes) {
                copy_superblocks(copy, w, m->row_bytes, n_rows - r < step ? n_rows - r : step, part, bytes);
                w = copy;
            }
            _mm512_storeu_ps(value + r * n, t->dot(w, x, ahead));
        }
        float *out = m->y + r0;
        for (int r = 0; r < PANEL_ROWS; r++) y[r] = first && r < n_rows ? out[r] : 0;
        add_values(y, x->d, value, n);
        memcpy(out, y, (size_t)n_rows * sizeof *y);
    }
}
/* One token; n_cols must be a multiple of 256. */
void mul_one_avx512(const struct ms4_mul *m, const struct one_type *t) {
    struct one_x x;
    if (t->pack_grid) t->pack_grid(x.grid);
    const int n_superblocks = m->n_cols / SUPERBLOCK;
    for (int first = 0; first < n_superblocks; first += ONE_SUPERBLOCKS) {
        const int n = n_superblocks - first < ONE_SUPERBLOCKS ? n_superblocks - first : ONE_SUPERBLOCKS;
        open_x(&x, mul_blocks(m, 0) + first, n, t);
        mul_pass(m, t, &x, first, n);
    }
}
#endif
