/* neon.c -- kernels for AArch64 with the dot-product instructions (ARMv8.2 and later). */
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "dequantize.h"
#include "plain.h"

#define X(type, family) \
    static void mul_##type##_neon(const struct ms4_mul *m) { \
        mul_opened_plain(m, unpack_##type, SUPERBLOCK_BYTES(type), family, dot_groups_plain); \
    }
UNPACK_TYPES(X)
#undef X
static void mul_f32_neon(const struct ms4_mul *m) { mul_floats_plain(m, load_f32_plain); }
static void mul_f16_neon(const struct ms4_mul *m) { mul_floats_plain(m, load_f16_plain); }
static void mul_bf16_neon(const struct ms4_mul *m) { mul_floats_plain(m, load_bf16_plain); }

const struct ms4_ops ops_neon = {
    .isa = "neon",
    .mul = {
#define X(name, id, weights, bytes, quantised) [MS4_TYPE_##name] = mul_##name##_neon,
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
