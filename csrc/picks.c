/* picks.c -- what the router chose, token by token, sorted so that each expert's tokens lie side by side. */
#include "step.h"
#include <string.h>

void picks_group(picks *p, int32_t n_expert) {
    const int32_t n_pairs = p->n * p->k;
    int32_t *first = p->first;
    memset(first, 0, (size_t)(n_expert + 1) * sizeof *first);
    for (int32_t i = 0; i < n_pairs; i++) first[p->expert[i] + 1]++;
    p->n_used = 0;
    for (int32_t i = 0; i < n_expert; i++) {
        if (first[i + 1]) p->used[p->n_used++] = i;
        first[i + 1] += first[i];
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        int32_t pair = first[p->expert[i]]++;
        p->row[i] = pair;
        p->token[pair] = i / p->k;
        p->pair_weight[pair] = p->weight[i];
    }
    memmove(first + 1, first, (size_t)n_expert * sizeof *first);
    first[0] = 0;
}
