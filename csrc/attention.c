/* attention.c -- multi-head latent attention over the kv cache (SPEC 2.2, 2.3).
 *
 * In:  ws.q, rotated and scaled; the cache, with the step's own latents in it.   Out: ws.o, n_head x d_value a token.
 *
 * Absorbed: W_uk is folded into the query, so all heads read the same rows of the cache (kv_rank + d_rope wide), and
 * W_uv is applied to what they collect.  Keys are cut into segments at multiples of SEGMENT; a query attends to each
 * segment afresh and the results are merged in order.  So decode can hand out segments as items of work, and a
 * token's numbers are the same whether it came alone or in a chunk.
 * Expanded: per head, keys and values are made from the latents once and used by every query of the chunk: less
 * arithmetic per pair, more per key.  The two differ in rounding only, but 8-bit activations turn a difference in the
 * last bit into one in the third digit; so the form is chosen once for all that is fed together (attention_expands),
 * and never by how it is cut into steps.
 */
#include "model.h"
#include <string.h>

#define SEGMENT (4 * ATTEND_KEYS)
#define ROW_TOKENS 4           /* tokens of one absorbed item in prefill */

typedef struct {
    const step *st;
    const layer_weights *w;
    int32_t layer, n_segments;
    int32_t per_item;          /* tokens of an item */
    int32_t split;             /* 1: an item is one token, one segment and some of the heads, merged later */
    int32_t n_parts;           /* split: of the heads */
    int32_t n_groups;          /* expanded: groups of queries per head */
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
static void load_slice(const ms4_engine *e, const matrix *m, int32_t head, float *out) {
    load_rows(e, m, head, 0, m->n_rows, out);
}
static void transpose(float *out, const float *in, int32_t rows, int32_t columns) {
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < columns; c++) out[(size_t)c * (size_t)rows + (size_t)r] = in[(size_t)r * (size_t)columns + (size_t)c];
}
/* W_uk of a head: to_latent != 0: kv_rank rows of d_nope, else d_nope rows of kv_rank.  spare: as many floats again. */
static void load_k_b(const attend_job *job, int32_t head, int to_latent, float *out, float *spare) {
    const matrix *m = &job->w->k_b;
    if (job->w->k_b_transposed != to_latent) {
        load_slice(job->st->e, m, head, out);
        return;
    }
    load_slice(job->st->e, m, head, spare);
    transpose(out, spare, m->n_rows, m->n_cols);
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
/* --- absorbed ----------------------------------------------------------------------------- */
/* An item is a head and a tile of tokens: ws.q -> ws.absorbed = [W_uk^T q_nope | q_rope] */
static void absorb_item(void *context, int32_t item, int32_t thread) {
    const attend_job *job = context;
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t d_head = (size_t)(s->d_nope + s->d_rope), q_stride = (size_t)s->n_head * d_head;
    size_t a_stride = (size_t)s->n_head * job->d_latent;
    int32_t head = item % s->n_head, first = item / s->n_head * TOKEN_TILE, n = int_min(TOKEN_TILE, job->st->n - first);
    float *w = e->ws.scratch[thread];
    const float *q = e->ws.q + (size_t)first * q_stride + (size_t)head * d_head;
    float *a = e->ws.absorbed + (size_t)first * a_stride + (size_t)head * job->d_latent;
    if (job->w->k_b_transposed) {
        load_k_b(job, head, 1, w, w + (size_t)s->kv_rank * (size_t)s->d_nope);
        mul_float(e, w, s->kv_rank, s->d_nope, q, q_stride, n, a, a_stride);
    } else mul_slice(e, &job->w->k_b, head, q, q_stride, n, a, a_stride, w);
    for (int32_t t = 0; t < n; t++)
        memcpy(a + (size_t)t * a_stride + s->kv_rank, q + (size_t)t * q_stride + s->d_nope, (size_t)s->d_rope * sizeof(float));
}
/* Latents of keys [key, key + n) as floats, k, and transposed, kt; absent ones are zero. */
static void load_keys(const attend_job *job, int32_t key, int32_t n, float *k, float *kt) {
    const struct ms4_ops *ops = job->st->e->ops;
    size_t width = job->d_latent;
    ops->from_half(k, kv_cache_at(&job->st->s->kv, job->layer, key), (size_t)n * width);
    memset(k + (size_t)n * width, 0, (size_t)(ATTEND_KEYS - n) * width * sizeof(float));
    ops->transpose_keys(kt, k, width, n, (int32_t)width);
}
/* The next tile's latents, which the kernel fetches while it computes with this one's. */
static void prefetch_keys(struct ms4_attend *a, const attend_job *job, int32_t key, int32_t last) {
    if (key + ATTEND_KEYS > last) return;
    a->next = (const uint8_t *)kv_cache_at(&job->st->s->kv, job->layer, key + ATTEND_KEYS);
    a->next_lines = (int32_t)((size_t)int_min(ATTEND_KEYS, last + 1 - key - ATTEND_KEYS) * job->d_latent * sizeof(uint16_t) / 64);
}
static int32_t seen(int32_t position, int32_t key) {          /* keys of the tile at `key` that `position` may see */
    int32_t n = position + 1 - key;
    return n < 0 ? 0 : n > ATTEND_KEYS ? ATTEND_KEYS : n;
}
static void start_row(float *row, size_t d) {
    memset(row, 0, (d + 2) * sizeof *row);
    row[0] = -INFINITY;
}
/* One segment for tokens [first, first + n) and heads [head, last_head): out[(t * n_head + h)] = { m, l, o[kv_rank] },
 * started afresh. */
static void attend_segment(const attend_job *job, int32_t first, int32_t n, int32_t segment, int32_t head, int32_t last_head,
                           float *out, float *buffer) {
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t width = job->d_latent, row = (size_t)s->kv_rank + 2;
    float *k = buffer, *kt = k + ATTEND_KEYS * width, m[ATTEND_ROWS], l[ATTEND_ROWS];
    int32_t n_keys[ATTEND_ROWS], last = job->st->pos + first + n - 1;
    for (int32_t t = 0; t < n; t++)
        for (int32_t h = head; h < last_head; h++) start_row(out + ((size_t)t * (size_t)s->n_head + (size_t)h) * row, row - 2);
    for (int32_t key = segment * SEGMENT; key < segment * SEGMENT + SEGMENT && key <= last; key += ATTEND_KEYS) {
        load_keys(job, key, seen(last, key), k, kt);
        for (int32_t t = 0; t < n; t++) {
            int32_t sees = seen(job->st->pos + first + t, key);
            for (int32_t h = head; sees && h < last_head; h += ATTEND_ROWS) {
                int32_t n_q = int_min(ATTEND_ROWS, last_head - h);
                float *at = out + ((size_t)t * (size_t)s->n_head + (size_t)h) * row;
                for (int32_t i = 0; i < n_q; i++) {
                    m[i] = at[(size_t)i * row];
                    l[i] = at[(size_t)i * row + 1];
                    n_keys[i] = sees;
                }
                struct ms4_attend a = {
                    .q = e->ws.absorbed + ((size_t)(first + t) * (size_t)s->n_head + (size_t)h) * width, .q_stride = width,
                    .kt = kt, .v = k, .v_stride = width, .o = at + 2, .o_stride = row, .m = m, .l = l, .n_keys = n_keys,
                    .n_q = n_q, .d_k = (int32_t)width, .d_v = s->kv_rank };
                if (h == head && !t) prefetch_keys(&a, job, key, last);
                e->ops->attend(&a);
                for (int32_t i = 0; i < n_q; i++) {
                    at[(size_t)i * row] = m[i];
                    at[(size_t)i * row + 1] = l[i];
                }
            }
        }
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
    float *scratch = e->ws.scratch[thread], *result = scratch + 2 * ATTEND_KEYS * job->d_latent;
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
    for (int32_t g = 0; g * SEGMENT < job->st->pos + first + n; g++) {
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
static int attend_absorbed(attend_job *job) {
    const step *st = job->st;
    ms4_engine *e = st->e;
    size_t heads = (size_t)e->shape.n_head, row = (size_t)e->shape.kv_rank + 2, n = (size_t)st->n;
    int32_t tiles = (st->n + TOKEN_TILE - 1) / TOKEN_TILE * e->shape.n_head;
    job->n_segments = (st->pos + st->n + SEGMENT - 1) / SEGMENT;
    job->split = st->n < 8;
    job->n_parts = int_min((pool_size(e->pool) - 1) / (job->n_segments * st->n) + 1, e->shape.n_head);
    job->per_item = job->split ? 1 : ROW_TOKENS;
    TRY(workspace_room(&e->ws.absorbed, &e->ws.absorbed_floats, n * heads * job->d_latent));
    TRY(workspace_room(&e->ws.partial, &e->ws.partial_floats, n * heads * row * (job->split ? (size_t)job->n_segments : 1)));
    pool_run(e->pool, absorb_item, job, tiles, &st->s->stop);
    int32_t items = job->split ? st->n * job->n_segments * job->n_parts : (st->n + job->per_item - 1) / job->per_item;
    pool_run(e->pool, attend_item, job, items, &st->s->stop);
    pool_run(e->pool, collect_item, job, tiles, &st->s->stop);
    return MS4_OK;
}
/* --- expanded ----------------------------------------------------------------------------- */
/* Keys (transposed) and values of one head for the tile of keys at `key`: kt = [W_uk c | rope key], v = W_uv c.
 * w_k: d_nope rows of kv_rank; w_v: kv_rank rows of d_value.  k, lt: room for the latents and the latents transposed. */
static void expand_tile(const attend_job *job, int32_t key, int32_t n, const float *w_k, const float *w_v, float *k, float *lt,
                        float *kt, float *v) {
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t rank = (size_t)s->kv_rank, d_v = (size_t)s->d_value;
    load_keys(job, key, n, k, lt);
    e->ops->product(kt, ATTEND_KEYS, w_k, rank, lt, ATTEND_KEYS, s->d_nope, ATTEND_KEYS, s->kv_rank);
    memcpy(kt + (size_t)s->d_nope * ATTEND_KEYS, lt + rank * ATTEND_KEYS, (size_t)s->d_rope * ATTEND_KEYS * sizeof(float));
    e->ops->product(v, d_v, k, job->d_latent, w_v, d_v, ATTEND_KEYS, s->d_value, s->kv_rank);
}
/* An item is a head and a group of queries. */
static void expand_item(void *context, int32_t item, int32_t thread) {
    const attend_job *job = context;
    const step *st = job->st;
    ms4_engine *e = st->e;
    const ms4_shape *s = &e->shape;
    size_t rank = (size_t)s->kv_rank, d_head = (size_t)(s->d_nope + s->d_rope), d_v = (size_t)s->d_value;
    size_t q_stride = (size_t)s->n_head * d_head, o_stride = (size_t)s->n_head * d_v;
    int32_t head = item % s->n_head, per_group = (st->n + job->n_groups - 1) / job->n_groups;
    int32_t first = item / s->n_head * per_group, end = int_min(first + per_group, st->n);
    float *w_k = e->ws.scratch[thread], *w_v = w_k + rank * (size_t)s->d_nope, *k = w_v + rank * d_v;
    float *lt = k + ATTEND_KEYS * job->d_latent, *kt = lt + ATTEND_KEYS * job->d_latent, *v = kt + ATTEND_KEYS * d_head;
    float *m = v + size_max(ATTEND_KEYS * d_v, rank * size_max((size_t)s->d_nope, d_v));
    float *l = m + per_group, *o = e->ws.o + (size_t)head * d_v;
    const float *q = e->ws.q + (size_t)head * d_head;
    load_k_b(job, head, 0, w_k, v);            /* v is free until the first tile */
    load_slice(e, &job->w->v_b, head, v);
    transpose(w_v, v, s->d_value, s->kv_rank);
    for (int32_t t = first; t < end; t++) {
        m[t - first] = -INFINITY;
        l[t - first] = 0;
        memset(o + (size_t)t * o_stride, 0, d_v * sizeof *o);
    }
    for (int32_t key = 0; key < st->pos + end; key += ATTEND_KEYS) {
        expand_tile(job, key, int_min(ATTEND_KEYS, st->pos + end - key), w_k, w_v, k, lt, kt, v);
        int32_t from = key - st->pos > first ? first + (key - st->pos - first) / ATTEND_ROWS * ATTEND_ROWS : first;
        for (int32_t t = from; t < end; t += ATTEND_ROWS) {
            int32_t n_keys[ATTEND_ROWS], n_q = int_min(ATTEND_ROWS, end - t);
            for (int32_t i = 0; i < n_q; i++) n_keys[i] = seen(st->pos + t + i, key);
            struct ms4_attend a = { .q = q + (size_t)t * q_stride, .q_stride = q_stride, .kt = kt, .v = v, .v_stride = d_v,
                                    .o = o + (size_t)t * o_stride, .o_stride = o_stride, .m = m + t - first,
                                    .l = l + t - first, .n_keys = n_keys, .n_q = n_q, .d_k = (int32_t)d_head, .d_v = s->d_value };
            e->ops->attend(&a);
        }
    }
    for (int32_t t = first; t < end; t++)
        for (size_t i = 0; i < d_v; i++) o[(size_t)t * o_stride + i] /= l[t - first];
}
/* Floats of scratch that one thread needs for a step of n tokens. */
static size_t scratch_floats(const attend_job *job) {
    const ms4_shape *s = &job->st->e->shape;
    size_t rank = (size_t)s->kv_rank, nope = (size_t)s->d_nope, d_v = (size_t)s->d_value, width = job->d_latent;
    size_t d_head = nope + (size_t)s->d_rope, n = (size_t)job->st->n;
    size_t absorb = 2 * rank * nope, collect = d_v * rank + TOKEN_TILE * rank + rank + 2;
    size_t attend = 2 * ATTEND_KEYS * width + ROW_TOKENS * (size_t)s->n_head * (rank + 2);
    size_t expand = rank * (nope + d_v) + ATTEND_KEYS * (2 * width + d_head)
                    + size_max(ATTEND_KEYS * d_v, rank * size_max(nope, d_v)) + 2 * n;
    size_t ffn = 2 * TOKEN_TILE * SUPERBLOCK;
    return size_max(size_max(absorb, collect), size_max(size_max(attend, expand), ffn));
}
int attention_prepare(const step *st) {
    ms4_engine *e = st->e;
    attend_job job = { .st = st, .d_latent = (size_t)(e->shape.kv_rank + e->shape.d_rope) };
    size_t needs = scratch_floats(&job);
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
/* Multiply-adds per (query, key): absorbed n_head (2 kv_rank + d_rope), expanded n_head (d_nope + d_rope + d_value);
 * expanding costs n_head (d_nope + d_value) kv_rank for each key, absorbing as much for each query (SPEC 2.3). */
int attention_expands(const ms4_shape *s, int32_t pos, size_t n) {
    double per_key = (double)(s->d_nope + s->d_value) * s->kv_rank;
    double saved = 2.0 * s->kv_rank + s->d_rope - (s->d_nope + s->d_rope + s->d_value);
    double pairs = (double)n * ((double)pos + (double)n / 2);
    return n > 2 * TOKEN_TILE && (double)pos * per_key < pairs * saved;
}
int attention_forward(const step *st, int32_t layer) {
    ms4_engine *e = st->e;
    attend_job job = { .st = st, .w = &e->layers[layer], .layer = layer,
                       .d_latent = (size_t)(e->shape.kv_rank + e->shape.d_rope) };
    if (!st->expand) return attend_absorbed(&job);
    job.n_groups = (2 * pool_size(e->pool) + e->shape.n_head - 1) / e->shape.n_head;
    pool_run(e->pool, expand_item, &job, e->shape.n_head * job.n_groups, &st->s->stop);
    return MS4_OK;
}
