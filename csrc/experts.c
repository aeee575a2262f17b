/* experts.c -- the expert store: all experts lie in host memory, in the pages that files.c holds; what is left to say
 * is which device computes them. */
#include "experts.h"
#include "error.h"
#include "memory.h"
#include <string.h>

struct experts {
    const layer_weights *layers;
    device *devices[MAX_SHARES];                               /* home first */
    uint8_t *place;                                            /* by layer and expert: its device; NULL: all home */
    ffn_group *groups[MAX_SHARES];                             /* n_expert for each device; made when needed */
    uint64_t n_pairs, n_bytes;
    int32_t n_layer, n_expert, n_devices;
};

int experts_open(const ms4_shape *s, const layer_weights *layers, device *home, experts **out) {
    experts *store = memory_take(1, sizeof *store);
    FAIL_IF(!store, MS4_ENOMEM, "no memory for the expert table");
    *store = (experts){ .layers = layers, .devices = { home }, .n_layer = s->n_layer, .n_expert = s->n_expert,
                        .n_devices = 1 };
    store->groups[0] = memory_take((size_t)s->n_expert, sizeof *store->groups[0]);
    if (!store->groups[0]) {
        experts_close(store);
        return error_set(MS4_ENOMEM, "no memory for the expert table");
    }
    *out = store;
    return MS4_OK;
}
void experts_close(experts *store) {
    if (!store) return;
    for (int i = 0; i < MAX_SHARES; i++) memory_give(store->groups[i]);
    memory_give(store->place);
    memory_give(store);
}
static ffn_group group_of(const ffn_weights *all, int32_t expert, const picks *p) {
    return (ffn_group){
        .w = { .gate = matrix_rows(&all->gate, expert, 0, all->gate.n_rows),
               .up = matrix_rows(&all->up, expert, 0, all->up.n_rows),
               .down = matrix_rows(&all->down, expert, 0, all->down.n_rows), .gelu = all->gelu },
        .first = p->first[expert], .n = p->first[expert + 1] - p->first[expert],
    };
}
int experts_take(experts *store, int32_t layer, const picks *p, ffn_share shares[MAX_SHARES], int32_t *n_shares) {
    const layer_weights *w = &store->layers[layer];
    ffn_share all[MAX_SHARES] = { 0 };
    for (int32_t i = 0; i < store->n_devices; i++)
        all[i] = (ffn_share){ .on = store->devices[i], .groups = store->groups[i], .n = p->n };
    for (int32_t i = 0; i < p->n_used; i++) {
        int32_t id = p->used[i];
        ffn_share *share = &all[store->place ? store->place[(size_t)layer * (size_t)store->n_expert + (size_t)id] : 0];
        share->groups[share->n_groups++] = group_of(&w->experts, id, p);
    }
    *n_shares = 0;
    for (int32_t i = 0; i < store->n_devices; i++)             /* home is there even if it has only the shared expert */
        if (!i || all[i].n_groups) shares[(*n_shares)++] = all[i];
    shares[0].whole = *n_shares == 1;
    store->n_pairs += (uint64_t)p->n * (uint64_t)p->k;
    store->n_bytes += (uint64_t)p->n_used * w->bytes_per_expert;
    return MS4_OK;
}
int experts_ready(experts *store, ffn_share *share, ffn_share *part) {
    (void)store;                                               /* resident: all of it in one part */
    *part = *share;
    share->every = NULL;
    share->n_groups = 0;
    return MS4_OK;
}
void experts_give(experts *store, int32_t layer, const picks *p) { (void)store; (void)layer; (void)p; }

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
    for (int32_t i = 1; i <= n_others && place; i++) {
        if (!store->groups[i]) store->groups[i] = memory_take((size_t)store->n_expert, sizeof *store->groups[i]);
        FAIL_IF(!store->groups[i], MS4_ENOMEM, "no memory for the places of experts");
        store->devices[i] = others[i - 1];
    }
    if (place) memcpy(store->place, place, n);
    else if (store->place) memset(store->place, 0, n);
    store->n_devices = place ? n_others + 1 : 1;
    return MS4_OK;
}
int32_t experts_devices(const experts *store) { return store->n_devices; }
void experts_count(experts *store, uint64_t *pairs, uint64_t *bytes) {
    *pairs = store->n_pairs;
    *bytes = store->n_bytes;
    store->n_pairs = store->n_bytes = 0;
}
