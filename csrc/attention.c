/* attention.c -- multi-head latent attention over the kv cache (SPEC 2.2, 2.3).
 *
 * In:  ws.q, rotated and scaled; the cache, with the step's own latents in it.   Out: ws.o, n_head x d_value a token.
 *
 * Absorbed form: W_uk is folded into the query, so all heads read the same rows of the cache (kv_rank + d_rope wide),
 * and W_uv is applied to what they collect.  Query and cache are 16-bit integers there (ops.h), at twice the speed of
 * floats, so it is the faster form for long prompts, too.  Keys are cut into segments at multiples of SEGMENT_KEYS; a
 * query attends to each segment afresh and the results are merged in order.  So decode can hand out segments as items of
 * work, and a token's numbers are the same whether it came alone or in a chunk.
 */
#include "model.h"
#include <string.h>

#define ROW_TOKENS 4           /* tokens of one item in prefill */

typedef struct {
    const step *st;
    const layer_weights *w;
    int32_t layer, n_segments;
    int32_t per_item;          /* tokens of an item */
    int32_t split;             /* 1: an item is one token, one segment and some of the heads, merged later */
    int32_t n_parts;           /* split: of the heads */
    size_t d_latent;           /* kv_rank + d_rope */
} attend_job;

#define ROWS_AT_ONCE 4         /* dequantised by one call */
/* Dequantised rows [first, first + n_rows) of one head of k_b or v_b.  Decode reads each head's once: with every few rows
 * it asks for the same ones of the next head. */
static void load_rows(const ms4_engine *e, const matrix *m, int32_t head, int32_t first, int32_t n_rows, float *out) {
    matrix s = matrix_rows(m, head, first, n_rows);
    size_t n = (size_t)s.n_cols, ahead = head + 1 < m->n_slices ? s.slice_bytes : 0;
    for (int32_t r = 0; r < s.n_rows; r += ROWS_AT_ONCE) {
        const uint8_t *row = s.data + (size_t)r * s.row_bytes;
        size_t rows = (size_t)int_min(ROWS_AT_ONCE, s.n_rows - r);
        e->ops->dequantize[s.type](out + (size_t)r * n, row, rows * n);
        for (size_t i = 0; ahead && i < rows * s.row_bytes; i += 64) __builtin_prefetch(row + ahead + i, 0, 2);
    }
    if (s.scales)
        for (size_t i = 0; i < (size_t)s.n_rows * n; i++) out[i] *= s.scales[0];
}
/* W_uk of a head out of m, d_nope rows of kv_rank, as kv_rank rows of d_nope.  spare: as many floats again. */
static void load_transposed(const ms4_engine *e, const matrix *m, int32_t head, float *out, float *spare) {
    load_rows(e, m, head, 0, m->n_rows, spare);
    for (size_t r = 0; r < (size_t)m->n_rows; r++)
        for (size_t c = 0; c < (size_t)m->n_cols; c++) out[c * (size_t)m->n_rows + r] = spare[r * (size_t)m->n_cols + c];
}
static void mul_float(const ms4_engine *e, const float *w, int32_t rows, int32_t columns, const float *x, size_t x_stride,
                      int32_t n, float *y, size_t y_stride) {
    struct ms4_mul mul = { .w = (const uint8_t *)w, .row_bytes = (size_t)columns * sizeof(float), .n_rows = rows,
                           .n_cols = columns, .x = x, .x_stride = x_stride * sizeof(float), .n_tokens = n, .y = y,
                           .y_stride = y_stride };
    e->ops->mul[MS4_TYPE_f32](&mul);
}
/* y = one head of m times n rows x.  Few tokens take a few rows of m at a time, which then stay in the L1 cache. */
static void mul_slice(const ms4_engine *e, const matrix *m, int32_t head, const float *x, size_t x_stride, int32_t n, float *y,
                      size_t y_stride, float *scratch) {
    int32_t rows = n < 8 ? 16 : m->n_rows;
    for (int32_t r = 0; r < m->n_rows; r += rows) {
        int32_t part = int_min(rows, m->n_rows - r);
        load_rows(e, m, head, r, part, scratch);
        mul_float(e, scratch, part, m->n_cols, x, x_stride, n, y + r, y_stride);
    }
}
/* An item is a head and a tile of tokens: ws.q -> ws.absorbed = [W_uk^T q_nope | q_rope] */
static void absorb_item(void *context, int32_t item, int32_t thread) {
    const attend_job *job = context;
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t d_head = (size_t)(s->d_nope + s->d_rope), q_stride = (size_t)s->n_head * d_head, rank = (size_t)s->kv_rank;
    int32_t head = item % s->n_head, first = item / s->n_head * TOKEN_TILE, n = int_min(TOKEN_TILE, job->st->n - first);
    float *a = e->ws.scratch[thread], *w = a + TOKEN_TILE * rank;
    const float *q = e->ws.q + (size_t)first * q_stride + (size_t)head * d_head;
    if (job->w->k_b_transposed) {
        load_transposed(e, &job->w->k_b, head, w, w + rank * (size_t)s->d_nope);
        mul_float(e, w, s->kv_rank, s->d_nope, q, q_stride, n, a, rank);
    } else mul_slice(e, &job->w->k_b, head, q, q_stride, n, a, rank, w);
    for (int32_t t = 0; t < n; t++) {
        size_t at = (size_t)(first + t) * (size_t)s->n_head + (size_t)head;
        int16_t *to = e->ws.absorbed + at * job->d_latent;
        e->ws.absorbed_d[2 * at] = e->ops->quantize_16(to, a + (size_t)t * rank, rank);
        e->ws.absorbed_d[2 * at + 1] = e->ops->quantize_16(to + rank, q + (size_t)t * q_stride + s->d_nope, (size_t)s->d_rope);
    }
}
static int32_t seen(int32_t position, int32_t key, int32_t most) {       /* keys of the `most` at `key` that `position` may see */
    int32_t n = position + 1 - key;
    return n < 0 ? 0 : n > most ? most : n;
}
/* Floats of scratch that an opened segment takes. */
static size_t segment_floats(const ms4_shape *s) {
    return 3 * SEGMENT_KEYS + (segment_keys_size(s->kv_rank, s->d_rope) + segment_values_size(s->kv_rank)) / 2;
}
static void start_row(float *row, size_t d) {
    memset(row, 0, (d + 2) * sizeof *row);
    row[0] = -INFINITY;
}
/* One segment for tokens [first, first + n) and heads [head, last_head): out[(t * n_head + h)] = { m, l, o[kv_rank] } */
static void attend_segment(const attend_job *job, int32_t first, int32_t n, int32_t segment, int32_t head, int32_t last_head,
                           float *out, float *buffer) {
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    const kv_cache *kv = &job->st->s->kv;
    size_t row = (size_t)s->kv_rank + 2, n_head = (size_t)s->n_head;
    int32_t key = segment * SEGMENT_KEYS, next = key + SEGMENT_KEYS, last = job->st->pos + first + n - 1;
    struct ms4_segment keys = { .rank = s->kv_rank, .d_rope = s->d_rope, .d = buffer, .keys = (int16_t *)(buffer + 3 * SEGMENT_KEYS) };
    keys.values = keys.keys + segment_keys_size(s->kv_rank, s->d_rope);
    e->ops->open_segment(&keys, kv_cache_at(kv, job->layer, key), kv_scales_at(kv, job->layer, key), seen(last, key, SEGMENT_KEYS));
    for (int32_t t = 0; t < n; t++) {
        size_t at = (size_t)(first + t) * n_head + (size_t)head;
        struct ms4_attend_segment a = { .segment = &keys, .q = e->ws.absorbed + at * job->d_latent, .q_d = e->ws.absorbed_d + 2 * at,
                                        .out = out + ((size_t)t * n_head + (size_t)head) * row,
                                        .n_keys = seen(job->st->pos + first + t, key, SEGMENT_KEYS), .n_q = last_head - head };
        if (!t && next <= last) {
            a.next = (const uint8_t *)kv_cache_at(kv, job->layer, next);
            a.next_lines = (int32_t)((size_t)seen(last, next, SEGMENT_KEYS) * job->d_latent * sizeof(int16_t) / 64);
        }
        if (a.n_keys) e->ops->attend_segment(&a);
        else for (int32_t h = 0; h < a.n_q; h++) start_row(a.out + (size_t)h * row, row - 2);
    }
}
/* Adds one segment's { m, l, o } to the running one. */
static void merge(const ms4_engine *e, float *into, const float *from, size_t d) {
    if (from[0] == -INFINITY) return;
    float m = into[0] > from[0] ? into[0] : from[0];
    float old = expf(into[0] - m), new = expf(from[0] - m);
    into[1] = into[1] * old + from[1] * new;
    if (old != 1)
        for (size_t i = 0; i < d; i++) into[2 + i] *= old;
    e->ops->add_scaled(into + 2, from + 2, new, d);
    into[0] = m;
}
static void attend_item(void *context, int32_t item, int32_t thread) {
    const attend_job *job = context;
    ms4_engine *e = job->st->e;
    size_t row = (size_t)e->shape.kv_rank + 2, heads = (size_t)e->shape.n_head;
    float *scratch = e->ws.scratch[thread], *result = scratch + segment_floats(&e->shape);
    if (job->split) {
        int32_t part = item % job->n_parts, n_head = e->shape.n_head;
        item /= job->n_parts;
        attend_segment(job, item / job->n_segments, 1, item % job->n_segments, part * n_head / job->n_parts,
                       (part + 1) * n_head / job->n_parts, e->ws.partial + (size_t)item * heads * row, scratch);
        return;
    }
    int32_t first = item * job->per_item, n = int_min(job->per_item, job->st->n - first);
    float *all = e->ws.partial + (size_t)first * heads * row;
    for (size_t i = 0; i < (size_t)n * heads; i++) start_row(all + i * row, row - 2);
    for (int32_t g = 0; g * SEGMENT_KEYS < job->st->pos + first + n; g++) {
        attend_segment(job, first, n, g, 0, e->shape.n_head, result, scratch);
        for (size_t i = 0; i < (size_t)n * heads; i++) merge(e, all + i * row, result + i * row, row - 2);
    }
}
/* An item is a head and a tile of tokens: segments merged, o = W_uv (o / l) */
static void collect_item(void *context, int32_t item, int32_t thread) {
    const attend_job *job = context;
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t rank = (size_t)s->kv_rank, row = rank + 2, heads = (size_t)s->n_head, d_o = heads * (size_t)s->d_value;
    int32_t head = item % s->n_head, first = item / s->n_head * TOKEN_TILE, n = int_min(TOKEN_TILE, job->st->n - first);
    float *w = e->ws.scratch[thread], *x = w + (size_t)s->d_value * rank, *merged = x + TOKEN_TILE * rank;
    for (int32_t t = 0; t < n; t++) {
        const float *from = e->ws.partial + ((size_t)(first + t) * heads + (size_t)head) * row;
        if (job->split) {
            start_row(merged, rank);
            for (int32_t g = 0; g < job->n_segments; g++)
                merge(e, merged, e->ws.partial + (((size_t)(first + t) * (size_t)job->n_segments + (size_t)g) * heads + (size_t)head) * row, rank);
            from = merged;
        }
        for (size_t i = 0; i < rank; i++) x[(size_t)t * rank + i] = from[2 + i] / from[1];
    }
    mul_slice(e, &job->w->v_b, head, x, rank, n, e->ws.o + (size_t)first * d_o + (size_t)head * (size_t)s->d_value, d_o, w);
}
/* Floats of scratch that one thread needs, whatever the step. */
static size_t scratch_floats(const ms4_shape *s) {
    size_t rank = (size_t)s->kv_rank, nope = (size_t)s->d_nope, d_v = (size_t)s->d_value;
    size_t absorb = TOKEN_TILE * rank + 2 * rank * nope, collect = d_v * rank + TOKEN_TILE * rank + rank + 2;
    size_t attend = segment_floats(s) + ROW_TOKENS * (size_t)s->n_head * (rank + 2);
    size_t ffn = 2 * TOKEN_TILE * SUPERBLOCK;
    return size_max(size_max(absorb, collect), size_max(attend, ffn));
}
int attention_prepare(const step *st) {
    ms4_engine *e = st->e;
    size_t needs = scratch_floats(&e->shape);
    int32_t n = pool_size(e->pool);
    if (!e->ws.scratch) {
        e->ws.scratch = memory_take((size_t)n, sizeof *e->ws.scratch);
        FAIL_IF(!e->ws.scratch, MS4_ENOMEM, "no memory for scratch buffers");
    }
    if (needs <= e->ws.scratch_floats) return MS4_OK;
    e->ws.scratch_floats = 0;
    for (int32_t i = 0; i < n; i++) {
        memory_give(e->ws.scratch[i]);
        e->ws.scratch[i] = memory_take(needs, sizeof(float));
        FAIL_IF(!e->ws.scratch[i], MS4_ENOMEM, "no memory for scratch buffers (%zu bytes)", needs * sizeof(float));
    }
    e->ws.scratch_floats = needs;
    return MS4_OK;
}
int attention_forward(const step *st, int32_t layer) {
    ms4_engine *e = st->e;
    attend_job job = { .st = st, .w = &e->layers[layer], .layer = layer,
                       .d_latent = (size_t)(e->shape.kv_rank + e->shape.d_rope) };
    size_t heads = (size_t)e->shape.n_head, row = (size_t)e->shape.kv_rank + 2, n = (size_t)st->n;
    int32_t tiles = (st->n + TOKEN_TILE - 1) / TOKEN_TILE * e->shape.n_head;
    job.n_segments = (st->pos + st->n + SEGMENT_KEYS - 1) / SEGMENT_KEYS;
    job.split = st->n < 8;
    job.n_parts = int_min((pool_size(e->pool) - 1) / (job.n_segments * st->n) + 1, e->shape.n_head);
    job.per_item = job.split ? 1 : ROW_TOKENS;
    TRY(workspace_room(&e->ws.absorbed, &e->ws.absorbed_bytes, n * heads * job.d_latent * sizeof *e->ws.absorbed));
    TRY(workspace_room(&e->ws.absorbed_d, &e->ws.absorbed_d_bytes, n * heads * 2 * sizeof *e->ws.absorbed_d));
    TRY(workspace_room(&e->ws.partial, &e->ws.partial_bytes,
                       n * heads * row * (job.split ? (size_t)job.n_segments : 1) * sizeof *e->ws.partial));
    pool_run(e->pool, absorb_item, &job, tiles, &st->s->stop);
    int32_t items = job.split ? st->n * job.n_segments * job.n_parts : (st->n + job.per_item - 1) / job.per_item;
    pool_run(e->pool, attend_item, &job, items, &st->s->stop);
    pool_run(e->pool, collect_item, &job, tiles, &st->s->stop);
    return MS4_OK;
}
