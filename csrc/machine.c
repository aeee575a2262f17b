/* machine.c -- what this machine can do: kernel table, threads, read bandwidth, int8 rate. */
#include "error.h"
#include "memory.h"
#include "ops.h"
#include "pool.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
int ms4_probe(ms4_machine *out) {
    const char *isa = getenv("MS4_ISA");
    const struct ms4_ops *ops = ms4_ops_for(isa && *isa ? isa : NULL);
    FAIL_IF(!ops, MS4_EARG, "MS4_ISA=%.40s: no such kernel table here", isa);
    *out = (ms4_machine){ ops->isa, pool_default_threads() };
    return MS4_OK;
}

#define PIECE ((size_t)1 << 20)
typedef struct { const struct ms4_ops *ops; const uint64_t *words; uint64_t sums[512]; uint8_t *weights[512]; int rounds; } probe_job;

static void read_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    const uint64_t *w = job->words + (size_t)item * (PIECE / sizeof *w);
    uint64_t sum[8] = { 0 };
    for (size_t i = 0; i < PIECE / sizeof *w; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += w[i + (size_t)j];
    for (int j = 0; j < 8; j++) job->sums[thread] += sum[j];
}
/* Q8_0 weights of 64 rows x 1024 columns and 64 tokens: all of it stays in the L2 cache. */
enum { ROWS = 64, COLUMNS = 1024, TOKENS = 64 };
static void multiply_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    size_t row = COLUMNS / 32 * sizeof(block_q8_0);
    uint8_t *w = job->weights[thread];
    block_q8 *x = (block_q8 *)(w + ROWS * row);
    float *y = (float *)(x + TOKENS * COLUMNS / SUPERBLOCK);
    struct ms4_mul mul = { .w = w, .row_bytes = row, .n_rows = ROWS, .n_cols = COLUMNS, .x = x,
                           .x_stride = COLUMNS / SUPERBLOCK * sizeof *x, .n_tokens = TOKENS, .y = y, .y_stride = ROWS };
    (void)item;
    for (int i = 0; i < job->rounds; i++) job->ops->mul[MS4_TYPE_q8_0](&mul);
}
static double best_of(pool *p, pool_fn *fn, probe_job *job, int32_t n_items, double work) {
    double best = 0;
    for (int pass = 0; pass < 5; pass++) {
        double start = seconds();
        pool_run(p, fn, job, n_items, NULL);
        double rate = work / (seconds() - start);
        if (rate > best) best = rate;
    }
    return best;
}
static int measure(pool *p, probe_job *job, uint64_t bytes, double *read, double *macs) {
    int32_t pieces = (int32_t)(bytes / PIECE), threads = pool_size(p);
    size_t one = ROWS * (COLUMNS / 32 * sizeof(block_q8_0)) + TOKENS * COLUMNS / SUPERBLOCK * sizeof(block_q8) + TOKENS * ROWS * sizeof(float);
    uint8_t *pages = memory_take_pages((size_t)pieces * PIECE, 1);
    FAIL_IF(!pages, MS4_ENOMEM, "no memory to measure the read bandwidth");
    memset(pages, 1, (size_t)pieces * PIECE);
    job->words = (const uint64_t *)pages;
    *read = best_of(p, read_item, job, pieces, (double)pieces * (double)PIECE);
    memory_give_pages(pages, (size_t)pieces * PIECE);
    int status = MS4_OK;
    for (int32_t i = 0; i < threads && !status; i++)
        if (!(job->weights[i] = memory_take(1, one))) status = error_set(MS4_ENOMEM, "no memory to measure the int8 rate");
    job->rounds = 20;
    if (!status) *macs = best_of(p, multiply_item, job, threads * 8, (double)threads * 8 * 20 * ROWS * COLUMNS * TOKENS);
    for (int32_t i = 0; i < threads; i++) memory_give(job->weights[i]);
    return status;
}
int ms4_measure(int32_t n_threads, uint64_t bytes, double *read_bytes_per_s, double *int8_macs_per_s) {
    FAIL_IF(bytes < 16 * PIECE || bytes / PIECE > INT32_MAX, MS4_EARG, "measure: at least 16 MiB");
    probe_job *job = memory_take(1, sizeof *job);
    FAIL_IF(!job, MS4_ENOMEM, "no memory to measure");
    pool *p = NULL;
    job->ops = ms4_ops_for(NULL);
    int status = pool_open(n_threads ? n_threads : pool_default_threads(), &p);
    if (!status) status = measure(p, job, bytes, read_bytes_per_s, int8_macs_per_s);
    pool_close(p);
    memory_give(job);
    return status;
}
