/* layer.c -- one decoder layer, in order: norm, attention, residual, norm, experts, residual (SPEC 2.1).
 * n tokens at once; n == 1 is decode. */
#include "model.h"
#include <string.h>

typedef struct {
    const step *st;
    const layer_weights *w;
    int32_t layer, per_item;
    const float *norm;
    int32_t quantise;
} token_job;

/* Runs fn over the tokens of a step, `per_item` at a time. */
static void run_tokens(token_job *job, pool_fn *fn) {
    job->per_item = job->st->n < 8 ? 1 : 8;
    pool_run(job->st->e->pool, fn, job, (job->st->n + job->per_item - 1) / job->per_item, &job->st->s->stop);
}
static int32_t last_token(const token_job *job, int32_t item) {
    return int_min((item + 1) * job->per_item, job->st->n);
}
/* h -> x (normalised), x_q */
static void norm_item(void *context, int32_t item, int32_t thread) {
    const token_job *job = context;
    ms4_engine *e = job->st->e;
    size_t d = (size_t)e->shape.d_model;
    (void)thread;
    for (int32_t t = item * job->per_item; t < last_token(job, item); t++) {
        float *x = e->ws.x + (size_t)t * d;
        e->ops->rms_norm(x, e->ws.h + (size_t)t * d, job->norm, d, e->shape.norm_eps);
        if (job->quantise) e->ops->quantize(e->ws.x_q + (size_t)t * blocks_of(d), x, d);
    }
}
/* Rotates the d_rope values of x in place, adjacent pairs; rope holds cos, sin of each pair (SPEC 2.2). */
static void rotate(float *x, const float *rope, int32_t d_rope) {
    for (int32_t i = 0; i < d_rope; i += 2) {
        float a = x[i], b = x[i + 1], c = rope[i], s = rope[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}
/* kv_a -> latent normalised, rope key rotated, both into the kv cache */
static void latent_item(void *context, int32_t item, int32_t thread) {
    const token_job *job = context;
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    size_t rank = (size_t)s->kv_rank, d_kv = rank + (size_t)s->d_rope;
    (void)thread;
    for (int32_t t = item * job->per_item; t < last_token(job, item); t++) {
        float *kv = e->ws.kv_a + (size_t)t * d_kv;
        int16_t *to = kv_cache_at(&job->st->s->kv, job->layer, job->st->pos + t);
        float *d = kv_scales_at(&job->st->s->kv, job->layer, job->st->pos + t);
        e->ops->rms_norm(kv, kv, job->w->kv_a_norm, rank, s->norm_eps);
        rotate(kv + rank, e->ws.rope + (size_t)t * (size_t)s->d_rope, s->d_rope);
        d[0] = e->ops->quantize_16(to, kv, rank);
        d[1] = e->ops->quantize_16(to + rank, kv + rank, (size_t)s->d_rope);
    }
}
/* q_a -> normalised, q_a_q */
static void low_rank_item(void *context, int32_t item, int32_t thread) {
    const token_job *job = context;
    ms4_engine *e = job->st->e;
    size_t rank = (size_t)e->shape.q_rank;
    (void)thread;
    for (int32_t t = item * job->per_item; t < last_token(job, item); t++) {
        float *q_a = e->ws.q_a + (size_t)t * rank;
        e->ops->rms_norm(q_a, q_a, job->w->q_a_norm, rank, e->shape.norm_eps);
        if (matrix_quantised(&job->w->q_b)) e->ops->quantize(e->ws.q_a_q + (size_t)t * blocks_of(rank), q_a, rank);
    }
}
static void latent_and_low_rank_item(void *context, int32_t item, int32_t thread) {
    latent_item(context, item, thread);
    low_rank_item(context, item, thread);
}
/* q -> rope part rotated, all of it times attn_scale and the query temperature s(pos) (SPEC 1.3) */
static void query_item(void *context, int32_t item, int32_t thread) {
    const token_job *job = context;
    ms4_engine *e = job->st->e;
    const ms4_shape *s = &e->shape;
    int32_t d_head = s->d_nope + s->d_rope;
    (void)thread;
    for (int32_t t = item * job->per_item; t < last_token(job, item); t++) {
        float *q = e->ws.q + (size_t)t * (size_t)(s->n_head * d_head);
        int32_t steps = s->temp_length ? (job->st->pos + t) / s->temp_length : 0;
        float scale = (float)(s->attn_scale * (1 + s->temp_beta * log1p(steps)));
        for (int32_t h = 0; h < s->n_head; h++, q += d_head) {
            rotate(q + s->d_nope, e->ws.rope + (size_t)t * (size_t)s->d_rope, s->d_rope);
            for (int32_t i = 0; i < d_head; i++) q[i] *= scale;
        }
    }
}
static void quantise_o_item(void *context, int32_t item, int32_t thread) {
    const token_job *job = context;
    ms4_engine *e = job->st->e;
    size_t d = (size_t)e->shape.n_head * (size_t)e->shape.d_value;
    (void)thread;
    for (int32_t t = item * job->per_item; t < last_token(job, item); t++)
        e->ops->quantize(e->ws.o_q + (size_t)t * blocks_of(d), e->ws.o + (size_t)t * d, d);
}
static int canceled(const step *st) {
    return atomic_load(&st->s->stop) ? error_set(MS4_ECANCELED, "canceled") : MS4_OK;
}
/* The last layer's queries and FFN matter only for tokens whose logits are wanted: moves the rows of the last `keep`
 * tokens to the front, and makes the step one of those tokens. */
static void keep_last(step *st, int32_t keep) {
    ms4_engine *e = st->e;
    workspace *ws = &e->ws;
    size_t d = (size_t)e->shape.d_model, d_rope = (size_t)e->shape.d_rope, from = (size_t)(st->n - keep), n = (size_t)keep;
    memmove(ws->h, ws->h + from * d, n * d * sizeof *ws->h);
    memmove(ws->x, ws->x + from * d, n * d * sizeof *ws->x);
    memmove(ws->x_q, ws->x_q + from * blocks_of(d), n * blocks_of(d) * sizeof *ws->x_q);
    memmove(ws->rope, ws->rope + from * d_rope, n * d_rope * sizeof *ws->rope);
    st->pos += st->n - keep;
    st->n = keep;
}
/* x -> latents in the cache, for all tokens; q_a, for the last `keep`, which become the step */
static void first_products(step *st, token_job *job, int32_t keep) {
    ms4_engine *e = st->e;
    const ms4_shape *s = &e->shape;
    workspace *ws = &e->ws;
    size_t d = (size_t)s->d_model;
    activations x = { ws->x, ws->x_q, d, blocks_of(d) };
    product both[2] = { { &job->w->kv_a, x, ws->kv_a, (size_t)(s->kv_rank + s->d_rope), 0 },
                        { &job->w->q_a, x, ws->q_a, (size_t)s->q_rank, 0 } };
    matmul(e->pool, e->ops, both, keep == st->n ? 2 : 1, st->n, &st->s->stop);
    if (keep == st->n) {
        run_tokens(job, latent_and_low_rank_item);
        return;
    }
    run_tokens(job, latent_item);
    keep_last(st, keep);
    matmul(e->pool, e->ops, both + 1, 1, st->n, &st->s->stop);
    run_tokens(job, low_rank_item);
}
static int attention_block(step *st, token_job *job, int32_t keep) {
    ms4_engine *e = st->e;
    const ms4_shape *s = &e->shape;
    const layer_weights *w = job->w;
    workspace *ws = &e->ws;
    size_t d = (size_t)s->d_model, d_o = (size_t)s->n_head * (size_t)s->d_value;
    size_t d_q = (size_t)s->n_head * (size_t)(s->d_nope + s->d_rope);
    activations q_a = { ws->q_a, ws->q_a_q, (size_t)s->q_rank, blocks_of((size_t)s->q_rank) };
    activations o = { ws->o, ws->o_q, d_o, blocks_of(d_o) };

    job->norm = w->attn_norm;
    job->quantise = matrix_quantised(&w->q_a) || matrix_quantised(&w->kv_a);
    run_tokens(job, norm_item);
    first_products(st, job, keep);
    TRY(canceled(st));
    if (!st->n) return MS4_OK;
    product second = { &w->q_b, q_a, ws->q, d_q, 0 };
    matmul(e->pool, e->ops, &second, 1, st->n, &st->s->stop);
    run_tokens(job, query_item);
    TRY(attention_forward(st, job->layer));
    if (matrix_quantised(&w->output)) run_tokens(job, quantise_o_item);
    product last = { &w->output, o, ws->h, d, 1 };
    matmul(e->pool, e->ops, &last, 1, st->n, &st->s->stop);
    return canceled(st);
}
int layer_forward(step *st, int32_t layer, int32_t keep) {
    token_job job = { .st = st, .w = &st->e->layers[layer], .layer = layer };
    TRY(attention_block(st, &job, keep));
    st->s->bytes_read += st->n ? job.w->bytes_per_step : matrix_bytes(&job.w->kv_a);
    if (!st->n) return MS4_OK;
    const expert_view *ffn = job.w->is_dense ? &job.w->dense : &job.w->shared;
    job.norm = job.w->ffn_norm;
    job.quantise = !ffn->gate.data || matrix_quantised(&ffn->gate) || matrix_quantised(&ffn->up);
    job.quantise |= !job.w->is_dense;          /* routed experts may have another type than the shared one */
    run_tokens(&job, norm_item);
    TRY(moe_forward(st, layer));
    return canceled(st);
}
