/* table.c -- the kernels for x86-64 with AVX-512 F, BW, DQ, VL and VNNI. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "avx512.h"
#include "cpu/avx2/avx2.h"
#include "many.h"
#include "one.h"
#include "one_blocks.h"
#include "one_crumbs.h"
#include "grid_rows.h"
#include "panel.h"
#include "cpu/plain/dequantize.h"
#include "cpu/plain/peak.h"
#include "cpu/plain/segment.h"

/* X(type, layout of the panel, its offset; for one token: order of x, its sums, offset of the weights; pack_grid) */
#define QUANTISED_TYPES(X) \
    X(q2_k, bytes_min, 0, CRUMB_ORDER, GROUP_SUMS, 1, NULL) X(q3_k, bytes, 124, CRUMB_ORDER, GROUP_SUMS, -16, NULL) \
    X(q4_k, blocks_min, 0, K_ORDER, MIN_SUMS, 0, NULL) X(q5_k, blocks_min, 0, K_ORDER, MIN_SUMS, 0, NULL) \
    X(q6_k, groups, 32, CRUMB_ORDER, GROUP_SUMS, -16, NULL) \
    X(q8_0, float_blocks, 128, NATURAL, OFFSET_SUMS, -128, NULL) X(q4_0, float_blocks, 8, BLOCK_ORDER, OFFSET_SUMS, -8, NULL) \
    X(iq4_nl, float_blocks, 128, BLOCK_ORDER, OFFSET_SUMS, -128, NULL) X(mxfp4, float_blocks, 12, BLOCK_ORDER, OFFSET_SUMS, -12, NULL) \
    X(iq4_xs, blocks, 128, BLOCK_ORDER, START_SUMS, -128, NULL) \
    X(iq2_xxs, groups, 128, QUAD_ORDER, NO_SUMS, 0, pack_iq2_xxs) X(iq2_xs, groups, 128, QUAD_ORDER, NO_SUMS, 0, pack_iq2_xs) \
    X(iq2_s, groups, 128, QUAD_ORDER, NO_SUMS, 0, pack_iq2_s) X(iq3_xxs, groups, 128, BLOCK_ORDER, NO_SUMS, 0, pack_iq3_xxs) \
    X(iq3_s, groups, 128, BLOCK_ORDER, NO_SUMS, 0, pack_iq3_s)
/* Those whose single tokens AVX2 multiplies faster than anything tried here: X(type, layout of the panel, its offset) */
#define AVX2_TOKEN_TYPES(X) \
    X(q4_1, float_blocks_min, 0) X(q5_0, float_blocks, 16) X(q5_1, float_blocks_min, 0) X(nvfp4, float_groups, 12) \
    X(iq1_s, groups, IQ1_OFFSET) X(iq1_m, groups, IQ1_OFFSET)
#define X(type, layout, offset, order, sums, row_offset, pack_grid) \
    static void mul_##type##_avx512(const struct ms4_mul *m) { \
        static const struct gemv_type t = { dot_##type, order, sums, row_offset, SUPERBLOCK_BYTES(type), pack_grid }; \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) gemv(m, &t); \
        else gemm(m, fill_##type, tiles_##layout, offset, SUPERBLOCK_BYTES(type), pack_grid); \
    }
QUANTISED_TYPES(X)
#undef X
#define X(type, layout, offset) \
    static void mul_##type##_avx512(const struct ms4_mul *m) { \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) avx2_gemv_##type(m); \
        else gemm(m, fill_##type, tiles_##layout, offset, SUPERBLOCK_BYTES(type), NULL); \
    }
AVX2_TOKEN_TYPES(X)
#undef X

/* --- dequantisation that attention waits for ---------------------------------------------- */
static void dequantize_q8_0_avx512(float *out, const void *w, size_t n) {
    const block_q8_0 *b = w;
    for (size_t i = 0; i < n / 32; i++, out += 32) {
        __m512 d = _mm512_set1_ps(_cvtsh_ss(b[i].d));
        for (int h = 0; h < 32; h += 16)
            _mm512_storeu_ps(out + h, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(b[i].qs + h))))));
    }
}

#define dequantize_q8_0 dequantize_q8_0_avx512       /* attention waits for this one: W_uk and W_uv are often Q8_0 */
const struct ms4_ops ops_avx512 = {
    .isa = "avx512",
    .mul = {
#define X(name, id, weights, bytes, quantised) [MS4_TYPE_##name] = mul_##name##_avx512,
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
    .attend = attend_avx512,
    .quantize_16 = quantize_16_plain,
    .open_segment = open_segment_avx512,
    .attend_segment = attend_segment_avx512,
    .fold = fold_plain,
    .transpose_keys = transpose_keys_avx512,
    .int8_peak = int8_peak,
    .float_peak = float_peak,
};
#endif
