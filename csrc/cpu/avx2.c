/* avx2.c -- the kernel table for x86-64 with AVX2, FMA and F16C, and all of it but the quantised products. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "dequantize.h"
#include "plain.h"

#define avx2_mul_f32 mul_f32_avx2
static void mul_f32_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_f32_plain); }
#define avx2_mul_f16 mul_f16_avx2
static void mul_f16_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_f16_plain); }
#define avx2_mul_bf16 mul_bf16_avx2
static void mul_bf16_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_bf16_plain); }

const struct ms4_ops ops_avx2 = {
    .isa = "avx2",
    .mul = {
#define X(name, id, weights, bytes, quantised) [MS4_TYPE_##name] = avx2_mul_##name,
        MS4_TYPES(X)
#undef X
    },
    .dequantize = DEQUANTIZE_TABLE,
    .quantize = quantize_plain,
    .rms_norm = rms_norm_plain,
    .silu_mul = silu_mul_plain,
    .add_scaled = add_scaled_plain,
    .attend = attend_plain,
    .from_half = from_half_plain,
    .to_half = to_half_plain,
    .transpose_keys = transpose_keys_plain,
    .product = product_plain,
};
#endif
