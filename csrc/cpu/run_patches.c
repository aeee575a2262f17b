/* run_patches.c -- the vision tower's own steps (SPEC 3.3, 3.4): attention of all patches to all, merging, biases.
 *
 * Keys are taken a tile of ATTEND_KEYS at a time with a running softmax, so memory grows with the patches, not with
 * their square.
 */
#include "cpu_device.h"
#include "error.h"
#include <math.h>
#include <string.h>

#define PATCHES_AT_ONCE 16     /* of an item that takes patch after patch */
#define QUERY_GROUP 128        /* queries of one attention item */

typedef struct {
    const cpu_device *d;
    const patch_grid *g;
    float *keys;               /* by head and tile: the keys, transposed */
    const vector *bias;
    buffer b;
    int32_t n, first, gelu;
} patch_run;

static size_t d_head(const patch_run *run) { return run->d->rows[BUF_Q].width / (size_t)run->g->n_head; }
static int32_t n_tiles(const patch_run *run) { return (run->n + ATTEND_KEYS - 1) / ATTEND_KEYS; }
static int32_t last_of(const patch_run *run, int32_t item) { return int_min((item + 1) * PATCHES_AT_ONCE, run->n); }
static void each_patch(const patch_run *run, pool_fn *fn) {
    pool_run(run->d->pool, fn, (void *)run, (run->n + PATCHES_AT_ONCE - 1) / PATCHES_AT_ONCE, run->d->stop);
}
/* --- attention --------------------------------------------------------------------------------- */
/* Rotates a head in place: the first half of its pairs by the patch's row, the second by its column. */
static void rotate_item(void *context, int32_t item, int32_t thread) {
    const patch_run *run = context;
    const size_t width = d_head(run), d = run->d->rows[BUF_Q].width;
    const float scale = 1 / sqrtf((float)width);
    (void)thread;
    for (int32_t t = item * PATCHES_AT_ONCE; t < last_of(run, item); t++) {
        const float *row = run->g->rope + (size_t)(t / run->g->columns) * width;
        const float *column = run->g->rope + (size_t)(t % run->g->columns) * width;
        float *q = cpu_row(run->d, BUF_Q, t), *k = cpu_row(run->d, BUF_K, t);
        for (size_t i = 0; i < d; i += 2) {
            const float *turn = (i % width < width / 2 ? row : column) + i % width;
            float q0 = q[i] * scale, q1 = q[i + 1] * scale, k0 = k[i], k1 = k[i + 1];
            q[i] = q0 * turn[0] - q1 * turn[1];
            q[i + 1] = q0 * turn[1] + q1 * turn[0];
            k[i] = k0 * turn[0] - k1 * turn[1];
            k[i + 1] = k0 * turn[1] + k1 * turn[0];
        }
    }
}
static float *keys_at(const patch_run *run, size_t head, int32_t tile) {
    return run->keys + (head * (size_t)n_tiles(run) + (size_t)tile) * ATTEND_KEYS * d_head(run);
}
static void transpose_item(void *context, int32_t item, int32_t thread) {
    const patch_run *run = context;
    const size_t width = d_head(run);
    int32_t n = int_min(ATTEND_KEYS, run->n - item * ATTEND_KEYS);
    (void)thread;
    for (size_t head = 0; head < (size_t)run->g->n_head; head++)
        run->d->ops->transpose_keys(keys_at(run, head, item), cpu_row(run->d, BUF_K, item * ATTEND_KEYS) + head * width,
                                    run->d->rows[BUF_K].width, n, (int32_t)width);
}
/* An item is a head and a group of queries: x = softmax(q k) v */
static void attend_item(void *context, int32_t item, int32_t thread) {
    const patch_run *run = context;
    const size_t width = d_head(run), d = run->d->rows[BUF_Q].width, head = (size_t)(item % run->g->n_head);
    int32_t first = item / run->g->n_head * QUERY_GROUP, end = int_min(first + QUERY_GROUP, run->n);
    float m[QUERY_GROUP], l[QUERY_GROUP];
    (void)thread;
    for (int32_t t = first; t < end; t++) {
        m[t - first] = -INFINITY;
        l[t - first] = 0;
        memset(cpu_row(run->d, BUF_X, t) + head * width, 0, width * sizeof(float));
    }
    for (int32_t tile = 0; tile < n_tiles(run); tile++) {
        int32_t key = tile * ATTEND_KEYS, n_keys[ATTEND_ROWS];
        for (int32_t i = 0; i < ATTEND_ROWS; i++) n_keys[i] = int_min(ATTEND_KEYS, run->n - key);
        for (int32_t t = first; t < end; t += ATTEND_ROWS) {
            struct ms4_attend a = {
                .q = cpu_row(run->d, BUF_Q, t) + head * width, .q_stride = d,
                .o = cpu_row(run->d, BUF_X, t) + head * width, .o_stride = d,
                .kt = keys_at(run, head, tile), .v = cpu_row(run->d, BUF_V, key) + head * width, .v_stride = d,
                .m = m + t - first, .l = l + t - first, .n_keys = n_keys, .n_q = int_min(ATTEND_ROWS, end - t),
                .d_k = (int32_t)width, .d_v = (int32_t)width };
            run->d->ops->attend(&a);
        }
    }
    for (int32_t t = first; t < end; t++)
        for (size_t i = 0; i < width; i++) cpu_row(run->d, BUF_X, t)[head * width + i] /= l[t - first];
}
int cpu_attend_patches(device *base, const patch_grid *g) {
    cpu_device *d = (cpu_device *)base;
    patch_run run = { .d = d, .g = g, .n = g->columns * g->rows };
    const int32_t padded = n_tiles(&run) * ATTEND_KEYS;
    const cpu_rows *v = &d->rows[BUF_V];
    TRY(cpu_need(&d->keys, (size_t)padded * d->rows[BUF_K].width * sizeof *run.keys));
    run.keys = d->keys.at;
    memset(cpu_row(d, BUF_V, run.n), 0, (size_t)(padded - run.n) * v->width * sizeof *v->f);      /* absent keys */
    each_patch(&run, rotate_item);
    pool_run(d->pool, transpose_item, &run, n_tiles(&run), d->stop);
    pool_run(d->pool, attend_item, &run, (run.n + QUERY_GROUP - 1) / QUERY_GROUP * g->n_head, d->stop);
    return cpu_quantize_rows(d, BUF_X, run.n);
}
/* --- the projector ------------------------------------------------------------------------------- */
static void merge_item(void *context, int32_t item, int32_t thread) {
    const patch_run *run = context;
    const size_t d = run->d->rows[run->b].width, m = (size_t)run->g->merge, columns = (size_t)run->g->columns / m;
    (void)thread;
    for (int32_t i = item * PATCHES_AT_ONCE; i < last_of(run, item); i++) {
        size_t at = (size_t)(run->first + i), y = at / columns * m, x = at % columns * m;
        float *to = cpu_row(run->d, BUF_MERGED, i);
        for (size_t dy = 0; dy < m; dy++)
            for (size_t dx = 0; dx < m; dx++) {
                const float *from = cpu_row(run->d, run->b, (int32_t)((y + dy) * (size_t)run->g->columns + x + dx));
                for (size_t c = 0; c < d; c++) to[c * m * m + dy * m + dx] = from[c];
            }
        cpu_quantize_row(run->d, BUF_MERGED, i);
    }
}
int cpu_merge_patches(device *d, const patch_grid *g, buffer from, int32_t first, int32_t n) {
    each_patch(&(patch_run){ .d = (cpu_device *)d, .g = g, .b = from, .first = first, .n = n }, merge_item);
    return MS4_OK;
}
static void bias_item(void *context, int32_t item, int32_t thread) {
    const patch_run *run = context;
    const size_t width = run->d->rows[run->b].width;
    (void)thread;
    for (int32_t t = item * PATCHES_AT_ONCE; t < last_of(run, item); t++) {
        float *y = cpu_row(run->d, run->b, t);
        for (size_t i = 0; run->bias->data && i < width; i++) y[i] += run->bias->data[i];
        if (run->gelu) run->d->ops->gelu(y, width);
        cpu_quantize_row(run->d, run->b, t);
    }
}
int cpu_bias(device *d, buffer b, const vector *bias, int32_t gelu, int32_t n) {
    each_patch(&(patch_run){ .d = (cpu_device *)d, .b = b, .bias = bias, .gelu = gelu, .n = n }, bias_item);
    return MS4_OK;
}
