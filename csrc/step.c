/* step.c -- one step of the text model: the spans of some sessions in, their latents in the kv caches, logits out.
 *
 * A step belongs to nobody: it holds the engine's turn, computes, and leaves a span as it was if that span's stop flag
 * was raised meanwhile or its logits are not finite.  The others are not touched by that.
 */
#include "clock.h"
#include "engine.h"
#include "error.h"
#include "layer.h"
#include "memory.h"
#include <math.h>
#include <string.h>

/* --- room --------------------------------------------------------------------------------- */
void step_room_close(step_room *r) {
    void *all[] = { r->rope, r->scale, r->wanted, r->keep, r->late, r->picks.expert, r->picks.weight, r->picks.row,
                    r->picks.token, r->picks.pair_weight, r->picks.first, r->picks.used };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) memory_give(all[i]);
    *r = (step_room){ 0 };
}
/* Makes *p an array of n * size bytes, its old content lost. */
static int renew(void *p, size_t n, size_t size) {
    void **at = p;
    memory_give(*at);
    *at = memory_take(n, size);
    FAIL_IF(!*at, MS4_ENOMEM, "no memory for a step (%zu bytes); use a smaller batch", n * size);
    return MS4_OK;
}
static int room_for(step_room *r, const ms4_shape *s, size_t n) {
    size_t pairs = n * (size_t)s->n_expert_used, experts = (size_t)s->n_expert;
    if (n <= (size_t)r->n_tokens) return MS4_OK;
    r->n_tokens = 0;
    TRY(renew(&r->rope, n * (size_t)s->d_rope, sizeof *r->rope));
    TRY(renew(&r->scale, n, sizeof *r->scale));
    TRY(renew(&r->keep, n, sizeof *r->keep));
    TRY(renew(&r->wanted, n, sizeof *r->wanted));
    TRY(renew(&r->late, (size_t)s->n_layer, sizeof *r->late));
    TRY(renew(&r->picks.expert, pairs, sizeof(int32_t)));
    TRY(renew(&r->picks.weight, pairs, sizeof(float)));
    TRY(renew(&r->picks.row, pairs, sizeof(int32_t)));
    TRY(renew(&r->picks.token, pairs, sizeof(int32_t)));
    TRY(renew(&r->picks.pair_weight, pairs, sizeof(float)));
    TRY(renew(&r->picks.first, experts + 1, sizeof(int32_t)));
    TRY(renew(&r->picks.used, experts, sizeof(int32_t)));
    r->picks.k = s->n_expert_used;
    r->n_tokens = (int32_t)n;
    return MS4_OK;
}
/* The buffers of this program, for n tokens. */
static void shapes_of(const ms4_engine *e, int32_t n, buffer_shape out[N_BUFFERS]) {
    const ms4_shape *s = &e->shape;
    const size_t d = (size_t)s->d_model, heads = (size_t)s->n_head;
    const int32_t blocks = e->weights.quantized;
    const buffer_shape shapes[N_BUFFERS] = {
        [BUF_H] = { d, n, 0 },
        [BUF_X] = { d, n, blocks },
        [BUF_KV] = { (size_t)(s->kv_rank + s->d_rope), n, 0 },
        [BUF_Q_A] = { (size_t)s->q_rank, n, blocks },
        [BUF_Q] = { heads * (size_t)(s->d_nope + s->d_rope), n, 0 },
        [BUF_O] = { heads * (size_t)s->d_value, n, blocks },
        [BUF_ROUTER] = { (size_t)s->n_expert, n, 0 },
        [BUF_PAIRS] = { experts_in_parts(e->experts) ? d : 0, n * s->n_expert_used, 0 },
    };
    memcpy(out, shapes, sizeof shapes);
}
/* Bytes that a step of n tokens may take beyond what the steps before have left. */
static uint64_t growth(const ms4_engine *e, int32_t n) {
    const ms4_shape *s = &e->shape;
    buffer_shape one[N_BUFFERS];
    uint64_t floats = (uint64_t)(s->n_expert_used * s->d_expert + s->d_shared + s->d_dense);
    if (n <= e->most_rows) return 0;
    shapes_of(e, 1, one);
    for (int i = 0; i < N_BUFFERS; i++) floats += (uint64_t)one[i].floats * (uint64_t)one[i].rows;
    const uint64_t of_kv = (uint64_t)s->n_layer * (uint64_t)(s->kv_rank + s->d_rope) * sizeof(uint16_t);
    return (uint64_t)(n - e->most_rows) * (floats * sizeof(float) * 5 / 4 + of_kv);     /* blocks are a quarter */
}
/* Experts that stay on the disk have what memory is left. */
static void make_room(ms4_engine *e, int32_t n) {
    if (experts_slots(e->experts)) budget_fit(&e->budget, experts_slots(e->experts), growth(e, n));
    if (n > e->most_rows) e->most_rows = n;
}
/* --- the step ------------------------------------------------------------------------------ */
typedef struct {
    ms4_engine *e;
    ms4_span *spans;                           /* the caller's */
    size_t n_spans;
    step st;                                   /* its spans: those that take part */
    ms4_span **part;                           /* the caller's span behind each of those */
    atomic_int stop;                           /* raised when all of them are to stop */
} run;

static int is_stopped(const ms4_span *s) { return s->stop && atomic_load((const atomic_int *)s->stop); }
/* Is there nobody left who wants the result? */
static int all_stopped(run *r) {
    for (int32_t i = 0; i < r->st.n_spans; i++)
        if (!is_stopped(r->part[i])) return 0;
    atomic_store(&r->stop, 1);
    return 1;
}
/* The angles of every position, and the factor of its queries: in double, here, for all devices (SPEC 1.3). */
static void fill_positions(const step *st) {
    const ms4_shape *s = st->shape;
    for (const span *sp = st->spans; sp < st->spans + st->n_spans; sp++)
        for (int32_t t = 0; t < sp->n; t++) {
            float *rope = st->rope + (size_t)(sp->first + t) * (size_t)s->d_rope;
            int32_t pos = sp->pos + t, steps = s->temp_length ? pos / s->temp_length : 0;
            for (int32_t i = 0; i < s->d_rope / 2; i++) {
                double angle = (double)pos * s->rope_freq[i];
                *rope++ = (float)cos(angle);
                *rope++ = (float)sin(angle);
            }
            st->scale[sp->first + t] = (float)(s->attn_scale * (1 + s->temp_beta * log1p(steps)));
        }
}
/* Embeddings, or the caller's rows, into H.  With several spans they lie in several places, so they come one by one. */
static int embed(const run *r) {
    const step *st = &r->st;
    device *d = r->e->home;
    for (int32_t i = 0; i < st->n_spans; i++) {
        const ms4_span *s = r->part[i];
        TRY(DO(d, embed, &r->e->weights.token_embd, s->tokens, s->rows, st->spans[i].first, st->spans[i].n));
    }
    return MS4_OK;
}
static int run_layers(run *r) {
    ms4_engine *e = r->e;
    step *st = &r->st;
    for (int32_t layer = 0; layer < e->shape.n_layer && !all_stopped(r); layer++) {
        const layer_weights *w = &e->at_home->layers[layer];
        TRY(layer_forward(st, e->home, layer, w, e->experts, &e->room.picks, layer + 1 == e->shape.n_layer));
        for (int32_t i = 0; i < st->n_spans; i++)
            atomic_fetch_add(&r->part[i]->session->done, (uint64_t)r->part[i]->n);
    }
    return MS4_OK;
}
/* Numbers that a span gets for each of its rows of logits. */
static size_t logits_width(const run *r, const ms4_span *s) {
    return (size_t)(s->n_highest ? s->n_highest : r->e->shape.n_vocab);
}
/* What is wanted of the logits of all spans, in one product.  All work of the step is done then. */
static int logits(run *r) {
    ms4_engine *e = r->e;
    step *st = &r->st;
    row_wanted *next = e->room.wanted;
    if (!st->n || all_stopped(r)) return DO(e->home, wait);
    for (int32_t i = 0; i < st->n_spans; i++) {
        const ms4_span *s = r->part[i];
        for (size_t t = 0, width = logits_width(r, s); t < s->n_logits; t++)
            *next++ = (row_wanted){ s->logits + t * width, s->n_highest ? s->ids + t * width : NULL, s->n_highest,
                                    s->n_among };
    }
    TRY(DO(e->home, norm, BUF_H, &e->at_home->output_norm, e->shape.norm_eps, BUF_X, st->n));
    return DO(e->home, logits, &e->at_home->output, e->room.wanted, st->n);
}
static int all_finite(const float *x, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        union { float f; uint32_t u; } v = { .f = x[i] };
        most = (v.u & 0x7fffffff) > most ? v.u & 0x7fffffff : most;
    }
    return most < 0x7f800000;
}
/* What became of each span: those that nobody stopped are longer now. */
static void conclude(run *r) {
    for (int32_t i = 0; i < r->st.n_spans; i++) {
        ms4_span *s = r->part[i];
        if (is_stopped(s)) s->status = error_set(MS4_ECANCELED, "canceled");
        else if (!all_finite(s->logits, s->n_logits * logits_width(r, s)))
            s->status = error_set(MS4_ENUMBER, LOGITS_NOT_FINITE);
        else atomic_fetch_add(&s->session->length, (int)s->n);
    }
}
/* --- counting ----------------------------------------------------------------------------- */
/* A span of one token is a decode; the time and the bytes of a step that has longer ones, too, count as prefill. */
static void count(const run *r, int64_t ns, int32_t n_out) {
    ms4_engine *e = r->e;
    const text_weights *w = &e->weights;
    uint64_t dense = n_out ? matrix_bytes(&w->output) : 0, embeddings = 0, prefill = 0, decode = 0;
    for (int32_t i = 0; i < e->shape.n_layer; i++)
        dense += i + 1 < e->shape.n_layer || n_out ? w->layers[i].bytes_per_step : matrix_bytes(&w->layers[i].kv_a);
    for (int32_t i = 0; i < r->st.n_spans; i++) {
        const ms4_span *s = r->part[i];
        for (size_t t = 0; t < s->n; t++) embeddings += s->tokens[t] == MS4_ROW ? 0 : w->token_embd.row_bytes;
        if (s->n > 1) prefill += s->n;
        else decode++;
    }
    const experts_counts experts = experts_count(e->experts);
    pthread_mutex_lock(&e->counting);
    ms4_stats *c = &e->stats;
    c->experts_used += experts.pairs;
    c->pairs_on_gpu += experts.on_card;
    c->bytes_streamed += experts.bytes_streamed;
    if (e->card) c->bytes_on_gpu += dense + experts.bytes_on_card + experts.bytes_streamed;
    if (e->card) card_count(e->card, c);
    c->n_steps++;
    c->tokens_prefill += prefill;
    c->tokens_decode += decode;
    *(prefill ? &c->ns_prefill : &c->ns_decode) += (uint64_t)ns;
    *(prefill ? &c->bytes_prefill : &c->bytes_decode) += dense + embeddings + experts.bytes;
    engine_count_slots(e, c);
    pthread_mutex_unlock(&e->counting);
}
/* --- asking for it ------------------------------------------------------------------------- */
static int check_span(const ms4_engine *e, const ms4_span *s) {
    size_t row_tokens = 0;
    const int32_t length = atomic_load(&s->session->length);
    FAIL_IF(s->session->engine != e, MS4_EARG, "a session of another engine");
    FAIL_IF(s->n < 1, MS4_EARG, "no tokens to feed");
    FAIL_IF(s->n > (size_t)(s->session->n_ctx - length), MS4_EFULL,
            "%zu tokens after %d do not fit into a context of %d", s->n, length, s->session->n_ctx);
    FAIL_IF(s->n_logits > s->n, MS4_EARG, "the logits of %zu of %zu positions", s->n_logits, s->n);
    FAIL_IF(s->n_logits && (!s->logits || (s->n_highest && !s->ids)), MS4_EARG, "no room for the logits");
    FAIL_IF(s->n_highest < 0 || s->n_highest > MS4_MOST_HIGHEST
                || (s->n_highest && (s->n_among < s->n_highest || s->n_among > e->shape.n_vocab)),
            MS4_EARG, "the %d highest of %d logits; at most %d, of %d", s->n_highest, s->n_among, MS4_MOST_HIGHEST,
            e->shape.n_vocab);
    for (size_t i = 0; i < s->n; i++) {
        FAIL_IF(s->tokens[i] != MS4_ROW && (s->tokens[i] < 0 || s->tokens[i] >= e->shape.n_vocab), MS4_EARG,
                "token id %d: the vocabulary has 0 to %d", s->tokens[i], e->shape.n_vocab - 1);
        row_tokens += s->tokens[i] == MS4_ROW;
    }
    FAIL_IF(row_tokens != s->n_rows, MS4_EARG,
            "%zu positions take a row, but there are %zu rows", row_tokens, s->n_rows);
    return MS4_OK;
}
static int check(const ms4_engine *e, const ms4_span *spans, size_t n_spans) {
    size_t n = 0;
    FAIL_IF(!n_spans, MS4_EARG, "a step without a span");
    for (size_t i = 0; i < n_spans; i++) {
        TRY(check_span(e, &spans[i]));
        n += spans[i].n;
        for (size_t j = 0; j < i; j++)
            FAIL_IF(spans[j].session == spans[i].session, MS4_EARG, "a session appears twice in a step");
    }
    FAIL_IF(n > (size_t)e->n_batch, MS4_EARG, "%zu tokens in a step; at most %d", n, e->n_batch);
    return MS4_OK;
}
/* Takes up the spans that nobody has stopped yet, and makes room for all that they need. */
static int prepare(run *r) {
    ms4_engine *e = r->e;
    step *st = &r->st;
    int32_t n_tokens = 0;
    for (size_t i = 0; i < r->n_spans; i++) n_tokens += (int32_t)r->spans[i].n;
    make_room(e, n_tokens);
    for (size_t i = 0; i < r->n_spans; i++) {
        ms4_span *s = &r->spans[i];
        if (is_stopped(s)) {
            s->status = error_set(MS4_ECANCELED, "canceled");
            continue;
        }
        ms4_session *session = s->session;
        const int32_t length = atomic_load(&session->length), n = (int32_t)s->n;
        atomic_store(&session->done, 0);
        atomic_store(&session->total, (uint64_t)n * (uint64_t)e->shape.n_layer);
        st->spans[st->n_spans] = (span){ &session->kv, st->n, n, length, (int32_t)s->n_logits };
        r->part[st->n_spans++] = s;
        st->n += n;
        st->n_out += (int32_t)s->n_logits;
        TRY(kv_cache_room(&session->kv, length, n));
    }
    TRY(room_for(&e->room, &e->shape, (size_t)st->n));
    TRY(experts_turn(e->experts));
    st->rope = e->room.rope;
    st->scale = e->room.scale;
    st->keep = e->room.keep;
    st->late = e->room.late;
    buffer_shape shapes[N_BUFFERS];
    shapes_of(e, st->n, shapes);
    /* One span: its own flag ends work at once.  Several: looked at between layers. */
    const atomic_int *stop = st->n_spans == 1 ? (const atomic_int *)r->part[0]->stop : &r->stop;
    TRY(DO(e->home, begin, shapes, stop));
    experts_begin(e->experts, stop);
    return e->other && experts_in_parts(e->experts) ? DO(e->other, begin, shapes, stop) : MS4_OK;
}
static int compute_once(run *r) {
    TRY(prepare(r));
    if (!r->st.n_spans) return MS4_OK;
    fill_positions(&r->st);
    TRY(embed(r));
    TRY(run_layers(r));
    TRY(logits(r));
    for (int32_t i = 0; i < r->st.n_late; i++)
        TRY(layer_recall(&r->st, r->e->home, r->st.late[i], r->e->experts, &r->e->room.picks));
    TRY(files_check(r->e->files));
    conclude(r);
    return MS4_OK;
}
/* Where the card has too little memory, slots give up theirs, and the step begins once more from its beginning. */
static int compute(run *r) {
    int status = compute_once(r);
    if (status != MS4_ENOMEM || !r->e->card || DO(r->e->home, wait) || !card_shrink(r->e->card)) return status;
    for (size_t i = 0; i < r->n_spans; i++) {
        r->spans[i].status = MS4_OK;
        kv_cache_cut(&r->spans[i].session->kv, atomic_load(&r->spans[i].session->length));
    }
    r->st.n_spans = r->st.n = r->st.n_out = r->st.n_late = 0;
    experts_count(r->e->experts);
    TRY(experts_on_card(r->e->experts, r->e->card->slots, r->e->other));
    engine_say(r->e, "the GPU has no memory left", "experts gave up places there, and the CPU computes more of them");
    return compute_once(r);
}
/* All spans in one turn.  What a span that failed has left behind in its cache is cut off. */
static int take_turn(ms4_engine *e, run *r) {
    int64_t start = now_ns();
    int status = compute(r), canceled = r->st.n_spans > 0;
    if (status) DO(r->e->home, wait);          /* nobody may be at work on what is given back now */
    for (size_t i = 0; i < r->n_spans; i++) {
        ms4_span *s = &r->spans[i];
        if (status) s->status = status;
        if (s->status) kv_cache_cut(&s->session->kv, atomic_load(&s->session->length));
    }
    for (int32_t i = 0; i < r->st.n_spans; i++) canceled &= r->part[i]->status == MS4_ECANCELED;
    if (!status && r->st.n_spans && !canceled) {
        const int64_t ns = now_ns() - start;
        count(r, ns, r->st.n_out);
        experts_end(e->experts, ns);
        if (e->card) engine_say_unpinned(e);
        if (e->watch.call) e->watch.call(-1, 0, NULL, e->watch.user);
    } else experts_count(e->experts);                         /* of no use to anybody */
    return status;
}
void ms4_stop(int32_t *stop) { atomic_store((atomic_int *)stop, 1); }
int ms4_step(ms4_engine *e, ms4_span *spans, size_t n_spans) {
    TRY(check(e, spans, n_spans));
    run r = { .e = e, .spans = spans, .n_spans = n_spans, .st = { .shape = &e->shape, .watch = &e->watch } };
    r.st.spans = memory_take(n_spans, sizeof *r.st.spans);
    r.part = memory_take(n_spans, sizeof *r.part);
    int status = r.st.spans && r.part ? MS4_OK : error_set(MS4_ENOMEM, "no memory for a step");
    for (size_t i = 0; i < n_spans; i++) spans[i].status = status;
    if (!status) {
        turn_take(&e->turn);
        status = take_turn(e, &r);
        turn_give(&e->turn);
    }
    for (size_t i = 0; i < n_spans && !status; i++) status = spans[i].status;
    memory_give(r.st.spans);
    memory_give(r.part);
    return status;
}
