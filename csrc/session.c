/* session.c -- a line of tokens: how long it is, and the kv cache behind it.  Nothing here waits for a step. */
#include "engine.h"
#include "error.h"
#include "memory.h"

int ms4_session_open(ms4_engine *e, int32_t n_ctx, ms4_session **out) {
    FAIL_IF(n_ctx < 1 || n_ctx > e->shape.n_ctx_train, MS4_EARG,
            "context of %d tokens: 1 to %d", n_ctx, e->shape.n_ctx_train);
    ms4_session *s = memory_take(1, sizeof *s);
    FAIL_IF(!s, MS4_ENOMEM, "no memory for a session");
    int status = kv_cache_open(e->kv, n_ctx, &s->kv);
    if (status) {
        memory_give(s);
        return status;
    }
    s->engine = e;
    s->n_ctx = n_ctx;
    *out = s;
    return MS4_OK;
}
void ms4_session_close(ms4_session *s) {
    if (!s) return;
    kv_cache_close(&s->kv);
    memory_give(s);
}
int32_t ms4_session_length(const ms4_session *s) { return atomic_load(&s->length); }
int ms4_session_rewind(ms4_session *s, int32_t length) {
    const int32_t now = atomic_load(&s->length);
    FAIL_IF(length < 0 || length > now, MS4_EARG, "rewind to %d of %d positions", length, now);
    atomic_store(&s->length, length);
    kv_cache_cut(&s->kv, length);
    return MS4_OK;
}
int ms4_session_share(ms4_session *s, const ms4_session *from, int32_t length) {
    const int32_t theirs = atomic_load(&from->length);
    FAIL_IF(s == from || s->engine != from->engine, MS4_EARG, "a session shares with another one of its engine");
    FAIL_IF(length < 0 || length > theirs, MS4_EARG, "%d positions of a session of %d", length, theirs);
    FAIL_IF(length > s->n_ctx, MS4_EFULL, "%d tokens do not fit into a context of %d", length, s->n_ctx);
    kv_cache_share(&s->kv, &from->kv, length);
    atomic_store(&s->length, length);
    return MS4_OK;
}
static uint64_t fingerprint(const ms4_session *s) {
    return text_weights_fingerprint(&s->engine->weights, &s->engine->shape);
}
int ms4_session_save(const ms4_session *s, int fd) {
    return kv_cache_save(&s->kv, fingerprint(s), atomic_load(&s->length), fd);
}
int ms4_session_load(ms4_session *s, int fd) {
    int32_t length = 0;
    atomic_store(&s->length, 0);
    kv_cache_cut(&s->kv, 0);
    TRY(kv_cache_load(&s->kv, fingerprint(s), s->n_ctx, fd, &length));
    atomic_store(&s->length, length);
    return MS4_OK;
}
void ms4_session_progress(const ms4_session *s, uint64_t *done, uint64_t *total) {
    *done = atomic_load(&s->done);
    *total = atomic_load(&s->total);
}
