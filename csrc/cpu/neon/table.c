/* table.c -- the kernels for AArch64 with the dot-product instructions. */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "neon.h"
#include "cpu/plain/dequantize.h"
#include "cpu/plain/peak.h"
#include "cpu/plain/segment.h"
#include "cpu/plain/weigh.h"

const struct ms4_ops ops_neon = {
    .isa = "neon",
    .mul = {
#define X(name, ...) [MS4_TYPE_##name] = mul_##name##_neon,
        MS4_TYPES(X)
#undef X
    },
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = quantize_plain,
    .rms_norm = rms_norm_plain,
    .silu_mul = silu_mul_plain,
    .gelu = gelu_plain,
    .gelu_mul = gelu_mul_plain,
    .add_scaled = add_scaled_plain,
    .choose = choose_plain,
    .attend = attend_neon,
    .quantize_16 = quantize_16_plain,
    .open_segment = open_segment_plain,
    .attend_segment = attend_segment_neon,
    .fold = fold_plain,
    .transpose_keys = transpose_keys_plain,
    .block_tops = block_tops_plain,
    .weigh = weigh_plain,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
#endif
