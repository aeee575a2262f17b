/* ops.h -- the table of kernels.  One filled table per ISA; dispatch.c picks one when an engine opens.
 *
 * Kernels take pointers and counts, allocate nothing, log nothing and cannot fail; callers check shapes at load.
 *
 * ONE ARITHMETIC.  Every number that depends on weights comes from IEEE single operations (to nearest even, denormals
 * kept) and from integers, in the order written here: the same bits on every ISA and device, for any number of threads,
 * and whatever is computed beside a token.  Only ref differs: it sums in double, is the definition of what is meant,
 * and the yardstick for the rounding of the others.  docs/arithmetic.md says the same at length, with the reasons.
 *
 * fma(a, b, c) is rounded once; a * b + c is rounded twice, and may not be contracted.  (float)I of an integer is
 * rounded, too.  rint() is (x + 1.5 * 2^23) - 1.5 * 2^23.  exp and erf are exp_plain and erf_plain (cpu/plain/plain.h).
 *   sums of 16, 64      partial sum j takes the elements k = j (mod 16 or 64) in ascending order, from 0; then the
 *                       partial sums are added as a tree: j with j + 32, then + 16, 8, 4, 2, 1 (of 16: from + 8 on).
 *   quantized weights   inside a superblock all sums are integers (exact, any order); across superblocks, for each
 *                       output element on its own and in ascending order, from y = 0:
 *                         K and IQ types   y = fma(x.d, fma(-dmin, (float)J, d * (float)I), y)
 *                                          I = sum of scale_b * (q . x.q)_b,  J = sum of min_b * sum(x.q)_b;
 *                                          types without mins: y = fma(x.d, d * (float)I, y)
 *                         32-blocks        t = fma(d_b, (float)I_b, t) over the blocks b of the superblock, from t = 0
 *                                          (types with mins then t = fma(m_b, (float)S_b, t)); y = fma(x.d, t, y)
 *   float weights       a sum of 16, by p = fma(w, x, p).  (With 64, products on CPUs would take up to twice as long:
 *                       their sums would no longer fit the registers.)
 *   rms_norm            S = sum of 64, by p = fma(x, x, p);  f = 1 / sqrt(S / n + eps);  x * f * weight
 *   quantize            a = largest magnitude of the superblock;  d = a / 127;  q = rint(x * (127 / a));
 *                       a < 2^-121: d = 0, all q = 0
 *   quantize_16         a = largest magnitude;  u = x * (1 / a);  S = sum of 64, by p = fma(u, u, p);
 *                       top = min(LENGTH_16 / sqrt(S), 32767);  f = top * (1 / a);  q = rint(x * f);  d = a / top;
 *                       largest = rint(a * f);  a < 2^-100: d = 0, all q = 0
 *   silu_mul            gate / (1 + exp(-gate)) * up
 *   gelu, gelu_mul      0.5 * x * (1 + erf(x * 0.70710678)), then * up
 *   choose              e = exp(logit - max);  total = the chosen e one by one from 0, ascending by id, or where norm
 *                       is 0 the sum of 64 of all e, by p = p + e;  weight = scale * e / total
 *   attend_segment      I, R = integer sums over latents and over the rope key;
 *                       s = fma(q_d[0] * d[0], (float)I, q_d[1] * d[1] * (float)R);  m = largest s;  p = exp(s - m)
 *                       (if m is -inf: exp(s - 0));  l = sum of 16 over the keys;  w = p * d[0];
 *                       unit = max(S * (1 / (0x1.fp+30)), largest w * (1 / 32767)), S = sum of 16 over the keys, by
 *                       part = fma(w, largest latent, part);  W = rint(w * (1 / unit)), 0 if unit < 2^-100;
 *                       o = (float)(integer sum of W * latent) * unit
 *   fold                m = max(m1, m2);  l = fma(l2, exp(m2 - m), l1 * exp(m1 - m));  each o likewise.  The segments
 *                       of a group of SEGMENT_GROUP (by position, from 0) into { -inf, 0, 0 } in ascending order; the
 *                       groups likewise.  Where l2 is 0, nothing changes.  In the end o / l.
 *   attend              s = from 0 by fma over the columns, ascending;  m' = max(m, largest s);  f = exp(m - m');
 *                       p = exp(s - m'), 0 for keys that are not seen;  (if m' is -inf: minus 0;)
 *                       l = fma(l, f, tree of all 32 p, + 16 first);  o = o * f, then o = fma(p, v, o) over the keys,
 *                       ascending.  Tiles ascending; in the end o / l.
 * Results of experts are added one by one, shared expert first, then ascending by id: h = fma(weight, y, h).
 *
 * No integer is taken from a NaN: which bits a NaN has depends on the machine.  What is not finite becomes zeros with a
 * scale of NaN (quantize, quantize_16, the weights of a segment), so all that is computed with it is NaN again.  Which
 * NaN, the sign of an m that is zero, and m where l is NaN, are left open: nothing depends on them.
 */
#ifndef MS4_OPS_H
#define MS4_OPS_H
#include "quant.h"

/* y[t * y_stride + r] = sum over k of w[r][k] * x[t'][k],  t' = x_rows ? x_rows[t] : t,  r < n_rows, t < n_tokens */
struct ms4_mul {
    const uint8_t *w;          /* n_rows rows of row_bytes bytes */
    size_t row_bytes;
    const void *x;             /* rows of block_q8 for quantized types, of float for F32, F16 and BF16 */
    size_t x_stride;           /* bytes from one row of x to the next */
    const int32_t *x_rows;     /* which row of x each token takes; NULL: row t */
    float *y;
    size_t y_stride;           /* floats from one token's results to the next */
    int32_t n_rows, n_cols, n_tokens;
    const uint8_t *next;       /* a hint: the weights that this thread will read after these; NULL: those that follow */
};
typedef void mul_fn(const struct ms4_mul *m);

/* Attention in floats, as the vision tower wants it: n_q query rows over one tile of at most ATTEND_KEYS keys, with
 * running softmax (SPEC 2.2):
 *   s = q . k;  m' = max(m, max s);  o = o * exp(m - m') + sum exp(s - m') v;  l likewise.
 * Scales are already folded into q.  Tiles begin at multiples of ATTEND_KEYS, so a row's numbers depend on its own
 * position only.  A row with n_keys[i] == 0 is left untouched. */
#define ATTEND_KEYS 32
#define ATTEND_ROWS 8          /* most query rows of one call */
struct ms4_attend {
    const float *q;            /* n_q rows of d_k floats, q_stride floats apart */
    const float *kt;           /* d_k rows of ATTEND_KEYS floats: the keys, transposed; absent keys are zero */
    const float *v;            /* ATTEND_KEYS rows of d_v floats, v_stride floats apart; absent keys are zero */
    float *o;                  /* n_q rows of d_v floats, o_stride floats apart: the unnormalised output */
    float *m, *l;              /* per row: running maximum (start at -INFINITY) and running sum (start at 0) */
    const int32_t *n_keys;     /* per row: how many keys of this tile it sees, from the first */
    size_t q_stride, v_stride, o_stride;
    int32_t n_q, d_k, d_v;     /* d_k and d_v: multiples of 8 */
};

/* --- attention over the kv cache, in 16-bit integers ---
 * A row of the cache, and a query folded into its space (SPEC 2.3), has two parts, latents and rope key, and each part
 * is integers times one scale.  Lengths (Euclidean) of at most LENGTH_16 keep every sum of products of two parts below
 * 2^31, by Cauchy-Schwarz, so the sums are exact in any order; the rounding is finer than that of halves. */
#define LENGTH_16 44000
#define SEGMENT_KEYS 128       /* keys attended to by one call; segments begin at multiples of it */
#define SEGMENT_GROUP 8        /* segments whose results are folded, in order, before the groups are, in order */
#define SEGMENT_BLOCK 32       /* keys, or columns of values, side by side */
/* A segment as the kernels want it; open_segment fills it, for one thread. */
struct ms4_segment {
    int32_t rank, d_rope;      /* of a row: latents, then rope key; multiples of 8 */
    int32_t n_keys;
    int16_t *keys;             /* blocks of 32 keys: (rank + d_rope) / 2 rows of 32 pairs: a key's numbers 2i, 2i + 1 */
    int16_t *values;           /* blocks of 32 latents: SEGMENT_KEYS / 2 rows of 32 pairs: of the keys 2j, 2j + 1 */
    float *d;                  /* SEGMENT_KEYS scales of latents, as many of rope keys; largest magnitudes of latents */
};                             /* numbers of absent keys and columns, as far as a block is begun, are zero */
static inline size_t segment_keys_size(int32_t rank, int32_t d_rope) { return (size_t)(rank + d_rope) * SEGMENT_KEYS; }
static inline size_t segment_values_size(int32_t rank) {
    return (size_t)((rank + SEGMENT_BLOCK - 1) / SEGMENT_BLOCK) * SEGMENT_BLOCK * SEGMENT_KEYS;
}
/* Attention of n_q query rows over one segment: out[row] = { m, l, o[rank] } with m = max s, l = sum exp(s - m),
 * o = sum exp(s - m) v over the keys that they see, the first n_keys of the segment, one or more.  Scales are folded
 * into q_d.  The weights of the values, exp(s - m) d, are rounded to 16 bits of their largest, or less where the sum
 * would not fit. */
struct ms4_attend_segment {
    const struct ms4_segment *segment;
    const int16_t *q;          /* n_q rows of rank + d_rope numbers, one after the other */
    const float *q_d;          /* n_q times two scales */
    float *out;                /* n_q rows of 2 + rank floats */
    int32_t n_keys, n_q;
    const uint8_t *next;       /* next_lines lines of 64 bytes to prefetch meanwhile: a hint, as ms4_mul.next */
    int32_t next_lines;
};

/* Choosing a token from its logits (sample.c).  Here ref and the others have the same bits: cpu/plain/weigh.h. */
#define WEIGH_BLOCK 128        /* logits looked at together */
struct ms4_weighing {
    double highest;            /* of the logits */
    double temperature;        /* above 0 */
    double least;              /* what a likely token weighs at least */
};

struct ms4_ops {
    const char *isa;
    mul_fn *mul[MS4_N_TYPES];
    void (*dequantize[MS4_N_TYPES])(float *out, const void *w, size_t n);        /* n weights, whole blocks */
    void (*quantize)(block_q8 *out, const float *x, size_t n);                   /* n floats, a multiple of 32 */
    void (*rms_norm)(float *out, const float *x, const float *weight, size_t n, float eps);
    void (*silu_mul)(float *out, const float *gate, const float *up, size_t n);  /* silu(gate) * up */
    void (*gelu)(float *x, size_t n);                                            /* x (1 + erf(x / sqrt 2)) / 2 */
    void (*gelu_mul)(float *out, const float *gate, const float *up, size_t n);  /* gelu(gate) * up */
    void (*add_scaled)(float *y, const float *x, float scale, size_t n);         /* y = fma(scale, x, y) */
    void (*attend)(const struct ms4_attend *a);
    /* The router's choice: ids of the k largest of n logits, 1 <= k <= n, ascending; of equal logits the one with the
     * lower index is larger, and NaN is as -INFINITY.  With e = exp(l - max), max being the largest of all logits, or
     * NaN if one of them is, weights[j] = scale * e / total; total is the sum of the chosen e, ascending by id, or if
     * norm == 0 of all, in 64 partial sums. */
    void (*choose)(const float *logits, int32_t n, int32_t k, float scale, int32_t norm, int32_t *ids, float *weights);
    /* x = d out, to the nearest integers of length LENGTH_16 or less; returns d: 0 for what is as good as zero, NaN for
     * what is not finite, out being zero then.  largest (or NULL): the largest magnitude in out. */
    float (*quantize_16)(int16_t *out, const float *x, size_t n, float *largest);
    /* n_keys rows, and three floats each: scales of latents and rope key, largest magnitude of the latents */
    void (*open_segment)(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys);
    void (*attend_segment)(const struct ms4_attend_segment *a);
    /* Adds the { m, l, o[n] } of other keys to a running one, which starts as { -INFINITY, 0, zeros }:
     *   m' = max(m, m2);  l = fma(l2, exp(m2 - m'), l * exp(m - m'));  each o likewise.
     * From one with l == 0, which saw no key, nothing changes. */
    void (*fold)(float *into, const float *from, size_t n);
    /* kt[i * ATTEND_KEYS + j] = k[j * k_stride + i], i < d, j < n_keys <= ATTEND_KEYS; zero for other j */
    void (*transpose_keys)(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d);
    /* tops[b] = the highest of block b of n >= 1 logits; returns whether all of them are finite */
    int (*block_tops)(float *tops, const float *x, size_t n);
    /* w[i] = e^((x[i] - highest) / temperature), i < n <= WEIGH_BLOCK, 0 from there to the end of the block; sums = of
     * the likely ones, of the others: each added as a tree: i with i + 64, then + 32, and so on */
    void (*weigh)(double *w, const float *x, size_t n, const struct ms4_weighing *how, double *sums);
    /* Loops in registers (peak.h): multiply-adds that the rounds were, 8-bit and float. */
    uint64_t (*int8_peak)(uint64_t rounds);
    uint64_t (*float_peak)(uint64_t rounds);
};

extern const struct ms4_ops ops_ref;
extern const struct ms4_ops ops_neon;      /* AArch64 only: dotprod */
extern const struct ms4_ops ops_avx2;      /* x86-64 only: AVX2 FMA F16C */
extern const struct ms4_ops ops_avxvnni;   /* x86-64 only: AVX2 FMA F16C AVX-VNNI */
extern const struct ms4_ops ops_avx512;    /* x86-64 only: F BW DQ VL VNNI */

struct ms4_type_info { const char *name; int32_t id, weights, bytes, quantized; };
extern const struct ms4_type_info ms4_type_infos[MS4_N_TYPES];                   /* types.c */
#endif
