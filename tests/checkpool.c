/* checkpool.c -- the thread pool: every item of a run is done exactly once and before the run returns, whoever does it.
 * Built with TURN_NS=0 every worker leaves its range to the others after each item; and here threads linger between
 * taking another's items over and making them their own.  Prints "ok" or the first run that went wrong. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#undef atomic_store_explicit
#define atomic_store_explicit(at, value, order) (sched_yield(), (void)atomic_exchange(at, value))
#include "../csrc/cpu/pool.c"

#define MAX_ITEMS 300
#ifndef N_RUNS
#define N_RUNS 1000
#endif

typedef struct { atomic_int done[MAX_ITEMS], busy[16]; } tally;

static void item(void *context, int32_t item, int32_t thread) {
    tally *t = context;
    if (atomic_fetch_add(&t->busy[thread], 1)) abort();        /* two items with the same thread number at once */
    for (volatile int i = 0; i < item % 7 * 50; i++) {}
    atomic_fetch_add(&t->done[item], 1);
    atomic_fetch_sub(&t->busy[thread], 1);
}
int main(void) {
    static tally t;
    for (int32_t threads = 1; threads <= 16; threads += threads < 4 ? 1 : 4) {
        pool *p;
        if (pool_open(threads, &p)) return 2;
        for (int run = 0; run < N_RUNS; run++) {
            int32_t n = 1 + run * 37 % MAX_ITEMS;
            for (int32_t i = 0; i < n; i++) atomic_store(&t.done[i], 0);
            pool_run(p, item, &t, n, NULL);
            for (int32_t i = 0; i < n; i++)
                if (atomic_load(&t.done[i]) != 1) {
                    printf("%d threads, run %d: item %d of %d done %d times\n", threads, run, i, n,
                           atomic_load(&t.done[i]));
                    return 1;
                }
        }
        pool_close(p);
    }
    puts("ok");
    return 0;
}
