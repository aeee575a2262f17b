/* pool.c -- the worker threads.
 *
 * DESIGN.  The items of a run are cut into one range per thread.  A thread takes its own items from the front, one
 * after the other, so that it reads neighbouring weights and prefetching goes on across items; when it has none left
 * it makes the second half of another's range its own.  The caller works too.  What it waits for at the end is not
 * "every worker" but "every worker that came in": `gate` holds an OPEN bit and the number of workers inside.  A worker
 * that the system did not wake in time therefore costs nothing (its range is taken by the others), and when no item is
 * left the caller closes the gate and waits only for items that are under way.
 *
 * Waiting is spinning for at most SPIN_NS, then sleeping on a futex.  Sleeping is not only polite: on a machine with
 * a busy neighbour the idle core lets the kernel move a descheduled worker there, with the item that it holds.  Then
 * both are on one CPU and would stay there, while the neighbour has the other for itself: so a worker that last ran
 * where the caller runs now is sent elsewhere before the next run.
 *
 * Where a worker shares its CPU with a busy neighbour, the system takes the CPU away from it for milliseconds, and in
 * the middle of an item the caller would wait for all of them.  So a worker gives way by itself, TURN_NS after it last
 * did, between two items and outside the gate: the others do what is in its range.  Beside one busy process on two CPUs
 * decode keeps 0.82 of its quiet rate this way, and 0.67 without; where nobody waits for the CPU it costs nothing.
 *
 * ORDER.  The fields of a run are written before the gate opens (release) and read after a worker has come in
 * (acquire); what items wrote is visible after the last worker has left (release) and the caller has seen it
 * (acquire).
 */
#define _GNU_SOURCE
#include "pool.h"
#include "clock.h"
#include "error.h"
#include "memory.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OPEN 0x40000000u
#define QUIT 0x80000000u
#define SPIN_NS 50000
#ifndef TURN_NS                 /* tests make it 0 */
#define TURN_NS 1500000
#endif

typedef struct {
    pool *owner;
    pthread_t thread;
    int32_t index;
    atomic_int tid, cpu;                       /* cpu: where it last finished an item, or -1 */
    int64_t since;                             /* when it last gave way to others on its CPU */
} worker;
/* Items first .. end - 1, both halves in one word so that front and back can be taken without a lock. */
typedef struct { _Alignas(64) _Atomic uint64_t items; } range;
#define RANGE(first, end) ((uint64_t)(uint32_t)(first) | (uint64_t)(uint32_t)(end) << 32)

struct pool {
    pool_fn *fn;
    void *context;
    const atomic_int *stop;
    int32_t n_threads, n_started;
    worker *workers;
    range *ranges;                             /* one per thread */
    _Alignas(64) atomic_uint gate;             /* OPEN | QUIT | workers inside */
    _Alignas(64) atomic_uint epoch;            /* counts runs; workers sleep on it */
    atomic_int n_asleep;                       /* workers asleep on epoch */
    atomic_int caller_asleep;                  /* the caller sleeps on gate */
};

static void futex_wait(atomic_uint *word, unsigned expected) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, NULL, NULL, 0);
}
static void futex_wake(atomic_uint *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0); }
static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
/* Waits until *word != value; registers in *asleep before it sleeps. */
static void wait_change(atomic_uint *word, unsigned value, atomic_int *asleep) {
    int64_t end = 0;
    for (int i = 0; atomic_load_explicit(word, memory_order_acquire) == value; i++) {
        relax();
        if (i % 32 != 31) continue;
        if (!end) end = now_ns() + SPIN_NS;
        else if (now_ns() > end) {
            atomic_fetch_add(asleep, 1);
            while (atomic_load(word) == value) futex_wait(word, value);
            atomic_fetch_sub(asleep, 1);
        }
    }
}
/* The first item of a range, or -1. */
static int32_t take(range *own) {
    uint64_t seen = atomic_load_explicit(&own->items, memory_order_relaxed);
    for (;;) {
        uint32_t first = (uint32_t)seen, end = (uint32_t)(seen >> 32);
        if (first >= end) return -1;
        if (atomic_compare_exchange_weak_explicit(&own->items, &seen, RANGE(first + 1, end), memory_order_relaxed,
                                                  memory_order_relaxed)) return (int32_t)first;
    }
}
/* Moves the second half of another's range, at least one item, into the empty range `own`; 0 if there was none. */
static int steal(range *own, range *other) {
    uint64_t seen = atomic_load_explicit(&other->items, memory_order_relaxed);
    for (;;) {
        uint32_t first = (uint32_t)seen, end = (uint32_t)(seen >> 32);
        if (first >= end) return 0;
        uint32_t middle = first + (end - first) / 2;
        if (!atomic_compare_exchange_weak_explicit(&other->items, &seen, RANGE(first, middle), memory_order_relaxed,
                                                   memory_order_relaxed)) continue;
        atomic_store_explicit(&own->items, RANGE(middle, end), memory_order_relaxed);
        return 1;
    }
}
/* Works until no item is left: 1.  A worker that has had the CPU for a while leaves the rest to the others: 0. */
static int take_items(pool *p, int32_t thread) {
    range *own = &p->ranges[thread];
    for (int32_t i = 0; i < p->n_threads; i++) {
        if (i && !steal(own, &p->ranges[(thread + i) % p->n_threads])) continue;
        for (int32_t item; (item = take(own)) >= 0; i = 0) {
            if (!p->stop || !atomic_load_explicit(p->stop, memory_order_relaxed)) p->fn(p->context, item, thread);
            if (thread && now_ns() - p->workers[thread].since > TURN_NS) return 0;
        }
    }
    return 1;
}
static int come_in(pool *p) {
    unsigned g = atomic_load(&p->gate);
    while (g & OPEN)
        if (atomic_compare_exchange_weak(&p->gate, &g, g + 1)) return 1;
    return 0;
}
static void go_out(pool *p) {
    unsigned left = atomic_fetch_sub(&p->gate, 1) - 1;
    if (!(left & OPEN) && !(left & ~QUIT) && atomic_load(&p->caller_asleep)) futex_wake(&p->gate, 1);
}
static void *work(void *arg) {
    worker *w = arg;
    pool *p = w->owner;
    unsigned seen = 0;
    atomic_store(&w->tid, (int)syscall(SYS_gettid));
    for (;;) {
        wait_change(&p->epoch, seen, &p->n_asleep);
        seen = atomic_load(&p->epoch);
        if (atomic_load(&p->gate) & QUIT) return NULL;
        while (come_in(p)) {
            int done = take_items(p, w->index);
            atomic_store_explicit(&w->cpu, sched_getcpu(), memory_order_relaxed);
            go_out(p);
            if (done) break;
            sched_yield();
            w->since = now_ns();
        }
    }
}
/* Moves workers off the CPU of the caller, where there are others: each may for a moment run only there. */
static void part(pool *p) {
    int here = sched_getcpu();
    for (int32_t i = 1; i <= p->n_started; i++) {
        worker *w = &p->workers[i];
        cpu_set_t all, others;
        if (atomic_load_explicit(&w->cpu, memory_order_relaxed) != here) continue;
        atomic_store_explicit(&w->cpu, -1, memory_order_relaxed);
        if (sched_getaffinity(atomic_load(&w->tid), sizeof all, &all)) continue;
        others = all;
        CPU_CLR(here, &others);
        if (!CPU_COUNT(&others) || sched_setaffinity(atomic_load(&w->tid), sizeof others, &others)) continue;
        sched_setaffinity(atomic_load(&w->tid), sizeof all, &all);
    }
}
void pool_run(pool *p, pool_fn *fn, void *context, int32_t n_items, const atomic_int *stop) {
    if (n_items < 1) return;
    p->fn = fn;
    p->context = context;
    p->stop = stop;
    int shared = n_items > 1 && p->n_started > 0;
    for (int64_t i = 0; i < p->n_threads; i++)
        atomic_store_explicit(&p->ranges[i].items,
                              shared ? RANGE(i * n_items / p->n_threads, (i + 1) * n_items / p->n_threads)
                                     : i ? 0 : RANGE(0, n_items), memory_order_relaxed);
    if (shared) {
        part(p);
        atomic_fetch_or(&p->gate, OPEN);
        atomic_fetch_add(&p->epoch, 1);
        if (atomic_load(&p->n_asleep)) futex_wake(&p->epoch, n_items - 1);
    }
    take_items(p, 0);
    if (!shared) return;
    for (unsigned g = atomic_fetch_and(&p->gate, ~OPEN) & ~OPEN; g; g = atomic_load(&p->gate))
        wait_change(&p->gate, g, &p->caller_asleep);
    atomic_thread_fence(memory_order_acquire);
    take_items(p, 0);                          /* what a worker took over unseen, before it gave way */
}
int32_t pool_size(const pool *p) { return p->n_threads; }

int pool_open(int32_t n_threads, pool **out) {
    FAIL_IF(n_threads < 1 || n_threads > POOL_MAX_THREADS, MS4_EARG,
            "%d threads: 1 to %d", n_threads, POOL_MAX_THREADS);
    pool *p = memory_take(1, sizeof *p);
    worker *workers = memory_take((size_t)n_threads, sizeof *workers);
    range *ranges = memory_take((size_t)n_threads, sizeof *ranges);
    if (!p || !workers || !ranges) {
        memory_give(p);
        memory_give(workers);
        memory_give(ranges);
        return error_set(MS4_ENOMEM, "no memory for worker threads");
    }
    p->n_threads = n_threads;
    p->workers = workers;
    p->ranges = ranges;
    sigset_t all, before;                      /* signals belong to the caller's threads */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);                   /* but a fault must reach its handler */
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t i = 1; i < n_threads; i++) {
        workers[i] = (worker){ .owner = p, .index = i, .cpu = -1 };
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i])) break;
        p->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (p->n_started + 1 < n_threads) {
        int32_t got = p->n_started + 1;
        pool_close(p);
        return error_set(MS4_ENOMEM, "the system gave %d of %d threads; ask for fewer", got, n_threads);
    }
    *out = p;
    return MS4_OK;
}
void pool_close(pool *p) {
    if (!p) return;
    atomic_fetch_or(&p->gate, QUIT);
    atomic_fetch_add(&p->epoch, 1);
    futex_wake(&p->epoch, POOL_MAX_THREADS);
    for (int32_t i = 1; i <= p->n_started; i++) pthread_join(p->workers[i].thread, NULL);
    memory_give(p->workers);
    memory_give(p->ranges);
    memory_give(p);
}
