/* table.c -- the kernels for x86-64 with AVX-512 F, BW, DQ, VL and VNNI. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "avx512.h"
#include "cpu/plain/dequantize.h"
#include "cpu/plain/peak.h"
#include "cpu/plain/segment.h"
#include "cpu/plain/weigh.h"

/* Attention waits for this one: W_uk and W_uv are often Q8_0. */
static void dequantize_q8_0_avx512(float *out, const void *w, size_t n) {
    const block_q8_0 *b = w;
    for (size_t i = 0; i < n / 32; i++, out += 32) {
        __m512 d = _mm512_set1_ps(_cvtsh_ss(b[i].d));
        for (int h = 0; h < 32; h += 16) {
            const __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(b[i].qs + h)));
            _mm512_storeu_ps(out + h, _mm512_mul_ps(d, _mm512_cvtepi32_ps(q)));
        }
    }
}

const struct ms4_ops ops_avx512 = {
    .isa = "avx512",
    .mul = {
#define X(name, ...) [MS4_TYPE_##name] = mul_##name##_avx512,
        MS4_TYPES(X)
#undef X
    },
    .dequantize = {
#define X(name, ...) [MS4_TYPE_##name] = MS4_TYPE_##name == MS4_TYPE_q8_0 ? dequantize_q8_0_avx512 : dequantize_##name,
        MS4_TYPES(X)
#undef X
    },
    .quantize = quantize_plain,
    .rms_norm = rms_norm_plain,
    .silu_mul = silu_mul_plain,
    .gelu = gelu_plain,
    .gelu_mul = gelu_mul_plain,
    .add_scaled = add_scaled_plain,
    .choose = choose_plain,
    .attend = attend_avx512,
    .quantize_16 = quantize_16_plain,
    .open_segment = open_segment_avx512,
    .attend_segment = attend_segment_avx512,
    .fold = fold_plain,
    .transpose_keys = transpose_keys_avx512,
    .block_tops = block_tops_plain,
    .weigh = weigh_plain,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
#endif
