/* neon.c -- kernels for AArch64 with the dot-product instructions (ARMv8.2 and later).
 *
 * Rows are opened by unpack.h, which the compiler vectorises; the products are written out here: row by row for one
 * token, and for more a panel of eight rows, so that one register of activations serves four weights of each row.
 */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "dequantize.h"
#include "peak.h"
#include "plain.h"
#include "segment.h"
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int is_blocks(enum family f) { return f != FAMILY_SCALES && f != FAMILY_MINS; }
/* How a type's superblock is opened, and what its sums become. */
struct opener { unpack_fn *unpack; size_t bytes; enum family family; };

/* --- one token ---------------------------------------------------------------------------------------- */
static void dot_groups_neon(int32_t *sums, const int8_t *q, const int8_t *x) {
    for (int g = 0; g < 16; g += 4) {
        int32x4_t v[4];
        for (int j = 0; j < 4; j++) v[j] = vdotq_s32(vdupq_n_s32(0), vld1q_s8(q + (g + j) * 16), vld1q_s8(x + (g + j) * 16));
        vst1q_s32(sums + g, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
    }
}

/* --- many tokens -------------------------------------------------------------------------------------- */
#define ROWS 8              /* rows of a panel: two registers of four */
#define TILE 4              /* tokens computed together */

/* One superblock of eight rows, opened: four weights of each row side by side, and everything else by rows. */
struct panel {
    int8_t q[SUPERBLOCK / 4][ROWS][4];
    int32_t scale[16][ROWS], min[16][ROWS];
    float d[16][ROWS], m[8][ROWS];
};
INLINE void open_panel(struct panel *p, const struct ms4_mul *m, int first, int i, int n, struct opener t) {
    for (int r = 0; r < ROWS; r++) {
        struct opened o;
        int row = first + r < m->n_rows ? first + r : m->n_rows - 1;
        t.unpack(&o, m->w + (size_t)row * m->row_bytes + (size_t)i * t.bytes, n);
        for (int k = 0; k < SUPERBLOCK / 4; k++) memcpy(p->q[k][r], o.q + k * 4, 4);
        if (is_blocks(t.family)) {
            int n_scales = t.family == FAMILY_BLOCKS_16 ? n / 16 : n / 32;
            for (int b = 0; b < n_scales; b++) p->d[b][r] = o.block_d[b];
            if (t.family == FAMILY_BLOCKS_MIN) for (int b = 0; b < n / 32; b++) p->m[b][r] = o.block_m[b];
            continue;
        }
        for (int g = 0; g < 16; g++) p->scale[g][r] = o.scale[g];
        p->d[0][r] = o.d;
        if (t.family != FAMILY_MINS) continue;
        for (int g = 0; g < 16; g++) p->min[g][r] = o.min[g];
        p->m[0][r] = o.dmin;
    }
}
/* The products of 16 weights, from weight k on, of four rows (half of the panel) with n tokens. */
INLINE void tile_group(int32x4_t *dot, const struct panel *p, const block_q8 *const *x, int n, int half, int k) {
    int8x16_t w[4];
    for (int j = 0; j < 4; j++) w[j] = vld1q_s8(p->q[k / 4 + j][half * 4]);
    for (int t = 0; t < n; t++) {
        int8x16_t v = vld1q_s8(x[t]->qs + k);
        dot[t] = vdotq_laneq_s32(dot[t], w[0], v, 0);
        dot[t] = vdotq_laneq_s32(dot[t], w[1], v, 1);
        dot[t] = vdotq_laneq_s32(dot[t], w[2], v, 2);
        dot[t] = vdotq_laneq_s32(dot[t], w[3], v, 3);
    }
}
INLINE void tile_superblock(float32x4_t *y, const struct panel *p, const block_q8 *const *x, int n, int half, enum family f) {
    int32x4_t sum[TILE], low[TILE];
    for (int t = 0; t < n; t++) sum[t] = low[t] = vdupq_n_s32(0);
    for (int g = 0; g < 16; g++) {
        int32x4_t dot[TILE], scale = vld1q_s32(p->scale[g] + half * 4);
        for (int t = 0; t < n; t++) dot[t] = vdupq_n_s32(0);
        tile_group(dot, p, x, n, half, g * 16);
        for (int t = 0; t < n; t++) sum[t] = vmlaq_s32(sum[t], dot[t], scale);
        if (f == FAMILY_MINS)
            for (int t = 0; t < n; t++) low[t] = vmlaq_n_s32(low[t], vld1q_s32(p->min[g] + half * 4), x[t]->sums[g]);
    }
    for (int t = 0; t < n; t++) {
        float32x4_t v = vmulq_f32(vld1q_f32(p->d[0] + half * 4), vcvtq_f32_s32(sum[t]));
        if (f == FAMILY_MINS) v = vfmsq_f32(v, vld1q_f32(p->m[0] + half * 4), vcvtq_f32_s32(low[t]));
        y[t] = vfmaq_n_f32(y[t], v, x[t]->d);
    }
}
INLINE void tile_blocks(float32x4_t *y, const struct panel *p, const block_q8 *const *x, int n, int half, int n_here, enum family f) {
    const int width = f == FAMILY_BLOCKS_16 ? 16 : 32;
    float32x4_t v[TILE];
    for (int t = 0; t < n; t++) v[t] = vdupq_n_f32(0);
    for (int b = 0; b < n_here / width; b++) {
        int32x4_t dot[TILE];
        for (int t = 0; t < n; t++) dot[t] = vdupq_n_s32(0);
        for (int k = b * width; k < (b + 1) * width; k += 16) tile_group(dot, p, x, n, half, k);
        for (int t = 0; t < n; t++) {
            v[t] = vfmaq_f32(v[t], vld1q_f32(p->d[b] + half * 4), vcvtq_f32_s32(dot[t]));
            if (f == FAMILY_BLOCKS_MIN)
                v[t] = vfmaq_n_f32(v[t], vld1q_f32(p->m[b] + half * 4), (float)(x[t]->sums[2 * b] + x[t]->sums[2 * b + 1]));
        }
    }
    for (int t = 0; t < n; t++) y[t] = vfmaq_n_f32(y[t], v[t], x[t]->d);
}
/* Copies between y and registers; the last rows may be fewer than four. */
INLINE void load_rows(float32x4_t *v, const float *y, int n_rows) {
    float part[4] = { 0 };
    if (n_rows < 4) memcpy(part, y, (size_t)n_rows * sizeof *y);
    *v = vld1q_f32(n_rows < 4 ? part : y);
}
INLINE void store_rows(float *y, float32x4_t v, int n_rows) {
    float part[4];
    vst1q_f32(n_rows < 4 ? part : y, v);
    if (n_rows < 4) memcpy(y, part, (size_t)n_rows * sizeof *y);
}
INLINE void tile(const struct ms4_mul *m, const struct panel *p, int token, int n, int first, int i, int n_here, struct opener o) {
    for (int half = 0; half < 2 && first + half * 4 < m->n_rows; half++) {
        const block_q8 *x[TILE];
        float32x4_t y[TILE];
        int row = first + half * 4;
        for (int t = 0; t < n; t++) {
            x[t] = mul_blocks(m, token + t) + i;
            if (i == 0) y[t] = vdupq_n_f32(0);
            else load_rows(y + t, m->y + (size_t)(token + t) * m->y_stride + row, m->n_rows - row);
        }
        if (is_blocks(o.family)) tile_blocks(y, p, x, n, half, n_here, o.family);
        else tile_superblock(y, p, x, n, half, o.family);
        for (int t = 0; t < n; t++) store_rows(m->y + (size_t)(token + t) * m->y_stride + row, y[t], m->n_rows - row);
    }
}
INLINE void mul_panels(const struct ms4_mul *m, struct opener o) {
    for (int first = 0; first < m->n_rows; first += ROWS)
        for (int i = 0; i * SUPERBLOCK < m->n_cols; i++) {
            struct panel p;
            int token = 0, n = m->n_cols - i * SUPERBLOCK;
            n = n < SUPERBLOCK ? n : SUPERBLOCK;
            open_panel(&p, m, first, i, n, o);
            for (; token + TILE <= m->n_tokens; token += TILE) tile(m, &p, token, TILE, first, i, n, o);
            for (; token < m->n_tokens; token++) tile(m, &p, token, 1, first, i, n, o);
        }
}
#define PANEL_FROM 3        /* so many tokens are worth opening a panel for */
#define X(type, family) \
    static void mul_##type##_neon(const struct ms4_mul *m) { \
        const struct opener o = { unpack_##type, SUPERBLOCK_BYTES(type), family }; \
        if (m->n_tokens < PANEL_FROM) mul_opened_plain(m, o.unpack, o.bytes, family, dot_groups_neon); \
        else mul_panels(m, o); \
    }
UNPACK_TYPES(X)
#undef X

/* --- float weights: the 16 partial sums of ops.h are four registers ------------------------------------- */
typedef float32x4_t load_fn(const uint8_t *w, size_t k);
INLINE float32x4_t load_f32(const uint8_t *w, size_t k) { return vld1q_f32((const float *)w + k); }
INLINE float32x4_t load_f16(const uint8_t *w, size_t k) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)w + k)));
}
INLINE float32x4_t load_bf16(const uint8_t *w, size_t k) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)w + k), 16));
}
/* One row times n tokens. */
INLINE void tile_floats(const struct ms4_mul *m, int row, int token, int n_tokens, size_t size, load_fn *load) {
    const uint8_t *w = m->w + (size_t)row * m->row_bytes;
    size_t n = (size_t)m->n_cols, k = 0;
    float32x4_t sum[TILE][4];
    for (int i = 0; i < n_tokens * 4; i++) sum[i / 4][i % 4] = vdupq_n_f32(0);
    for (; k + 16 <= n; k += 16)
        for (size_t j = 0; j < 4; j++) {
            float32x4_t v = load(w, k + j * 4);
            for (int t = 0; t < n_tokens; t++)
                sum[t][j] = vfmaq_f32(sum[t][j], v, vld1q_f32(mul_floats(m, token + t) + k + j * 4));
        }
    for (int t = 0; t < n_tokens; t++) {
        uint8_t w_end[64] = { 0 };
        float x_end[16] = { 0 }, part[16];
        memcpy(w_end, w + k * size, (n - k) * size);
        memcpy(x_end, mul_floats(m, token + t) + k, (n - k) * sizeof(float));
        for (size_t j = 0; j < 4; j++) {
            if (k < n) sum[t][j] = vfmaq_f32(sum[t][j], load(w_end, j * 4), vld1q_f32(x_end + j * 4));
            vst1q_f32(part + j * 4, sum[t][j]);
        }
        m->y[(size_t)(token + t) * m->y_stride + (size_t)row] = sum_16_plain(part);
    }
}
INLINE void mul_floats_neon(const struct ms4_mul *m, size_t size, load_fn *load) {
    for (int row = 0; row < m->n_rows; row++) {
        int token = 0;
        for (; token + TILE <= m->n_tokens; token += TILE) tile_floats(m, row, token, TILE, size, load);
        for (; token < m->n_tokens; token++) tile_floats(m, row, token, 1, size, load);
    }
}
static void mul_f32_neon(const struct ms4_mul *m) { mul_floats_neon(m, 4, load_f32); }
static void mul_f16_neon(const struct ms4_mul *m) { mul_floats_neon(m, 2, load_f16); }
static void mul_bf16_neon(const struct ms4_mul *m) { mul_floats_neon(m, 2, load_bf16); }

/* --- attention: four rows by 16 columns in registers ------------------------------------------------------ */
/* c[r] += a[r] times b: n_rows rows of n numbers, and n rows of 4 * width numbers, in ascending order. */
INLINE void tile_product(float32x4_t (*c)[4], const float *const *a, const float *b, size_t b_stride, size_t n, int n_rows, int width) {
    for (size_t i = 0; i < n; i++)
        for (int h = 0; h < width; h++) {
            float32x4_t v = vld1q_f32(b + i * b_stride + (size_t)h * 4);
            for (int r = 0; r < n_rows; r++) c[r][h] = vfmaq_n_f32(c[r][h], v, a[r][i]);
        }
}
INLINE void add_values(float *const *o, const float *const *s, const float *factor, const float *v, size_t v_stride, int n_rows, int width) {
    float32x4_t c[TILE][4];
    for (int r = 0; r < n_rows; r++)
        for (int h = 0; h < width; h++) c[r][h] = vmulq_n_f32(vld1q_f32(o[r] + h * 4), factor[r]);
    tile_product(c, s, v, v_stride, ATTEND_KEYS, n_rows, width);
    for (int r = 0; r < n_rows; r++)
        for (int h = 0; h < width; h++) vst1q_f32(o[r] + h * 4, c[r][h]);
}
INLINE void attend_rows(const struct ms4_attend *a, const int *rows, int n_rows) {
    const float *q[TILE], *weights[TILE];
    float s[TILE][ATTEND_KEYS], factor[TILE], *o[TILE];
    for (int r = 0; r < n_rows; r++) q[r] = a->q + (size_t)rows[r] * a->q_stride;
    for (int half = 0; half < ATTEND_KEYS; half += 16) {
        float32x4_t c[TILE][4];
        for (int i = 0; i < n_rows * 4; i++) c[i / 4][i % 4] = vdupq_n_f32(0);
        tile_product(c, q, a->kt + half, ATTEND_KEYS, (size_t)a->d_k, n_rows, 4);
        for (int i = 0; i < n_rows * 4; i++) vst1q_f32(s[i / 4] + half + i % 4 * 4, c[i / 4][i % 4]);
    }
    for (int r = 0; r < n_rows; r++) {
        factor[r] = attend_softmax_plain(s[r], a->n_keys[rows[r]], a->m + rows[r], a->l + rows[r]);
        weights[r] = s[r];
    }
    for (int i = 0; i < a->d_v; i += 16) {
        for (int r = 0; r < n_rows; r++) o[r] = a->o + (size_t)rows[r] * a->o_stride + i;
        if (i + 16 <= a->d_v) add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 4);
        else add_values(o, weights, factor, a->v + i, a->v_stride, n_rows, 2);
    }
}
static void attend_neon(const struct ms4_attend *a) {
    int rows[ATTEND_ROWS], n = 0, i = 0;
    for (int r = 0; r < a->n_q; r++)
        if (a->n_keys[r] > 0) rows[n++] = r;
    for (; i + TILE <= n; i += TILE) attend_rows(a, rows + i, TILE);
    for (; i < n; i++) attend_rows(a, rows + i, 1);
}
/* --- attention over the kv cache: four rows by 16 columns again, two pairs of numbers at a time ------------- */
INLINE void half_block_neon(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs, int n, const uint8_t *next,
                            int n_lines) {
    int32x4_t sum[TILE][4];
    for (int i = 0; i < n * 4; i++) sum[i / 4][i % 4] = vdupq_n_s32(0);
    for (int i = 0; i < n_pairs; i++, b += 2 * SEGMENT_BLOCK) {
        if (i < n_lines) __builtin_prefetch(next + (size_t)i * 64, 0, 2);
        for (int h = 0; h < 2; h++) {
            int16x8x2_t v = vld2q_s16(b + h * 16);      /* the first numbers of eight pairs, the second ones */
            for (int r = 0; r < n; r++) {
                int16_t x = a[r][2 * i], y = a[r][2 * i + 1];
                int32x4_t low = vmlal_n_s16(sum[r][2 * h], vget_low_s16(v.val[0]), x), high = vmlal_high_n_s16(sum[r][2 * h + 1], v.val[0], x);
                sum[r][2 * h] = vmlal_n_s16(low, vget_low_s16(v.val[1]), y);
                sum[r][2 * h + 1] = vmlal_high_n_s16(high, v.val[1], y);
            }
        }
    }
    for (int r = 0; r < n; r++)
        for (int h = 0; h < 4; h++) vst1q_s32(c + (size_t)r * c_stride + h * 4, sum[r][h]);
}
static inline void block_product_neon(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs, int n_rows,
                                      const uint8_t *next, int n_lines) {
    for (int half = 0; half < SEGMENT_BLOCK; half += 16, b += 32, c += 16, n_lines = 0) {
        if (n_rows == TILE) half_block_neon(c, c_stride, a, b, n_pairs, TILE, next, n_lines);
        else for (int r = 0; r < n_rows; r++) half_block_neon(c + (size_t)r * c_stride, c_stride, a + r, b, n_pairs, 1, next, n_lines);
    }
}
static void attend_segment_neon(const struct ms4_attend_segment *a) { attend_segment_16(a, TILE, block_product_neon, segment_weights_plain); }

const struct ms4_ops ops_neon = {
    .isa = "neon",
    .mul = {
#define X(name, id, weights, bytes, quantised) [MS4_TYPE_##name] = mul_##name##_neon,
        MS4_TYPES(X)
#undef X
    },
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = quantize_plain,
    .rms_norm = rms_norm_plain,
    .silu_mul = silu_mul_plain,
    .add_scaled = add_scaled_plain,
    .attend = attend_neon,
    .quantize_16 = quantize_16_plain,
    .open_segment = open_segment_plain,
    .attend_segment = attend_segment_neon,
    .transpose_keys = transpose_keys_plain,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
#endif
