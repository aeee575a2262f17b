/* sample.h -- what a device without a kernel for it takes from sample.c (ms4_sample is in ms4.h). */
#ifndef MS4_SAMPLE_H
#define MS4_SAMPLE_H
#include "ops.h"

/* Of n logits the k highest among the first `among`, 0 < k <= among <= n, and their ids, in the order of the ids; of
 * equal ones the first.  Where one of the n is not finite, NaN. */
int sample_highest(const struct ms4_ops *ops, const float *logits, size_t n, size_t among, size_t k, float *out,
                   int32_t *ids);
#endif
