/* avx2.c -- the kernel table for x86-64 with AVX2, FMA and F16C, and all of it but the quantised products. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ADD_PAIRS(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#include "avx2_segment.h"
#include "dequantize.h"
#include "peak.h"
#include "plain.h"

/* --- float weights: the 16 partial sums of ops.h are two registers ----------------------------------- */
#define ROWS_MOST 2
#define TOKENS_MOST 3       /* 2 rows x 3 tokens x 2 registers of sums, 6 left for operands */

typedef __m256 load_fn(const uint8_t *w, size_t k);        /* weights k to k + 7 of a row */
INLINE __m256 load_f32(const uint8_t *w, size_t k) { return _mm256_loadu_ps((const float *)w + k); }
INLINE __m256 load_f16(const uint8_t *w, size_t k) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + k * 2))); }
INLINE __m256 load_bf16(const uint8_t *w, size_t k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(w + k * 2))), 16));
}
/* j with j + 8, then + 4, + 2, + 1 */
INLINE float sum_tree(__m256 low, __m256 high) {
    __m256 v = _mm256_add_ps(low, high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/* Many tokens are done in blocks that stay in the cache: so many rows and tokens, and so many columns at a time, the
 * 16 sums of each output waiting in memory meanwhile. */
#define BLOCK_ROWS 16
#define BLOCK_TOKENS 24
#define BLOCK_COLUMNS 256
typedef __m256 float_sums[BLOCK_ROWS][BLOCK_TOKENS][2];

/* Columns k to `end` of n_rows rows and n_tokens tokens; those beyond the last multiple of 16 are copied out and
 * filled up with zeros. */
INLINE void tile_floats(float_sums sums, int row, int token, const uint8_t *const *w, const float *const *x, int n_rows,
                        int n_tokens, size_t k, size_t end, size_t size, load_fn *load) {
    __m256 sum[ROWS_MOST][TOKENS_MOST][2];
    for (int i = 0; i < n_rows * n_tokens * 2; i++)
        sum[i / 2 / n_tokens][i / 2 % n_tokens][i % 2] = sums[row + i / 2 / n_tokens][token + i / 2 % n_tokens][i % 2];
    for (; k + 16 <= end; k += 16)
        for (size_t half = 0; half < 2; half++)
            for (int r = 0; r < n_rows; r++) {
                __m256 v = load(w[r], k + half * 8);
                for (int t = 0; t < n_tokens; t++)
                    sum[r][t][half] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x[t] + k + half * 8), sum[r][t][half]);
            }
    for (int i = 0; i < n_rows * n_tokens && k < end; i++) {
        int r = i / n_tokens, t = i % n_tokens;
        uint8_t w_end[64] = { 0 };
        float x_end[16] = { 0 };
        memcpy(w_end, w[r] + k * size, (end - k) * size);
        memcpy(x_end, x[t] + k, (end - k) * sizeof(float));
        for (size_t half = 0; half < 2; half++)
            sum[r][t][half] = _mm256_fmadd_ps(load(w_end, half * 8), _mm256_loadu_ps(x_end + half * 8), sum[r][t][half]);
    }
    for (int i = 0; i < n_rows * n_tokens * 2; i++)
        sums[row + i / 2 / n_tokens][token + i / 2 % n_tokens][i % 2] = sum[i / 2 / n_tokens][i / 2 % n_tokens][i % 2];
}
/* One row or two, times all tokens of the block. */
INLINE void rows_floats(float_sums sums, int row, const uint8_t *const *w, const float *const *x, int n_rows, int n_tokens,
                        size_t k, size_t end, size_t size, load_fn *load) {
    int t = 0;
    for (; t + 3 <= n_tokens; t += 3) tile_floats(sums, row, t, w, x + t, n_rows, 3, k, end, size, load);
    for (; t < n_tokens; t++) tile_floats(sums, row, t, w, x + t, n_rows, 1, k, end, size, load);
}
INLINE void block_floats(const struct ms4_mul *m, int row, int token, int n_rows, int n_tokens, size_t size, load_fn *load) {
    const uint8_t *w[BLOCK_ROWS];
    const float *x[BLOCK_TOKENS];
    float_sums sums;
    size_t n = (size_t)m->n_cols, step = n_tokens > 1 ? BLOCK_COLUMNS : n;
    for (int r = 0; r < n_rows; r++) w[r] = m->w + (size_t)(row + r) * m->row_bytes;
    for (int t = 0; t < n_tokens; t++) x[t] = mul_floats(m, token + t);
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++) sums[r][t][0] = sums[r][t][1] = _mm256_setzero_ps();
    for (size_t k = 0; k < n; k += step) {
        size_t end = n - k < step ? n : k + step;
        int r = 0;
        for (; r + 2 <= n_rows; r += 2) rows_floats(sums, r, w + r, x, 2, n_tokens, k, end, size, load);
        if (r < n_rows) rows_floats(sums, r, w + r, x, 1, n_tokens, k, end, size, load);
    }
    for (int r = 0; r < n_rows; r++)
        for (int t = 0; t < n_tokens; t++)
            m->y[(size_t)(token + t) * m->y_stride + (size_t)(row + r)] = sum_tree(sums[r][t][0], sums[r][t][1]);
}
INLINE void mul_floats_avx2(const struct ms4_mul *m, size_t size, load_fn *load) {
    for (int row = 0; row < m->n_rows; row += BLOCK_ROWS)
        for (int token = 0; token < m->n_tokens; token += BLOCK_TOKENS) {
            int n_rows = m->n_rows - row, n_tokens = m->n_tokens - token;
            block_floats(m, row, token, n_rows < BLOCK_ROWS ? n_rows : BLOCK_ROWS,
                         n_tokens < BLOCK_TOKENS ? n_tokens : BLOCK_TOKENS, size, load);
        }
}
static void avx2_mul_f32(const struct ms4_mul *m) { mul_floats_avx2(m, 4, load_f32); }
static void avx2_mul_f16(const struct ms4_mul *m) { mul_floats_avx2(m, 2, load_f16); }
static void avx2_mul_bf16(const struct ms4_mul *m) { mul_floats_avx2(m, 2, load_bf16); }

/* --- attention ------------------------------------------------------------------------------------------ */
#define ATTEND_TILE 4       /* rows whose sums are held in registers together, 16 columns each */

/* c[r] += a[r] times b: n_rows rows of n numbers, and n rows of 8 * width numbers, in ascending order. */
INLINE void tile_product(__m256 (*c)[2], const float *const *a, const float *b, size_t b_stride, size_t n, int n_rows, int width) {
    for (size_t i = 0; i < n; i++)
        for (int h = 0; h < width; h++) {
            __m256 v = _mm256_loadu_ps(b + i * b_stride + (size_t)h * 8);
            for (int r = 0; r < n_rows; r++) c[r][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(a[r] + i), v, c[r][h]);
        }
}
/* o = o * factor + s v for 8 * width columns. */
INLINE void add_values(float *const *o, const float *const *s, const float *factor, const float *v, size_t v_stride, int n_rows, int width) {
    __m256 c[ATTEND_TILE][2];
    for (int i = 0; i < n_rows * width; i++)
        c[i / width][i % width] = _mm256_mul_ps(_mm256_loadu_ps(o[i / width] + i % width * 8), _mm256_set1_ps(factor[i / width]));
    tile_product(c, s, v, v_stride, ATTEND_KEYS, n_rows, width);
    for (int i = 0; i < n_rows * width; i++) _mm256_storeu_ps(o[i / width] + i % width * 8, c[i / width][i % width]);
}
INLINE void attend_rows(const struct ms4_attend *a, const int *rows, int n_rows) {
    const float *q[ATTEND_TILE], *weights[ATTEND_TILE];
    float s[ATTEND_TILE][ATTEND_KEYS], factor[ATTEND_TILE], *o[ATTEND_TILE];
    for (int r = 0; r < n_rows; r++) q[r] = a->q + (size_t)rows[r] * a->q_stride;
    for (int half = 0; half < ATTEND_KEYS; half += 16) {
        __m256 c[ATTEND_TILE][2];
        for (int r = 0; r < n_rows; r++) c[r][0] = c[r][1] = _mm256_setzero_ps();
        tile_product(c, q, a->kt + half, ATTEND_KEYS, (size_t)a->d_k, n_rows, 2);
        for (int i = 0; i < n_rows * 2; i++) _mm256_storeu_ps(s[i / 2] + half + i % 2 * 8, c[i / 2][i % 2]);
    }
    for (int r = 0; r < n_rows; r++) {
        factor[r] = attend_softmax_plain(s[r], a->n_keys[rows[r]], a->m + rows[r], a->l + rows[r]);
        weights[r] = s[r];
    }
    for (int i = 0; i < a->d_v; i += 16) {
        for (int r = 0; r < n_rows; r++) o[r] = a->o + (size_t)rows[r] * a->o_stride + i;
        if (i + 16 <= a->d_v) add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 2);
        else add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 1);
    }
}
static void attend_avx2(const struct ms4_attend *a) {
    int rows[ATTEND_ROWS], n = 0, i = 0;
    for (int r = 0; r < a->n_q; r++)
        if (a->n_keys[r] > 0) rows[n++] = r;
    for (; i + 4 <= n; i += 4) attend_rows(a, rows + i, 4);
    if (n - i == 3) attend_rows(a, rows + i, 3);
    else if (n - i == 2) attend_rows(a, rows + i, 2);
    else if (n - i == 1) attend_rows(a, rows + i, 1);
}
static void transpose_keys_avx2(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (int j = 0; j < ATTEND_KEYS; j += 8)
        for (int i = 0; i < d; i += 8) {
            __m256i v[8];
            for (int r = 0; r < 8; r++)
                v[r] = j + r < n_keys ? _mm256_loadu_si256((const void *)(k + (size_t)(j + r) * k_stride + i)) : _mm256_setzero_si256();
            transpose_8(v);
            for (int r = 0; r < 8; r++) _mm256_storeu_si256((void *)(kt + (size_t)(i + r) * ATTEND_KEYS + j), v[r]);
        }
}

/* --- attention over the kv cache ------------------------------------------------------------------------ */
/* Eight pairs, of which n are there: 4 or more. */
INLINE __m256i load_pairs(const int16_t *x, size_t n) {
    __m128i low = _mm_loadu_si128((const void *)x), high = n >= 8 ? _mm_loadu_si128((const void *)(x + 8)) : _mm_setzero_si128();
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
static void attend_segment_avx2(const struct ms4_attend_segment *a) { attend_segment_16(a, SEGMENT_ROWS, block_product_avx2, segment_weights_plain); }
static void open_segment_avx2(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys) {
    size_t width = (size_t)(s->rank + s->d_rope), pairs = width / 2;
    int n = blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    open_scales(s, rows, d, n_keys);
    for (int key = 0; key < n; key += 8)
        for (size_t i = 0; i < pairs; i += 8) {
            __m256i v[8];
            for (int j = 0; j < 8; j++) v[j] = key + j < n_keys ? load_pairs(rows + (size_t)(key + j) * width + 2 * i, pairs - i) : _mm256_setzero_si256();
            transpose_8(v);
            int16_t *to = s->keys + ((size_t)(key / SEGMENT_BLOCK) * pairs + i) * 2 * SEGMENT_BLOCK + key % SEGMENT_BLOCK * 2;
            for (size_t j = 0; j < 8 && i + j < pairs; j++) _mm256_storeu_si256((void *)(to + j * 2 * SEGMENT_BLOCK), v[j]);
        }
    size_t columns = segment_values_size(s->rank) / SEGMENT_KEYS;
    for (size_t i = 0; i < columns; i += 16)
        for (int j = 0; j < n; j += 2) {
            size_t there = i < (size_t)s->rank ? ((size_t)s->rank - i) / 2 : 0;
            const int16_t *row = rows + (size_t)j * width + i;
            __m256i even = there && j < n_keys ? load_pairs(row, there) : _mm256_setzero_si256();
            __m256i odd = there && j + 1 < n_keys ? load_pairs(row + width, there) : _mm256_setzero_si256();
            even = _mm256_permute4x64_epi64(even, 0xd8);        /* so that the lanes of unpacked pairs come in order */
            odd = _mm256_permute4x64_epi64(odd, 0xd8);
            int16_t *to = s->values + (i / SEGMENT_BLOCK * SEGMENT_KEYS + (size_t)j) * SEGMENT_BLOCK + i % SEGMENT_BLOCK * 2;
            _mm256_storeu_si256((void *)to, _mm256_unpacklo_epi16(even, odd));
            _mm256_storeu_si256((void *)(to + 16), _mm256_unpackhi_epi16(even, odd));
        }
}

/* The two tables differ in products of integers only. */
#define FLOAT_PRODUCTS [MS4_TYPE_f32] = avx2_mul_f32, [MS4_TYPE_f16] = avx2_mul_f16, [MS4_TYPE_bf16] = avx2_mul_bf16
#define ALL_BUT_PRODUCTS \
    .dequantize = DEQUANTIZE_TABLE, \
    .quantize = quantize_plain, \
    .rms_norm = rms_norm_plain, \
    .silu_mul = silu_mul_plain, \
    .add_scaled = add_scaled_plain, \
    .attend = attend_avx2, \
    .quantize_16 = quantize_16_plain, \
    .open_segment = open_segment_avx2, \
    .transpose_keys = transpose_keys_avx2, \
    .float_peak = float_peak

#define X(type, family) [MS4_TYPE_##type] = avx2_mul_##type,
const struct ms4_ops ops_avx2 = {
    .isa = "avx2", .mul = { UNPACK_TYPES(X) FLOAT_PRODUCTS }, .int8_peak = int8_peak,
    .attend_segment = attend_segment_avx2, ALL_BUT_PRODUCTS
};
#undef X
#define X(type, family) [MS4_TYPE_##type] = avxvnni_mul_##type,
const struct ms4_ops ops_avxvnni = {
    .isa = "avxvnni", .mul = { UNPACK_TYPES(X) FLOAT_PRODUCTS }, .int8_peak = avxvnni_int8_peak,
    .attend_segment = avxvnni_attend_segment, ALL_BUT_PRODUCTS
};
#undef X
#endif
