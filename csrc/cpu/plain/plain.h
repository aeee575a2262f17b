/* plain.h -- kernels in plain C that every ISA file includes: the compiler vectorises them for that file's target.
 *
 * Element-wise work, reductions in 16 partial sums, the softmax of attention, and the product of one row at a time
 * with opened superblocks (unpack.h).  The order of arithmetic is the one of ops.h.
 */
#ifndef MS4_PLAIN_H
#define MS4_PLAIN_H
#include "ops.h"
#include "unpack.h"
#include <math.h>

typedef union { float f; uint32_t u; int32_t i; } plain_bits;
#define PLAIN_ROUND 12582912.0f      /* 1.5 * 2^23: adding it rounds a float below 2^22 to the nearest even integer */

/* --- activations -------------------------------------------------------------------------- */
/* The largest magnitude, as bits: they order like the numbers, with infinity and NaN on top. */
static inline uint32_t largest_bits_plain(const float *x, int n) {
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) {
        plain_bits v = { .f = x[i] };
        v.u &= 0x7fffffffu;
        largest = v.u > largest ? v.u : largest;
    }
    return largest;
}
static inline void quantize_superblock_plain(block_q8 *out, const float *x, int n) {
    plain_bits largest = { .u = largest_bits_plain(x, n) };
    int finite = largest.u < 0x7f800000u;
    /* below 2^-121 the factor would not be a float: such a block is as good as zero */
    if (!finite || largest.f < 0x1p-121f) {
        memset(out, 0, sizeof *out);
        if (!finite) out->d = NAN;
        return;
    }
    float factor = 127.0f / largest.f;
    out->d = largest.f / 127.0f;
    for (int i = 0; i < n; i++) {
        plain_bits v = { .f = x[i] * factor + PLAIN_ROUND };
        out->qs[i] = (int8_t)v.u;       /* the integer is in the lowest bits */
    }
    memset(out->qs + n, 0, (size_t)(SUPERBLOCK - n));
    for (int g = 0; g < SUPERBLOCK / 16; g++) {
        int sum = 0;
        for (int i = 0; i < 16; i++) sum += out->qs[g * 16 + i];
        out->sums[g] = (int16_t)sum;
    }
}
static inline void quantize_plain(block_q8 *out, const float *x, size_t n) {
    for (; n >= SUPERBLOCK; n -= SUPERBLOCK, x += SUPERBLOCK) quantize_superblock_plain(out++, x, SUPERBLOCK);
    if (n) quantize_superblock_plain(out, x, (int)n);
}

/* --- elements ----------------------------------------------------------------------------- */
/* Adds 16 partial sums as a tree: j with j + 8, then + 4, + 2, + 1; 64 likewise, from + 32 on. */
static inline float sum_16_plain(float *part) {
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++) part[j] += part[j + width];
    return part[0];
}
static inline float sum_64_plain(float *part) {
    for (int j = 0; j < 32; j++) part[j] += part[j + 32];
    for (int j = 0; j < 16; j++) part[j] += part[j + 16];
    return sum_16_plain(part);
}
/* The sum of (x * unit)^2 in 64 partial sums. */
static inline float sum_squares_plain(const float *x, size_t n, float unit) {
    float part[64] = { 0 };
    size_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (size_t j = 0; j < 64; j++) part[j] = __builtin_fmaf(x[i + j] * unit, x[i + j] * unit, part[j]);
    for (size_t j = 0; i + j < n; j++) part[j] = __builtin_fmaf(x[i + j] * unit, x[i + j] * unit, part[j]);
    return sum_64_plain(part);
}
static inline void rms_norm_plain(float *out, const float *x, const float *weight, size_t n, float eps) {
    float factor = 1.0f / sqrtf(sum_squares_plain(x, n, 1) / (float)n + eps);
    for (size_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}
/* e^x within 1 ulp or so: x = k ln 2 + r, a polynomial for e^r, then 2^k in two halves, because 2^k itself may be
 * beyond the range of float.  -inf gives 0, NaN stays NaN (and whatever its bits make of k, it times that is NaN). */
static inline float exp_plain(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    plain_bits k = { .f = __builtin_fmaf(x, 0x1.715476p+0f, PLAIN_ROUND) };
    float whole = k.f - PLAIN_ROUND;
    float r = __builtin_fmaf(whole, -0x1.62e43p-1f, x);
    r = __builtin_fmaf(whole, 0x1.05c61p-29f, r);
    float p = __builtin_fmaf(0x1.6a2432p-10f, r, 0x1.1239e4p-7f);
    p = __builtin_fmaf(p, r, 0x1.5558f2p-5f);
    p = __builtin_fmaf(p, r, 0x1.555492p-3f);
    p = __builtin_fmaf(p, r, 0x1.fffffcp-2f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    int32_t n = k.i - 0x4b400000, half = n >> 1;
    plain_bits first = { .u = (uint32_t)(half + 127) << 23 }, second = { .u = (uint32_t)(n - half + 127) << 23 };
    return p * first.f * second.f;
}
static inline void silu_mul_plain(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exp_plain(-gate[i])) * up[i];
}
/* The error function within 1.2 ulp: t + t p(t^2) for |x| = t below 0.921875, else 1 - e^-q(t), which is 1 from 3.9
 * on.  p and q are minimax polynomials (Lawson's weighted least squares): p of degree 6 for erf(t) / t - 1; q of degree
 * 7 for -log erfc(t) up to 4, where weights were erfc(t), and beyond 4 it only has to grow, and does.  Coefficients
 * were rounded to floats from the lowest on, each time fitting the rest anew.  p misses by 1e-9, q by 5e-11.  NaN stays
 * NaN. */
static inline float erf_plain(float x) {
    float t = __builtin_fabsf(x), s = t * t, p = __builtin_fmaf(0x1.4e1556p-14f, s, -0x1.a5b0f8p-11f);
    p = __builtin_fmaf(p, s, 0x1.5441d4p-8f);
    p = __builtin_fmaf(p, s, -0x1.b8007ap-6f);
    p = __builtin_fmaf(p, s, 0x1.ce2d6p-4f);
    p = __builtin_fmaf(p, s, -0x1.812740p-2f);
    p = __builtin_fmaf(p, s, 0x1.06eba8p-3f);
    float q = __builtin_fmaf(0x1.6370b8p-16f, t, -0x1.c8a54p-12f);
    q = __builtin_fmaf(q, t, 0x1.11acbap-8f);
    q = __builtin_fmaf(q, t, -0x1.9bc356p-6f);
    q = __builtin_fmaf(q, t, 0x1.bb97e8p-4f);
    q = __builtin_fmaf(q, t, 0x1.4443d2p-1f);
    q = __builtin_fmaf(q, t, 0x1.21286ep+0f);
    q = __builtin_fmaf(q, t, -0x1.71dae4p-13f);
    /* by the sign of the gap (for NaN either is NaN): a comparison would be made a branch, which is not vectorised */
    plain_bits near = { .f = __builtin_fmaf(p, t, t) }, far = { .f = 1.0f - exp_plain(-q) };
    plain_bits gap = { .f = t - 0.921875f };
    uint32_t is_near = 0u - (gap.u >> 31);
    plain_bits size = { .u = (near.u & is_near) | (far.u & ~is_near) };
    return __builtin_copysignf(size.f, x);
}
static inline float gelu_one_plain(float x) { return 0.5f * x * (1.0f + erf_plain(x * 0.70710678f)); }
static inline void gelu_plain(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = gelu_one_plain(x[i]);
}
static inline void gelu_mul_plain(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gelu_one_plain(gate[i]) * up[i];
}
static inline void add_scaled_plain(float *y, const float *x, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = __builtin_fmaf(scale, x[i], y[i]);
}

/* --- choice of experts -------------------------------------------------------------------- */
/* Whether logit a comes before logit b: it is larger, or as large and has the lower index.  NaN is as -INFINITY. */
static inline int before_plain(const float *logits, int32_t a, int32_t b) {
    float of_a = logits[a] != logits[a] ? -INFINITY : logits[a], of_b = logits[b] != logits[b] ? -INFINITY : logits[b];
    return of_a > of_b || (of_a == of_b && a < b);
}
/* ids is a heap of k, the last of them on top, but for place `at`: id goes there or further down. */
static inline void sift_plain(const float *logits, int32_t *ids, int32_t k, int32_t at, int32_t id) {
    for (int32_t child; (child = 2 * at + 1) < k; at = child) {
        if (child + 1 < k && before_plain(logits, ids[child], ids[child + 1])) child++;
        if (before_plain(logits, ids[child], id)) break;
        ids[at] = ids[child];
    }
    ids[at] = id;
}
static inline void choose_ids_plain(const float *logits, int32_t n, int32_t k, int32_t *ids) {
    for (int32_t i = 0; i < k; i++) ids[i] = i;
    for (int32_t i = k / 2 - 1; i >= 0; i--) sift_plain(logits, ids, k, i, ids[i]);
    for (int32_t i = k; i < n; i++)
        if (before_plain(logits, i, ids[0])) sift_plain(logits, ids, k, 0, i);
    int32_t last = ids[0];                     /* the other k - 1 are before it */
    for (int32_t i = 0; i < n; i++)
        if (!before_plain(logits, last, i)) *ids++ = i;
}
/* The sum of e^(x - max) in 64 partial sums. */
static inline float sum_exp_plain(const float *x, size_t n, float max) {
    float part[64] = { 0 };
    size_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (size_t j = 0; j < 64; j++) part[j] += exp_plain(x[i + j] - max);
    for (size_t j = 0; i + j < n; j++) part[j] += exp_plain(x[i + j] - max);
    return sum_64_plain(part);
}
static inline void choose_plain(const float *logits, int32_t n, int32_t k, float scale, int32_t norm, int32_t *ids,
                                float *weights) {
    float max = -INFINITY, total = 0;
    int nan = 0;
    for (int32_t i = 0; i < n; i++) {
        max = logits[i] > max ? logits[i] : max;
        nan |= logits[i] != logits[i];
    }
    if (nan) max = NAN;
    choose_ids_plain(logits, n, k, ids);
    for (int32_t j = 0; j < k; j++) weights[j] = exp_plain(logits[ids[j]] - max);
    if (norm) for (int32_t j = 0; j < k; j++) total += weights[j];
    else total = sum_exp_plain(logits, (size_t)n, max);
    for (int32_t j = 0; j < k; j++) weights[j] = scale * weights[j] / total;
}

/* --- attention ---------------------------------------------------------------------------- */
static inline void transpose_keys_plain(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (size_t i = 0; i < (size_t)d; i++) {
        for (size_t j = 0; j < (size_t)n_keys; j++) kt[i * ATTEND_KEYS + j] = k[j * k_stride + i];
        for (size_t j = (size_t)n_keys; j < ATTEND_KEYS; j++) kt[i * ATTEND_KEYS + j] = 0;
    }
}
/* Turns one row's scores into weights, and brings its m and l up to date; returns the factor for what o holds.
 * Keys the row does not see get weight 0 and all ATTEND_KEYS are added up, so the order never depends on the call. */
static inline float attend_softmax_plain(float *s, int32_t n_keys, float *m, float *l) {
    float top[8], largest = *m;
    for (int j = 0; j < ATTEND_KEYS; j++) s[j] = j < n_keys ? s[j] : -INFINITY;
    for (int j = 0; j < 8; j++) top[j] = s[j];
    for (int i = 8; i < ATTEND_KEYS; i += 8)
        for (int j = 0; j < 8; j++) top[j] = top[j] > s[i + j] ? top[j] : s[i + j];
    for (int j = 0; j < 8; j++) largest = largest > top[j] ? largest : top[j];
    /* all scores -inf: nothing to add, and inf - inf would be NaN */
    float shift = largest == -INFINITY ? 0 : largest, factor = exp_plain(*m - shift), part[16];
    for (int j = 0; j < ATTEND_KEYS; j++) s[j] = exp_plain(s[j] - shift);
    for (int j = 0; j < 16; j++) part[j] = s[j] + s[j + 16];
    *l = __builtin_fmaf(*l, factor, sum_16_plain(part));
    *m = largest;
    return factor;
}

/* --- products ----------------------------------------------------------------------------- */
static inline int mul_row_of(const struct ms4_mul *m, int token) { return m->x_rows ? m->x_rows[token] : token; }
static inline const block_q8 *mul_blocks(const struct ms4_mul *m, int token) {
    return (const block_q8 *)((const uint8_t *)m->x + (size_t)mul_row_of(m, token) * m->x_stride);
}
static inline const float *mul_floats(const struct ms4_mul *m, int token) {
    return (const float *)((const uint8_t *)m->x + (size_t)mul_row_of(m, token) * m->x_stride);
}
/* y plus the product of one superblock (n weights of it exist) with one token's block. */
static inline float add_superblock_plain(float y, const struct opened *o, const block_q8 *x, int n,
                                         enum ms4_family family, const int32_t *sums) {
    if (!is_blocks(family)) {
        int32_t dot = 0, mins = 0;
        for (int g = 0; g < 16; g++) dot += o->scale[g] * sums[g];
        float t = o->d * (float)dot;
        if (has_min(family)) {
            for (int g = 0; g < 16; g++) mins += o->min[g] * x->sums[g];
            t = __builtin_fmaf(-o->dmin, (float)mins, t);
        }
        return __builtin_fmaf(x->d, t, y);
    }
    float t = 0;
    if (family == FAMILY_blocks_16) {
        for (int b = 0; b < n / 16; b++) t = __builtin_fmaf(o->block_d[b], (float)sums[b], t);
        return __builtin_fmaf(x->d, t, y);
    }
    for (int b = 0; b < n / 32; b++) {
        t = __builtin_fmaf(o->block_d[b], (float)(sums[b * 2] + sums[b * 2 + 1]), t);
        if (has_min(family))
            t = __builtin_fmaf(o->block_m[b], (float)(x->sums[b * 2] + x->sums[b * 2 + 1]), t);
    }
    return __builtin_fmaf(x->d, t, y);
}
/* sums[g] = the product of group g, 16 weights wide. */
typedef void dot_groups_fn(int32_t *sums, const int8_t *q, const int8_t *x);
/* One row times every token.  bytes: of one superblock's weights.  unpack, family and dot are constants. */
INLINE void mul_opened_plain(const struct ms4_mul *m, unpack_fn *unpack, size_t bytes, enum ms4_family family,
                             dot_groups_fn *dot) {
    for (int r = 0; r < m->n_rows; r++)
        for (int i = 0, n_left = m->n_cols; n_left > 0; i++, n_left -= SUPERBLOCK) {
            int n = n_left < SUPERBLOCK ? n_left : SUPERBLOCK;
            struct opened o;
            unpack(&o, m->w + (size_t)r * m->row_bytes + (size_t)i * bytes, n);
            for (int t = 0; t < m->n_tokens; t++) {
                const block_q8 *x = mul_blocks(m, t) + i;
                float *y = m->y + (size_t)t * m->y_stride + r;
                int32_t sums[16];
                dot(sums, o.q, x->qs);
                *y = add_superblock_plain(i ? *y : 0, &o, x, n, family, sums);
            }
        }
}
/* Bytes of 256 weights of a type. */
#define SUPERBLOCK_BYTES(type) (sizeof(block_##type) * SUPERBLOCK / PLAIN_WEIGHTS_##type)
enum {
#define X(name, id, weights, bytes, family, ...) PLAIN_WEIGHTS_##name = weights,
    MS4_TYPES(X)
#undef X
};
#endif
