/* ref.c -- what each kernel means.  Plain C, no cleverness, sums in double: the fast kernels are tested against it.
 * The block formats are in dequantize.c. */
#include "dequantize.h"
#include "peak.h"
#include "segment.h"
#include "weigh.h"
#include <math.h>
#include <string.h>

#define WEIGHTS_AT_ONCE SUPERBLOCK

/* Both inputs of a product as exact numbers: x = d * q for quantized types. */
static double activation(const void *x, int quantized, size_t k) {
    if (!quantized) return ((const float *)x)[k];
    const block_q8 *b = (const block_q8 *)x + k / SUPERBLOCK;
    return (double)b->d * b->qs[k % SUPERBLOCK];
}
static void mul_ref(const struct ms4_mul *m, enum ms4_type type) {
    const struct ms4_type_info *info = &ms4_type_infos[type];
    size_t n_cols = (size_t)m->n_cols, unit = (size_t)info->weights;
    for (int r = 0; r < m->n_rows; r++)
        for (int t = 0; t < m->n_tokens; t++) {
            const uint8_t *w = m->w + (size_t)r * m->row_bytes;
            const uint8_t *x = (const uint8_t *)m->x + (size_t)(m->x_rows ? m->x_rows[t] : t) * m->x_stride;
            double sum = 0;
            for (size_t k = 0; k < n_cols; k += WEIGHTS_AT_ONCE) {
                float weights[WEIGHTS_AT_ONCE];
                size_t n = n_cols - k < WEIGHTS_AT_ONCE ? n_cols - k : WEIGHTS_AT_ONCE;
                ops_ref.dequantize[type](weights, w + k / unit * (size_t)info->bytes, n);
                for (size_t j = 0; j < n; j++) sum += weights[j] * activation(x, info->quantized, k + j);
            }
            m->y[(size_t)t * m->y_stride + (size_t)r] = (float)sum;
        }
}
#define X(name, ...) \
    static void mul_##name##_ref(const struct ms4_mul *m) { mul_ref(m, MS4_TYPE_##name); }
MS4_TYPES(X)
#undef X

static void quantize_superblock_ref(block_q8 *out, const float *x, size_t n) {
    double largest = 0;
    int finite = 1;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) finite = 0;
        if (fabs((double)x[i]) > largest) largest = fabs((double)x[i]);
    }
    if (!finite) { out->d = NAN; return; }
    if (largest < 0x1p-121) return;         /* 127 / largest would not be a float */
    out->d = (float)(largest / 127);
    for (size_t i = 0; i < n; i++) {
        out->qs[i] = (int8_t)rint(x[i] * 127 / largest);
        out->sums[i / 16] = (int16_t)(out->sums[i / 16] + out->qs[i]);
    }
}
static void quantize_ref(block_q8 *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += SUPERBLOCK)
        quantize_superblock_ref(out + i / SUPERBLOCK, x + i, n - i < SUPERBLOCK ? n - i : SUPERBLOCK);
}
static void rms_norm_ref(float *out, const float *x, const float *weight, size_t n, float eps) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    double factor = 1 / sqrt(squares / (double)n + eps);
    for (size_t i = 0; i < n; i++) out[i] = (float)(x[i] * factor * weight[i]);
}
static void silu_mul_ref(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (float)(gate[i] / (1 + exp(-(double)gate[i])) * up[i]);
}
static double gelu_one_ref(double x) { return 0.5 * x * (1 + erf(x * sqrt(0.5))); }
static void gelu_ref(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (float)gelu_one_ref(x[i]);
}
static void gelu_mul_ref(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (float)(gelu_one_ref(gate[i]) * up[i]);
}
static void add_scaled_ref(float *y, const float *x, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = (float)((double)scale * x[i] + y[i]);
}

/* Whether logit a comes before logit b. */
static int before_ref(const float *logits, int32_t a, int32_t b) {
    double of_a = isnan(logits[a]) ? -INFINITY : logits[a], of_b = isnan(logits[b]) ? -INFINITY : logits[b];
    return of_a > of_b || (of_a == of_b && a < b);
}
static void choose_ref(const float *logits, int32_t n, int32_t k, float scale, int32_t norm, int32_t *ids,
                       float *weights) {
    double max = -INFINITY, total = 0;
    int32_t last = -1;                         /* of those that were found one after the other, the first k */
    for (int32_t j = 0; j < k; j++) {
        int32_t next = -1;
        for (int32_t i = 0; i < n; i++)
            if ((last < 0 || before_ref(logits, last, i)) && (next < 0 || before_ref(logits, i, next))) next = i;
        last = next;
    }
    for (int32_t i = 0; i < n; i++) max = isnan(logits[i]) || isnan(max) ? NAN : fmax(max, logits[i]);
    for (int32_t i = 0, j = 0; i < n; i++) {
        int chosen = !before_ref(logits, last, i);
        if (chosen) ids[j++] = i;
        if (chosen || !norm) total += exp(logits[i] - max);
    }
    for (int32_t j = 0; j < k; j++) weights[j] = (float)(scale * exp(logits[ids[j]] - max) / total);
}

static void attend_row_ref(const struct ms4_attend *a, size_t row) {
    double s[ATTEND_KEYS], largest = a->m[row], sum = 0;
    size_t n_keys = (size_t)a->n_keys[row];
    for (size_t j = 0; j < n_keys; j++) {
        s[j] = 0;
        for (size_t i = 0; i < (size_t)a->d_k; i++)
            s[j] += (double)a->q[row * a->q_stride + i] * a->kt[i * ATTEND_KEYS + j];
        if (s[j] > largest) largest = s[j];
    }
    if (largest == -INFINITY) return;
    double factor = exp(a->m[row] - largest);
    for (size_t j = 0; j < n_keys; j++) sum += s[j] = exp(s[j] - largest);
    for (size_t i = 0; i < (size_t)a->d_v; i++) {
        double o = a->o[row * a->o_stride + i] * factor;
        for (size_t j = 0; j < n_keys; j++) o += s[j] * a->v[j * a->v_stride + i];
        a->o[row * a->o_stride + i] = (float)o;
    }
    a->l[row] = (float)(a->l[row] * factor + sum);
    a->m[row] = (float)largest;
}
static void attend_ref(const struct ms4_attend *a) {
    for (int row = 0; row < a->n_q; row++)
        if (a->n_keys[row] > 0) attend_row_ref(a, (size_t)row);
}

/* Lengths of at most LENGTH_16, numbers of at most 2^15 - 1. */
static float quantize_16_ref(int16_t *out, const float *x, size_t n, float *largest) {
    double most = 0, squares = 0;
    int finite = 1;
    memset(out, 0, n * sizeof *out);
    if (largest) *largest = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) finite = 0;
        if (fabs((double)x[i]) > most) most = fabs((double)x[i]);
        squares += (double)x[i] * x[i];
    }
    if (!finite) return NAN;
    if (most < 0x1p-100) return 0;
    double factor = fmin(32767 / most, LENGTH_16 / sqrt(squares));
    for (size_t i = 0; i < n; i++) out[i] = (int16_t)rint(x[i] * factor);
    if (largest) *largest = (float)rint(most * factor);
    return (float)(1 / factor);
}
/* Number i of key j of an opened segment, as a key and as a value. */
static double segment_key(const struct ms4_segment *s, size_t j, size_t i) {
    size_t width = (size_t)(s->rank + s->d_rope);
    float d = s->d[i < (size_t)s->rank ? j : SEGMENT_KEYS + j];
    return (double)d
        * s->keys[((j / SEGMENT_BLOCK * width + i / 2 * 2) * SEGMENT_BLOCK) + j % SEGMENT_BLOCK * 2 + i % 2];
}
static double segment_value(const struct ms4_segment *s, size_t j, size_t i) {
    return (double)s->d[j]
        * s->values[(i / SEGMENT_BLOCK * SEGMENT_KEYS + j / 2 * 2) * SEGMENT_BLOCK + i % SEGMENT_BLOCK * 2 + j % 2];
}
static void attend_segment_row_ref(const struct ms4_attend_segment *a, size_t row) {
    const struct ms4_segment *seg = a->segment;
    size_t rank = (size_t)seg->rank, width = rank + (size_t)seg->d_rope, n_keys = (size_t)a->n_keys;
    const int16_t *q = a->q + row * width;
    float *out = a->out + row * (rank + 2);
    double s[SEGMENT_KEYS], largest = -INFINITY, sum = 0;
    for (size_t j = 0; j < n_keys; j++) {
        s[j] = 0;
        for (size_t i = 0; i < width; i++)
            s[j] += (double)a->q_d[2 * row + (i >= rank)] * q[i] * segment_key(seg, j, i);
        if (s[j] > largest) largest = s[j];
    }
    for (size_t j = 0; j < n_keys; j++) sum += s[j] = exp(s[j] - largest);
    for (size_t i = 0; i < rank; i++) {
        double o = 0;
        for (size_t j = 0; j < n_keys; j++) o += s[j] * segment_value(seg, j, i);
        out[2 + i] = (float)o;
    }
    out[0] = (float)largest;
    out[1] = (float)sum;
}
static void attend_segment_ref(const struct ms4_attend_segment *a) {
    for (int row = 0; row < a->n_q; row++) attend_segment_row_ref(a, (size_t)row);
}
static void fold_ref(float *into, const float *from, size_t n) {
    if (from[1] == 0) return;
    double m = into[0] > from[0] ? into[0] : from[0], old = exp(into[0] - m), new = exp(from[0] - m);
    into[0] = (float)m;
    for (size_t i = 1; i < n + 2; i++) into[i] = (float)(into[i] * old + from[i] * new);
}
static void transpose_keys_ref(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d) {
    for (size_t i = 0; i < (size_t)d; i++)
        for (size_t j = 0; j < ATTEND_KEYS; j++)
            kt[i * ATTEND_KEYS + j] = j < (size_t)n_keys ? k[j * k_stride + i] : 0;
}

const struct ms4_ops ops_ref = {
    .isa = "ref",
    .mul = {
#define X(name, ...) [MS4_TYPE_##name] = mul_##name##_ref,
        MS4_TYPES(X)
#undef X
    },
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = quantize_ref,
    .rms_norm = rms_norm_ref,
    .silu_mul = silu_mul_ref,
    .gelu = gelu_ref,
    .gelu_mul = gelu_mul_ref,
    .add_scaled = add_scaled_ref,
    .choose = choose_ref,
    .attend = attend_ref,
    .quantize_16 = quantize_16_ref,
    .open_segment = open_segment_plain,
    .attend_segment = attend_segment_ref,
    .fold = fold_ref,
    .transpose_keys = transpose_keys_ref,
    .block_tops = block_tops_plain,
    .weigh = weigh_plain,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
