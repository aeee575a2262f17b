/* quant.h -- GGUF block layouts and the activation block the integer kernels read (SPEC 4.8).
 *
 * A block is 32 weights, a superblock 256.  Every type is listed once, in MS4_TYPES: the C enum, the table of
 * sizes and the kernel tables are all made from that list (csrc/cpu/README.md: what a new type needs).  fp16 fields are
 * raw bits (uint16_t).
 */
#ifndef MS4_QUANT_H
#define MS4_QUANT_H
#include <stddef.h>
#include <stdint.h>
#define SUPERBLOCK 256

/* How the integer sums of a superblock become a float (ops.h has the order of arithmetic): the kernels of every ISA
 * choose by it.  scales_16, mins_16: a superblock with an integer scale (and a min) for each 16 weights; _32: for each
 * 32.  blocks, blocks_min: a float scale (and a min) for each 32 weights; blocks_16: a float scale for each 16. */
enum ms4_family {
    FAMILY_floats,
    FAMILY_scales_16, FAMILY_scales_32, FAMILY_mins_16, FAMILY_mins_32,
    FAMILY_blocks, FAMILY_blocks_min, FAMILY_blocks_16
};
static inline int is_blocks(enum ms4_family f) { return f >= FAMILY_blocks; }
static inline int has_min(enum ms4_family f) {
    return f == FAMILY_mins_16 || f == FAMILY_mins_32 || f == FAMILY_blocks_min;
}
/* Weights that share a scale. */
static inline int scale_width(enum ms4_family f) {
    return f == FAMILY_scales_16 || f == FAMILY_mins_16 || f == FAMILY_blocks_16 ? 16 : 32;
}

/* X(name, GGUF type id, weights per block, bytes per block, family, where in a block the half is that is its scale d,
 * and where the one that is its min: -1 if it has none) */
#define MS4_FLOAT_TYPES(X) \
    X(f32, 0, 1, 4, floats, -1, -1) X(f16, 1, 1, 2, floats, -1, -1) X(bf16, 30, 1, 2, floats, -1, -1)
#define MS4_QUANTIZED_TYPES(X) \
    X(q4_0, 2, 32, 18, blocks, 0, -1) X(q4_1, 3, 32, 20, blocks_min, 0, 2) X(q5_0, 6, 32, 22, blocks, 0, -1) \
    X(q5_1, 7, 32, 24, blocks_min, 0, 2) X(q8_0, 8, 32, 34, blocks, 0, -1) X(q2_k, 10, 256, 84, mins_16, 80, 82) \
    X(q3_k, 11, 256, 110, scales_16, 108, -1) X(q4_k, 12, 256, 144, mins_32, 0, 2) \
    X(q5_k, 13, 256, 176, mins_32, 0, 2) X(q6_k, 14, 256, 210, scales_16, 208, -1) \
    X(iq2_xxs, 16, 256, 66, scales_32, 0, -1) X(iq2_xs, 17, 256, 74, scales_16, 0, -1) \
    X(iq3_xxs, 18, 256, 98, scales_32, 0, -1) X(iq1_s, 19, 256, 50, scales_32, 0, -1) \
    X(iq4_nl, 20, 32, 18, blocks, 0, -1) X(iq3_s, 21, 256, 110, scales_32, 0, -1) \
    X(iq2_s, 22, 256, 82, scales_16, 0, -1) X(iq4_xs, 23, 256, 136, scales_32, 0, -1) \
    X(iq1_m, 29, 256, 56, scales_16, -1, -1) X(mxfp4, 39, 32, 17, blocks, -1, -1) \
    X(nvfp4, 40, 64, 36, blocks_16, -1, -1)
#define MS4_TYPES(X) MS4_FLOAT_TYPES(X) MS4_QUANTIZED_TYPES(X)

enum ms4_type {
#define X(name, ...) MS4_TYPE_##name,
    MS4_TYPES(X)
#undef X
    MS4_N_TYPES
};
enum {
#define X(name, id, weights, bytes, family, ...) MS4_FAMILY_##name = FAMILY_##family,
    MS4_TYPES(X)
#undef X
};
#define FAMILY_OF(name) ((enum ms4_family)MS4_FAMILY_##name)

typedef float block_f32;
typedef uint16_t block_f16, block_bf16;
/* y = d * (q - 8) */
typedef struct { uint16_t d; uint8_t qs[16]; } block_q4_0;
/* y = d * q + m */
typedef struct { uint16_t d, m; uint8_t qs[16]; } block_q4_1;
/* y = d * (q - 16); bit i of qh is bit 4 of weight i */
typedef struct { uint16_t d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;
typedef struct { uint16_t d, m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;
typedef struct { uint16_t d; int8_t qs[32]; } block_q8_0;
typedef struct { uint8_t scales[16]; uint8_t qs[64]; uint16_t d, dmin; } block_q2_k;
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; uint16_t d; } block_q3_k;
/* y = d * scale[b] * q - dmin * min[b], q in 0..15; 6-bit scales and mins: q4_k_scale_min() */
typedef struct { uint16_t d, dmin; uint8_t scales[12]; uint8_t qs[128]; } block_q4_k;
typedef struct { uint16_t d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_k;
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t d; } block_q6_k;
typedef struct { uint16_t d; uint16_t qs[32]; } block_iq2_xxs;
typedef struct { uint16_t d; uint16_t qs[32]; uint8_t scales[8]; } block_iq2_xs;
typedef struct { uint16_t d; uint8_t qs[32]; uint8_t signs[32]; uint8_t qh[8]; uint8_t scales[8]; } block_iq2_s;
typedef struct { uint16_t d; uint8_t qs[64]; uint8_t w[32]; } block_iq3_xxs;
typedef struct { uint16_t d; uint8_t qs[64]; uint8_t qh[8]; uint8_t signs[32]; uint8_t scales[4]; } block_iq3_s;
typedef struct { uint16_t d; uint8_t qs[32]; uint16_t qh[8]; } block_iq1_s;
typedef struct { uint8_t qs[32]; uint8_t qh[16]; uint8_t scales[8]; } block_iq1_m;
typedef struct { uint16_t d; uint8_t qs[16]; } block_iq4_nl;
typedef struct { uint16_t d; uint16_t scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs;
typedef struct { uint8_t e; uint8_t qs[16]; } block_mxfp4;
typedef struct { uint8_t d[4]; uint8_t qs[32]; } block_nvfp4;

/* 256 activations: x = d * q.  sums[g] is the sum of q over the 16-group g.  A row whose length is not a multiple
 * of 256 ends in a block filled up with zeros.  Rows of blocks are 64-byte aligned. */
typedef struct {
    int8_t qs[SUPERBLOCK];
    int16_t sums[SUPERBLOCK / 16];
    float d;
    float unused[7];
} block_q8;

#define X(name, id, weights, bytes, ...) _Static_assert(sizeof(block_##name) == (bytes), "GGUF layout of " #name);
MS4_TYPES(X)
#undef X
_Static_assert(sizeof(block_q8) == 320, "five cache lines");

static inline float half_to_float(uint16_t h) {
    union { uint32_t u; float f; } v;
    uint32_t e = h >> 10 & 31, m = h & 1023;
    if (e == 0) { v.f = (float)m * 5.9604644775390625e-8f; v.u |= (uint32_t)(h & 0x8000) << 16; return v.f; }
    v.u = (uint32_t)(h & 0x8000) << 16 | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    return v.f;
}
static inline float bf16_to_float(uint16_t h) {
    union { uint32_t u; float f; } v = { .u = (uint32_t)h << 16 };
    return v.f;
}
/* Unpacks the 6-bit scale and min of block b of a Q4_K or Q5_K superblock. */
static inline void q4_k_scale_min(const uint8_t *s, int b, int *scale, int *min) {
    if (b < 4) { *scale = s[b] & 63; *min = s[b + 4] & 63; }
    else { *scale = (s[b + 4] & 15) | (s[b - 4] >> 6) << 4; *min = s[b + 4] >> 4 | (s[b] >> 6) << 4; }
}
#endif
