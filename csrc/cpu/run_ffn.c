/* run_ffn.c -- feed-forward networks: the router's choice, then gate/up/down of routed, shared or dense ones.
 *
 * Tokens are grouped by expert, so an expert's weights are read once for all its tokens.  Two runs of the pool: gate
 * and up with the activation, then down.  In the second, an item owns some rows of the output for all tokens, and adds
 * shared expert first, then experts in ascending order: the sum of a token never depends on the grouping, nor on which
 * device computed what, as sum_pairs adds in the same order.
 * act(gate) * up stays float32 or int8 with float32 scales: it leaves the range of float16 (SPEC 2.5).
 */
#include "cpu_device.h"
#include "error.h"
#include <string.h>

#define HIDDEN_CHUNK SUPERBLOCK                /* hidden columns of one gate/up item: whole blocks of activations */
#define DOWN_TILE 64                           /* tokens whose down results wait in scratch to be added */
#define CHOOSE_TOKENS 16

/* One FFN and the rows that go through it: those of `tokens` (NULL: x_row and the following). */
typedef struct {
    const ffn_weights *w;
    const int32_t *tokens;
    const float *weights;                      /* of the pairs; NULL: 1 */
    float *pairs;                              /* where the results go, a row each; NULL: weighted, to H */
    float *hidden_f;                           /* rows of act(gate) * up, as down wants them: floats, or blocks */
    block_q8 *hidden_q;
    size_t f_stride, q_stride;
    int32_t x_row, n, first_item;              /* first_item: in the gate/up run */
} ffn_job;
typedef struct {
    cpu_device *d;
    const ffn_job *jobs;
    int32_t n_jobs, rows;                      /* rows: of the output, per down item */
} ffn_run;

/* --- choosing ------------------------------------------------------------------------------- */
typedef struct { const cpu_device *d; const ms4_shape *s; picks *p; } choose_run;

static void choose_item(void *context, int32_t item, int32_t thread) {
    const choose_run *run = context;
    (void)thread;
    for (int32_t t = item * CHOOSE_TOKENS; t < int_min((item + 1) * CHOOSE_TOKENS, run->p->n); t++) {
        size_t at = (size_t)t * (size_t)run->p->k;
        run->d->ops->choose(cpu_row(run->d, BUF_ROUTER, t), run->s->n_expert, run->p->k, run->s->router_scale,
                            run->s->router_norm, run->p->expert + at, run->p->weight + at);
    }
}
int cpu_route(device *base, const ms4_shape *s, const ffn_ahead *ahead, picks *p) {
    const cpu_device *d = (const cpu_device *)base;
    (void)ahead;
    choose_run run = { d, s, p };
    pool_run(d->pool, choose_item, &run, (p->n + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS, d->stop);
    if (d->stop && atomic_load(d->stop))       /* tokens were left out: any choice will do, as long as it is one */
        for (int32_t i = 0; i < p->n * p->k; i++) p->expert[i] = i % p->k;
    picks_group(p, s->n_expert);
    p->late = 0;
    return MS4_OK;
}
/* --- gate and up ------------------------------------------------------------------------------ */
/* Where the gate rows lie that come after the chunk at `column`: this job's next, or the next job's first. */
static const uint8_t *after_chunk(const ffn_run *run, const ffn_job *job, int32_t column) {
    const matrix *gate = &job->w->gate;
    if (column + HIDDEN_CHUNK < gate->n_rows) return gate->data + (size_t)(column + HIDDEN_CHUNK) * gate->row_bytes;
    return job + 1 < run->jobs + run->n_jobs ? job[1].w->gate.data : NULL;
}
static void gate_up_tile(const ffn_run *run, const ffn_job *job, int32_t column, int32_t first, int32_t n,
                         float *gate) {
    const struct ms4_ops *ops = run->d->ops;
    const int32_t columns = int_min(HIDDEN_CHUNK, job->w->gate.n_rows - column);
    float *up = gate + TOKEN_TILE * HIDDEN_CHUNK;
    const activations x = cpu_x(run->d, BUF_X, job->tokens ? 0 : job->x_row + first);
    const int32_t *tokens = job->tokens ? job->tokens + first : NULL;
    const matrix gate_rows = matrix_rows(&job->w->gate, 0, column, columns);
    const matrix up_rows = matrix_rows(&job->w->up, 0, column, columns);
    cpu_mul(ops, &gate_rows, &x, tokens, n, gate, HIDDEN_CHUNK, up_rows.data);
    cpu_mul(ops, &up_rows, &x, tokens, n, up, HIDDEN_CHUNK, after_chunk(run, job, column));
    for (int32_t t = 0; t < n; t++) {
        const float *row = gate + (size_t)t * HIDDEN_CHUNK;
        const size_t at = (size_t)(first + t);
        float *hidden = job->hidden_f ? job->hidden_f + at * job->f_stride + (size_t)column
                                      : gate + (size_t)t * HIDDEN_CHUNK;
        (job->w->gelu ? ops->gelu_mul : ops->silu_mul)(hidden, row, up + (size_t)t * HIDDEN_CHUNK, (size_t)columns);
        if (job->hidden_q)
            ops->quantize(job->hidden_q + at * job->q_stride + (size_t)column / SUPERBLOCK, hidden, (size_t)columns);
    }
}
static int32_t hidden_chunks(const ffn_job *job) { return (job->w->gate.n_rows + HIDDEN_CHUNK - 1) / HIDDEN_CHUNK; }
static int32_t gate_up_items(const ffn_job *job) {
    return hidden_chunks(job) * ((job->n + TOKEN_TILE - 1) / TOKEN_TILE);
}
static void gate_up_item(void *context, int32_t item, int32_t thread) {
    const ffn_run *run = context;
    const ffn_job *job = run->jobs;
    while (item >= job->first_item + gate_up_items(job)) job++;
    item -= job->first_item;
    int32_t first = item / hidden_chunks(job) * TOKEN_TILE;
    gate_up_tile(run, job, item % hidden_chunks(job) * HIDDEN_CHUNK, first, int_min(TOKEN_TILE, job->n - first),
                 run->d->scratch[thread]);
}
/* --- down ------------------------------------------------------------------------------------- */
/* Rows [row, row + n_rows) of one job's results, of tokens [t, t + n): to H, or to where pairs wait. */
static void put_down(const ffn_run *run, const ffn_job *job, int32_t t, int32_t n, int32_t row, int32_t n_rows,
                     const float *sum) {
    const size_t d = run->d->rows[BUF_H].width;
    for (int32_t i = 0; i < n; i++, sum += run->rows) {
        const int32_t at = t + i;
        if (job->pairs) {
            memcpy(job->pairs + (size_t)at * d + (size_t)row, sum, (size_t)n_rows * sizeof *sum);
            continue;
        }
        float *h = cpu_row(run->d, BUF_H, job->tokens ? job->tokens[at] : job->x_row + at) + row;
        run->d->ops->add_scaled(h, sum, job->weights ? job->weights[at] : 1, (size_t)n_rows);
    }
}
static void down_item(void *context, int32_t item, int32_t thread) {
    const ffn_run *run = context;
    const int32_t d_model = (int32_t)run->d->rows[BUF_H].width;
    const int32_t row = item * run->rows, n_rows = int_min(run->rows, d_model - row);
    const ffn_job *end = run->jobs + run->n_jobs;
    float *sum = run->d->scratch[thread];
    for (const ffn_job *job = run->jobs; job < end; job++) {
        const matrix part = matrix_rows(&job->w->down, 0, row, n_rows);
        const matrix *after = &(job + 1 < end ? job + 1 : run->jobs)->w->down;
        const uint8_t *next = after->data + (size_t)(job + 1 < end ? row : row + n_rows) * after->row_bytes;
        for (int32_t t = 0; t < job->n; t += DOWN_TILE) {
            int32_t n = int_min(DOWN_TILE, job->n - t);
            const activations hidden = { job->hidden_f ? job->hidden_f + (size_t)t * job->f_stride : NULL,
                                         job->hidden_q ? job->hidden_q + (size_t)t * job->q_stride : NULL,
                                         job->f_stride, job->q_stride };
            cpu_mul(run->d->ops, &part, &hidden, NULL, n, sum, (size_t)run->rows, next);
            put_down(run, job, t, n, row, n_rows, sum);
        }
    }
}
/* --- a share ---------------------------------------------------------------------------------- */
static size_t hidden_width(const ffn_job *job) { return (size_t)job->w->gate.n_rows; }

/* Gives every job its rows of act(gate) * up. */
static int place_hidden(cpu_device *d, ffn_job *jobs, int32_t n_jobs) {
    size_t n_f = 0, n_q = 0;
    for (ffn_job *job = jobs; job < jobs + n_jobs; job++) {
        job->f_stride = matrix_quantized(&job->w->down) ? 0 : hidden_width(job);
        job->q_stride = matrix_quantized(&job->w->down) ? blocks_of(hidden_width(job)) : 0;
        n_f += (size_t)job->n * job->f_stride;
        n_q += (size_t)job->n * job->q_stride;
    }
    TRY(cpu_need(&d->hidden_f, n_f * sizeof(float)));
    TRY(cpu_need(&d->hidden_q, n_q * sizeof(block_q8)));
    float *f = d->hidden_f.at;
    block_q8 *q = d->hidden_q.at;
    for (ffn_job *job = jobs; job < jobs + n_jobs; job++) {
        job->hidden_f = job->f_stride ? f : NULL;
        job->hidden_q = job->q_stride ? q : NULL;
        f += job->f_stride ? (size_t)job->n * job->f_stride : 0;
        q += job->q_stride ? (size_t)job->n * job->q_stride : 0;
    }
    return MS4_OK;
}
int cpu_ffn(device *base, const ffn_share *share, const picks *p) {
    cpu_device *d = (cpu_device *)base;
    const int32_t d_model = (int32_t)d->rows[BUF_H].width;
    int32_t n_jobs = 0, items = 0;
    TRY(cpu_scratch(d, 2 * TOKEN_TILE * HIDDEN_CHUNK));
    TRY(cpu_need(&d->jobs, ((size_t)share->n_groups + 1) * sizeof(ffn_job)));
    ffn_job *jobs = d->jobs.at;
    if (share->every) jobs[n_jobs++] = (ffn_job){ .w = share->every, .x_row = share->row, .n = share->n };
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        jobs[n_jobs++] = (ffn_job){ .w = &g->w, .tokens = p->token + g->first, .weights = p->pair_weight + g->first,
                                    .n = g->n, .pairs = share->whole ? NULL : cpu_row(d, BUF_PAIRS, g->first) };
    TRY(place_hidden(d, jobs, n_jobs));
    for (int32_t i = 0; i < n_jobs; i++) {
        jobs[i].first_item = items;
        items += gate_up_items(&jobs[i]);
    }
    ffn_run run = { d, jobs, n_jobs, cpu_rows_per_item(d->pool, d_model, share->n) };
    pool_run(d->pool, gate_up_item, &run, items, d->stop);
    pool_run(d->pool, down_item, &run, n_jobs ? (d_model + run.rows - 1) / run.rows : 0, d->stop);
    return MS4_OK;
}
/* --- shares of several devices ------------------------------------------------------------------ */
int cpu_send(device *from, device *to, const ffn_share *share, const picks *p) {
    const cpu_rows *x = &((cpu_device *)from)->rows[BUF_X], *y = &((cpu_device *)to)->rows[BUF_X];
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        for (int32_t i = g->first; i < g->first + g->n; i++) {
            size_t t = (size_t)p->token[i];
            memcpy(y->f + t * y->width, x->f + t * x->width, x->width * sizeof *x->f);
            if (x->q) memcpy(y->q + t * y->blocks, x->q + t * x->blocks, x->blocks * sizeof *x->q);
        }
    return MS4_OK;
}
int cpu_fetch(device *to, device *from, const ffn_share *share) {
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        memcpy(cpu_row((cpu_device *)to, BUF_PAIRS, g->first), cpu_row((cpu_device *)from, BUF_PAIRS, g->first),
               (size_t)g->n * ((cpu_device *)from)->rows[BUF_PAIRS].width * sizeof(float));
    return MS4_OK;
}
typedef struct { const cpu_device *d; const picks *p; } sum_run;
/* An item is a token: its pairs, ascending by expert. */
static void sum_item(void *context, int32_t item, int32_t thread) {
    const sum_run *run = context;
    const picks *p = run->p;
    (void)thread;
    for (int32_t i = item * p->k; i < (item + 1) * p->k; i++)
        run->d->ops->add_scaled(cpu_row(run->d, BUF_H, item), cpu_row(run->d, BUF_PAIRS, p->row[i]), p->weight[i],
                                run->d->rows[BUF_H].width);
}
int cpu_sum_pairs(device *base, const picks *p) {
    sum_run run = { (cpu_device *)base, p };
    pool_run(run.d->pool, sum_item, &run, p->n, run.d->stop);
    return MS4_OK;
}
