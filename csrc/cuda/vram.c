/* vram.c -- pools of slots, what lies in them, and who is sent for. */
#include "cuda/vram.h"
#include "cuda/errands.h"
#include "memory.h"
#include "numbers.h"
#include "policy.h"
#include <string.h>
#include <time.h>

#define ALIGNED 256
#define SPARES 2                                              /* slots of a pool that are empty, for trading */
#define PIECES 8                                              /* of a pool, about: what can be given up at once */
#define MOST_PIECES (4 * PIECES * POLICY_POOLS)
#define GIVEN_UP (-1)                                         /* as a pool: of a slot that is no more */

/* id: layer * n_expert + expert; -1: it holds nothing; coming: somebody is on the way to it. */
typedef struct { uint8_t *at; int32_t id, pool, coming; } place;
typedef struct { uint8_t *memory; size_t bytes; int32_t first, n; } piece;    /* slots first .. first + n - 1 */

struct vram {
    gpu *g;
    const layer_weights *layers;
    slots *from_disk;                                         /* of opening alone */
    policy *counts;
    place *slots;
    int32_t *slot_of;                                         /* by id: -1 is not there */
    const uint8_t **at, **at_on_card;                         /* by id: where it lies, NULL: not there; and a copy */
    int32_t at_changed;                                       /* since it was copied */
    uint8_t *where;                                           /* by id: bits of policy.h */
    int32_t *pool;                                            /* by layer: -1 has no experts, or no slots */
    int32_t *n_in;                                            /* by layer: experts in slots */
    int32_t *pairs;                                           /* n_expert: scratch */
    piece pieces[MOST_PIECES];
    int32_t in_pool[POLICY_POOLS];                            /* slots */
    uint64_t of_pool[POLICY_POOLS];                           /* bytes of an expert */
    int32_t n_layer, n_expert, n_slots, n_given_up, n_pools, n_pieces, n_held, n_experts;
    int32_t of_all[POLICY_POOLS], shares_counts;              /* experts of the size; counts is somebody else's */
    uint64_t n_down, bytes_down, n_brought, bytes_brought, n_evicted, n_failed, allowed;
    errands *errands;                                         /* NULL: nothing moves */
};
static size_t up_to(size_t n) { return (n + ALIGNED - 1) / ALIGNED * ALIGNED; }
static size_t expert_bytes(const ffn_weights *f) {
    return up_to(matrix_bytes(&f->gate)) + up_to(matrix_bytes(&f->up)) + up_to(matrix_bytes(&f->down));
}
uint64_t vram_wanted(const ms4_shape *s, const layer_weights *layers) {
    uint64_t bytes = 0;
    for (int32_t i = 0; i < s->n_layer; i++)
        if (layers[i].has_experts) bytes += (uint64_t)s->n_expert * expert_bytes(&layers[i].experts);
    return bytes;
}
static ffn_weights host_expert(const vram *v, int32_t id) {
    return ffn_expert(&v->layers[id / v->n_expert].experts, id % v->n_expert);
}
/* Where the three matrices lie in a slot: gate, up, down, each aligned. */
static void in_slot(const place *s, ffn_weights *f) {
    f->gate.data = s->at;
    f->up.data = f->gate.data + up_to(matrix_bytes(&f->gate));
    f->down.data = f->up.data + up_to(matrix_bytes(&f->up));
}
/* --- the table ---------------------------------------------------------------------------------------------------- */
static void enter(vram *v, int32_t at, int32_t id) {
    v->slots[at].id = id;
    v->slot_of[id] = at;
    v->where[id] = POLICY_RAM | POLICY_VRAM;
    v->at[id] = v->slots[at].at;
    v->at_changed = 1;
    v->n_in[id / v->n_expert]++;
    v->n_held++;
}
static void leave(vram *v, int32_t at) {
    const int32_t id = v->slots[at].id;
    v->slots[at].id = -1;
    v->slot_of[id] = -1;
    v->where[id] = POLICY_RAM;
    v->at[id] = NULL;
    v->at_changed = 1;
    v->n_in[id / v->n_expert]--;
    v->n_held--;
}
int vram_find(const vram *v, int32_t layer, int32_t expert, ffn_weights *out) {
    const int32_t id = layer * v->n_expert + expert, at = v->slot_of[id];
    if (at < 0) return 0;
    *out = host_expert(v, id);
    in_slot(&v->slots[at], out);
    return 1;
}
static size_t table_bytes(const vram *v) { return (size_t)v->n_layer * (size_t)v->n_expert * sizeof *v->at; }
int vram_show(vram *v) {
    if (!v->at_changed) return MS4_OK;
    TRY(gpu_enter(v->g));
    TRY(gpu_upload(v->g, v->at_on_card, v->at, table_bytes(v)));
    v->at_changed = 0;
    return MS4_OK;
}
void vram_ahead(const vram *v, int32_t layer, ffn_ahead *out) {
    const ffn_weights *w = &v->layers[layer].experts;
    out->experts = *w;
    out->up_at = up_to(matrix_bytes(&w->gate));
    out->down_at = out->up_at + up_to(matrix_bytes(&w->up));
    if (w->gate.scales || w->up.scales || w->down.scales) return;
    out->slots = v->at_on_card + (size_t)layer * (size_t)v->n_expert;
    out->all = v->n_in[layer] == v->n_expert;
}
int vram_has_all(const vram *v) { return v->n_held == v->n_experts; }
void vram_used(vram *v, int32_t layer, const picks *p) {
    for (int32_t i = 0; i < p->n_used; i++) v->pairs[i] = p->first[p->used[i] + 1] - p->first[p->used[i]];
    policy_count(v->counts, layer, p->used, v->pairs, p->n_used, p->n);
}
void vram_count(const vram *v, ms4_stats *out) {
    out->experts = (uint64_t)v->n_experts;
    out->vram_slots = (uint64_t)(v->n_slots - v->n_given_up);
    out->vram_experts = (uint64_t)v->n_held;
    out->uploads = v->n_brought;
    out->bytes_uploaded = v->bytes_brought;
    out->evictions = v->n_evicted;
    out->downloads = v->n_down;
    out->bytes_downloaded = v->bytes_down;
    out->uploads_failed = v->n_failed;
    out->slots_given_up = (uint64_t)v->n_given_up;
    out->bytes_allowed = v->allowed;
    out->bus_bytes_per_s = policy_bus(v->counts);
    out->stream_from = policy_stream_from(v->counts);
}
/* --- on their way ------------------------------------------------------------------------------------------------- */
/* Who came gives its place in RAM to who has to leave, and who now comes down there. */
static void trade(vram *v, const errand *up) {
    const int32_t n = v->n_expert, at = up->out < 0 ? -1 : v->slot_of[up->out];
    errand e = { .id = up->out, .out = -1, .slot = at };
    if (at < 0) {
        slots_release(v->from_disk, up->id / n, up->id % n);
        return;
    }
    vram_find(v, e.id / n, e.id % n, &e.from);
    e.to = host_expert(v, e.id);
    e.landing = slots_trade(v->from_disk, up->id / n, up->id % n, e.id / n, e.id % n, &e.to);
    leave(v, at);
    v->n_evicted++;
    if (!e.landing) return;
    v->slots[at].coming = 1;
    v->where[e.id] |= POLICY_BUSY;
    errands_put(v->errands, &e);
}
/* What has arrived gets its place in the table; what could not be brought leaves its slot empty. */
static int arrive(vram *v) {
    for (;;) {
        errand e;
        int ended, good;
        TRY(errands_next(v->errands, &e, &ended, &good));
        if (!ended) return MS4_OK;
        v->slots[e.slot].coming = 0;
        v->where[e.id] = v->from_disk ? 0 : POLICY_RAM;
        if (e.out >= 0) v->where[e.out] = POLICY_VRAM;
        if (e.landing) {
            v->n_down += (uint64_t)good;
            v->bytes_down += good ? errand_bytes(&e) : 0;
            continue;
        }
        if (good) {
            enter(v, e.slot, e.id);
            v->n_brought++;
            v->bytes_brought += errand_bytes(&e);
        } else {
            v->n_failed++;
            e.out = -1;
        }
        if (v->from_disk) trade(v, &e);
    }
}
/* An empty slot of a pool that nobody is on the way to; -1: there is none. */
static int32_t empty_slot(const vram *v, int32_t pool) {
    for (int32_t i = 0; i < v->n_slots; i++)
        if (v->slots[i].pool == pool && v->slots[i].id < 0 && !v->slots[i].coming) return i;
    return -1;
}
/* The slot that a move brings its expert to; -1: there is none.  What leaves is gone from the table at once, as the
 * step that read it is over; but not who comes down into RAM, as long as that place is taken. */
static int32_t clear_for(vram *v, const policy_move *m) {
    if (m->out < 0 || m->down) return empty_slot(v, v->pool[m->id / v->n_expert]);
    const int32_t at = v->slot_of[m->out];
    if (at >= 0) leave(v, at);
    v->n_evicted += at >= 0;
    return at;
}
/* Sends for what a move brings; 0: that is not possible now. */
static int ask(vram *v, const policy_move *m) {
    const int32_t layer = m->id / v->n_expert, expert = m->id % v->n_expert;
    errand e = { .from = host_expert(v, m->id), .id = m->id, .out = m->down ? m->out : -1 };
    if (v->from_disk && !slots_hold(v->from_disk, layer, expert)) return 0;
    if (v->from_disk) slots_point(v->from_disk, layer, expert, &e.from);
    e.slot = clear_for(v, m);
    if (e.slot < 0) {
        if (v->from_disk) slots_release(v->from_disk, layer, expert);
        return 0;
    }
    e.to = e.from;
    in_slot(&v->slots[e.slot], &e.to);
    v->slots[e.slot].coming = 1;
    v->where[m->id] |= POLICY_BUSY;
    if (e.out >= 0) v->where[e.out] |= POLICY_BUSY;
    errands_put(v->errands, &e);
    return 1;
}
/* Slots that a pool keeps empty, for trading. */
static int32_t spares(const vram *v, int32_t pool) {
    const int32_t few = v->in_pool[pool] / 4;
    return !v->from_disk || v->in_pool[pool] == v->of_all[pool] ? 0 : few < SPARES ? few : SPARES;
}
/* Where experts are that may be in RAM or not. */
static void look_at_ram(vram *v) {
    for (int32_t id = 0; v->from_disk && id < v->n_layer * v->n_expert; id++) {
        const int32_t layer = id / v->n_expert;
        const int there = v->pool[layer] >= 0 && slots_there(v->from_disk, layer, id % v->n_expert);
        v->where[id] = (uint8_t)((v->where[id] & ~POLICY_RAM) | (there ? POLICY_RAM : 0));
    }
}
/* The best moves; free slots are those that hold nothing and that nobody is on the way to. */
static int32_t find_moves(vram *v, uint64_t budget, policy_move *moves, int32_t most) {
    int32_t n_free[POLICY_POOLS] = { 0 };
    for (const place *p = v->slots; p < v->slots + v->n_slots; p++)
        if (p->pool != GIVEN_UP) n_free[p->pool] += p->id < 0 && !p->coming;
    for (int32_t i = 0; i < v->n_pools; i++) n_free[i] -= int_min(n_free[i], spares(v, i));
    look_at_ram(v);
    const policy_places at = { .where = v->where, .pool = v->pool, .n_free = n_free, .bytes = v->of_pool,
                               .n_pools = v->n_pools, .exclusive = v->from_disk != NULL };
    return policy_moves(v->counts, &at, budget, moves, most);
}
struct policy *vram_policy(vram *v) { return v->counts; }
/* What the bus was seen to do since the last look. */
static void look_at_bus(vram *v) {
    double bytes, ns;
    gpu_timed(v->g, &bytes, &ns);
    policy_saw_bus(v->counts, bytes, ns);
}
int32_t vram_stream_from(vram *v) {
    look_at_bus(v);
    return policy_stream_from(v->counts);
}
int vram_turn(vram *v, double ns_step, double ns_cpu) {
    policy_move moves[MOST_ERRANDS];
    uint64_t largest = 0;
    if (!v->errands) return MS4_OK;
    TRY(gpu_enter(v->g));
    TRY(arrive(v));
    look_at_bus(v);
    for (int32_t i = 0; i < v->n_pools; i++) largest = v->of_pool[i] > largest ? v->of_pool[i] : largest;
    if (v->from_disk) largest *= 2;                           /* up and down */
    v->allowed = policy_allow(v->counts, ns_step, ns_cpu, errands_bytes(v->errands), largest);
    const int32_t n = find_moves(v, v->allowed, moves, errands_idle(v->errands));
    for (int32_t i = 0; i < n; i++)
        if (ask(v, &moves[i])) policy_spend(v->counts, v->of_pool[v->pool[moves[i].id / v->n_expert]] << moves[i].down);
    return MS4_OK;
}
/* --- opening ------------------------------------------------------------------------------------------------------ */
/* Pools by byte size.  More sizes than there may be pools: those layers have none. */
static void find_pools(vram *v) {
    for (int32_t i = 0; i < v->n_layer; i++) {
        int32_t pool = 0;
        v->pool[i] = -1;
        if (!v->layers[i].has_experts) continue;
        const uint64_t bytes = expert_bytes(&v->layers[i].experts);
        v->n_experts += v->n_expert;
        while (pool < v->n_pools && v->of_pool[pool] != bytes) pool++;
        if (pool == POLICY_POOLS) continue;
        if (pool == v->n_pools) v->of_pool[v->n_pools++] = bytes;
        v->pool[i] = pool;
        v->of_all[pool] += v->n_expert;
        v->in_pool[pool] += v->n_expert;                      /* what it would take to hold them all */
    }
}
/* n slots of a pool, in some pieces; fewer, if the card has no more. */
static int make_pool(vram *v, int32_t pool, int32_t n) {
    const size_t bytes = v->of_pool[pool];
    int32_t at_once = (n + PIECES - 1) / PIECES, made = 0;
    while (made < n && at_once && v->n_pieces < MOST_PIECES) {
        piece p = { .first = v->n_slots, .n = at_once < n - made ? at_once : n - made };
        p.bytes = (size_t)p.n * bytes;
        int status = gpu_take(v->g, p.bytes, (void **)&p.memory);
        if (status && status != MS4_ENOMEM) return status;
        if (status) {
            at_once /= 2;
            continue;
        }
        for (int32_t i = 0; i < p.n; i++) v->slots[v->n_slots++] = (place){ p.memory + (size_t)i * bytes, -1, pool, 0 };
        v->pieces[v->n_pieces++] = p;
        made += p.n;
    }
    v->in_pool[pool] = made;
    gpu_short(v->g);                                          /* that is nobody's business any more */
    return MS4_OK;
}
/* As many slots of each size as their share of the bytes allows. */
static int make_slots(vram *v, uint64_t bytes) {
    uint64_t wanted = 0;
    int32_t n[POLICY_POOLS] = { 0 }, all = 0;
    for (int32_t i = 0; i < v->n_pools; i++) wanted += (uint64_t)v->in_pool[i] * v->of_pool[i];
    for (int32_t i = 0; i < v->n_pools; i++) {
        n[i] = wanted > bytes ? (int32_t)((double)v->in_pool[i] * ((double)bytes / (double)wanted)) : v->in_pool[i];
        all += n[i];
    }
    v->slots = memory_take((size_t)all + 1, sizeof *v->slots);
    FAIL_IF(!v->slots, MS4_ENOMEM, "no memory for the table of slots");
    for (int32_t i = 0; i < v->n_pools; i++) TRY(make_pool(v, i, n[i]));
    return MS4_OK;
}
/* An expert out of the slots of the disk, which read it first: its addresses are good until the next is asked for. */
static int read_expert(vram *v, int32_t id, ffn_weights *out) {
    const int32_t layer = id / v->n_expert, expert = id % v->n_expert;
    int32_t n_there, n, got, left;
    *out = host_expert(v, id);
    if (!v->from_disk) return MS4_OK;
    slots_want(v->from_disk, layer, &expert, NULL, 1, NULL, &n_there);
    TRY(slots_wait(v->from_disk, &left));
    TRY(slots_next(v->from_disk, 0, &got, &n));
    slots_point(v->from_disk, layer, expert, out);
    return MS4_OK;
}
static int fill_slot(vram *v, int32_t at, int32_t id) {
    ffn_weights from, to;
    TRY(read_expert(v, id, &from));
    to = from;
    in_slot(&v->slots[at], &to);
    const matrix *pairs[][2] = { { &from.gate, &to.gate }, { &from.up, &to.up }, { &from.down, &to.down } };
    for (int i = 0; i < 3; i++)
        TRY(gpu_upload(v->g, (void *)(uintptr_t)pairs[i][1]->data, pairs[i][0]->data,
                       (size_t)matrix_bytes(pairs[i][0])));
    enter(v, at, id);
    return MS4_OK;
}
static int fill(vram *v) {
    int32_t next[POLICY_POOLS] = { 0 };
    for (int32_t i = 1; i < v->n_pools; i++) next[i] = next[i - 1] + v->in_pool[i - 1];
    int32_t end[POLICY_POOLS] = { 0 };
    for (int32_t i = 0; i < v->n_pools; i++) end[i] = next[i] + v->in_pool[i] - spares(v, i);
    for (int32_t expert = 0; expert < v->n_expert; expert++)
        for (int32_t layer = 0; layer < v->n_layer; layer++) {
            const int32_t pool = v->pool[layer];
            if (pool >= 0 && next[pool] < end[pool]) TRY(fill_slot(v, next[pool]++, layer * v->n_expert + expert));
        }
    if (v->from_disk) slots_drop(v->from_disk);
    return gpu_wait(v->g);
}
int vram_warm(vram *v) {
    policy_move moves[POLICY_MOVES];
    if (!v->errands || v->from_disk) return MS4_OK;
    TRY(gpu_enter(v->g));
    for (int32_t done = 0, n; done < v->n_slots && (n = find_moves(v, UINT64_MAX, moves, POLICY_MOVES)) > 0; done += n)
        for (int32_t i = 0; i < n; i++) {
            const int32_t at = clear_for(v, &moves[i]);
            if (at < 0) continue;
            TRY(fill_slot(v, at, moves[i].id));
            v->n_brought++;
            v->bytes_brought += v->of_pool[v->slots[at].pool];
        }
    return gpu_wait(v->g);
}
static int start_thread(vram *v) {
    if (vram_has_all(v) || v->n_given_up == v->n_slots || v->errands) return MS4_OK;
    return v->from_disk && !v->shares_counts ? MS4_OK : errands_open(v->g, v->from_disk, &v->errands);
}
int vram_trade(vram *v, policy *counts) {
    if (!v->shares_counts) policy_close(v->counts);
    v->counts = counts;
    v->shares_counts = 1;
    return start_thread(v);
}
void vram_stop(vram *v) {
    errand e;
    if (!v->errands) return;
    errands_end(v->errands);
    while (errands_left(v->errands, &e))
        if (v->from_disk && !e.landing) slots_release(v->from_disk, e.id / v->n_expert, e.id % v->n_expert);
    errands_close(v->errands);
    v->errands = NULL;
}
static int open_parts(vram *v, uint64_t bytes) {
    const size_t n = (size_t)v->n_layer * (size_t)v->n_expert;
    v->slot_of = memory_take(n, sizeof *v->slot_of);
    v->at = memory_take(n, sizeof *v->at);
    v->where = memory_take(n, 1);
    v->pool = memory_take((size_t)v->n_layer, sizeof *v->pool);
    v->n_in = memory_take((size_t)v->n_layer, sizeof *v->n_in);
    v->pairs = memory_take((size_t)v->n_expert, sizeof *v->pairs);
    FAIL_IF(!v->slot_of || !v->at || !v->where || !v->pool || !v->n_in || !v->pairs, MS4_ENOMEM,
            "no memory for the table of slots");
    for (size_t i = 0; i < n; i++) v->slot_of[i] = -1;
    memset(v->where, POLICY_RAM, n);
    TRY(policy_open(v->n_layer, v->n_expert, NULL, &v->counts));
    find_pools(v);
    TRY(gpu_take(v->g, table_bytes(v), (void **)&v->at_on_card));
    v->at_changed = 1;
    TRY(make_slots(v, bytes > table_bytes(v) ? bytes - table_bytes(v) : 0));
    TRY(fill(v));
    return start_thread(v);
}
/* --- giving up ---------------------------------------------------------------------------------------------------- */
/* Nobody is on the way any more. */
static int come_home(vram *v) {
    while (v->errands && errands_bytes(v->errands)) {
        TRY(gpu_enter(v->g));
        TRY(arrive(v));
        if (!errands_bytes(v->errands)) break;
        gpu_settle(v->g);
        nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
    }
    return MS4_OK;
}
static double worth_of(const vram *v, const piece *p) {
    double sum = 0;
    for (int32_t i = p->first; i < p->first + p->n; i++) {
        const int32_t id = v->slots[i].id;
        sum += id < 0 ? 0 : policy_value(v->counts, id / v->n_expert, id % v->n_expert);
    }
    return sum;
}
static piece *least_worth(vram *v) {
    piece *least = NULL;
    for (piece *p = v->pieces; p < v->pieces + v->n_pieces; p++)
        if (p->memory && (!least || worth_of(v, p) < worth_of(v, least))) least = p;
    return least;
}
int vram_shrink(vram *v, uint64_t bytes, uint64_t *given) {
    *given = 0;
    TRY(come_home(v));
    for (piece *p; *given < bytes && (p = least_worth(v));) {
        for (int32_t i = p->first; i < p->first + p->n; i++) {
            if (v->slots[i].id >= 0) leave(v, i);
            v->slots[i].pool = GIVEN_UP;
        }
        gpu_give(v->g, p->memory, p->bytes);                  /* the driver waits for what may still read there */
        *given += p->bytes;
        v->n_given_up += p->n;
        *p = (piece){ 0 };
    }
    return start_thread(v);
}
int vram_open(gpu *g, const ms4_shape *s, const layer_weights *layers, slots *from_disk, uint64_t bytes, vram **out) {
    vram *v = memory_take(1, sizeof *v);
    FAIL_IF(!v, MS4_ENOMEM, "no memory for the table of slots");
    v->g = g;
    v->layers = layers;
    v->from_disk = from_disk;
    v->n_layer = s->n_layer;
    v->n_expert = s->n_expert;
    int status = open_parts(v, bytes);
    if (status) {
        vram_close(v);
        return status;
    }
    *out = v;
    return MS4_OK;
}
void vram_close(vram *v) {
    if (!v) return;
    vram_stop(v);
    if (!gpu_enter(v->g)) gpu_settle(v->g);
    for (int32_t i = 0; i < v->n_pieces; i++) gpu_give(v->g, v->pieces[i].memory, v->pieces[i].bytes);
    gpu_give(v->g, v->at_on_card, table_bytes(v));
    if (!v->shares_counts) policy_close(v->counts);
    void *all[] = { v->slots, v->slot_of, v->at, v->where, v->pool, v->n_in, v->pairs };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) memory_give(all[i]);
    memory_give(v);
}
