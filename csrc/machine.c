/* machine.c -- what this machine can do: kernel table, threads, read bandwidth, int8 rate. */
#include "clock.h"
#include "error.h"
#include "memory.h"
#include "ops.h"
#include "pool.h"
#include <stdlib.h>
#include <string.h>

int ms4_probe(ms4_machine *out) {
    const char *isa = getenv("MS4_ISA");
    const struct ms4_ops *ops = ms4_ops_for(isa && *isa ? isa : NULL);
    FAIL_IF(!ops, MS4_EARG, "MS4_ISA=%.40s: no such kernel table here", isa);
    *out = (ms4_machine){ ops->isa, pool_default_threads() };
    return MS4_OK;
}

#define PIECE ((size_t)1 << 20)
#define PEAK_ROUNDS 200000
typedef struct { const struct ms4_ops *ops; const uint64_t *words; uint64_t sums[512]; } probe_job;

static void read_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    const uint64_t *w = job->words + (size_t)item * (PIECE / sizeof *w);
    uint64_t sum[8] = { 0 };
    for (size_t i = 0; i < PIECE / sizeof *w; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += w[i + (size_t)j];
    for (int j = 0; j < 8; j++) job->sums[thread] += sum[j];
}
static void int8_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    (void)item;
    job->sums[thread] = job->ops->int8_peak(PEAK_ROUNDS);
}
static void float_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    (void)item;
    job->sums[thread] = job->ops->float_peak(PEAK_ROUNDS);
}
/* Best rate of five runs of n_items items that do `work` each. */
static double best_of(pool *p, pool_fn *fn, probe_job *job, int32_t n_items, double work) {
    double best = 0;
    for (int pass = 0; pass < 5; pass++) {
        int64_t start = now_ns();
        pool_run(p, fn, job, n_items, NULL);
        double rate = (double)n_items * work / (1e-9 * (double)(now_ns() - start));
        if (rate > best) best = rate;
    }
    return best;
}
static int measure(pool *p, probe_job *job, uint64_t bytes, ms4_limits *out) {
    int32_t pieces = (int32_t)(bytes / PIECE), items = 4 * pool_size(p);
    uint8_t *pages = memory_take_pages((size_t)pieces * PIECE, 1);
    FAIL_IF(!pages, MS4_ENOMEM, "no memory to measure the read bandwidth");
    memset(pages, 1, (size_t)pieces * PIECE);
    job->words = (const uint64_t *)pages;
    out->read_bytes_per_s = best_of(p, read_item, job, pieces, (double)PIECE);
    memory_give_pages(pages, (size_t)pieces * PIECE);
    out->int8_macs_per_s = best_of(p, int8_item, job, items, (double)job->ops->int8_peak(PEAK_ROUNDS));
    out->float_macs_per_s = best_of(p, float_item, job, items, (double)job->ops->float_peak(PEAK_ROUNDS));
    return MS4_OK;
}
int ms4_measure(int32_t n_threads, uint64_t bytes, ms4_limits *out) {
    const char *isa = getenv("MS4_ISA");
    FAIL_IF(bytes < 16 * PIECE || bytes / PIECE > INT32_MAX, MS4_EARG, "measure: at least 16 MiB");
    probe_job *job = memory_take(1, sizeof *job);
    FAIL_IF(!job, MS4_ENOMEM, "no memory to measure");
    pool *p = NULL;
    job->ops = ms4_ops_for(isa && *isa ? isa : NULL);
    int status = job->ops ? pool_open(n_threads ? n_threads : pool_default_threads(), &p)
                          : error_set(MS4_EARG, "MS4_ISA=%.40s: no such kernel table here", isa);
    if (!status) status = measure(p, job, bytes, out);
    pool_close(p);
    memory_give(job);
    return status;
}
