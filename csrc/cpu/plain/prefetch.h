/* prefetch.h -- asks for weights long before they are read. */
#ifndef MS4_PREFETCH_H
#define MS4_PREFETCH_H
#include <stddef.h>

/* Bytes from where weights are read to where they are asked for; into L2, as L1 has too few outstanding misses.
 * Measured on each maker's processors (dispatch.c). */
extern size_t prefetch_ahead;

/* Part i of n (constants) of the prefetches of `bytes` bytes at `ahead`, behind the instruction that computes the
 * vector v.  Prefetches stand alone between loads and arithmetic: eight in a row take a third of memory's speed, two a
 * tenth, and left to itself the compiler puts them in a row, or (GCC 12) deletes a loop that only prefetches.  They
 * cannot fault. */
#define prefetch_after(v, ahead, i, n, bytes) do { \
        const size_t lines_ = ((bytes) + 63) / 64, end_ = ((size_t)(i) + 1) * lines_ / (n); \
        for (size_t line_ = (size_t)(i) * lines_ / (n); line_ < end_; line_++) \
            __asm__ volatile("prefetcht1 %1" : "+v"(v) : "m"((ahead)[64 * line_])); \
    } while (0)
#endif
