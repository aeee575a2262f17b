/* layer.c -- the model, in order (SPEC 2.1): norm, attention, residual, norm, experts, residual.
 *
 * What is computed stands here, for one token and for many, for every device; how, is theirs.
 */
#include "layer.h"
#include "clock.h"
#include "error.h"
#include <string.h>

/* The last layer's queries and FFN matter only for rows whose logits are wanted: those become the step. */
static int keep_out(step *st, device *d) {
    size_t d_rope = (size_t)st->shape->d_rope;
    int32_t n = 0;
    for (span *s = st->spans; s < st->spans + st->n_spans; s++) {
        int32_t from = s->first + s->n - s->n_out;
        s->pos += s->n - s->n_out;
        s->first = n;
        s->n = s->n_out;
        for (int32_t i = 0; i < s->n; i++, n++) {
            st->keep[n] = from + i;
            memmove(st->rope + (size_t)n * d_rope, st->rope + (size_t)(from + i) * d_rope, d_rope * sizeof *st->rope);
            st->scale[n] = st->scale[from + i];
        }
    }
    st->n = n;
    return n ? DO(d, keep, st->keep, n) : MS4_OK;
}
static int attention(step *st, device *d, int32_t layer, const layer_weights *w, int last) {
    const float eps = st->shape->norm_eps;
    const product first[] = { { .m = &w->kv_a, .x = BUF_X, .y = BUF_KV }, { .m = &w->q_a, .x = BUF_X, .y = BUF_Q_A } };
    const product second = { .m = &w->q_b, .x = BUF_Q_A, .y = BUF_Q };
    const product out = { .m = &w->output, .x = BUF_O, .y = BUF_H, .add = 1 };
    const int fewer = last && st->n_out < st->n;
    TRY(DO(d, norm, BUF_H, &w->attn_norm, eps, BUF_X, st->n));
    TRY(DO(d, products, first, fewer ? 1 : 2, st->n));
    TRY(DO(d, latents, st, layer, &w->kv_a_norm, eps));
    if (fewer) {                                   /* the others have left their latents, and nobody asks for more */
        TRY(keep_out(st, d));
        if (!st->n) return MS4_OK;
        TRY(DO(d, products, first + 1, 1, st->n));
    }
    TRY(DO(d, norm, BUF_Q_A, &w->q_a_norm, eps, BUF_Q_A, st->n));
    TRY(DO(d, products, &second, 1, st->n));
    TRY(DO(d, queries, st));
    TRY(DO(d, attend, st, layer, &w->k_b, &w->v_b));
    return DO(d, products, &out, 1, st->n);
}
/* What the other devices need, then all shares, part by part, as their weights come, those of other devices with their
 * results, and then the sum if it is not there yet. */
static int run_shares(device *d, experts *store, const picks *p, ffn_share *shares, int32_t n) {
    for (int32_t i = 1; i < n; i++) TRY(DO(d, send, shares[i].on, &shares[i], p));
    for (;;) {
        ffn_share part;
        TRY(experts_ready(store, shares, n, &part));
        if (!ffn_share_has(&part)) break;
        const int64_t start = now_ns();
        TRY(DO(part.on, ffn, &part, p));
        experts_took(store, &part, now_ns() - start);
        if (part.on != d) TRY(DO(d, fetch, part.on, &part));
    }
    return shares[0].whole ? MS4_OK : DO(d, sum_pairs, p);
}
static int moe(step *st, device *d, int32_t layer, const layer_weights *w, experts *store, picks *p) {
    const product route = { .m = &w->router, .x = BUF_X, .y = BUF_ROUTER };
    ffn_share shares[MAX_SHARES];
    ffn_ahead ahead;
    int32_t n = 0;
    TRY(DO(d, products, &route, 1, st->n));
    p->n = st->n;
    experts_ahead(store, layer, &ahead);
    ahead.every = w->has_every ? &w->every : NULL;
    if (st->watch->call) ahead.all = 0;            /* who watches hears of every layer in its turn */
    TRY(DO(d, route, st->shape, &ahead, p));
    if (p->late) {
        st->late[st->n_late++] = layer;
        return DO(d, ffn, &(ffn_share){ .on = d, .every = ahead.every, .n = st->n, .whole = 1 }, p);
    }
    if (st->watch->call) st->watch->call(layer, p->n, p->expert, st->watch->user);
    TRY(experts_take(store, layer, p, shares, &n));
    if (w->has_every) shares[0].every = &w->every;
    int status = run_shares(d, store, p, shares, n);
    experts_give(store, layer, p);
    return status;
}
int layer_forward(step *st, device *home, int32_t layer, const layer_weights *w, experts *store, picks *p, int last) {
    TRY(attention(st, home, layer, w, last));
    if (!st->n) return MS4_OK;
    TRY(DO(home, norm, BUF_H, &w->ffn_norm, st->shape->norm_eps, BUF_X, st->n));
    if (w->has_experts) return moe(st, home, layer, w, store, p);
    return DO(home, ffn, &(ffn_share){ .on = home, .every = &w->every, .n = st->n, .whole = 1 }, NULL);
}
int layer_recall(const step *st, device *home, int32_t layer, experts *store, picks *p) {
    ffn_share shares[MAX_SHARES];
    int32_t n = 0;
    TRY(DO(home, recall, st->shape, layer, p));
    TRY(experts_take(store, layer, p, shares, &n));
    experts_give(store, layer, p);
    return MS4_OK;
}
