/* moe.c -- the feed-forward half of a layer: router, top-k, then gate/up/down of routed, shared or dense FFNs.
 *
 * Tokens are grouped by expert, so an expert's weights are read once for all its tokens.  Two runs of the pool:
 * gate and up with SiLU, then down.  In the second, an item owns some rows of the output for all tokens, and adds
 * shared expert first, then experts in ascending order: the sum of a token never depends on the grouping.
 * silu(gate) * up stays float32 or int8 with float32 scales: it leaves the range of float16 (SPEC 2.5).
 */
#include "model.h"
#include <string.h>

#define HIDDEN_CHUNK SUPERBLOCK                /* hidden columns of one gate/up item: whole blocks of activations */
#define DOWN_TILE 64                           /* tokens whose down results wait in scratch to be added */

typedef struct {
    const step *st;
    const ffn_job *jobs;
    int32_t n_jobs, rows;                      /* rows: of the output, per down item */
} ffn_run;

/* The n_expert_used largest of n logits, ties to the lowest index, ascending by index; weights as in SPEC 2.4. */
static void choose(const float *logits, const ms4_shape *s, int32_t *ids, float *weights) {
    double max = -INFINITY, sum = 0, chosen_sum = 0;
    int32_t k = s->n_expert_used;
    for (int32_t i = 0; i < s->n_expert; i++)
        if (logits[i] > max) max = logits[i];
    for (int32_t i = 0; i < s->n_expert; i++) sum += exp(logits[i] - max);
    for (int32_t j = 0; j < k; j++) {
        int32_t best = -1;
        for (int32_t i = 0; i < s->n_expert; i++) {
            int taken = 0;
            for (int32_t other = 0; other < j; other++) taken |= ids[other] == i;
            if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
        }
        ids[j] = best;
        chosen_sum += exp(logits[best] - max);
    }
    for (int32_t j = 1; j < k; j++)            /* k is small: insertion sort */
        for (int32_t i = j; i > 0 && ids[i] < ids[i - 1]; i--) {
            int32_t swap = ids[i];
            ids[i] = ids[i - 1];
            ids[i - 1] = swap;
        }
    double total = s->router_norm ? chosen_sum : sum;
    for (int32_t j = 0; j < k; j++) weights[j] = (float)(s->router_scale * exp(logits[ids[j]] - max) / total);
}
static void choose_item(void *context, int32_t item, int32_t thread) {
    const step *st = context;
    const ms4_shape *s = &st->e->shape;
    workspace *ws = &st->e->ws;
    (void)thread;
    for (int32_t t = item * 16; t < int_min(item * 16 + 16, st->n); t++) {
        size_t k = (size_t)t * (size_t)s->n_expert_used;
        choose(ws->router + (size_t)t * (size_t)s->n_expert, s, ws->chosen + k, ws->chosen_weight + k);
    }
}
/* chosen, weights by token -> pairs by expert: pair_token, pair_weight, expert_first; returns experts in use. */
static int32_t group(const step *st) {
    const ms4_shape *s = &st->e->shape;
    workspace *ws = &st->e->ws;
    int32_t n_pairs = st->n * s->n_expert_used, used = 0, *first = ws->expert_first;
    memset(first, 0, (size_t)(s->n_expert + 1) * sizeof *first);
    for (int32_t i = 0; i < n_pairs; i++) first[ws->chosen[i] + 1]++;
    for (int32_t i = 0; i < s->n_expert; i++) {
        if (first[i + 1]) ws->expert_ids[used++] = i;
        first[i + 1] += first[i];
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        int32_t pair = first[ws->chosen[i]]++;
        ws->pair_token[pair] = i / s->n_expert_used;
        ws->pair_weight[pair] = ws->chosen_weight[i];
    }
    memmove(first + 1, first, (size_t)s->n_expert * sizeof *first);
    first[0] = 0;
    return used;
}
/* Where the gate rows lie that come after the chunk at `column`: this job's next, or the next job's first. */
static const uint8_t *after_chunk(const ffn_run *run, const ffn_job *job, int32_t column) {
    if (column + HIDDEN_CHUNK < job->w.gate.n_rows) return job->w.gate.data + (size_t)(column + HIDDEN_CHUNK) * job->w.gate.row_bytes;
    return job + 1 < run->jobs + run->n_jobs ? job[1].w.gate.data : NULL;
}
static void gate_up_tile(const ffn_run *run, const ffn_job *job, int32_t column, int32_t pair, int32_t n, float *gate) {
    ms4_engine *e = run->st->e;
    size_t d = (size_t)e->shape.d_model;
    int32_t columns = int_min(HIDDEN_CHUNK, job->w.gate.n_rows - column);
    float *up = gate + TOKEN_TILE * HIDDEN_CHUNK;
    activations x = { e->ws.x, e->ws.x_q, d, blocks_of(d) };
    const int32_t *tokens = e->ws.pair_token + job->first + pair;
    matrix gate_rows = matrix_rows(&job->w.gate, 0, column, columns);
    matrix up_rows = matrix_rows(&job->w.up, 0, column, columns);
    matrix_mul(e->ops, &gate_rows, &x, tokens, n, gate, HIDDEN_CHUNK, up_rows.data);
    matrix_mul(e->ops, &up_rows, &x, tokens, n, up, HIDDEN_CHUNK, after_chunk(run, job, column));
    for (int32_t t = 0; t < n; t++) {
        float *hidden = gate + (size_t)t * HIDDEN_CHUNK;
        size_t row = (size_t)(pair + t);
        if (!matrix_quantised(&job->w.down)) hidden = job->hidden_f + row * job->f_stride + (size_t)column;
        e->ops->silu_mul(hidden, gate + (size_t)t * HIDDEN_CHUNK, up + (size_t)t * HIDDEN_CHUNK, (size_t)columns);
        if (matrix_quantised(&job->w.down))
            e->ops->quantize(job->hidden_q + row * job->q_stride + (size_t)column / SUPERBLOCK, hidden, (size_t)columns);
    }
}
static int32_t gate_up_items(const ffn_job *job) {
    return (job->w.gate.n_rows + HIDDEN_CHUNK - 1) / HIDDEN_CHUNK * ((job->n + TOKEN_TILE - 1) / TOKEN_TILE);
}
static void gate_up_item(void *context, int32_t item, int32_t thread) {
    const ffn_run *run = context;
    const ffn_job *job = run->jobs;
    while (item >= job->first_item + gate_up_items(job)) job++;
    int32_t chunks = (job->w.gate.n_rows + HIDDEN_CHUNK - 1) / HIDDEN_CHUNK;
    item -= job->first_item;
    int32_t pair = item / chunks * TOKEN_TILE;
    gate_up_tile(run, job, item % chunks * HIDDEN_CHUNK, pair, int_min(TOKEN_TILE, job->n - pair),
                 run->st->e->ws.scratch[thread]);
}
static void down_item(void *context, int32_t item, int32_t thread) {
    const ffn_run *run = context;
    ms4_engine *e = run->st->e;
    size_t d = (size_t)e->shape.d_model;
    int32_t row = item * run->rows, n_rows = int_min(run->rows, e->shape.d_model - row);
    float *sum = e->ws.scratch[thread];
    for (const ffn_job *job = run->jobs; job < run->jobs + run->n_jobs; job++) {
        matrix part = matrix_rows(&job->w.down, 0, row, n_rows);
        const matrix *after = &(job + 1 < run->jobs + run->n_jobs ? job + 1 : run->jobs)->w.down;
        const uint8_t *next = after->data + (size_t)(job + 1 < run->jobs + run->n_jobs ? row : row + n_rows) * after->row_bytes;
        for (int32_t t = 0; t < job->n; t += DOWN_TILE) {
            int32_t n = int_min(DOWN_TILE, job->n - t);
            activations hidden = { job->hidden_f, job->hidden_q + (size_t)t * job->q_stride, job->f_stride, job->q_stride };
            if (hidden.f) hidden.f += (size_t)t * job->f_stride;
            matrix_mul(e->ops, &part, &hidden, NULL, n, sum, (size_t)run->rows, next);
            for (int32_t i = 0; i < n; i++) {
                size_t pair = (size_t)(job->first + t + i), token = (size_t)e->ws.pair_token[pair];
                e->ops->add_scaled(e->ws.h + token * d + (size_t)row, sum + (size_t)i * (size_t)run->rows,
                                   e->ws.pair_weight[pair], (size_t)n_rows);
            }
        }
    }
}
static void run_ffns(const step *st, ffn_job *jobs, int32_t n_jobs) {
    ms4_engine *e = st->e;
    int32_t items = 0;
    for (int32_t i = 0; i < n_jobs; i++) {
        jobs[i].first_item = items;
        items += gate_up_items(&jobs[i]);
    }
    ffn_run run = { st, jobs, n_jobs, rows_per_item(e->pool, e->shape.d_model, st->n) };
    pool_run(e->pool, gate_up_item, &run, items, &st->s->stop);
    pool_run(e->pool, down_item, &run, (e->shape.d_model + run.rows - 1) / run.rows, &st->s->stop);
}
/* The job of an FFN that every token goes through, with weight 1; its pairs come after the routed ones. */
static ffn_job every_token(const step *st, const expert_view *w) {
    ms4_engine *e = st->e;
    int32_t first = st->n * e->shape.n_expert_used;
    for (int32_t t = 0; t < st->n; t++) {
        e->ws.pair_token[first + t] = t;
        e->ws.pair_weight[first + t] = 1;
    }
    size_t d = (size_t)w->gate.n_rows;
    return (ffn_job){ .w = *w, .first = first, .n = st->n, .hidden_f = e->ws.shared_f, .hidden_q = e->ws.shared_q,
                      .f_stride = d, .q_stride = blocks_of(d) };
}
int moe_forward(const step *st, int32_t layer) {
    ms4_engine *e = st->e;
    workspace *ws = &e->ws;
    const layer_weights *w = &e->layers[layer];
    size_t d = (size_t)e->shape.d_model, d_e = (size_t)e->shape.d_expert;
    ffn_job *jobs = ws->jobs;
    int32_t n_jobs = 0;
    if (w->is_dense) {
        jobs[n_jobs++] = every_token(st, &w->dense);
        run_ffns(st, jobs, n_jobs);
        return MS4_OK;
    }
    product route = { &w->router, { ws->x, ws->x_q, d, blocks_of(d) }, ws->router, (size_t)e->shape.n_expert, 0 };
    matmul(e->pool, e->ops, &route, 1, st->n, &st->s->stop);
    if (atomic_load(&st->s->stop)) return MS4_OK;             /* the caller sees it too; router is not filled */
    pool_run(e->pool, choose_item, (void *)st, (st->n + 15) / 16, NULL);
    int32_t used = group(st);
    st->s->experts_used += (uint64_t)st->n * (uint64_t)e->shape.n_expert_used;
    st->s->bytes_read += (uint64_t)used * w->bytes_per_expert;
    TRY(experts_pin(e->experts, layer, ws->expert_ids, used, ws->views));
    if (w->shared.gate.data) jobs[n_jobs++] = every_token(st, &w->shared);
    for (int32_t i = 0; i < used; i++) {
        int32_t id = ws->expert_ids[i], first = ws->expert_first[id];
        jobs[n_jobs++] = (ffn_job){ .w = ws->views[i], .first = first, .n = ws->expert_first[id + 1] - first,
                                    .hidden_f = ws->hidden_f ? ws->hidden_f + (size_t)first * d_e : NULL,
                                    .hidden_q = ws->hidden_q + (size_t)first * blocks_of(d_e),
                                    .f_stride = d_e, .q_stride = blocks_of(d_e) };
    }
    run_ffns(st, jobs, n_jobs);
    experts_unpin(e->experts, layer, ws->expert_ids, used);
    return MS4_OK;
}
