/* slots.c -- who has a slot, who gets one, and what is waited for.
 *
 * An expert is known by its id, layer * n_expert + expert.  Its mark says what is wanted of it in the layer that is
 * computed now; the state of its slot's job says how far it has been read.  Only this file looks at marks, and only in
 * the thread that asks; the disk sets states.
 */
#include "slots.h"
#include "clock.h"
#include "disk.h"
#include "error.h"
#include "memory.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define N_THREADS 8                                           /* reads at a time: docs/tried.md */
#ifndef MOST_READING                                          /* tests make them smaller */
#define MOST_READING 24                                       /* experts */
#define MOST_GIVEN 16
#endif
#define LOOK_MS 50                                            /* between two looks at the stop flag */

enum { NOTHING, SOON, WANTED, GIVEN };                        /* marks; the order says who has to leave first */

/* id -1: it holds nothing; ahead: it was read for the next layer, and not wanted since; held: it stays where it is. */
typedef struct { int32_t id, ahead, held; uint64_t used; double value; disk_job job; } slot;
typedef struct {
    uint8_t *memory;
    slot *slot;
    uint64_t slot_bytes, file_bytes;                          /* file_bytes: of its experts */
    uint64_t rated;                                           /* the turn that its slots' values are of */
    int32_t n, n_most, n_used, n_held;                        /* slots that there are; may be used; are; are held */
} pool_of;
typedef struct { int32_t pool, file[DISK_RANGES]; uint64_t offset[DISK_RANGES], bytes[DISK_RANGES], step[DISK_RANGES]; }
    place;                                                    /* of expert 0, and from one to the next */
struct slots {
    files *files;
    disk *disk;
    place *places;                                            /* by layer */
    pool_of *pools;
    int32_t *slot_of;                                         /* by id: in its pool, or -1 */
    uint8_t *mark, *share;                                    /* by id; by place among the wanted */
    int32_t *wanted, *soon;                                   /* ids */
    int32_t n_layer, n_expert, n_pools, n_wanted, n_soon, layer;
    double (*value)(const void *, int32_t, int32_t);
    const void *context;
    slots_leaving *leaves;                                    /* NULL, or who is asked before memory is given back */
    void *who;
    const atomic_int *stop;
    uint64_t turn, clock, seen, least;                        /* turn: counts layers; clock: uses */
    _Atomic int64_t waiting_since;                            /* 0: nobody waits; read by others, too */
    slots_counts counts;
};

/* --- sizes -------------------------------------------------------------------------------- */
/* A range may begin anywhere in the first block of its room. */
static uint64_t room_of(uint64_t bytes) {
    return (bytes + 2 * FILES_ALIGN - 2) / FILES_ALIGN * FILES_ALIGN;
}
static uint64_t expert_room(const ffn_weights *w) {
    return room_of(matrix_bytes(&w->gate)) + room_of(matrix_bytes(&w->up)) + room_of(matrix_bytes(&w->down));
}
/* Is this the first layer whose experts take so much? */
static int is_first(const layer_weights *layers, int32_t layer) {
    if (!layers[layer].has_experts) return 0;
    for (int32_t i = 0; i < layer; i++)
        if (layers[i].has_experts && expert_room(&layers[i].experts) == expert_room(&layers[layer].experts)) return 0;
    return 1;
}
uint64_t slots_least(const ms4_shape *s, const layer_weights *layers) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < s->n_layer; i++) sum += is_first(layers, i) ? expert_room(&layers[i].experts) : 0;
    return sum;
}
uint64_t slots_all(const ms4_shape *s, const layer_weights *layers) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < s->n_layer; i++)
        sum += layers[i].has_experts ? expert_room(&layers[i].experts) * (uint64_t)s->n_expert : 0;
    return sum;
}
/* How many slots each pool may use of so many bytes: one, and of the rest its part. */
static void share_out(slots *s, uint64_t bytes) {
    uint64_t all = 0, rest = bytes > s->least ? bytes - s->least : 0;
    for (int32_t i = 0; i < s->n_pools; i++) all += s->pools[i].file_bytes;
    for (pool_of *p = s->pools; p < s->pools + s->n_pools; p++) {
        const double part = (double)rest * ((double)p->file_bytes / (double)all) / (double)p->slot_bytes;
        p->n_most = part + 1 < p->n ? (int32_t)part + 1 : p->n;
    }
}
/* --- a slot ------------------------------------------------------------------------------- */
static pool_of *pool_at(const slots *s, int32_t id) { return &s->pools[s->places[id / s->n_expert].pool]; }
static slot *slot_at(const slots *s, int32_t id) {
    return s->slot_of[id] < 0 ? NULL : &pool_at(s, id)->slot[s->slot_of[id]];
}
static disk_state state_of(const slot *at) {
    return (disk_state)atomic_load_explicit(&at->job.state, memory_order_acquire);
}
static void clear(slots *s, slot *at) {
    s->slot_of[at->id] = -1;
    at->id = -1;
    atomic_store_explicit(&at->job.state, DISK_IDLE, memory_order_relaxed);
}
static int may_leave(const slots *s, const uint8_t *memory, size_t bytes) {
    return !s->leaves || s->leaves(s->who, memory, bytes);
}
/* Gives its memory back, too. */
static void drop(slots *s, pool_of *p, slot *at) {
    uint8_t *memory = p->memory + (size_t)(at - p->slot) * p->slot_bytes;
    clear(s, at);
    if (may_leave(s, memory, p->slot_bytes)) memory_drop_pages(memory, p->slot_bytes);
    p->n_used--;
}
static double value_of(const slots *s, const slot *at) {
    return s->value ? s->value(s->context, at->id / s->n_expert, at->id % s->n_expert) : (double)at->used;
}
/* Layers until an expert may be used again.  (Among equals the one leaves whose turn is farthest away: in a prompt that
 * does not fit, whole layers come one after the other, and who was used last would otherwise push out who is next.) */
static int32_t distance(const slots *s, int32_t id) {
    return (id / s->n_expert - s->layer + s->n_layer - 1) % s->n_layer;
}
static int is_better_victim(const slots *s, const slot *a, const slot *b) {
    const int mark_a = s->mark[a->id], mark_b = s->mark[b->id];
    if (mark_a != mark_b) return mark_a < mark_b;
    if (a->value != b->value) return a->value < b->value;
    return distance(s, a->id) > distance(s, b->id);
}
/* An expert that may leave, marked `most` at most. */
static slot *victim(slots *s, pool_of *p, int most) {
    slot *best = NULL;
    for (slot *at = p->slot; p->rated != s->turn && at < p->slot + p->n; at++)
        if (at->id >= 0) at->value = value_of(s, at);
    p->rated = s->turn;
    for (slot *at = p->slot; at < p->slot + p->n; at++) {
        if (at->id < 0 || at->held || s->mark[at->id] > most || state_of(at) == DISK_READING) continue;
        if (state_of(at) == DISK_FAILED) return at;
        if (!best || is_better_victim(s, at, best)) best = at;
    }
    return best;
}
/* A slot for an expert: one that holds nothing, or that of who leaves; NULL: none now.  (Where all that may be used are
 * held, because there were more when that began, there is one more, so that nobody waits for a card.) */
static slot *slot_for(slots *s, int32_t id, int most) {
    pool_of *p = pool_at(s, id);
    slot *at = p->slot;
    if (p->n_used < p->n_most || (p->n_used == p->n_held && p->n_used < p->n)) {
        while (at->id >= 0) at++;
        p->n_used++;
    } else {
        at = victim(s, p, most);
        if (!at) return NULL;
        clear(s, at);
    }
    at->id = id;
    s->slot_of[id] = (int32_t)(at - p->slot);
    at->used = ++s->clock;
    at->value = value_of(s, at);
    return at;
}
/* Where the parts of a slot's expert are on the disk, and are to be in the slot. */
static void lay_out(const slots *s, slot *at) {
    const int32_t expert = at->id % s->n_expert;
    const place *from = &s->places[at->id / s->n_expert];
    const pool_of *p = pool_at(s, at->id);
    uint8_t *to = p->memory + (size_t)(at - p->slot) * p->slot_bytes;
    at->job.n = DISK_RANGES;
    for (int i = 0; i < DISK_RANGES; i++) {
        const uint64_t offset = from->offset[i] + (uint64_t)expert * from->step[i];
        at->job.range[i] = (disk_range){ from->file[i], offset, from->bytes[i], to + offset % FILES_ALIGN };
        to += room_of(from->bytes[i]);
    }
}
static int start(slots *s, int32_t id, int most) {
    slot *at = slot_for(s, id, most);
    if (!at) return 0;
    lay_out(s, at);
    at->ahead = s->mark[id] == SOON;
    disk_read(s->disk, &at->job, s->mark[id] != WANTED);
    s->counts.n_reads++;
    return 1;
}
/* --- what is wanted ----------------------------------------------------------------------- */
/* How many of these have a slot and are still read, or, with `any`, have one at all while marked so. */
static int32_t n_held(const slots *s, const int32_t *ids, int32_t n, int mark, int any) {
    int32_t held = 0;
    for (int32_t i = 0; i < n; i++) {
        const slot *at = slot_at(s, ids[i]);
        held += at && s->mark[ids[i]] == mark && (any || state_of(at) == DISK_READING);
    }
    return held;
}
/* Starts what can be started, in the order of the file: what is wanted, then what will be.  What one does not get a
 * slot for, the next one does not either.  More than MOST_READING at a time would push out what is of use, and not be
 * there sooner. */
static void start_all(slots *s) {
    int32_t more = MOST_READING - n_held(s, s->wanted, s->n_wanted, WANTED, 0);
    for (int32_t i = 0; i < s->n_wanted && more > 0; i++) {
        const int32_t id = s->wanted[i];
        if (s->mark[id] == WANTED && !slot_at(s, id)) more = start(s, id, SOON) ? more - 1 : 0;
    }
    if (more < 1 || !s->n_soon) return;
    const int32_t n_slots = pool_at(s, s->soon[0])->n_most / 4;
    more = (n_slots < MOST_READING ? n_slots : MOST_READING) - n_held(s, s->soon, s->n_soon, SOON, 1);
    for (int32_t i = 0; i < s->n_soon && more > 0; i++)
        if (s->mark[s->soon[i]] == SOON && !slot_at(s, s->soon[i]))
            more = start(s, s->soon[i], NOTHING) ? more - 1 : 0;
}
void slots_want(slots *s, int32_t layer, const int32_t *ids, const uint8_t *share, int32_t n, const atomic_int *stop,
                int32_t *n_there) {
    slots_drop(s);
    s->layer = layer;
    s->stop = stop;
    s->turn++;
    s->n_wanted = n;
    *n_there = 0;
    for (int32_t i = 0; i < n; i++) {
        const int32_t id = layer * s->n_expert + ids[i];
        slot *at = slot_at(s, id);
        s->wanted[i] = id;
        s->share[i] = share ? share[i] : 0;
        s->mark[id] = WANTED;
        if (!at) continue;
        at->used = ++s->clock;
        s->counts.n_hits += state_of(at) == DISK_READ && !at->ahead;
        at->ahead = 0;
        if (state_of(at) == DISK_READ) ++*n_there;
        else if (state_of(at) == DISK_READING) disk_hurry(s->disk, &at->job);
        else drop(s, pool_at(s, id), at);                     /* failed when nobody waited: tried again */
    }
    s->counts.n_wanted += (uint64_t)n;
    start_all(s);
}
static int fail(const slots *s, const slot *at) {
    const disk_job *job = &at->job;
    FAIL_IF(job->error == ENODATA, MS4_EIO, "%s: the file became shorter while it was in use; load it again",
            files_path(s->files, job->error_file));
    return error_set(MS4_EIO, "%s: layer %d, expert %d cannot be read at byte %llu: %s",
                     files_path(s->files, job->error_file), at->id / s->n_expert, at->id % s->n_expert,
                     (unsigned long long)job->error_at, strerror(job->error));
}
static int is_missing(const slots *s, int32_t id) {
    const slot *at = slot_at(s, id);
    return !at || state_of(at) == DISK_READING;
}
/* How many of the wanted have not been given; *n_missing: those of them that are not there. */
static int32_t n_left(const slots *s, int32_t *n_missing) {
    int32_t left = 0;
    *n_missing = 0;
    for (int32_t i = 0; i < s->n_wanted; i++) {
        if (s->mark[s->wanted[i]] != WANTED) continue;
        left++;
        *n_missing += is_missing(s, s->wanted[i]);
    }
    return left;
}
/* What was given to this share (-1: to any) is not in use any more. */
static void take_back(slots *s, int32_t share) {
    for (int32_t i = 0; i < s->n_wanted; i++)
        if (s->mark[s->wanted[i]] == GIVEN && (share < 0 || s->share[i] == share)) s->mark[s->wanted[i]] = NOTHING;
}
/* While some are missing, at most MOST_GIVEN: reads are started between parts, and a long part would leave the disk
 * idle. */
static int collect(slots *s, int32_t share, int32_t *ids, int32_t *n) {
    int32_t n_missing;
    const int32_t left = n_left(s, &n_missing), most = n_missing ? MOST_GIVEN : left;
    *n = 0;
    for (int32_t i = 0; i < s->n_wanted && *n < most; i++) {
        const int32_t id = s->wanted[i];
        slot *at = slot_at(s, id);
        if (s->share[i] != share || s->mark[id] != WANTED || is_missing(s, id)) continue;
        if (state_of(at) == DISK_READ) {
            s->mark[id] = GIVEN;
            ids[(*n)++] = id % s->n_expert;
        } else {
            int status = fail(s, at);
            drop(s, pool_at(s, id), at);
            return status;
        }
    }
    return MS4_OK;
}
int slots_next(slots *s, int32_t share, int32_t *ids, int32_t *n) {
    take_back(s, share);
    TRY(collect(s, share, ids, n));
    start_all(s);
    return MS4_OK;
}
int slots_wait(slots *s, int32_t *left) {
    int32_t n_missing;
    int64_t since = 0;
    int status = MS4_OK;
    take_back(s, -1);
    while ((*left = n_left(s, &n_missing)) > 0 && n_missing == *left && !status) {
        start_all(s);                                         /* there is a slot: nothing that is wanted has one */
        if (!since) atomic_store(&s->waiting_since, since = now_ns());
        disk_wait(s->disk, &s->seen, LOOK_MS);
        if (s->stop && atomic_load_explicit(s->stop, memory_order_relaxed))
            status = error_set(MS4_ECANCELED, "canceled");
    }
    atomic_store(&s->waiting_since, 0);
    if (since) s->counts.ns_waited += (uint64_t)(now_ns() - since);
    return status;
}
void slots_drop(slots *s) {
    for (int32_t i = 0; i < s->n_wanted; i++) s->mark[s->wanted[i]] = NOTHING;
    s->n_wanted = 0;
}
void slots_soon(slots *s, int32_t layer, const int32_t *ids, int32_t n) {
    for (int32_t i = 0; i < s->n_soon; i++)
        if (s->mark[s->soon[i]] == SOON) s->mark[s->soon[i]] = NOTHING;
    s->n_soon = n;
    for (int32_t i = 0; i < n; i++) {
        s->soon[i] = layer * s->n_expert + ids[i];
        if (s->mark[s->soon[i]] == NOTHING) s->mark[s->soon[i]] = SOON;
    }
}
const uint8_t *slots_at(const slots *s, int32_t layer, int32_t expert, int32_t part) {
    return slot_at(s, layer * s->n_expert + expert)->job.range[part].to;
}
void slots_point(const slots *s, int32_t layer, int32_t expert, ffn_weights *w) {
    w->gate.data = slots_at(s, layer, expert, 0);
    w->up.data = slots_at(s, layer, expert, 1);
    w->down.data = slots_at(s, layer, expert, 2);
}
void slots_rate(slots *s, double (*value)(const void *, int32_t, int32_t), const void *context) {
    s->value = value;
    s->context = context;
}
void slots_watch(slots *s, slots_leaving *leaves, void *context) {
    s->leaves = leaves;
    s->who = context;
}
const uint8_t *slots_memory(const slots *s, int32_t pool, uint64_t *bytes, uint64_t *slot_bytes) {
    if (pool >= s->n_pools) return NULL;
    const pool_of *p = &s->pools[pool];
    *bytes = (uint64_t)p->n * p->slot_bytes;
    *slot_bytes = p->slot_bytes;
    return p->memory;
}
typedef struct { double value; int32_t id; } rated;
static int by_value(const void *a, const void *b) {
    const rated *x = a, *y = b;
    return x->value != y->value ? x->value < y->value ? 1 : -1 : x->id - y->id;
}
int slots_fill(slots *s) {
    int32_t n = 0;
    rated *all = memory_take((size_t)s->n_layer * (size_t)s->n_expert, sizeof *all);
    FAIL_IF(!all, MS4_ENOMEM, "no memory to sort experts");
    for (int32_t id = 0; s->value && id < s->n_layer * s->n_expert; id++) {
        const double value = s->value(s->context, id / s->n_expert, id % s->n_expert);
        if (value > 0 && !slot_at(s, id)) all[n++] = (rated){ value, id };
    }
    qsort(all, (size_t)n, sizeof *all, by_value);
    for (int32_t i = 0; i < n; i++)
        if (pool_at(s, all[i].id)->n_used < pool_at(s, all[i].id)->n_most) start(s, all[i].id, NOTHING);
    memory_give(all);
    return MS4_OK;
}
/* Gives back what is too much, but for what is being read or held. */
static void trim(slots *s, pool_of *p) {
    while (p->n_used > p->n_most) {
        slot *at = victim(s, p, SOON);
        if (!at) break;
        drop(s, p, at);
    }
}
void slots_fit(slots *s, uint64_t bytes) {
    share_out(s, bytes);
    s->counts.most_bytes = bytes;
    for (pool_of *p = s->pools; p < s->pools + s->n_pools; p++) trim(s, p);
}
/* --- to and from a card ------------------------------------------------------------------- */
#define LEAST_FREE 3                                          /* slots that are left to the others */

int slots_there(const slots *s, int32_t layer, int32_t expert) {
    const slot *at = slot_at(s, layer * s->n_expert + expert);
    return at && state_of(at) == DISK_READ;
}
int slots_hold(slots *s, int32_t layer, int32_t expert) {
    const int32_t id = layer * s->n_expert + expert;
    pool_of *p = pool_at(s, id);
    if (!slots_there(s, layer, expert) || slot_at(s, id)->held || p->n_most - p->n_held <= LEAST_FREE) return 0;
    slot_at(s, id)->held = 1;
    p->n_held++;
    return 1;
}
static slot *let_go(slots *s, int32_t id) {
    slot *at = slot_at(s, id);
    pool_at(s, id)->n_held -= at->held;
    at->held = 0;
    return at;
}
void slots_release(slots *s, int32_t layer, int32_t expert) {
    const int32_t id = layer * s->n_expert + expert;
    let_go(s, id);
    trim(s, pool_at(s, id));
}
disk_job *slots_trade(slots *s, int32_t layer, int32_t expert, int32_t to_layer, int32_t to_expert, ffn_weights *w) {
    const int32_t id = layer * s->n_expert + expert, to = to_layer * s->n_expert + to_expert;
    pool_of *p = pool_at(s, id);
    slot *at = let_go(s, id);
    if (slot_at(s, to) || pool_at(s, to) != p) {
        trim(s, p);
        return NULL;
    }
    clear(s, at);
    at->id = to;
    s->slot_of[to] = (int32_t)(at - p->slot);
    at->used = ++s->clock;
    at->value = value_of(s, at);
    at->ahead = 0;
    lay_out(s, at);
    atomic_store_explicit(&at->job.state, DISK_READING, memory_order_relaxed);
    slots_point(s, to_layer, to_expert, w);
    trim(s, p);
    return &at->job;
}
void slots_landed(slots *s, disk_job *job, int good) {
    if (good) disk_landed(s->disk, job);
    else disk_read(s->disk, job, 0);
}
uint64_t slots_waiting(slots *s) {
    const int64_t since = atomic_load(&s->waiting_since);
    return since ? (uint64_t)(now_ns() - since) : 0;
}
void slots_count(slots *s, slots_counts *out) {
    *out = s->counts;
    for (const pool_of *p = s->pools; p < s->pools + s->n_pools; p++) {
        out->n_slots += (uint64_t)p->n_used;
        out->bytes += (uint64_t)p->n_used * p->slot_bytes;
        for (const slot *at = p->slot; at < p->slot + p->n; at++)
            out->bytes_there += state_of(at) == DISK_READ ? p->slot_bytes : 0;
    }
    disk_count(s->disk, &out->bytes_read, &out->ns_reading);
}
/* --- opening ------------------------------------------------------------------------------ */
/* Finds the experts of a layer in the files, and the pool of their size, or makes it. */
static int find_layer(slots *s, int32_t layer, const layer_weights *w) {
    const matrix *parts[DISK_RANGES] = { &w->experts.gate, &w->experts.up, &w->experts.down };
    const uint64_t room = expert_room(&w->experts);
    place *at = &s->places[layer];
    for (int i = 0; i < DISK_RANGES; i++) {
        FAIL_IF(!files_find(s->files, parts[i]->data, &at->file[i], &at->offset[i]), MS4_EMODEL,
                "experts of layer %d are in no file", layer);
        at->bytes[i] = matrix_bytes(parts[i]);
        at->step[i] = parts[i]->slice_bytes;
    }
    while (at->pool < s->n_pools && s->pools[at->pool].slot_bytes != room) at->pool++;
    if (at->pool == s->n_pools) s->pools[s->n_pools++].slot_bytes = room;
    s->pools[at->pool].file_bytes += room * (uint64_t)s->n_expert;
    return MS4_OK;
}
static int open_pools(slots *s, uint64_t bytes) {
    for (pool_of *p = s->pools; p < s->pools + s->n_pools; p++) p->n = (int32_t)(p->file_bytes / p->slot_bytes);
    share_out(s, bytes);
    for (pool_of *p = s->pools; p < s->pools + s->n_pools; p++) {
        p->n = p->n_most;
        p->slot = memory_take((size_t)p->n, sizeof *p->slot);
        p->memory = memory_take_pages((size_t)p->n * p->slot_bytes, 1);
        FAIL_IF(!p->slot || !p->memory, MS4_ENOMEM, "no memory for %d experts of %llu bytes", p->n,
                (unsigned long long)p->slot_bytes);
        for (int32_t i = 0; i < p->n; i++) p->slot[i].id = -1;
    }
    return MS4_OK;
}
static int open_all(slots *s, const layer_weights *layers, uint64_t bytes) {
    const size_t n_layer = (size_t)s->n_layer, n_expert = (size_t)s->n_expert, n = n_layer * n_expert;
    s->places = memory_take(n_layer, sizeof *s->places);
    s->pools = memory_take(n_layer, sizeof *s->pools);
    s->slot_of = memory_take(n, sizeof *s->slot_of);
    s->mark = memory_take(n, sizeof *s->mark);
    s->share = memory_take(n_expert, sizeof *s->share);
    s->wanted = memory_take(n_expert, sizeof *s->wanted);
    s->soon = memory_take(n_expert, sizeof *s->soon);
    FAIL_IF(!s->places || !s->pools || !s->slot_of || !s->mark || !s->share || !s->wanted || !s->soon, MS4_ENOMEM,
            "no memory for the table of experts");
    for (size_t i = 0; i < n; i++) s->slot_of[i] = -1;
    for (int32_t i = 0; i < s->n_layer; i++)
        if (layers[i].has_experts) TRY(find_layer(s, i, &layers[i]));
    TRY(open_pools(s, bytes));
    return disk_open(s->files, N_THREADS, &s->disk);
}
int slots_open(const ms4_shape *shape, const layer_weights *layers, files *f, uint64_t bytes, slots **out) {
    const uint64_t least = slots_least(shape, layers);
    FAIL_IF(bytes < least, MS4_ENOMEM, "%llu bytes for experts: at least %llu", (unsigned long long)bytes,
            (unsigned long long)least);
    slots *s = memory_take(1, sizeof *s);
    FAIL_IF(!s, MS4_ENOMEM, "no memory for the table of experts");
    *s = (slots){ .files = f, .n_layer = shape->n_layer, .n_expert = shape->n_expert, .least = least,
                  .counts = { .most_bytes = bytes } };
    int status = open_all(s, layers, bytes);
    if (status) slots_close(s);
    else *out = s;
    return status;
}
void slots_close(slots *s) {
    if (!s) return;
    disk_close(s->disk);
    for (pool_of *p = s->pools; p && p < s->pools + s->n_pools; p++) {
        const size_t bytes = (size_t)p->n * p->slot_bytes;
        if (may_leave(s, p->memory, bytes)) memory_give_pages(p->memory, bytes);
        memory_give(p->slot);
    }
    void *all[] = { s->places, s->pools, s->slot_of, s->mark, s->share, s->wanted, s->soon };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) memory_give(all[i]);
    memory_give(s);
}
