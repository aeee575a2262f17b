/* checkharness.h -- what checkkernels.c stands on: random numbers, memory that ends at an unreadable page, weights
 * and activations of every type, timing, and the line printed for each kernel. */
#ifndef CHECKHARNESS_H
#define CHECKHARNESS_H
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "ms4.h"
#include "ops.h"

static const struct ms4_ops *ref, *fast;
static uint64_t seed, state;
static int passed, failed, bench, ok;
static size_t slack;        /* bytes between an operand's end and the unreadable page */
static const char *only = "", *only_isa = "";
static sigjmp_buf crash;

static uint32_t rnd(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}
static int between(int low, int high) { return low + (int)(rnd() % (uint32_t)(high - low + 1)); }
static float uniform(void) { return (float)(rnd() >> 8) * 0x1p-23f - 1; }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
/* Records a failure once per kernel, with the place. */
static void expect(int good, const char *what) {
    if (!good && ok) { ok = 0; printf("  %s: %s\n", fast->isa, what); }
}
static int same_bits(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, 4) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

/* --- guarded memory ------------------------------------------------------------------------- */
/* The last byte touches an unreadable page, so that one byte too far is a crash and not luck.  All of it is given
 * back by release_all(). */
#define PAGE 65536
static struct { void *at; size_t length; } maps[64];
static int n_maps;
static void *guarded(size_t bytes) {
    bytes += slack;
    size_t length = (bytes + PAGE - 1) / PAGE * PAGE;
    char *m = mmap(NULL, length + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED || mprotect(m + length, PAGE, PROT_NONE) || n_maps == 64) { perror("guarded"); exit(2); }
    maps[n_maps].at = m;
    maps[n_maps++].length = length + PAGE;
    return m + length - bytes;
}
static float *guarded_floats(size_t n) { return guarded(n * sizeof(float)); }
static void release_all(void) {
    while (n_maps) { n_maps--; munmap(maps[n_maps].at, maps[n_maps].length); }
}
static void on_crash(int sig) { siglongjmp(crash, sig); }

/* --- weights ---------------------------------------------------------------------------------- */
/* Where the halves of a block are: d, and m or dmin (-1: none). */
static const struct { int d, m; } halves_of[MS4_N_TYPES] = {
#define X(name, id, weights, bytes, family, d_at, m_at) { d_at, m_at },
    MS4_TYPES(X)
#undef X
};
static int m_at(int type) { return halves_of[type].m; }
static void put_u16(uint8_t *p, uint32_t v) { p[0] = (uint8_t)v; p[1] = (uint8_t)(v >> 8); }
static void set_d(int type, uint8_t *block, uint32_t half) {
    if (halves_of[type].d >= 0) put_u16(block + halves_of[type].d, half);
    else if (type == MS4_TYPE_iq1_m)
        for (int i = 0; i < 4; i++)
            block[49 + 2 * i] = (uint8_t)((block[49 + 2 * i] & 15) | (half >> (4 * i) & 15) << 4);
    else if (type == MS4_TYPE_mxfp4) block[0] = (uint8_t)(half ? 100 + half % 50 : 0);
}
/* Blocks of random bytes with ordinary scales of either sign, or (extreme) bytes that are all ones or all zeros under
 * the largest scales. */
static void fill_weights(int type, uint8_t *w, size_t n_weights, int extreme) {
    const struct ms4_type_info *info = &ms4_type_infos[type];
    for (size_t i = 0; i < n_weights / (size_t)info->weights; i++) {
        uint8_t *block = w + i * (size_t)info->bytes;
        uint8_t same = rnd() & 1 ? 0xff : 0;
        for (int j = 0; j < info->bytes; j++) block[j] = extreme ? same : (uint8_t)rnd();
        uint32_t sign = rnd() & 0x8000, d = sign | (extreme ? 0x7bff : 0x2000 + rnd() % 0x2800), m = rnd() % 0x4000;
        float number = uniform();
        uint32_t bits;
        memcpy(&bits, &number, 4);
        if (type == MS4_TYPE_f32) memcpy(block, &number, 4);
        else if (type == MS4_TYPE_bf16) put_u16(block, bits >> 16);
        else if (type == MS4_TYPE_f16) put_u16(block, rnd() % 64 ? d : rnd() & 0x83ff);
        else set_d(type, block, d);
        if (m_at(type) >= 0) put_u16(block + m_at(type), extreme ? d ^ 0x8000 : m);
    }
}
/* Sums of |d part| and |min part| of one row times one token's activations: what rounding errors are measured by. */
static double magnitude_of(int type, const uint8_t *row, size_t n, const float *x) {
    const struct ms4_type_info *info = &ms4_type_infos[type];
    double sum = 0;
    for (size_t k = 0; k < n; k += (size_t)info->weights, row += info->bytes) {
        uint8_t block[256];
        float y[SUPERBLOCK];
        for (int part = 0; part < (m_at(type) >= 0 ? 2 : 1); part++) {
            memcpy(block, row, (size_t)info->bytes);
            if (part == 1) set_d(type, block, 0);
            else if (m_at(type) >= 0) put_u16(block + m_at(type), 0);
            ref->dequantize[type](y, block, (size_t)info->weights);
            for (int j = 0; j < info->weights; j++) sum += fabs((double)y[j] * x[k + (size_t)j]);
        }
    }
    return sum;
}

/* --- activations ------------------------------------------------------------------------------ */
static void fill_blocks(block_q8 *x, size_t n, int extreme) {
    for (size_t i = 0; i * SUPERBLOCK < n; i++) {
        memset(x + i, 0, sizeof *x);
        x[i].d = 0.75f + 0.25f * uniform();
        x[i].d = ldexpf(x[i].d, between(-6, 6));        /* (arguments would be drawn in any order) */
        int same = rnd() & 1 ? 127 : -127;
        for (size_t j = 0; j < SUPERBLOCK && i * SUPERBLOCK + j < n; j++) {
            int q = extreme == 1 ? same : extreme == 2 ? (rnd() & 1 ? 127 : -127) : between(-127, 127);
            x[i].qs[j] = (int8_t)q;
            x[i].sums[j / 16] = (int16_t)(x[i].sums[j / 16] + q);
        }
    }
}

/* --- results and timing ------------------------------------------------------------------------ */
/* Of the bits that a check has seen; of those that the same check saw on the fast table before this one, if any. */
static uint64_t hash, hashes[128];
static int n_checks;
static const char *isa_before;
static void hash_bytes(const void *bytes, size_t n) {
    for (size_t j = 0; j < n; j++) hash = (hash ^ ((const uint8_t *)bytes)[j]) * 1099511628211u;
}
static void hash_floats(const float *y, size_t n) {
    for (size_t j = 0; j < n; j++) hash_bytes(isnan(y[j]) ? "NaN" : (const void *)(y + j), isnan(y[j]) ? 3 : 4);
}

/* Runs check under the crash handler and prints the kernel's line; timing, if asked for, follows on it. */
static void run_check(const char *name, void (*check)(void), void (*time_it)(void)) {
    uint64_t *seen = &hashes[n_checks++];
    if (!strstr(name, only)) return;
    state = seed;
    hash = 14695981039346656037u;
    ok = 1;
    int sig = sigsetjmp(crash, 1);
    if (sig) ok = 0;
    else check();
    if (isa_before) expect(hash == *seen, "not the bits of the other fast kernels");
    *seen = hash;
    printf("%-15s %-7s %s%s", name, fast->isa, ok ? "ok" : "FAILED", sig ? " (crash: read or wrote too far?)" : "");
    release_all();
    if (ok && bench && time_it) time_it();
    release_all();
    printf("\n");
    fflush(stdout);
    ok ? passed++ : failed++;
}
/* Shortest of a few runs, in seconds. */
static double best_time(void (*run)(const struct ms4_ops *), const struct ms4_ops *ops) {
    double best = 1e9, start = now();
    for (int rep = 0; rep < 3 || (rep < 20000 && now() - start < 0.05); rep++) {
        double t = now();
        run(ops);
        t = now() - t;
        if (t < best) best = t;
    }
    return best;
}
#endif
