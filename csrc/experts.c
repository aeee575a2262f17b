/* experts.c -- the expert store: all experts are resident, in the pages that files.c holds. */
#include "experts.h"
#include "error.h"
#include "memory.h"
#include <string.h>

struct experts { int32_t n_layer; expert_view *layers; };

int experts_open(int32_t n_layer, const expert_view *layers, experts **out) {
    experts *store = memory_take(1, sizeof *store);
    expert_view *copy = memory_take((size_t)n_layer, sizeof *copy);
    if (!store || !copy) {
        memory_give(store);
        memory_give(copy);
        return error_set(MS4_ENOMEM, "no memory for the expert table");
    }
    memcpy(copy, layers, (size_t)n_layer * sizeof *copy);
    *store = (experts){ n_layer, copy };
    *out = store;
    return MS4_OK;
}
void experts_close(experts *store) {
    if (!store) return;
    memory_give(store->layers);
    memory_give(store);
}
int experts_pin(experts *store, int32_t layer, const int32_t *ids, int32_t n, expert_view *views) {
    const expert_view *all = &store->layers[layer];
    for (int32_t i = 0; i < n; i++)
        views[i] = (expert_view){
            .gate = matrix_rows(&all->gate, ids[i], 0, all->gate.n_rows),
            .up = matrix_rows(&all->up, ids[i], 0, all->up.n_rows),
            .down = matrix_rows(&all->down, ids[i], 0, all->down.n_rows),
        };
    return MS4_OK;
}
void experts_unpin(experts *store, int32_t layer, const int32_t *ids, int32_t n) {
    (void)store; (void)layer; (void)ids; (void)n;             /* resident: nothing to release */
}
