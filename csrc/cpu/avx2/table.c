/* table.c -- the kernels for x86-64 with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "cpu/plain/dequantize.h"
#include "cpu/plain/peak.h"
#include "cpu/plain/segment.h"
#include "cpu/plain/weigh.h"

const struct ms4_ops ops_avx2 = {
    .isa = "avx2",
    .mul = {
#define X(type, ...) [MS4_TYPE_##type] = mul_##type##_avx2,
        MS4_QUANTIZED_TYPES(X)
#undef X
        [MS4_TYPE_f32] = mul_f32_avx2, [MS4_TYPE_f16] = mul_f16_avx2, [MS4_TYPE_bf16] = mul_bf16_avx2,
    },
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = quantize_plain,
    .rms_norm = rms_norm_plain,
    .silu_mul = silu_mul_plain,
    .gelu = gelu_plain,
    .gelu_mul = gelu_mul_plain,
    .add_scaled = add_scaled_plain,
    .choose = choose_plain,
    .attend = attend_avx2,
    .quantize_16 = quantize_16_plain,
    .open_segment = open_segment_avx2,
    .attend_segment = attend_segment_avx2,
    .fold = fold_plain,
    .transpose_keys = transpose_keys_avx2,
    .block_tops = block_tops_plain,
    .weigh = weigh_plain,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
#endif
