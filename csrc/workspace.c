/* workspace.c -- the buffers of a step.  They belong to the engine (sessions take turns) and only grow. */
#include "model.h"
#include <string.h>

/* Makes *p an array of n * size bytes, its old content lost. */
static int renew(void *p, size_t n, size_t size) {
    void **at = p;
    memory_give(*at);
    *at = memory_take(n, size);
    FAIL_IF(!*at, MS4_ENOMEM, "no memory for the buffers of a step (%zu bytes); use a smaller batch", n * size);
    return MS4_OK;
}
int workspace_room(void *buffer, size_t *has, size_t needs) {
    if (needs <= *has) return MS4_OK;
    *has = 0;
    TRY(renew(buffer, needs, 1));
    *has = needs;
    return MS4_OK;
}
static int grow_tokens(ms4_engine *e, size_t n) {
    const ms4_shape *s = &e->shape;
    workspace *w = &e->ws;
    size_t d = (size_t)s->d_model, d_q = (size_t)s->n_head * (size_t)(s->d_nope + s->d_rope);
    size_t d_o = (size_t)s->n_head * (size_t)s->d_value;
    TRY(renew(&w->h, n * d, sizeof(float)));
    TRY(renew(&w->x, n * d, sizeof(float)));
    TRY(renew(&w->x_q, n * blocks_of(d), sizeof(block_q8)));
    TRY(renew(&w->q_a, n * (size_t)s->q_rank, sizeof(float)));
    TRY(renew(&w->q_a_q, n * blocks_of((size_t)s->q_rank), sizeof(block_q8)));
    TRY(renew(&w->q, n * d_q, sizeof(float)));
    TRY(renew(&w->kv_a, n * (size_t)(s->kv_rank + s->d_rope), sizeof(float)));
    TRY(renew(&w->o, n * d_o, sizeof(float)));
    TRY(renew(&w->o_q, n * blocks_of(d_o), sizeof(block_q8)));
    return renew(&w->rope, n * (size_t)s->d_rope, sizeof(float));
}
static int grow_experts(ms4_engine *e, size_t n) {
    const ms4_shape *s = &e->shape;
    workspace *w = &e->ws;
    size_t pairs = n * (size_t)s->n_expert_used, d_e = (size_t)s->d_expert, jobs = (size_t)s->n_expert + 1;
    size_t d_s = size_max((size_t)s->d_shared, (size_t)s->d_dense);
    TRY(renew(&w->router, n * (size_t)s->n_expert, sizeof(float)));
    TRY(renew(&w->pair_weight, pairs + n, sizeof(float)));
    TRY(renew(&w->chosen_weight, pairs, sizeof(float)));
    TRY(renew(&w->pair_token, pairs + n, sizeof(int32_t)));
    TRY(renew(&w->chosen, pairs, sizeof(int32_t)));
    TRY(renew(&w->expert_first, jobs + 1, sizeof(int32_t)));
    TRY(renew(&w->expert_ids, jobs, sizeof(int32_t)));
    TRY(renew(&w->jobs, jobs, sizeof(ffn_job)));
    TRY(renew(&w->views, jobs, sizeof(expert_view)));
    TRY(renew(&w->hidden_q, pairs * blocks_of(d_e), sizeof(block_q8)));
    TRY(renew(&w->shared_q, n * blocks_of(d_s), sizeof(block_q8)));
    if (!e->float_down) return MS4_OK;
    TRY(renew(&w->hidden_f, pairs * d_e, sizeof(float)));
    return renew(&w->shared_f, n * d_s, sizeof(float));
}
int workspace_grow(ms4_engine *e, int32_t n_tokens) {
    workspace *w = &e->ws;
    if (n_tokens <= w->n_tokens) return MS4_OK;
    w->n_tokens = 0;
    TRY(grow_tokens(e, (size_t)n_tokens));
    TRY(grow_experts(e, (size_t)n_tokens));
    w->n_tokens = n_tokens;
    return MS4_OK;
}
void workspace_close(ms4_engine *e) {
    workspace *w = &e->ws;
    void *all[] = { w->h, w->x, w->q_a, w->q, w->kv_a, w->o, w->rope, w->x_q, w->q_a_q, w->o_q, w->router,
                    w->chosen_weight, w->pair_weight, w->hidden_f, w->shared_f, w->chosen, w->pair_token, w->expert_first, w->expert_ids,
                    w->hidden_q, w->shared_q, w->jobs, w->views, w->absorbed, w->absorbed_d, w->partial };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) memory_give(all[i]);
    for (int32_t i = 0; w->scratch && i < pool_size(e->pool); i++) memory_give(w->scratch[i]);
    memory_give(w->scratch);
    memset(w, 0, sizeof *w);
}
