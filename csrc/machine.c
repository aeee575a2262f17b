/* machine.c -- what this machine can do: kernel table, threads, read bandwidth, int8 rate. */
#include "clock.h"
#include "memory.h"
#include "cpu/cpu_device.h"
#include "engine.h"
#include "error.h"
#include "allowance.h"

int ms4_probe(ms4_machine *out) {
    const struct ms4_ops *ops;
    TRY(cpu_ops_here(&ops));
    *out = (ms4_machine){ ops->isa, allowance_threads() };
    return MS4_OK;
}

#define PIECE ((uint64_t)1 << 20)
#define PEAK_ROUNDS 200000
typedef struct { const struct ms4_ops *ops; const files *files; uint64_t sums[POOL_MAX_THREADS]; } probe_job;

/* A piece of what lies in memory of the files, counted through all of it; 0 bytes: there are not so many. */
static const uint64_t *piece_at(const files *f, int32_t item, uint64_t *bytes) {
    uint64_t at = (uint64_t)item * PIECE, of_run;
    const uint8_t *run;
    for (size_t i = 0; (run = files_resident(f, i, &of_run)); i++) {
        const uint64_t skip = -(uintptr_t)run % sizeof(uint64_t);
        of_run -= skip < of_run ? skip : of_run;
        run += skip;
        uint64_t pieces = (of_run + PIECE - 1) / PIECE * PIECE;
        if (at < pieces) {
            *bytes = of_run - at < PIECE ? of_run - at : PIECE;
            return (const uint64_t *)(run + at);
        }
        at -= pieces;
    }
    *bytes = 0;
    return NULL;
}
static void read_item(void *context, int32_t item, int32_t thread) {
    probe_job *job = context;
    uint64_t sum[8] = { 0 }, bytes;
    const uint64_t *w = piece_at(job->files, item, &bytes);
    for (size_t i = 0; i + 8 <= bytes / sizeof *w; i += 8)
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
#define PASSES 5
/* Best rate of n_passes runs of n_items items that do `work` together. */
static double best_of(int n_passes, pool *p, pool_fn *fn, probe_job *job, int32_t n_items, double work) {
    double best = 0;
    for (int pass = 0; pass < n_passes; pass++) {
        int64_t start = now_ns();
        pool_run(p, fn, job, n_items, NULL);
        double rate = work / (1e-9 * (double)(now_ns() - start));
        if (rate > best) best = rate;
    }
    return best;
}
int ms4_measure(ms4_engine *e, uint64_t most, ms4_limits *out) {
    probe_job *job = memory_take(1, sizeof *job);
    FAIL_IF(!job, MS4_ENOMEM, "no memory to measure");
    job->ops = e->ops;
    job->files = e->files;
    int32_t n = 0, items = 4 * pool_size(e->pool);
    uint64_t read = 0, bytes;
    for (; read < most && piece_at(e->files, n, &bytes); n++) read += bytes;
    out->vram_bytes_per_s = out->bus_bytes_per_s = 0;
    turn_take(&e->turn);
    int reads = read && most / read < PASSES ? (int)(most / read) : PASSES;
    out->read_bytes_per_s = best_of(reads < 1 ? 1 : reads, e->pool, read_item, job, n, (double)read);
    out->int8_macs_per_s = best_of(PASSES, e->pool, int8_item, job, items,
                                   items * (double)e->ops->int8_peak(PEAK_ROUNDS));
    out->float_macs_per_s = best_of(PASSES, e->pool, float_item, job, items,
                                    items * (double)e->ops->float_peak(PEAK_ROUNDS));
    int status = e->card ? card_measure(e->card, &out->vram_bytes_per_s, &out->bus_bytes_per_s) : MS4_OK;
    turn_give(&e->turn);
    memory_give(job);
    TRY(status);
    return files_check(e->files);
}
