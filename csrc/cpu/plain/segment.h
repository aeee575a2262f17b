/* segment.h -- attention over a segment of the kv cache, in 16-bit integers: all but the innermost product, in plain C
 * that every ISA file includes and the compiler vectorises for that file's target. */
#ifndef MS4_SEGMENT_H
#define MS4_SEGMENT_H
#include "plain.h"

/* The length is taken from 64 partial sums; x of 2^-100 and less are as good as zero. */
static inline float quantize_16_plain(int16_t *out, const float *x, size_t n, float *largest) {
    plain_bits most = { .u = largest_bits_plain(x, (int)n) };
    int finite = most.u < 0x7f800000u;
    if (!finite || most.f < 0x1p-100f) {
        memset(out, 0, n * sizeof *out);
        if (largest) *largest = 0;
        return finite ? 0 : NAN;
    }
    float one = 1.0f / most.f, length = sqrtf(sum_squares_plain(x, n, one));
    float top = LENGTH_16 / length;            /* of the largest, if the length decides */
    top = top < 32767.0f ? top : 32767.0f;
    float factor = top * one;
    for (size_t i = 0; i < n; i++) {
        plain_bits v = { .f = x[i] * factor + PLAIN_ROUND };
        out[i] = (int16_t)v.u;          /* the integer is in the lowest bits */
    }
    if (largest) *largest = most.f * factor + PLAIN_ROUND - PLAIN_ROUND;
    return most.f / top;
}

/* --- opening ------------------------------------------------------------------------------ */
/* The numbers of each key, side by side; absent keys have zeros. */
static inline void open_scales(struct ms4_segment *s, const float *d, int32_t n_keys) {
    memset(s->d, 0, 3 * SEGMENT_KEYS * sizeof *s->d);
    for (int32_t j = 0; j < n_keys; j++)
        for (int32_t i = 0; i < 3; i++) s->d[i * SEGMENT_KEYS + j] = d[3 * j + i];
    s->n_keys = n_keys;
}
static inline int32_t blocks_of_keys(int32_t n_keys) { return (n_keys + SEGMENT_BLOCK - 1) / SEGMENT_BLOCK; }
static inline void open_segment_plain(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys) {
    size_t width = (size_t)(s->rank + s->d_rope), n = (size_t)blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    open_scales(s, d, n_keys);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < width / 2; i++) {
            int16_t *to = s->keys + (j / SEGMENT_BLOCK * (width / 2) + i) * 2 * SEGMENT_BLOCK + j % SEGMENT_BLOCK * 2;
            to[0] = j < (size_t)n_keys ? rows[j * width + 2 * i] : 0;
            to[1] = j < (size_t)n_keys ? rows[j * width + 2 * i + 1] : 0;
        }
    size_t rank = (size_t)s->rank, columns = segment_values_size(s->rank) / SEGMENT_KEYS;
    for (size_t i = 0; i < columns; i++)
        for (size_t j = 0; j < n; j++)
            s->values[(i / SEGMENT_BLOCK * (SEGMENT_KEYS / 2) + j / 2) * 2 * SEGMENT_BLOCK
                      + i % SEGMENT_BLOCK * 2 + j % 2]
                = i < rank && j < (size_t)n_keys ? rows[j * width + i] : 0;
}

/* --- attending ---------------------------------------------------------------------------- */
/* What a weight of 1 stands for: each is below 2^15 then, and the sum of all, times the largest latents, below 2^31
 * (0x1.fp+30 leaves room for rounding).  most, sum: the largest weight, and that sum, before rounding. */
static inline float weights_unit(float most, float sum) {
    float by_sum = sum * (1.0f / 0x1.fp+30f), by_most = most * (1.0f / 32767.0f);
    return by_sum < by_most ? by_most : by_sum;                /* NaN stays */
}
static inline float weights_factor(float unit) { return unit < 0x1p-100f ? 0 : 1.0f / unit; }
/* One row's scores, as the sums of its two parts, become 16-bit weights of the values: their sums times *unit are o. */
static inline void segment_weights_plain(int16_t *weights, const int32_t *latent, const int32_t *rope,
                                         const struct ms4_segment *s, const float *q_d, int32_t n_keys, float *m,
                                         float *l, float *unit) {
    float score[SEGMENT_KEYS], top[16], part[16] = { 0 }, sum[16] = { 0 }, largest = -INFINITY;
    int n = blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    for (int j = 0; j < n; j++) {
        float of_rope = q_d[1] * s->d[SEGMENT_KEYS + j] * (float)rope[j];
        float x = __builtin_fmaf(q_d[0] * s->d[j], (float)latent[j], of_rope);
        score[j] = j < n_keys ? x : -INFINITY;
    }
    for (int j = 0; j < 16; j++) top[j] = -INFINITY;
    for (int i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) top[j] = top[j] > score[i + j] ? top[j] : score[i + j];
    for (int j = 0; j < 16; j++) largest = largest > top[j] ? largest : top[j];
    float shift = largest == -INFINITY ? 0 : largest;          /* -inf - -inf would be NaN */
    for (int j = 0; j < n; j++) score[j] = exp_plain(score[j] - shift);
    for (int i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) part[j] += score[i + j];
    for (int j = 0; j < n; j++) score[j] = j < n_keys ? score[j] * s->d[j] : 0;    /* not 0 * NaN */
    for (int j = 0; j < 16; j++) top[j] = 0;
    for (int i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) {
            top[j] = top[j] > score[i + j] ? top[j] : score[i + j];
            sum[j] = __builtin_fmaf(score[i + j], s->d[2 * SEGMENT_KEYS + i + j], sum[j]);
        }
    float most = 0;
    for (int j = 0; j < 16; j++) most = most > top[j] ? most : top[j];
    *m = largest;
    *l = sum_16_plain(part);
    *unit = weights_unit(most, sum_16_plain(sum));
    float factor = weights_factor(*unit);
    for (int j = 0; j < n; j++) {
        plain_bits v = { .f = score[j] * factor + PLAIN_ROUND };
        weights[j] = (int16_t)v.u;
    }
}
typedef void segment_weights_fn(int16_t *weights, const int32_t *latent, const int32_t *rope,
                                const struct ms4_segment *s, const float *q_d, int32_t n_keys, float *m, float *l,
                                float *unit);
/* c[r * c_stride + j] = sum over i < n_pairs of a[r][2i] * b[i][j][0] + a[r][2i + 1] * b[i][j][1], j < 32, r < n_rows;
 * b is one block of keys or values.  next: n_lines lines to prefetch meanwhile. */
typedef void block_product_fn(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs,
                              int n_rows, const uint8_t *next, int n_lines);

/* `most` rows at most, no more than ATTEND_ROWS; the functions are constants. */
INLINE void attend_rows_16(const struct ms4_attend_segment *a, int row, int n_rows, const int most,
                           block_product_fn *product, segment_weights_fn *to_weights) {
    const struct ms4_segment *s = a->segment;
    size_t width = (size_t)(s->rank + s->d_rope), rank = (size_t)s->rank, block = width * SEGMENT_BLOCK;
    int32_t latent[ATTEND_ROWS][SEGMENT_KEYS], rope[ATTEND_ROWS][SEGMENT_KEYS], c[ATTEND_ROWS][SEGMENT_BLOCK];
    int16_t weights[ATTEND_ROWS][SEGMENT_KEYS];
    const int16_t *q[ATTEND_ROWS], *q_rope[ATTEND_ROWS], *w[ATTEND_ROWS];
    float unit[ATTEND_ROWS];
    for (int r = 0; r < n_rows; r++) {
        q[r] = a->q + (size_t)(row + r) * width;
        q_rope[r] = q[r] + rank;
        w[r] = weights[r];
    }
    int n_blocks = blocks_of_keys(a->n_keys);
    for (int b = 0; b < n_blocks; b++) {
        const int16_t *keys = s->keys + (size_t)b * block;
        int at = (row / most * n_blocks + b) * s->rank / 2, lines = a->next_lines - at;
        const uint8_t *next = a->next + (size_t)(lines > 0 ? at : 0) * 64;
        product(latent[0] + b * SEGMENT_BLOCK, SEGMENT_KEYS, q, keys, s->rank / 2, n_rows, next, lines);
        product(rope[0] + b * SEGMENT_BLOCK, SEGMENT_KEYS, q_rope, keys + rank * SEGMENT_BLOCK, s->d_rope / 2, n_rows,
                NULL, 0);
    }
    for (int r = 0; r < n_rows; r++) {
        float *out = a->out + (size_t)(row + r) * (rank + 2);
        to_weights(weights[r], latent[r], rope[r], s, a->q_d + 2 * (row + r), a->n_keys, out, out + 1, unit + r);
        if (!(unit[r] < INFINITY)) memset(weights[r], 0, sizeof weights[r]);      /* no integer is taken from a NaN */
    }
    for (size_t i = 0; i < rank; i += SEGMENT_BLOCK) {
        product(c[0], SEGMENT_BLOCK, w, s->values + i * SEGMENT_KEYS, n_blocks * SEGMENT_BLOCK / 2, n_rows, NULL, 0);
        size_t n = rank - i < SEGMENT_BLOCK ? rank - i : SEGMENT_BLOCK;
        for (int r = 0; r < n_rows; r++) {
            float *out = a->out + (size_t)(row + r) * (rank + 2) + 2 + i;
            for (size_t j = 0; j < n; j++) out[j] = (float)c[r][j] * unit[r];
        }
    }
}
INLINE void attend_segment_16(const struct ms4_attend_segment *a, const int most, block_product_fn *product,
                              segment_weights_fn *to_weights) {
    for (int row = 0; row < a->n_q; row += most)
        attend_rows_16(a, row, a->n_q - row < most ? a->n_q - row : most, most, product, to_weights);
}

/* --- folding ------------------------------------------------------------------------------ */
static inline void fold_plain(float *into, const float *from, size_t n) {
    if (from[1] == 0) return;
    float m = into[0] > from[0] ? into[0] : from[0], old = exp_plain(into[0] - m), new = exp_plain(from[0] - m);
    into[0] = m;
    for (size_t i = 1; i < n + 2; i++) into[i] = __builtin_fmaf(from[i], new, into[i] * old);
}
#endif
