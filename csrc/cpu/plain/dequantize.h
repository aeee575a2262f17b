/* dequantize.h -- the exact dequantizers of dequantize.c; every kernel table holds the same ones. */
#ifndef MS4_DEQUANTIZE_H
#define MS4_DEQUANTIZE_H
#include "quant.h"

/* n weights, whole blocks */
#define X(name, ...) void dequantize_##name(float *out, const void *w, size_t n);
MS4_TYPES(X)
#undef X
#define DEQUANTIZE_ENTRY(name, ...) [MS4_TYPE_##name] = dequantize_##name,
#define DEQUANTIZE_TABLE { MS4_TYPES(DEQUANTIZE_ENTRY) }
#endif
