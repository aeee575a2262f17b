/* experts.c -- the expert store: which device computes an expert, and where its weights lie in host memory. */
#include "experts.h"
#include "error.h"
#include "memory.h"
#include <string.h>

/* From this share of a layer's experts on the step is one of many tokens, and the next layer will want nearly all of
 * its own: they are read while this layer is computed. */
#define AHEAD_FROM 0.75

struct experts {
    const layer_weights *layers;
    device *devices[MAX_SHARES];                               /* home first */
    uint8_t *place;                                            /* by layer and expert: its device; NULL: all home */
    ffn_group *groups[MAX_SHARES];                             /* n_expert for each device; made when needed */
    slots *slots;                                              /* NULL: all experts lie with their files */
    vram *on_card;                                             /* NULL: the home device sees host memory */
    policy *policy;                                            /* who has earned a slot */
    ffn_group *part;                                           /* n_expert: of a part that comes from slots */
    uint8_t *share_of;                                         /* by place in `wanted` */
    int32_t *ids, *pairs, *wanted;                             /* n_expert: scratch */
    const picks *picks;                                        /* of the layer that is computed */
    const atomic_int *stop;
    experts_counts counts;
    double ns_step, ns_cpu;                                    /* of the last step; of the CPU for experts in it */
    int32_t n_layer, n_expert, n_devices, layer;
    int32_t turn;                                              /* the share that the last part was of */
    int32_t stream_from;                                       /* rows: policy_stream_from for this layer */
};

/* Of a slot: none, if the expert lies on the card. */
static double value_of(const void *context, int32_t layer, int32_t expert) {
    const experts *store = context;
    ffn_weights w;
    if (store->on_card && vram_find(store->on_card, layer, expert, &w)) return 0;
    return policy_value(store->policy, layer, expert);
}
static int open_parts(experts *store) {
    const size_t n = (size_t)store->n_expert;
    store->groups[0] = memory_take(n, sizeof *store->groups[0]);
    store->part = memory_take(n, sizeof *store->part);
    store->share_of = memory_take(n, 1);
    store->ids = memory_take(n, sizeof *store->ids);
    store->pairs = memory_take(n, sizeof *store->pairs);
    store->wanted = memory_take(n, sizeof *store->wanted);
    FAIL_IF(!store->groups[0] || !store->part || !store->share_of || !store->ids || !store->pairs || !store->wanted,
            MS4_ENOMEM, "no memory for the expert table");
    if (!store->slots) return MS4_OK;
    TRY(policy_open(store->n_layer, store->n_expert, NULL, &store->policy));
    slots_rate(store->slots, value_of, store);
    return MS4_OK;
}
int experts_open(const ms4_shape *s, const layer_weights *layers, device *home, slots *from_disk, experts **out) {
    experts *store = memory_take(1, sizeof *store);
    if (!store) {
        slots_close(from_disk);
        return error_set(MS4_ENOMEM, "no memory for the expert table");
    }
    *store = (experts){ .layers = layers, .devices = { home }, .slots = from_disk, .n_layer = s->n_layer,
                        .n_expert = s->n_expert, .n_devices = 1 };
    int status = open_parts(store);
    if (status) experts_close(store);
    else *out = store;
    return status;
}
void experts_close(experts *store) {
    if (!store) return;
    if (store->on_card) vram_stop(store->on_card);             /* it may be at work in the slots */
    for (int i = 0; i < MAX_SHARES; i++) memory_give(store->groups[i]);
    slots_close(store->slots);
    policy_close(store->policy);
    memory_give(store->place);
    memory_give(store->part);
    memory_give(store->share_of);
    memory_give(store->ids);
    memory_give(store->pairs);
    memory_give(store->wanted);
    memory_give(store);
}
void experts_begin(experts *store, const atomic_int *stop) { store->stop = stop; }
slots *experts_slots(experts *store) { return store->slots; }
policy *experts_policy(experts *store) {
    return store->policy ? store->policy : store->on_card ? vram_policy(store->on_card) : NULL;
}

/* Where an expert is, and its pairs.  With slots the addresses are those of a part that slots_next has given. */
static ffn_group group_of(const experts *store, int32_t expert, const picks *p) {
    ffn_group g = { .w = ffn_expert(&store->layers[store->layer].experts, expert),
                    .first = p->first[expert], .n = p->first[expert + 1] - p->first[expert] };
    if (store->slots) slots_point(store->slots, store->layer, expert, &g.w);
    return g;
}
/* What a device has to know beforehand: the pairs, and what the weights are like, but not where. */
static ffn_group pairs_of(const experts *store, int32_t expert, const picks *p) {
    return (ffn_group){ .w = store->layers[store->layer].experts, .first = p->first[expert],
                        .n = p->first[expert + 1] - p->first[expert] };
}
/* Who computes an expert.  On a card: those in its slots, and those that are worth the way for this layer alone. */
static int32_t locate(const experts *store, int32_t expert, ffn_group *g) {
    const int32_t at =
        store->place ? store->place[(size_t)store->layer * (size_t)store->n_expert + (size_t)expert] : 0;
    if (!store->on_card) return at;
    if (!at && vram_find(store->on_card, store->layer, expert, &g->w)) return 0;
    g->away = !store->place && g->n >= store->stream_from && store->picks->n > 1;
    return !g->away;
}
/* Puts an expert into the share of who computes it, and among those that the disk has to bring. */
static void share_out(experts *store, const picks *p, int32_t id, ffn_share *all, int32_t *n_wanted) {
    ffn_group g = pairs_of(store, id, p);
    const int32_t device = locate(store, id, &g), on_card = store->on_card && !device;
    const uint64_t bytes = store->layers[store->layer].bytes_per_expert;
    if (!store->slots && (!on_card || g.away)) g.w = group_of(store, id, p).w;
    if (store->slots && (!on_card || g.away)) {
        store->share_of[*n_wanted] = (uint8_t)device;
        store->wanted[(*n_wanted)++] = id;
    }
    all[device].groups[all[device].n_groups++] = g;
    if (on_card) store->counts.on_card += (uint64_t)g.n;
    *(g.away ? &store->counts.bytes_streamed : &store->counts.bytes_on_card) += on_card ? bytes : 0;
}
/* Asks for what is not there; how many of the n wanted experts are. */
static int32_t want(experts *store, const picks *p, int32_t n) {
    int32_t n_there = n, next = store->layer + 1;
    if (store->on_card && !store->slots) vram_used(store->on_card, store->layer, p);
    if (!store->slots) return n_there;
    for (int32_t i = 0; i < p->n_used; i++) store->pairs[i] = p->first[p->used[i] + 1] - p->first[p->used[i]];
    policy_count(store->policy, store->layer, p->used, store->pairs, p->n_used, p->n);
    slots_want(store->slots, store->layer, store->wanted, store->share_of, n, store->stop, &n_there);
    /* The last layer is computed for those tokens only whose logits are wanted. */
    const int ahead = next + 1 < store->n_layer && store->layers[next].has_experts
                   && p->n_used >= AHEAD_FROM * store->n_expert;
    int32_t n_soon = 0;
    for (int32_t i = 0; i < store->n_expert && ahead; i++) {
        ffn_weights w;
        if (!store->on_card || !vram_find(store->on_card, next, i, &w)) store->ids[n_soon++] = i;
    }
    slots_soon(store->slots, next, store->ids, n_soon);
    return n_there;
}
void experts_ahead(const experts *store, int32_t layer, ffn_ahead *out) {
    *out = (ffn_ahead){ 0 };
    if (store->on_card && !store->place) vram_ahead(store->on_card, layer, out);
    out->layer = layer;
}
int experts_take(experts *store, int32_t layer, const picks *p, ffn_share shares[MAX_SHARES], int32_t *n_shares) {
    const layer_weights *w = &store->layers[layer];
    ffn_share all[MAX_SHARES] = { 0 };
    int32_t n_wanted = 0;
    store->layer = layer;
    store->picks = p;
    store->turn = -1;
    if (store->on_card) store->stream_from = vram_stream_from(store->on_card);
    for (int32_t i = 0; i < store->n_devices; i++)
        all[i] = (ffn_share){ .on = store->devices[i], .groups = store->groups[i], .n = p->n };
    for (int32_t i = 0; i < p->n_used; i++) share_out(store, p, p->used[i], all, &n_wanted);
    *n_shares = 0;
    for (int32_t i = 0; i < store->n_devices; i++)             /* home is there even if it has only the shared expert */
        if (!i || all[i].n_groups) shares[(*n_shares)++] = all[i];
    shares[0].whole = want(store, p, n_wanted) == n_wanted && *n_shares == 1;
    store->counts.pairs += (uint64_t)p->n * (uint64_t)p->k;
    store->counts.bytes += (uint64_t)p->n_used * w->bytes_per_expert;
    return MS4_OK;
}
/* Host memory that the card brings from is not read any more, so that slots may be given to others. */
static int let_bring(const experts *store) {
    return store->on_card ? DO(store->devices[0], brought) : MS4_OK;
}
/* Of a share: what lies on the card, which is its first part's, and what has come into slots and was not given yet. */
static int part_from_slots(experts *store, const ffn_share *share, ffn_share *part) {
    const int on_card = store->on_card && share->on == store->devices[0];
    int32_t device = 0, n;
    while (store->devices[device] != share->on) device++;
    part->groups = store->part;
    part->n_groups = 0;
    for (int32_t i = 0; i < share->n_groups && on_card; i++)
        if (!share->groups[i].away) part->groups[part->n_groups++] = share->groups[i];
    if (on_card) TRY(let_bring(store));
    TRY(slots_next(store->slots, device, store->ids, &n));
    for (int32_t i = 0; i < n; i++) {
        part->groups[part->n_groups] = group_of(store, store->ids[i], store->picks);
        part->groups[part->n_groups++].away = on_card;
    }
    return MS4_OK;
}
static int take_part(experts *store, ffn_share *share, ffn_share *part) {
    *part = *share;
    if (store->slots) TRY(part_from_slots(store, share, part));
    share->every = NULL;
    share->n_groups = 0;
    return MS4_OK;
}
int experts_ready(experts *store, ffn_share *shares, int32_t n, ffn_share *part) {
    for (int32_t left = 1; left;) {
        for (int32_t i = 0; i < n; i++) {
            store->turn = (store->turn + 1) % n;
            TRY(take_part(store, &shares[store->turn], part));
            if (ffn_share_has(part)) return MS4_OK;
        }
        left = 0;
        if (store->slots) TRY(slots_wait(store->slots, &left));
    }
    return MS4_OK;
}
void experts_give(experts *store, int32_t layer, const picks *p) {
    (void)layer; (void)p;
    if (!store->slots) return;
    let_bring(store);                                          /* a card that is lost says so when it is asked next */
    slots_drop(store->slots);
}

static int add_device(experts *store, int32_t at, device *d) {
    if (!store->groups[at]) store->groups[at] = memory_take((size_t)store->n_expert, sizeof *store->groups[at]);
    FAIL_IF(!store->groups[at], MS4_ENOMEM, "no memory for the places of experts");
    store->devices[at] = d;
    return MS4_OK;
}
int experts_place(experts *store, const uint8_t *place, device *const *others, int32_t n_others) {
    size_t n = (size_t)store->n_layer * (size_t)store->n_expert;
    FAIL_IF(n_others < 0 || n_others >= MAX_SHARES, MS4_EARG,
            "%d devices for experts: at most %d", n_others + 1, MAX_SHARES);
    for (size_t i = 0; place && i < n; i++)
        FAIL_IF(place[i] > n_others, MS4_EARG, "an expert is to be on device %d of %d", place[i], n_others);
    if (place && !store->place) {
        store->place = memory_take(n, 1);
        FAIL_IF(!store->place, MS4_ENOMEM, "no memory for the places of experts");
    }
    for (int32_t i = 1; i <= n_others && place; i++) TRY(add_device(store, i, others[i - 1]));
    if (place) memcpy(store->place, place, n);
    store->n_devices = place ? n_others + 1 : store->on_card && !vram_has_all(store->on_card) ? 2 : 1;
    if (!place) {                                              /* as if there had never been one */
        memory_give(store->place);
        store->place = NULL;
    }
    return MS4_OK;
}
int experts_on_card(experts *store, vram *on_card, device *other) {
    store->on_card = on_card;
    TRY(add_device(store, 1, other));
    if (!store->place) store->n_devices = vram_has_all(on_card) ? 1 : 2;
    return store->slots ? vram_trade(on_card, store->policy) : MS4_OK;
}
void experts_off_card(experts *store, device *home) {
    store->on_card = NULL;
    store->devices[0] = home;
    store->n_devices = 1;
    memory_give(store->place);
    store->place = NULL;
}
int experts_turn(experts *store) {
    const double ns_step = store->ns_step, ns_cpu = store->ns_cpu;
    store->ns_step = store->ns_cpu = 0;
    if (!store->on_card) return MS4_OK;
    TRY(vram_turn(store->on_card, ns_step, ns_cpu));
    return vram_show(store->on_card);
}
/* The time of a device that works on after it has answered says nothing. */
void experts_took(experts *store, const ffn_share *part, int64_t ns) {
    const double of_one = (double)store->layers[store->layer].bytes_per_expert;
    double rows = 0;
    if (!store->on_card || part->on == store->devices[0] || !part->n_groups) return;
    for (const ffn_group *g = part->groups; g < part->groups + part->n_groups; g++) rows += g->n;
    policy_saw_cpu(vram_policy(store->on_card), of_one * part->n_groups, of_one * rows, (double)ns);
    store->ns_cpu += (double)ns;
}
void experts_end(experts *store, int64_t ns) { store->ns_step = (double)ns; }
int experts_in_parts(const experts *store) { return store->n_devices > 1 || store->slots; }
experts_counts experts_count(experts *store) {
    const experts_counts counts = store->counts;
    store->counts = (experts_counts){ 0 };
    return counts;
}
