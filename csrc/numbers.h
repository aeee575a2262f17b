/* numbers.h -- the smaller and the larger of two. */
#ifndef MS4_NUMBERS_H
#define MS4_NUMBERS_H
#include <stddef.h>
#include <stdint.h>
static inline size_t size_max(size_t a, size_t b) { return a > b ? a : b; }
static inline int32_t int_min(int32_t a, int32_t b) { return a < b ? a : b; }
#endif
