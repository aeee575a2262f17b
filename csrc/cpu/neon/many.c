/* many.c -- products with many tokens on AArch64 with the dot-product instructions (ARMv8.2 and later).
 *
 * Rows are opened by unpack.h, which the compiler vectorises; the products are written out here: a panel of eight rows,
 * so that one register of activations serves four weights of each row.
 */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"

/* How a type's superblock is opened, and what its sums become. */
struct opener { unpack_fn *unpack; size_t bytes; enum ms4_family family; };

#define PANEL_ROWS 8              /* rows of a panel: two registers of four */

/* One superblock of eight rows, opened: four weights of each row side by side, and everything else by rows. */
struct panel {
    int8_t q[SUPERBLOCK / 4][PANEL_ROWS][4];
    int32_t scale[16][PANEL_ROWS], min[16][PANEL_ROWS];
    float d[16][PANEL_ROWS], m[8][PANEL_ROWS];
};
INLINE void open_panel(struct panel *p, const struct ms4_mul *m, int first, int i, int n, struct opener t) {
    for (int r = 0; r < PANEL_ROWS; r++) {
        struct opened o;
        int row = first + r < m->n_rows ? first + r : m->n_rows - 1;
        t.unpack(&o, m->w + (size_t)row * m->row_bytes + (size_t)i * t.bytes, n);
        for (int k = 0; k < SUPERBLOCK / 4; k++) memcpy(p->q[k][r], o.q + k * 4, 4);
        if (is_blocks(t.family)) {
            int n_scales = t.family == FAMILY_blocks_16 ? n / 16 : n / 32;
            for (int b = 0; b < n_scales; b++) p->d[b][r] = o.block_d[b];
            if (has_min(t.family)) for (int b = 0; b < n / 32; b++) p->m[b][r] = o.block_m[b];
            continue;
        }
        for (int g = 0; g < 16; g++) p->scale[g][r] = o.scale[g];
        p->d[0][r] = o.d;
        if (!has_min(t.family)) continue;
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
INLINE void tile_superblock(float32x4_t *y, const struct panel *p, const block_q8 *const *x, int n, int half,
                            enum ms4_family f) {
    int32x4_t sum[TILE], low[TILE];
    for (int t = 0; t < n; t++) sum[t] = low[t] = vdupq_n_s32(0);
    for (int g = 0; g < 16; g++) {
        int32x4_t dot[TILE], scale = vld1q_s32(p->scale[g] + half * 4);
        for (int t = 0; t < n; t++) dot[t] = vdupq_n_s32(0);
        tile_group(dot, p, x, n, half, g * 16);
        for (int t = 0; t < n; t++) sum[t] = vmlaq_s32(sum[t], dot[t], scale);
        if (has_min(f))
            for (int t = 0; t < n; t++) low[t] = vmlaq_n_s32(low[t], vld1q_s32(p->min[g] + half * 4), x[t]->sums[g]);
    }
    for (int t = 0; t < n; t++) {
        float32x4_t v = vmulq_f32(vld1q_f32(p->d[0] + half * 4), vcvtq_f32_s32(sum[t]));
        if (has_min(f)) v = vfmsq_f32(v, vld1q_f32(p->m[0] + half * 4), vcvtq_f32_s32(low[t]));
        y[t] = vfmaq_n_f32(y[t], v, x[t]->d);
    }
}
INLINE void tile_blocks(float32x4_t *y, const struct panel *p, const block_q8 *const *x, int n, int half, int n_here,
                        enum ms4_family f) {
    const int width = f == FAMILY_blocks_16 ? 16 : 32;
    float32x4_t v[TILE];
    for (int t = 0; t < n; t++) v[t] = vdupq_n_f32(0);
    for (int b = 0; b < n_here / width; b++) {
        int32x4_t dot[TILE];
        for (int t = 0; t < n; t++) dot[t] = vdupq_n_s32(0);
        for (int k = b * width; k < (b + 1) * width; k += 16) tile_group(dot, p, x, n, half, k);
        for (int t = 0; t < n; t++) {
            v[t] = vfmaq_f32(v[t], vld1q_f32(p->d[b] + half * 4), vcvtq_f32_s32(dot[t]));
            if (has_min(f))
                v[t] = vfmaq_n_f32(v[t], vld1q_f32(p->m[b] + half * 4),
                                   (float)(x[t]->sums[2 * b] + x[t]->sums[2 * b + 1]));
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
INLINE void tile(const struct ms4_mul *m, const struct panel *p, int token, int n, int first, int i, int n_here,
                 struct opener o) {
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
INLINE void mul_many(const struct ms4_mul *m, struct opener o) {
    for (int first = 0; first < m->n_rows; first += PANEL_ROWS)
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
#define X(type, id, weights, bytes, family, ...) \
    void mul_##type##_neon(const struct ms4_mul *m) { \
        const struct opener o = { unpack_##type, SUPERBLOCK_BYTES(type), FAMILY_##family }; \
        if (m->n_tokens < PANEL_FROM) mul_one_##type##_neon(m); \
        else mul_many(m, o); \
    }
MS4_QUANTIZED_TYPES(X)
#undef X
#endif
