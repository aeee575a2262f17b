/* tape.c -- parts of a step as graphs, made once, and changed where a step differs from the one before. */
#include "cuda/tape.h"
#include "memory.h"
#include <string.h>

#define KEPT_PIECE ((size_t)256 << 10)                        /* memory of the card is taken in pieces of so much */
#define MOST_PIECES 64
#define STRETCH 4                                             /* parts, if nobody but tape_is_long ends them */
#define FIRST_PART 64                                         /* launches; each part has so many times what the .. */
#define NEXT_PART 4                                           /* .. one before it had: the card is busy meanwhile */

/* One launch, and what it reads beside its argument: `card` holds a copy of `kept`. */
typedef struct {
    tape_launch how;
    uint8_t args[TAPE_ARGS];
    size_t bytes;
    CUgraphNode node;
    uint8_t *kept, *card;
    size_t kept_bytes, kept_room;
    int32_t changed;                                          /* since the graph was made, or was told */
} launch;
typedef struct {
    launch *at;
    int32_t n, room, next;                                    /* next: of this step; those before are its own */
    CUgraph graph;
    CUgraphExec exec;                                         /* NULL: there is no graph */
} part;
struct tape {
    gpu *g;
    part *parts;
    int32_t current, n_parts, begun;                          /* begun: the stretch's first part */
    struct { uint8_t *at; size_t bytes; } pieces[MOST_PIECES];
    size_t used;                                              /* of the last piece */
    int32_t n_pieces;
};
#define GPU(t, name, ...) gpu_check((t)->g, #name, cuda.name(__VA_ARGS__))

int tape_open(gpu *g, tape **out) {
    tape *t = memory_take(1, sizeof *t);
    FAIL_IF(!t, MS4_ENOMEM, "no memory for the GPU");
    t->g = g;
    *out = t;
    return MS4_OK;
}
static void drop_graph(tape *t, part *p) {
    if (p->exec && !gpu_lost(t->g)) cuda.cuGraphExecDestroy(p->exec);
    if (p->graph && !gpu_lost(t->g)) cuda.cuGraphDestroy(p->graph);
    p->exec = NULL;
    p->graph = NULL;
}
void tape_close(tape *t) {
    if (!t) return;
    for (part *p = t->parts; p < t->parts + t->n_parts; p++) {
        drop_graph(t, p);
        for (launch *l = p->at; l < p->at + p->room; l++) memory_give(l->kept);
        memory_give(p->at);
    }
    for (int32_t i = 0; i < t->n_pieces; i++) gpu_give(t->g, t->pieces[i].at, t->pieces[i].bytes);
    memory_give(t->parts);
    memory_give(t);
}
void tape_begin(tape *t) {
    t->current = t->begun = 0;
    for (part *p = t->parts; p < t->parts + t->n_parts; p++) p->next = 0;
}
/* Parts that a step before had there stay as they are. */
void tape_stretch(tape *t, int32_t n) {
    if (STRETCH * n > t->current) t->current = STRETCH * n;
    t->begun = t->current;
}
int tape_is_long(const tape *t) {
    const int32_t nth = t->current - t->begun;
    int32_t most = FIRST_PART;
    for (int32_t i = 0; i < nth && i < STRETCH; i++) most *= NEXT_PART;
    return nth + 1 < STRETCH && t->current < t->n_parts && t->parts[t->current].next >= most;
}
/* Room for an n-th in *array, which has *room: at least twice as many. */
static int grow(void *array, int32_t n, int32_t *room, size_t size) {
    void **at = array;
    if (n < *room) return MS4_OK;
    const int32_t wanted = 2 * (n < 8 ? 8 : n);
    void *larger = memory_take((size_t)wanted, size);
    FAIL_IF(!larger, MS4_ENOMEM, "no memory for the launches of a step");
    if (*room) memcpy(larger, *at, (size_t)*room * size);
    memory_give(*at);
    *at = larger;
    *room = wanted;
    return MS4_OK;
}
/* The place of the next launch, in the part that is written. */
static int next_launch(tape *t, part **of, launch **out) {
    TRY(grow(&t->parts, t->current, &t->n_parts, sizeof *t->parts));
    part *p = &t->parts[t->current];
    TRY(grow(&p->at, p->next, &p->room, sizeof *p->at));
    *of = p;
    *out = &p->at[p->next];
    return MS4_OK;
}
int tape_put(tape *t, const tape_launch *how, const void *args, size_t bytes) {
    part *p;
    launch *l;
    FAIL_IF(bytes > TAPE_ARGS, MS4_EDEVICE, "a kernel takes %zu bytes; the engine writes down %d", bytes, TAPE_ARGS);
    TRY(next_launch(t, &p, &l));
    if (p->next == p->n || l->how.f != how->f) {              /* this step goes another way from here on */
        drop_graph(t, p);
        p->n = p->next + 1;
        l->changed = 1;
    }
    l->changed |= memcmp(&l->how, how, sizeof *how) || memcmp(l->args, args, bytes);
    l->how = *how;
    l->bytes = bytes;
    memcpy(l->args, args, bytes);
    p->next++;
    return MS4_OK;
}
static int place(tape *t, launch *l, size_t bytes) {
    const size_t room = (bytes + 255) / 256 * 256, wanted = room > KEPT_PIECE ? room : KEPT_PIECE;
    memory_give(l->kept);
    l->kept_room = l->kept_bytes = 0;
    l->kept = memory_take(room, 1);
    FAIL_IF(!l->kept, MS4_ENOMEM, "no memory for the launches of a step");
    if (!t->n_pieces || t->used + room > t->pieces[t->n_pieces - 1].bytes) {
        FAIL_IF(t->n_pieces == MOST_PIECES, MS4_EDEVICE, "a step has too many tables; use --device cuda:safe");
        TRY(gpu_take(t->g, wanted, (void **)&t->pieces[t->n_pieces].at));
        t->pieces[t->n_pieces++].bytes = wanted;
        t->used = 0;
    }
    l->card = t->pieces[t->n_pieces - 1].at + t->used;
    l->kept_room = room;
    t->used += room;
    return MS4_OK;
}
int tape_keep(tape *t, const void *from, size_t bytes, void **card, int *stale) {
    part *p;
    launch *l;
    TRY(next_launch(t, &p, &l));
    if (bytes > l->kept_room) TRY(place(t, l, bytes));
    *card = l->card;
    *stale = l->kept_bytes != bytes || memcmp(l->kept, from, bytes);
    memcpy(l->kept, from, bytes);
    l->kept_bytes = bytes;
    return MS4_OK;
}
static cuda_kernel_node node_of(launch *l, void *parameters[1]) {
    parameters[0] = l->args;
    return (cuda_kernel_node){
        .f = l->how.f, .grid = { (unsigned)l->how.grid.x, (unsigned)l->how.grid.y, (unsigned)l->how.grid.z },
        .block = { (unsigned)l->how.threads, 1, 1 }, .shared = (unsigned)l->how.shared, .parameters = parameters };
}
static int make_graph(tape *t, part *p) {
    void *parameters[1];
    TRY(GPU(t, cuGraphCreate, &p->graph, 0));
    for (int32_t i = 0; i < p->n; i++) {
        const cuda_kernel_node node = node_of(&p->at[i], parameters);
        TRY(GPU(t, cuGraphAddKernelNode, &p->at[i].node, p->graph, i ? &p->at[i - 1].node : NULL, (size_t)(i > 0),
                &node));
        p->at[i].changed = 0;
    }
    return GPU(t, cuGraphInstantiate, &p->exec, p->graph, 0);
}
/* Tells the graph what has changed. */
static int mend_graph(tape *t, part *p) {
    void *parameters[1];
    for (launch *l = p->at; l < p->at + p->n; l++) {
        if (!l->changed) continue;
        const cuda_kernel_node node = node_of(l, parameters);
        TRY(GPU(t, cuGraphExecKernelNodeSetParams, p->exec, l->node, &node));
        l->changed = 0;
    }
    return MS4_OK;
}
int tape_go(tape *t, CUstream stream) {
    part *p = t->current < t->n_parts ? &t->parts[t->current] : NULL;
    if (!p || !p->next) return MS4_OK;
    if (p->next < p->n) drop_graph(t, p);                     /* this step has fewer */
    p->n = p->next;
    int status = p->exec ? mend_graph(t, p) : make_graph(t, p);
    if (status) {                                             /* the step has failed, and with it what is here */
        drop_graph(t, p);
        p->n = p->next = 0;
        return status;
    }
    t->current++;
    return GPU(t, cuGraphLaunch, p->exec, stream);
}
