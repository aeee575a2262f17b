/* session.c -- a line of tokens: its kv cache, and feeding it in steps of at most n_batch tokens. */
#include "clock.h"
#include "model.h"
#include <string.h>

int ms4_session_open(ms4_engine *e, int32_t n_ctx, ms4_session **out) {
    FAIL_IF(n_ctx < 1 || n_ctx > e->shape.n_ctx_train, MS4_EARG, "context of %d tokens: 1 to %d", n_ctx, e->shape.n_ctx_train);
    ms4_session *s = memory_take(1, sizeof *s);
    FAIL_IF(!s, MS4_ENOMEM, "no memory for a session");
    kv_cache *kv = &s->kv;
    kv->width = (size_t)(e->shape.kv_rank + e->shape.d_rope);
    kv->n_ctx = (size_t)n_ctx;
    size_t rows = kv->n_ctx * (size_t)e->shape.n_layer;
    kv->bytes = rows * (kv->width * sizeof *kv->data + 2 * sizeof *kv->scales);
    kv->data = memory_take_pages(kv->bytes, 0);               /* untouched pages cost nothing */
    if (!kv->data) {
        memory_give(s);
        return error_set(MS4_ENOMEM, "no memory for a context of %d tokens; use a smaller one", n_ctx);
    }
    kv->scales = (float *)(kv->data + rows * kv->width);
    s->engine = e;
    s->n_ctx = n_ctx;
    pthread_mutex_lock(&e->turn);
    e->n_sessions++;
    pthread_mutex_unlock(&e->turn);
    *out = s;
    return MS4_OK;
}
void ms4_session_close(ms4_session *s) {
    if (!s) return;
    pthread_mutex_lock(&s->engine->turn);
    s->engine->n_sessions--;
    pthread_mutex_unlock(&s->engine->turn);
    memory_give_pages(s->kv.data, s->kv.bytes);
    memory_give(s);
}
int32_t ms4_session_length(const ms4_session *s) { return s->length; }
int ms4_session_rewind(ms4_session *s, int32_t length) {
    FAIL_IF(length < 0 || length > s->length, MS4_EARG, "rewind to %d of %d positions", length, s->length);
    s->length = length;
    return MS4_OK;
}
void ms4_session_cancel(ms4_session *s) { atomic_store(&s->stop, 1); }
void ms4_session_progress(const ms4_session *s, uint64_t *done, uint64_t *total) {
    *done = atomic_load(&s->done);
    *total = atomic_load(&s->total);
}
/* cos and sin of every pair at every position of the step; angles in double (SPEC 1.3) */
static void fill_rope(const step *st) {
    const ms4_shape *s = &st->e->shape;
    float *rope = st->e->ws.rope;
    for (int32_t t = 0; t < st->n; t++)
        for (int32_t i = 0; i < s->d_rope / 2; i++) {
            double angle = (double)(st->pos + t) * s->rope_freq[i];
            *rope++ = (float)cos(angle);
            *rope++ = (float)sin(angle);
        }
}
/* Token embeddings, or the caller's rows, into ws.h; *rows moves past those taken. */
static void embed(const step *st, const int32_t *tokens, const float **rows) {
    ms4_engine *e = st->e;
    const matrix *m = &e->token_embd;
    size_t d = (size_t)e->shape.d_model;
    for (int32_t t = 0; t < st->n; t++) {
        float *h = e->ws.h + (size_t)t * d;
        if (tokens[t] == MS4_ROW) {
            memcpy(h, *rows, d * sizeof *h);
            *rows += d;
        } else {
            e->ops->dequantize[m->type](h, m->data + (size_t)tokens[t] * m->row_bytes, d);
            st->s->bytes_read += m->row_bytes;
        }
    }
}
/* Final norm and output matrix for the tokens of the step. */
static void output_logits(const step *st, float *logits) {
    ms4_engine *e = st->e;
    size_t d = (size_t)e->shape.d_model;
    for (size_t t = 0; t < (size_t)st->n; t++) {
        float *x = e->ws.x + t * d;
        e->ops->rms_norm(x, e->ws.h + t * d, e->output_norm, d, e->shape.norm_eps);
        if (matrix_quantised(&e->output)) e->ops->quantize(e->ws.x_q + t * blocks_of(d), x, d);
    }
    st->s->bytes_read += matrix_bytes(&e->output);
    product last = { &e->output, { e->ws.x, e->ws.x_q, d, blocks_of(d) }, logits, (size_t)e->shape.n_vocab, 0 };
    matmul(e->pool, e->ops, &last, 1, st->n, &st->s->stop);
}
static int run_step(step *st, const int32_t *tokens, const float **rows, int32_t n_out, float *logits) {
    ms4_engine *e = st->e;
    uint64_t n = (uint64_t)st->n;
    TRY(workspace_grow(e, st->n));
    TRY(attention_prepare(st));
    fill_rope(st);
    embed(st, tokens, rows);
    for (int32_t layer = 0; layer < e->shape.n_layer; layer++) {
        TRY(layer_forward(st, layer, layer + 1 < e->shape.n_layer ? st->n : n_out));
        atomic_fetch_add(&st->s->done, n);
    }
    if (n_out) output_logits(st, logits);
    FAIL_IF(atomic_load(&st->s->stop), MS4_ECANCELED, "canceled");
    for (size_t i = 0; i < (size_t)n_out * (size_t)e->shape.n_vocab; i++)
        FAIL_IF(!isfinite(logits[i]), MS4_ENUMBER,
                "the model gave a logit that is not a finite number; the file is damaged (compare its checksum)");
    return files_check(e->files);
}
static int run_steps(ms4_session *s, const int32_t *tokens, int32_t n, const float *rows, float *logits, int32_t all) {
    ms4_engine *e = s->engine;
    for (int32_t at = 0; at < n; at += e->n_batch) {
        step st = { e, s, int_min(e->n_batch, n - at), s->length + at };
        int32_t n_out = !logits ? 0 : all ? st.n : at + st.n == n;
        TRY(run_step(&st, tokens + at, &rows, n_out, all && logits ? logits + (size_t)at * (size_t)e->shape.n_vocab : logits));
    }
    return MS4_OK;
}
static void count(const ms4_session *s, int32_t n, int64_t ns) {
    ms4_engine *e = s->engine;
    pthread_mutex_lock(&e->counting);
    ms4_stats *c = &e->stats;
    c->experts_used += s->experts_used;
    if (n == 1) {
        c->tokens_decode++;
        c->ns_decode += (uint64_t)ns;
        c->bytes_decode += s->bytes_read;
    } else {
        c->tokens_prefill += (uint64_t)n;
        c->ns_prefill += (uint64_t)ns;
        c->bytes_prefill += s->bytes_read;
    }
    pthread_mutex_unlock(&e->counting);
}
int ms4_session_feed(ms4_session *s, const int32_t *tokens, size_t n, const float *rows, size_t n_rows, float *logits,
                     int32_t all) {
    ms4_engine *e = s->engine;
    size_t row_tokens = 0;
    FAIL_IF(n < 1, MS4_EARG, "no tokens to feed");
    FAIL_IF(n > (size_t)(s->n_ctx - s->length), MS4_EFULL, "%zu tokens after %d do not fit into a context of %d", n,
            s->length, s->n_ctx);
    for (size_t i = 0; i < n; i++) {
        FAIL_IF(tokens[i] != MS4_ROW && (tokens[i] < 0 || tokens[i] >= e->shape.n_vocab), MS4_EARG,
                "token id %d: the vocabulary has 0 to %d", tokens[i], e->shape.n_vocab - 1);
        row_tokens += tokens[i] == MS4_ROW;
    }
    FAIL_IF(row_tokens != n_rows, MS4_EARG, "%zu positions take a row, but there are %zu rows", row_tokens, n_rows);
    pthread_mutex_lock(&e->turn);
    int64_t start = now_ns();
    atomic_store(&s->stop, 0);
    atomic_store(&s->done, 0);
    atomic_store(&s->total, (uint64_t)n * (uint64_t)e->shape.n_layer);
    s->experts_used = s->bytes_read = 0;
    int status = run_steps(s, tokens, (int32_t)n, rows, logits, all);
    if (!status) {
        s->length += (int32_t)n;
        count(s, (int32_t)n, now_ns() - start);
    }
    pthread_mutex_unlock(&e->turn);
    return status;
}
