/* avx2.h -- the products of avx2_mul.c, for the table in avx2.c. */
#ifndef MS4_AVX2_H
#define MS4_AVX2_H
#include "ops.h"
#include "unpack.h"

#define X(type, family) void avx2_mul_##type(const struct ms4_mul *m);
UNPACK_TYPES(X)
#undef X
#endif
