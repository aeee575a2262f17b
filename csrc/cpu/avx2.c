/* avx2.c -- kernels for x86-64 with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "dequantize.h"
#include "plain.h"

#define X(type, family) \
    static void mul_##type##_avx2(const struct ms4_mul *m) { \
        mul_opened_plain(m, unpack_##type, SUPERBLOCK_BYTES(type), family, dot_groups_plain); \
    }
UNPACK_TYPES(X)
#undef X
static void mul_f32_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_f32_plain); }
static void mul_f16_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_f16_plain); }
static void mul_bf16_avx2(const struct ms4_mul *m) { mul_floats_plain(m, load_bf16_plain); }

const struct ms4_ops ops_avx2 = {
    .isa = "avx2",
    .mul = {
#define X(name, id, weights, bytes, quantised) [MS4_TYPE_##name] = mul_##name##_avx2,
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
};
#endif
