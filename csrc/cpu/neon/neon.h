/* neon.h -- what the files for AArch64 share.  Included after their target pragma. */
#ifndef MS4_NEON_H
#define MS4_NEON_H
#include "cpu/plain/plain.h"
#include <arm_neon.h>

#define TILE 4              /* tokens, or query rows, computed together */

/* many.c; one.c */
#define X(type, ...) mul_fn mul_##type##_neon, mul_one_##type##_neon;
MS4_QUANTIZED_TYPES(X)
#undef X
/* float.c */
mul_fn mul_f32_neon, mul_f16_neon, mul_bf16_neon;
/* attend.c */
void attend_neon(const struct ms4_attend *a);
/* segment.c */
void attend_segment_neon(const struct ms4_attend_segment *a);
#endif
