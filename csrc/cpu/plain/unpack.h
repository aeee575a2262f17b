/* unpack.h -- opens one superblock of one row: 8-bit quants, integer scales and mins, float d and dmin.
 *
 * This is the integer form of each type (SPEC 4.8) in plain C, for the kernels of every ISA that have no faster way
 * for a type.  ref.c does not use it: it has the formulas.
 */
#ifndef MS4_UNPACK_H
#define MS4_UNPACK_H
#include "grids.h"
#include "quant.h"
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Superblock types: weight k = d * scale[k / 16] * q[k] - dmin * min[k / 16].
 * 32-blocks: weight k = block_d[b] * q[k] + block_m[b], with b = k / 32; for NVFP4 b = k / 16. */
struct opened {
    int8_t q[SUPERBLOCK];
    int16_t scale[16], min[16];
    float d, dmin;
    float block_d[16], block_m[8];
};
/* n: weights of this superblock that exist (32-blocks may end early; the rest of q is then zero). */
typedef void unpack_fn(struct opened *o, const uint8_t *w, int n);

static const int8_t unpack_kv[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
static const int8_t unpack_e2m1[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };    /* twice */

static inline uint32_t unpack_u16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static inline uint32_t unpack_u32(const uint8_t *p) { return unpack_u16(p) | unpack_u16(p + 2) << 16; }
/* Seven sign bits; the eighth makes their number even. */
static inline uint8_t unpack_sign7(uint32_t x) { return (uint8_t)(x | (uint32_t)(__builtin_popcount(x) & 1) << 7); }
/* 2^(e - 128): half an MXFP4 scale, as the quants are doubled. */
static inline float unpack_e8m0_half(uint8_t e) {
    union { uint32_t u; float f; } v = { .u = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23 };
    return v.f;
}
/* Half of an unsigned E4M3: exponent bias 7; 0x7f stands for 0; bit 7 is not used. */
static inline float unpack_e4m3_half(uint8_t s) {
    uint32_t e = s >> 3 & 15, m = s & 7;
    if (e == 0 || s == 0x7f) return s == 0x7f ? 0 : (float)m * 0x1p-10f;
    union { uint32_t u; float f; } v = { .u = (e + 119) << 23 | m << 20 };
    return v.f;
}
/* out[j] = grid[j], negated where bit j of signs is set. */
static inline void unpack_signed(int8_t *out, const int8_t *grid, int n, uint32_t signs) {
    for (int j = 0; j < n; j++) {
        int negative = -(int)(signs >> j & 1);
        out[j] = (int8_t)((grid[j] ^ negative) - negative);
    }
}

/* --- 32-blocks ---------------------------------------------------------------------------- */
static inline void unpack_nibbles(int8_t *q, const uint8_t *qs, int n, int offset) {
    for (int j = 0; j < n; j++) q[j] = (int8_t)((qs[j] & 15) - offset);
    for (int j = 0; j < n; j++) q[n + j] = (int8_t)((qs[j] >> 4) - offset);
}
static inline void unpack_fifth_bit(int8_t *q, const uint8_t *qh) {
    uint32_t bits = unpack_u32(qh);
    for (int j = 0; j < 32; j++) q[j] = (int8_t)(q[j] + (int)(bits >> j & 1) * 16);
}
static inline void unpack_table(int8_t *q, const uint8_t *qs, int n, const int8_t *table) {
    for (int j = 0; j < n; j++) q[j] = table[qs[j] & 15];
    for (int j = 0; j < n; j++) q[n + j] = table[qs[j] >> 4];
}
/* Each body opens block b of struct type at w, with quants from q on. */
#define UNPACK_BLOCKS(type, body) \
    static inline void unpack_##type(struct opened *o, const uint8_t *w, int n) { \
        for (int b = 0; b < n / 32; b++) { \
            const block_##type *p = (const block_##type *)w + b; \
            int8_t *q = o->q + b * 32; \
            body \
        } \
        memset(o->q + n, 0, (size_t)(SUPERBLOCK - n)); \
    }
UNPACK_BLOCKS(q4_0, { o->block_d[b] = half_to_float(p->d); unpack_nibbles(q, p->qs, 16, 8); })
UNPACK_BLOCKS(q4_1, {
    o->block_d[b] = half_to_float(p->d);
    o->block_m[b] = half_to_float(p->m);
    unpack_nibbles(q, p->qs, 16, 0);
})
UNPACK_BLOCKS(q5_0, {
    o->block_d[b] = half_to_float(p->d);
    unpack_nibbles(q, p->qs, 16, 16);
    unpack_fifth_bit(q, p->qh);
})
UNPACK_BLOCKS(q5_1, {
    o->block_d[b] = half_to_float(p->d);
    o->block_m[b] = half_to_float(p->m);
    unpack_nibbles(q, p->qs, 16, 0);
    unpack_fifth_bit(q, p->qh);
})
UNPACK_BLOCKS(q8_0, { o->block_d[b] = half_to_float(p->d); memcpy(q, p->qs, 32); })
UNPACK_BLOCKS(iq4_nl, { o->block_d[b] = half_to_float(p->d); unpack_table(q, p->qs, 16, unpack_kv); })
UNPACK_BLOCKS(mxfp4, { o->block_d[b] = unpack_e8m0_half(p->e); unpack_table(q, p->qs, 16, unpack_e2m1); })
static inline void unpack_nvfp4(struct opened *o, const uint8_t *w, int n) {
    for (int b = 0; b < n / 16; b++) {
        const block_nvfp4 *p = (const block_nvfp4 *)w + b / 4;
        o->block_d[b] = unpack_e4m3_half(p->d[b % 4]);
        unpack_table(o->q + b * 16, p->qs + b % 4 * 8, 8, unpack_e2m1);
    }
    memset(o->q + n, 0, (size_t)(SUPERBLOCK - n));
}

/* --- superblocks -------------------------------------------------------------------------- */
static inline void unpack_q2_k(struct opened *o, const uint8_t *w, int n) {
    const block_q2_k *p = (const block_q2_k *)w;
    (void)n;
    o->d = half_to_float(p->d);
    o->dmin = half_to_float(p->dmin);
    for (int g = 0; g < 16; g++) { o->scale[g] = p->scales[g] & 15; o->min[g] = p->scales[g] >> 4; }
    for (int s = 0; s < 8; s++)
        for (int l = 0; l < 32; l++) o->q[s * 32 + l] = (int8_t)(p->qs[s / 4 * 32 + l] >> (s % 4 * 2) & 3);
}
static inline void unpack_q3_k(struct opened *o, const uint8_t *w, int n) {
    const block_q3_k *p = (const block_q3_k *)w;
    const uint8_t *sc = p->scales;
    (void)n;
    o->d = half_to_float(p->d);
    for (int g = 0; g < 16; g++) {
        int low = g < 8 ? sc[g] & 15 : sc[g - 8] >> 4, high = sc[8 + g % 4] >> (g / 4 * 2) & 3;
        o->scale[g] = (int16_t)((low | high << 4) - 32);
    }
    for (int s = 0; s < 8; s++)
        for (int l = 0; l < 32; l++)
            o->q[s * 32 + l] = (int8_t)((p->qs[s / 4 * 32 + l] >> (s % 4 * 2) & 3) + (p->hmask[l] >> s & 1) * 4 - 4);
}
static inline void unpack_scales_mins(struct opened *o, const uint8_t *scales) {
    for (int b = 0; b < 8; b++) {
        int scale, min;
        q4_k_scale_min(scales, b, &scale, &min);
        o->scale[b * 2] = o->scale[b * 2 + 1] = (int16_t)scale;
        o->min[b * 2] = o->min[b * 2 + 1] = (int16_t)min;
    }
}
static inline void unpack_q4_k(struct opened *o, const uint8_t *w, int n) {
    const block_q4_k *p = (const block_q4_k *)w;
    (void)n;
    o->d = half_to_float(p->d);
    o->dmin = half_to_float(p->dmin);
    unpack_scales_mins(o, p->scales);
    for (int c = 0; c < 4; c++) unpack_nibbles(o->q + c * 64, p->qs + c * 32, 32, 0);
}
static inline void unpack_q5_k(struct opened *o, const uint8_t *w, int n) {
    const block_q5_k *p = (const block_q5_k *)w;
    (void)n;
    o->d = half_to_float(p->d);
    o->dmin = half_to_float(p->dmin);
    unpack_scales_mins(o, p->scales);
    for (int s = 0; s < 8; s++)
        for (int l = 0; l < 32; l++)
            o->q[s * 32 + l] = (int8_t)((p->qs[s / 2 * 32 + l] >> (s % 2 * 4) & 15) | (p->qh[l] >> s & 1) << 4);
}
static inline void unpack_q6_k(struct opened *o, const uint8_t *w, int n) {
    const block_q6_k *p = (const block_q6_k *)w;
    (void)n;
    o->d = half_to_float(p->d);
    for (int g = 0; g < 16; g++) o->scale[g] = p->scales[g];
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < 32; l++) {
                int low = p->ql[h * 64 + j % 2 * 32 + l] >> (j / 2 * 4) & 15, high = p->qh[h * 32 + l] >> (j * 2) & 3;
                o->q[h * 128 + j * 32 + l] = (int8_t)((low | high << 4) - 32);
            }
}
static inline void unpack_iq4_xs(struct opened *o, const uint8_t *w, int n) {
    const block_iq4_xs *p = (const block_iq4_xs *)w;
    (void)n;
    o->d = half_to_float(p->d);
    for (int s = 0; s < 8; s++) {
        int low = p->scales_l[s / 2] >> (s % 2 * 4) & 15, high = p->scales_h >> (s * 2) & 3;
        o->scale[s * 2] = o->scale[s * 2 + 1] = (int16_t)((low | high << 4) - 32);
        unpack_table(o->q + s * 32, p->qs + s * 16, 16, unpack_kv);
    }
}
static inline void unpack_iq2_xxs(struct opened *o, const uint8_t *w, int n) {
    const block_iq2_xxs *p = (const block_iq2_xxs *)w;
    (void)n;
    o->d = half_to_float(p->d) * 0.125f;
    for (int k = 0; k < 8; k++) {
        const uint8_t *index = (const uint8_t *)(p->qs + k * 4);
        uint32_t signs = unpack_u32(index + 4);
        o->scale[k * 2] = o->scale[k * 2 + 1] = (int16_t)(1 + 2 * (signs >> 28));
        for (int l = 0; l < 4; l++)
            unpack_signed(o->q + k * 32 + l * 8, grid_iq2xxs[index[l]], 8, unpack_sign7(signs >> (7 * l) & 127));
    }
}
static inline void unpack_iq2_xs(struct opened *o, const uint8_t *w, int n) {
    const block_iq2_xs *p = (const block_iq2_xs *)w;
    (void)n;
    o->d = half_to_float(p->d) * 0.125f;
    for (int g = 0; g < 16; g++) o->scale[g] = (int16_t)(1 + 2 * (p->scales[g / 2] >> (g % 2 * 4) & 15));
    for (int g = 0; g < 32; g++)
        unpack_signed(o->q + g * 8, grid_iq2xs[p->qs[g] & 511], 8, unpack_sign7(p->qs[g] >> 9));
}
static inline void unpack_iq2_s(struct opened *o, const uint8_t *w, int n) {
    const block_iq2_s *p = (const block_iq2_s *)w;
    (void)n;
    o->d = half_to_float(p->d) * 0.125f;
    for (int g = 0; g < 16; g++) o->scale[g] = (int16_t)(1 + 2 * (p->scales[g / 2] >> (g % 2 * 4) & 15));
    for (int g = 0; g < 32; g++) {
        int index = p->qs[g] | (p->qh[g / 4] >> (g % 4 * 2) & 3) << 8;
        unpack_signed(o->q + g * 8, grid_iq2s[index], 8, p->signs[g]);
    }
}
static inline void unpack_iq3_xxs(struct opened *o, const uint8_t *w, int n) {
    const block_iq3_xxs *p = (const block_iq3_xxs *)w;
    (void)n;
    o->d = half_to_float(p->d) * 0.25f;
    for (int k = 0; k < 8; k++) {
        uint32_t bits = unpack_u32(p->w + k * 4);
        o->scale[k * 2] = o->scale[k * 2 + 1] = (int16_t)(1 + 2 * (bits >> 28));
        for (int l = 0; l < 4; l++) {
            int g = k * 4 + l;
            uint32_t signs = unpack_sign7(bits >> (7 * l) & 127);
            unpack_signed(o->q + g * 8, grid_iq3xxs[p->qs[g * 2]], 4, signs);
            unpack_signed(o->q + g * 8 + 4, grid_iq3xxs[p->qs[g * 2 + 1]], 4, signs >> 4);
        }
    }
}
static inline void unpack_iq3_s(struct opened *o, const uint8_t *w, int n) {
    const block_iq3_s *p = (const block_iq3_s *)w;
    (void)n;
    o->d = half_to_float(p->d);
    for (int k = 0; k < 8; k++)
        o->scale[k * 2] = o->scale[k * 2 + 1] = (int16_t)(1 + 2 * (p->scales[k / 2] >> (k % 2 * 4) & 15));
    for (int j = 0; j < 64; j++) {
        int index = p->qs[j] | (p->qh[j / 8] >> (j % 8) & 1) << 8;
        unpack_signed(o->q + j * 4, grid_iq3s[index], 4, p->signs[j / 2] >> (j % 2 * 4));
    }
}
/* q = 8 * grid + delta, delta 1 or -1: eight times what the formula has. */
static inline void unpack_shifted(int8_t *q, const int8_t *grid, int delta) {
    for (int j = 0; j < 8; j++) q[j] = (int8_t)(grid[j] * 8 + delta);
}
static inline void unpack_iq1_s(struct opened *o, const uint8_t *w, int n) {
    const block_iq1_s *p = (const block_iq1_s *)w;
    (void)n;
    o->d = half_to_float(p->d) * 0.125f;
    for (int k = 0; k < 8; k++) {
        int h = p->qh[k];
        o->scale[k * 2] = o->scale[k * 2 + 1] = (int16_t)(2 * (h >> 12 & 7) + 1);
        for (int l = 0; l < 4; l++) {
            int index = p->qs[k * 4 + l] | (h >> (3 * l) & 7) << 8;
            unpack_shifted(o->q + k * 32 + l * 8, grid_iq1[index], h & 0x8000 ? -1 : 1);
        }
    }
}
static inline void unpack_iq1_m(struct opened *o, const uint8_t *w, int n) {
    const block_iq1_m *p = (const block_iq1_m *)w;
    uint32_t d = 0;
    (void)n;
    for (int t = 0; t < 4; t++) d |= (uint32_t)(p->scales[t * 2 + 1] >> 4) << (t * 4);
    o->d = half_to_float((uint16_t)d) * 0.125f;
    for (int g = 0; g < 16; g++)
        o->scale[g] = (int16_t)(2 * (unpack_u16(p->scales + g / 4 * 2) >> (g % 4 * 3) & 7) + 1);
    for (int g = 0; g < 32; g++) {
        int bits = p->qh[g / 2] >> (g % 2 * 4) & 15;
        unpack_shifted(o->q + g * 8, grid_iq1[p->qs[g] | (bits & 7) << 8], bits & 8 ? -1 : 1);
    }
}
#endif
