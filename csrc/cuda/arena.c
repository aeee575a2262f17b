/* arena.c -- runs of whole pages, cut into chunks, each of which is pinned or not. */
#include "cuda/arena.h"
#include "cuda/driver.h"
#include "memory.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef ARENA_CHUNK                                           /* tests make it smaller */
#define ARENA_CHUNK ((uintptr_t)64 << 20)
#endif

typedef struct { uintptr_t at, end; size_t first, chunk; } run;       /* first: its first chunk; chunk: bytes of each */
struct arena {
    run *runs;
    _Atomic uint8_t *is_pinned;                               /* by chunk */
    size_t n_runs, n_chunks;
    uint64_t most, refused;
    _Atomic uint64_t pinned;
    int read_only;
};
static int by_address(const void *a, const void *b) {
    const run *x = a, *y = b;
    return x->at < y->at ? -1 : x->at > y->at;
}
/* Whole pages; runs that share one, or touch, become one, if nobody has said what their chunks are. */
static void merge(arena *a, const arena_range *ranges, size_t n) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < n; i++) {
        const uintptr_t at = (uintptr_t)ranges[i].at, end = at + ranges[i].bytes;
        a->runs[i] = (run){ at / page * page, (end + page - 1) / page * page, 0, ranges[i].chunk };
    }
    qsort(a->runs, n, sizeof *a->runs, by_address);
    for (size_t i = 0; i < n; i++) {
        run *last = a->n_runs ? &a->runs[a->n_runs - 1] : NULL;
        const int is_own = a->runs[i].chunk || (last && last->chunk);
        if (last && !is_own && a->runs[i].at <= last->end)
            last->end = a->runs[i].end > last->end ? a->runs[i].end : last->end;
        else a->runs[a->n_runs++] = a->runs[i];
    }
    for (run *r = a->runs; r < a->runs + a->n_runs; r++) {
        if (!r->chunk) r->chunk = ARENA_CHUNK;
        r->first = a->n_chunks;
        a->n_chunks += (r->end - r->at + r->chunk - 1) / r->chunk;
    }
}
int arena_open(const arena_range *ranges, size_t n, int read_only, uint64_t most, arena **out) {
    arena *a = memory_take(1, sizeof *a);
    FAIL_IF(!a, MS4_ENOMEM, "no memory for the table of pinned memory");
    a->runs = memory_take(n, sizeof *a->runs);
    if (a->runs) merge(a, ranges, n);
    a->is_pinned = a->runs ? memory_take(a->n_chunks, 1) : NULL;
    if (!a->is_pinned) {
        arena_close(a, 0);
        return error_set(MS4_ENOMEM, "no memory for the table of pinned memory");
    }
    a->most = most;
    a->read_only = read_only;
    *out = a;
    return MS4_OK;
}
static const run *run_of(const arena *a, uintptr_t at) {
    size_t low = 0, high = a->n_runs;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (a->runs[middle].end <= at) low = middle + 1;
        else high = middle;
    }
    return low < a->n_runs && a->runs[low].at <= at ? &a->runs[low] : NULL;
}
/* The chunk that begins at *at, or in which it lies; *end: where it ends. */
static size_t chunk_of(const run *r, uintptr_t at, uintptr_t *begin, uintptr_t *end) {
    const size_t i = (at - r->at) / r->chunk;
    *begin = r->at + i * r->chunk;
    *end = *begin + r->chunk < r->end ? *begin + r->chunk : r->end;
    return r->first + i;
}
void arena_close(arena *a, int lost) {
    if (!a) return;
    for (size_t i = 0; a->is_pinned && !lost && i < a->n_runs; i++)
        for (uintptr_t at = a->runs[i].at, begin, end; at < a->runs[i].end; at = end)
            if (a->is_pinned[chunk_of(&a->runs[i], at, &begin, &end)]) cuda.cuMemHostUnregister((void *)begin);
    memory_give(a->runs);
    memory_give((void *)a->is_pinned);
    memory_give(a);
}
/* What the system refuses once it is not asked for again: it would take its time each time. */
void arena_pin(arena *a, const void *p, size_t bytes) {
    const uintptr_t at = (uintptr_t)p, stop = at + bytes;
    const run *r = run_of(a, at);
    for (uintptr_t next = at, begin, end; r && next < stop && next < r->end && !a->refused; next = end) {
        const size_t i = chunk_of(r, next, &begin, &end);
        if (a->is_pinned[i] || a->pinned + (end - begin) > a->most) continue;
        const unsigned how = CU_MEMHOSTREGISTER_PORTABLE | (a->read_only ? CU_MEMHOSTREGISTER_READ_ONLY : 0);
        if (cuda.cuMemHostRegister((void *)begin, end - begin, how)) {
            for (const run *each = a->runs; each < a->runs + a->n_runs; each++) a->refused += each->end - each->at;
            a->refused = (a->refused < a->most ? a->refused : a->most) - a->pinned;
        } else {
            a->pinned += end - begin;
            atomic_store_explicit(&a->is_pinned[i], 1, memory_order_release);
        }
    }
}
void arena_unpin(arena *a, const void *p, size_t bytes) {
    const uintptr_t at = (uintptr_t)p, stop = at + bytes;
    const run *r = run_of(a, at);
    for (uintptr_t next = at, begin, end; r && next < stop && next < r->end; next = end) {
        const size_t i = chunk_of(r, next, &begin, &end);
        if (!a->is_pinned[i]) continue;
        atomic_store_explicit(&a->is_pinned[i], 0, memory_order_release);
        cuda.cuMemHostUnregister((void *)begin);
        a->pinned -= end - begin;
    }
}
size_t arena_pinned(const arena *a, const void *p, size_t bytes) {
    uintptr_t begin, end;
    const uintptr_t at = (uintptr_t)p;
    const run *r = run_of(a, at);
    if (!r || !atomic_load_explicit(&a->is_pinned[chunk_of(r, at, &begin, &end)], memory_order_acquire)) return 0;
    return end - at < bytes ? end - at : bytes;
}
void arena_count(const arena *a, uint64_t *pinned, uint64_t *refused) {
    *pinned = a->pinned;
    *refused = a->refused;
}
