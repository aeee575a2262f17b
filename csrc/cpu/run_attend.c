/* run_attend.c -- multi-head latent attention over the kv cache (SPEC 2.2, 2.3).
 *
 * In:  Q, rotated and scaled; the caches, with the step's own latents in them.   Out: O, n_head x d_value a row.
 *
 * Absorbed form: W_uk is folded into the query, so all heads read the same rows of the cache (kv_rank + d_rope wide),
 * and W_uv is applied to what they collect.  Query and cache are 16-bit integers there (ops.h), at twice the speed of
 * floats, so it is the faster form for long prompts, too.  Keys are cut into segments of SEGMENT_KEYS, one block of the
 * cache each; a query attends to each segment afresh and the results are folded in order, in groups of SEGMENT_GROUP.
 * So decode can hand out segments as items of work, and a token's numbers are the same whether it came alone, in a
 * chunk, or beside others.
 */
#include "cpu_device.h"
#include "error.h"
#include <math.h>
#include <string.h>

#define ROW_TOKENS 4           /* tokens of one item in prefill: they share an opened segment */

/* A span's part of the work.  split: an item is one token, one segment and some of the heads, folded later; else an
 * item is per_item tokens, all their segments and all heads, folded on the way. */
typedef struct {
    const span *sp;
    int32_t n_segments, split, n_parts, per_item, first_item;
    size_t first_partial;      /* in rows of partial: n x n_segments x n_head if split, else n x n_head */
} span_work;
typedef struct {
    cpu_device *d;
    const step *st;
    const matrix *k_b, *v_b;
    span_work *spans;
    int32_t *row_span;         /* by row of the step: its span */
    int16_t *absorbed;         /* n x n_head x (kv_rank + d_rope), and two scales each */
    float *absorbed_d, *partial;
    int32_t layer;
} attend_run;

static size_t latent_width(const attend_run *run) { return (size_t)(run->st->shape->kv_rank + run->st->shape->d_rope); }
/* Floats of a result: { m, l, o[kv_rank] } */
static size_t result_width(const attend_run *run) { return (size_t)run->st->shape->kv_rank + 2; }
static size_t heads(const attend_run *run) { return (size_t)run->st->shape->n_head; }

/* --- W_uk and W_uv -------------------------------------------------------------------------- */
#define ROWS_AT_ONCE 4         /* dequantized by one call */
/* Dequantized rows [first, first + n_rows) of one head of k_b or v_b.  Decode reads each head's once: with every few
 * rows it asks for the same ones of the next head. */
static void load_rows(const struct ms4_ops *ops, const matrix *m, int32_t head, int32_t first, int32_t n_rows,
                      float *out) {
    const matrix s = matrix_rows(m, head, first, n_rows);
    size_t n = (size_t)s.n_cols, ahead = head + 1 < m->n_slices ? s.slice_bytes : 0;
    for (int32_t r = 0; r < s.n_rows; r += ROWS_AT_ONCE) {
        const uint8_t *row = s.data + (size_t)r * s.row_bytes;
        size_t rows = (size_t)int_min(ROWS_AT_ONCE, s.n_rows - r);
        ops->dequantize[s.type](out + (size_t)r * n, row, rows * n);
        for (size_t i = 0; ahead && i < rows * s.row_bytes; i += 64) __builtin_prefetch(row + ahead + i, 0, 2);
    }
    if (s.scales)
        for (size_t i = 0; i < (size_t)s.n_rows * n; i++) out[i] *= s.scales[0];
}
/* W_uk of a head out of m, d_nope rows of kv_rank, as kv_rank rows of d_nope.  spare: as many floats again. */
static void load_transposed(const struct ms4_ops *ops, const matrix *m, int32_t head, float *out, float *spare) {
    load_rows(ops, m, head, 0, m->n_rows, spare);
    for (size_t r = 0; r < (size_t)m->n_rows; r++)
        for (size_t c = 0; c < (size_t)m->n_cols; c++)
            out[c * (size_t)m->n_rows + r] = spare[r * (size_t)m->n_cols + c];
}
static void mul_float(const struct ms4_ops *ops, const float *w, int32_t rows, int32_t columns, const float *x,
                      size_t x_stride, int32_t n, float *y, size_t y_stride) {
    struct ms4_mul mul = { .w = (const uint8_t *)w, .row_bytes = (size_t)columns * sizeof(float), .n_rows = rows,
                           .n_cols = columns, .x = x, .x_stride = x_stride * sizeof(float), .n_tokens = n, .y = y,
                           .y_stride = y_stride };
    ops->mul[MS4_TYPE_f32](&mul);
}
/* y = one head of m times n rows x.  Few tokens take a few rows of m at a time, which then stay in the L1 cache. */
static void mul_slice(const struct ms4_ops *ops, const matrix *m, int32_t head, const float *x, size_t x_stride,
                      int32_t n, float *y, size_t y_stride, float *scratch) {
    int32_t rows = n < 8 ? 16 : m->n_rows;
    for (int32_t r = 0; r < m->n_rows; r += rows) {
        int32_t part = int_min(rows, m->n_rows - r);
        load_rows(ops, m, head, r, part, scratch);
        mul_float(ops, scratch, part, m->n_cols, x, x_stride, n, y + r, y_stride);
    }
}
/* An item is a head and a tile of tokens: Q -> absorbed = [W_uk^T q_nope | q_rope] */
static void absorb_item(void *context, int32_t item, int32_t thread) {
    const attend_run *run = context;
    const struct ms4_ops *ops = run->d->ops;
    const ms4_shape *s = run->st->shape;
    size_t d_head = (size_t)(s->d_nope + s->d_rope), q_stride = (size_t)s->n_head * d_head, rank = (size_t)s->kv_rank;
    int32_t head = item % s->n_head, first = item / s->n_head * TOKEN_TILE, n = int_min(TOKEN_TILE, run->st->n - first);
    float *a = run->d->scratch[thread], *w = a + TOKEN_TILE * rank;
    const float *q = cpu_row(run->d, BUF_Q, first) + (size_t)head * d_head;
    if (run->k_b->transposed) {
        load_transposed(ops, run->k_b, head, w, w + rank * (size_t)s->d_nope);
        mul_float(ops, w, s->kv_rank, s->d_nope, q, q_stride, n, a, rank);
    } else mul_slice(ops, run->k_b, head, q, q_stride, n, a, rank, w);
    for (int32_t t = 0; t < n; t++) {
        size_t at = (size_t)(first + t) * heads(run) + (size_t)head;
        int16_t *to = run->absorbed + at * latent_width(run);
        float *d = run->absorbed_d + 2 * at;
        d[0] = ops->quantize_16(to, a + (size_t)t * rank, rank, NULL);
        d[1] = ops->quantize_16(to + rank, q + (size_t)t * q_stride + s->d_nope, (size_t)s->d_rope, NULL);
    }
}
/* --- segments ------------------------------------------------------------------------------- */
/* Keys of the `most` at `key` that `position` may see. */
static int32_t seen(int32_t position, int32_t key, int32_t most) {
    int32_t n = position + 1 - key;
    return n < 0 ? 0 : n > most ? most : n;
}
/* Floats of scratch that an opened segment takes. */
static size_t segment_floats(const ms4_shape *s) {
    return 3 * SEGMENT_KEYS + (segment_keys_size(s->kv_rank, s->d_rope) + segment_values_size(s->kv_rank)) / 2;
}
static void start_results(float *out, size_t n, size_t row) {         /* n of them, of no key yet */
    memset(out, 0, n * row * sizeof *out);
    for (size_t i = 0; i < n; i++) out[i * row] = -INFINITY;
}
/* One segment for tokens [first, first + n) of a span and heads [head, last_head): out[(t * n_head + h)] */
static void attend_segment(const attend_run *run, const span *sp, int32_t first, int32_t n, int32_t segment,
                           int32_t head, int32_t last_head, float *out, float *buffer) {
    const ms4_shape *s = run->st->shape;
    const size_t row = result_width(run), width = latent_width(run);
    int32_t key = segment * SEGMENT_KEYS, next = key + SEGMENT_KEYS, last = sp->pos + first + n - 1;
    struct ms4_segment keys = { .rank = s->kv_rank, .d_rope = s->d_rope, .d = buffer,
                                .keys = (int16_t *)(buffer + 3 * SEGMENT_KEYS) };
    keys.values = keys.keys + segment_keys_size(s->kv_rank, s->d_rope);
    run->d->ops->open_segment(&keys, kv_cache_row(sp->kv, run->layer, key), kv_cache_scales(sp->kv, run->layer, key),
                              seen(last, key, SEGMENT_KEYS));
    for (int32_t t = 0; t < n; t++) {
        size_t at = (size_t)(sp->first + first + t) * heads(run) + (size_t)head;
        struct ms4_attend_segment a = { .segment = &keys, .q = run->absorbed + at * width,
                                        .q_d = run->absorbed_d + 2 * at,
                                        .out = out + ((size_t)t * heads(run) + (size_t)head) * row,
                                        .n_keys = seen(sp->pos + first + t, key, SEGMENT_KEYS),
                                        .n_q = last_head - head };
        if (!t && next <= last) {
            a.next = (const uint8_t *)kv_cache_row(sp->kv, run->layer, next);
            a.next_lines = (int32_t)((size_t)seen(last, next, SEGMENT_KEYS) * width * sizeof(int16_t) / 64);
        }
        if (a.n_keys) run->d->ops->attend_segment(&a);
        else start_results(a.out, (size_t)a.n_q, row);
    }
}
static const span_work *work_of(const attend_run *run, int32_t item) {
    const span_work *w = run->spans + run->st->n_spans - 1;
    while (item < w->first_item) w--;
    return w;
}
static void attend_item(void *context, int32_t item, int32_t thread) {
    const attend_run *run = context;
    const span_work *w = work_of(run, item);
    const size_t row = result_width(run);
    float *scratch = run->d->scratch[thread], *result = scratch + segment_floats(run->st->shape);
    item -= w->first_item;
    if (w->split) {
        int32_t part = item % w->n_parts, n_head = run->st->shape->n_head;
        item /= w->n_parts;
        float *out = run->partial + (w->first_partial + (size_t)item * heads(run)) * row;
        attend_segment(run, w->sp, item / w->n_segments, 1, item % w->n_segments, part * n_head / w->n_parts,
                       (part + 1) * n_head / w->n_parts, out, scratch);
        return;
    }
    int32_t first = item * w->per_item, n = int_min(w->per_item, w->sp->n - first), segment = 0;
    const int32_t last_segment = (w->sp->pos + first + n - 1) / SEGMENT_KEYS;
    const size_t n_rows = (size_t)n * heads(run);
    float *all = run->partial + (w->first_partial + (size_t)first * heads(run)) * row;
    float *group = result + ROW_TOKENS * heads(run) * row;
    start_results(all, n_rows, row);
    while (segment <= last_segment) {
        start_results(group, n_rows, row);
        do {
            attend_segment(run, w->sp, first, n, segment, 0, run->st->shape->n_head, result, scratch);
            for (size_t i = 0; i < n_rows; i++) run->d->ops->fold(group + i * row, result + i * row, row - 2);
        } while (++segment % SEGMENT_GROUP && segment <= last_segment);
        for (size_t i = 0; i < n_rows; i++) run->d->ops->fold(all + i * row, group + i * row, row - 2);
    }
}
/* The folded { m, l, o } of a row and a head; room: for two of them, to fold what lies there by segment. */
static const float *result_of(const attend_run *run, int32_t t, int32_t head, float *room) {
    const span_work *w = &run->spans[run->row_span[t]];
    const size_t row = result_width(run), at = (size_t)(t - w->sp->first);
    if (!w->split) return run->partial + (w->first_partial + at * heads(run) + (size_t)head) * row;
    const size_t first = at * (size_t)w->n_segments * heads(run) + (size_t)head;
    const float *from = run->partial + (w->first_partial + first) * row;
    float *out = room, *group = room + row;
    start_results(out, 1, row);
    for (int32_t segment = 0; segment < w->n_segments; from += heads(run) * row) {
        if (segment % SEGMENT_GROUP == 0) start_results(group, 1, row);
        run->d->ops->fold(group, from, row - 2);
        if (++segment % SEGMENT_GROUP == 0 || segment == w->n_segments) run->d->ops->fold(out, group, row - 2);
    }
    return out;
}
/* An item is a head and a tile of tokens: o = W_uv (o / l) */
static void collect_item(void *context, int32_t item, int32_t thread) {
    const attend_run *run = context;
    const ms4_shape *s = run->st->shape;
    size_t rank = (size_t)s->kv_rank, d_o = heads(run) * (size_t)s->d_value;
    int32_t head = item % s->n_head, first = item / s->n_head * TOKEN_TILE, n = int_min(TOKEN_TILE, run->st->n - first);
    float *w = run->d->scratch[thread], *x = w + (size_t)s->d_value * rank, *folded = x + TOKEN_TILE * rank;
    for (int32_t t = 0; t < n; t++) {
        const float *from = result_of(run, first + t, head, folded);
        for (size_t i = 0; i < rank; i++) x[(size_t)t * rank + i] = from[2 + i] / from[1];
    }
    float *o = cpu_row(run->d, BUF_O, first) + (size_t)head * (size_t)s->d_value;
    mul_slice(run->d->ops, run->v_b, head, x, rank, n, o, d_o, w);
}
/* --- the whole ------------------------------------------------------------------------------ */
/* Floats of scratch that one thread needs, whatever the step. */
static size_t scratch_floats(const ms4_shape *s) {
    size_t rank = (size_t)s->kv_rank, nope = (size_t)s->d_nope, d_v = (size_t)s->d_value;
    size_t absorb = TOKEN_TILE * rank + 2 * rank * nope, collect = d_v * rank + TOKEN_TILE * rank + 2 * (rank + 2);
    size_t attend = segment_floats(s) + 2 * ROW_TOKENS * (size_t)s->n_head * (rank + 2);
    return size_max(size_max(absorb, collect), attend);
}
/* Cuts the work of all spans into items; returns how many, and the rows of partial that they need. */
static int32_t cut(attend_run *run, size_t *n_partial) {
    int32_t items = 0, splits = 0;
    *n_partial = 0;
    for (int32_t i = 0; i < run->st->n_spans; i++) {
        const span *sp = &run->st->spans[i];
        span_work *w = &run->spans[i];
        const int32_t n_segments = (sp->pos + sp->n + SEGMENT_KEYS - 1) / SEGMENT_KEYS;
        *w = (span_work){ .sp = sp, .split = sp->n < 8, .n_segments = n_segments };
        if (w->split) splits += sp->n * w->n_segments;
        for (int32_t t = sp->first; t < sp->first + sp->n; t++) run->row_span[t] = i;
    }
    for (int32_t i = 0; i < run->st->n_spans; i++) {
        span_work *w = &run->spans[i];
        w->n_parts = w->split && splits ? int_min((pool_size(run->d->pool) - 1) / splits + 1, run->st->shape->n_head)
                                        : 1;
        w->per_item = w->split ? 1 : ROW_TOKENS;
        w->first_item = items;
        w->first_partial = *n_partial;
        items += w->split ? w->sp->n * w->n_segments * w->n_parts : (w->sp->n + w->per_item - 1) / w->per_item;
        *n_partial += (size_t)w->sp->n * heads(run) * (w->split ? (size_t)w->n_segments : 1);
    }
    return items;
}
int cpu_attend(device *base, const step *st, int32_t layer, const matrix *k_b, const matrix *v_b) {
    cpu_device *d = (cpu_device *)base;
    attend_run run = { .d = d, .st = st, .k_b = k_b, .v_b = v_b, .layer = layer };
    const size_t pairs = (size_t)st->n * heads(&run);
    size_t n_partial;
    TRY(cpu_scratch(d, scratch_floats(st->shape)));
    TRY(cpu_need(&d->spans, (size_t)st->n_spans * sizeof *run.spans));
    TRY(cpu_need(&d->row_spans, (size_t)st->n * sizeof *run.row_span));
    run.spans = d->spans.at;
    run.row_span = d->row_spans.at;
    int32_t items = cut(&run, &n_partial);
    TRY(cpu_need(&d->absorbed, pairs * latent_width(&run) * sizeof *run.absorbed));
    TRY(cpu_need(&d->absorbed_d, pairs * 2 * sizeof *run.absorbed_d));
    TRY(cpu_need(&d->partial, n_partial * result_width(&run) * sizeof *run.partial));
    run.absorbed = d->absorbed.at;
    run.absorbed_d = d->absorbed_d.at;
    run.partial = d->partial.at;
    int32_t tiles = (st->n + TOKEN_TILE - 1) / TOKEN_TILE * st->shape->n_head;
    pool_run(d->pool, absorb_item, &run, tiles, d->stop);
    pool_run(d->pool, attend_item, &run, items, d->stop);
    pool_run(d->pool, collect_item, &run, tiles, d->stop);
    return cpu_quantize_rows(d, BUF_O, st->n);
}
