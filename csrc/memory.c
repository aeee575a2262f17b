/* memory.c -- aligned memory, pages, and failure on demand: MS4_FAIL_ALLOC=N makes the Nth request fail, counted
 * from the first one after the variable was set. */
#define _GNU_SOURCE
#include "memory.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_long n_taken;

static int must_fail(void) {
    const char *at = getenv("MS4_FAIL_ALLOC");
    if (at) return atomic_fetch_add(&n_taken, 1) + 1 == strtol(at, NULL, 10);
    atomic_store(&n_taken, 0);
    return 0;
}
void *memory_take(size_t n, size_t size) {
    size_t bytes;
    void *p = NULL;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 2 || must_fail()) return NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) return NULL;
    return memset(p, 0, bytes);
}
void memory_give(void *p) { free(p); }

void *memory_take_pages(size_t bytes, int huge) {
    if (must_fail()) return NULL;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (huge) madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}
void memory_give_pages(void *p, size_t bytes) {
    if (p) munmap(p, bytes);
}
void memory_drop_pages(void *p, size_t bytes) { madvise(p, bytes, MADV_DONTNEED); }

uint64_t memory_resident(void) {
    unsigned long long all, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f) return 0;
    if (fscanf(f, "%llu %llu", &all, &resident) != 2) resident = 0;
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}
