/* run_tokens.c -- what is done to each row on its own: embedding, norms, latents into the kv cache, queries. */
#include "cpu_device.h"
#include <string.h>

/* A row-wise call: what its items need of the arguments. */
typedef struct {
    const cpu_device *d;
    const step *st;
    const vector *weight;
    buffer x, y;
    float eps;
    int32_t layer, n, per_item;
} row_run;

/* Runs fn over n rows, `per_item` at a time. */
static int run_rows(row_run *run, pool_fn *fn) {
    run->per_item = run->n < 8 ? 1 : 8;
    pool_run(run->d->pool, fn, run, (run->n + run->per_item - 1) / run->per_item, run->d->stop);
    return MS4_OK;
}
static int32_t end_of(const row_run *run, int32_t item) { return int_min((item + 1) * run->per_item, run->n); }

/* --- blocks -------------------------------------------------------------------------------- */
static void quantize_item(void *context, int32_t item, int32_t thread) {
    const row_run *run = context;
    (void)thread;
    for (int32_t t = item * run->per_item; t < end_of(run, item); t++) cpu_quantize_row(run->d, run->x, t);
}
int cpu_quantize_rows(cpu_device *d, buffer b, int32_t n) {
    return d->rows[b].q ? run_rows(&(row_run){ .d = d, .x = b, .n = n }, quantize_item) : MS4_OK;
}
/* --- norms --------------------------------------------------------------------------------- */
static void norm_item(void *context, int32_t item, int32_t thread) {
    const row_run *run = context;
    (void)thread;
    for (int32_t t = item * run->per_item; t < end_of(run, item); t++) {
        run->d->ops->rms_norm(cpu_row(run->d, run->y, t), cpu_row(run->d, run->x, t), run->weight->data,
                              (size_t)run->weight->n, run->eps);
        cpu_quantize_row(run->d, run->y, t);
    }
}
int cpu_norm(device *d, buffer x, const vector *w, float eps, buffer y, int32_t n) {
    return run_rows(&(row_run){ .d = (cpu_device *)d, .weight = w, .x = x, .y = y, .eps = eps, .n = n }, norm_item);
}
/* --- attention's rows ---------------------------------------------------------------------- */
static const span *span_of(const step *st, int32_t row) {
    const span *s = st->spans;
    while (row >= s->first + s->n) s++;
    return s;
}
/* Rotates the d_rope values of x in place, adjacent pairs; rope holds cos, sin of each pair (SPEC 2.2). */
static void rotate(float *x, const float *rope, int32_t d_rope) {
    for (int32_t i = 0; i < d_rope; i += 2) {
        float a = x[i], b = x[i + 1], c = rope[i], s = rope[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}
/* KV: latent normalised, rope key rotated, both into the kv cache */
static void latent_item(void *context, int32_t item, int32_t thread) {
    const row_run *run = context;
    const struct ms4_ops *ops = run->d->ops;
    const size_t rank = (size_t)run->st->shape->kv_rank, d_rope = (size_t)run->st->shape->d_rope;
    (void)thread;
    for (int32_t t = item * run->per_item; t < end_of(run, item); t++) {
        const span *s = span_of(run->st, t);
        float *kv = cpu_row(run->d, BUF_KV, t), *d = kv_cache_scales(s->kv, run->layer, s->pos + t - s->first);
        int16_t *to = kv_cache_row(s->kv, run->layer, s->pos + t - s->first);
        ops->rms_norm(kv, kv, run->weight->data, rank, run->eps);
        rotate(kv + rank, run->st->rope + (size_t)t * d_rope, (int32_t)d_rope);
        d[0] = ops->quantize_16(to, kv, rank, d + 2);
        d[1] = ops->quantize_16(to + rank, kv + rank, d_rope, NULL);
    }
}
int cpu_latents(device *d, const step *st, int32_t layer, const vector *norm, float eps) {
    row_run run = { .d = (cpu_device *)d, .st = st, .weight = norm, .eps = eps, .layer = layer, .n = st->n };
    return run_rows(&run, latent_item);
}
/* Q: rope part rotated, all of it times the row's factor (SPEC 1.3) */
static void query_item(void *context, int32_t item, int32_t thread) {
    const row_run *run = context;
    const step *st = run->st;
    const int32_t d_head = st->shape->d_nope + st->shape->d_rope, d_rope = st->shape->d_rope;
    (void)thread;
    for (int32_t t = item * run->per_item; t < end_of(run, item); t++) {
        float *q = cpu_row(run->d, BUF_Q, t);
        for (int32_t h = 0; h < st->shape->n_head; h++, q += d_head) {
            rotate(q + st->shape->d_nope, st->rope + (size_t)t * (size_t)d_rope, d_rope);
            for (int32_t i = 0; i < d_head; i++) q[i] *= st->scale[t];
        }
    }
}
int cpu_queries(device *d, const step *st) {
    return run_rows(&(row_run){ .d = (cpu_device *)d, .st = st, .n = st->n }, query_item);
}
/* --- first and last ------------------------------------------------------------------------ */
int cpu_embed(device *base, const matrix *m, const int32_t *tokens, const float *rows, int32_t first, int32_t n) {
    const cpu_device *d = (const cpu_device *)base;
    const size_t width = d->rows[BUF_H].width;
    for (int32_t t = 0; t < n; t++) {
        float *h = cpu_row(d, BUF_H, first + t);
        if (tokens[t] == MS4_ROW) {
            memcpy(h, rows, width * sizeof *h);
            rows += width;
            continue;
        }
        d->ops->dequantize[m->type](h, m->data + (size_t)tokens[t] * m->row_bytes, width);
        for (size_t i = 0; m->scales && i < width; i++) h[i] *= m->scales[0];
    }
    return MS4_OK;
}
int cpu_keep(device *base, const int32_t *rows, int32_t n) {
    const cpu_device *d = (const cpu_device *)base;
    const cpu_rows *x = &d->rows[BUF_X];
    for (int32_t i = 0; i < n; i++) {
        if (rows[i] == i) continue;
        memcpy(cpu_row(d, BUF_H, i), cpu_row(d, BUF_H, rows[i]), d->rows[BUF_H].width * sizeof(float));
        memcpy(cpu_row(d, BUF_X, i), cpu_row(d, BUF_X, rows[i]), x->width * sizeof(float));
        if (x->q) memcpy(x->q + (size_t)i * x->blocks, x->q + (size_t)rows[i] * x->blocks, x->blocks * sizeof *x->q);
    }
    return MS4_OK;
}
