/* dequantize.c -- every block type to float32, as SPEC 4.8 writes it.
 *
 * All products fit 24 bits, so each weight is the exact value of its formula, rounded once where a min is subtracted.
 * Names are the SPEC's: element i = 128 h + 32 j + l of a superblock, 16-group g = i / 16, 32-group s = i / 32,
 * 8-group g8 = i / 8 = 4 k + l.
 */
#include "dequantize.h"
#include "grids.h"
#include <math.h>

static const int kv[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
static const float e2m1[16] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6 };

/* Element i of 32 whose first half lies in the low nibbles of 16 bytes, the second in the high ones. */
static int nibble(const uint8_t *qs, int i) { return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4; }
static int bit(const uint8_t *bits, int i) { return bits[i / 8] >> (i % 8) & 1; }
static uint32_t u16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static uint32_t u32(const uint8_t *p) { return u16(p) | u16(p + 2) << 16; }
/* Seven signs, and an eighth that makes the number of ones even. */
static uint32_t sign7(uint32_t x) {
    uint32_t parity = 0;
    for (int i = 0; i < 7; i++) parity ^= x >> i & 1;
    return x | parity << 7;
}
static float with_sign(float y, uint32_t signs, int i) { return signs >> i & 1 ? -y : y; }

void dequantize_f32(float *out, const void *w, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = ((const float *)w)[i];
}
void dequantize_f16(float *out, const void *w, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = half_to_float(((const uint16_t *)w)[i]);
}
void dequantize_bf16(float *out, const void *w, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = bf16_to_float(((const uint16_t *)w)[i]);
}

/* The body gives y, element i of block p. */
#define DEQUANTIZE(type, weights, element) \
    void dequantize_##type(float *out, const void *w, size_t n) { \
        for (const block_##type *p = w; n; p++, out += weights, n -= weights) \
            for (int i = 0; i < weights; i++) { element } \
    }
DEQUANTIZE(q4_0, 32, { out[i] = half_to_float(p->d) * (float)(nibble(p->qs, i) - 8); })
DEQUANTIZE(q4_1, 32, { out[i] = half_to_float(p->d) * (float)nibble(p->qs, i) + half_to_float(p->m); })
DEQUANTIZE(q5_0, 32, { out[i] = half_to_float(p->d) * (float)((nibble(p->qs, i) | bit(p->qh, i) << 4) - 16); })
DEQUANTIZE(q5_1, 32, {
    out[i] = half_to_float(p->d) * (float)(nibble(p->qs, i) | bit(p->qh, i) << 4) + half_to_float(p->m);
})
DEQUANTIZE(q8_0, 32, { out[i] = half_to_float(p->d) * (float)p->qs[i]; })
DEQUANTIZE(iq4_nl, 32, { out[i] = half_to_float(p->d) * (float)kv[nibble(p->qs, i)]; })
DEQUANTIZE(mxfp4, 32, { out[i] = ldexpf(e2m1[nibble(p->qs, i)], p->e - 127); })

/* Unsigned, exponent bias 7; the largest code stands for 0, and bit 7 is not used. */
static float e4m3(uint8_t s) {
    int e = s >> 3 & 15, m = s & 7;
    if (s == 0x7f) return 0;
    return e ? ldexpf((float)(8 + m), e - 10) : ldexpf((float)m, -9);
}
DEQUANTIZE(nvfp4, 64, {
    int b = i / 16;
    int j = i % 16;
    uint8_t byte = p->qs[b * 8 + j % 8];
    out[i] = e4m3(p->d[b]) * e2m1[j < 8 ? byte & 15 : byte >> 4];
})

DEQUANTIZE(q2_k, 256, {
    int h = i / 128;
    int j = i / 32 % 4;
    int l = i % 32;
    int g = i / 16;
    int q = p->qs[32 * h + l] >> (2 * j) & 3;
    out[i] = half_to_float(p->d) * (float)(p->scales[g] & 15) * (float)q
        - half_to_float(p->dmin) * (float)(p->scales[g] >> 4);
})
static int scale_q3_k(const uint8_t *sc, int g) {
    int base = g < 8 ? sc[g] & 15 : sc[g - 8] >> 4, top = sc[8 + g % 4] >> (2 * (g / 4)) & 3;
    return (base | top << 4) - 32;
}
DEQUANTIZE(q3_k, 256, {
    int h = i / 128;
    int j = i / 32 % 4;
    int l = i % 32;
    int q = (p->qs[32 * h + l] >> (2 * j) & 3) - (p->hmask[l] >> (4 * h + j) & 1 ? 0 : 4);
    out[i] = half_to_float(p->d) * (float)scale_q3_k(p->scales, i / 16) * (float)q;
})
DEQUANTIZE(q4_k, 256, {
    int s = i / 32;
    int l = i % 32;
    int scale;
    int min;
    q4_k_scale_min(p->scales, s, &scale, &min);
    int q = p->qs[32 * (s / 2) + l] >> (4 * (s % 2)) & 15;
    out[i] = half_to_float(p->d) * (float)scale * (float)q - half_to_float(p->dmin) * (float)min;
})
DEQUANTIZE(q5_k, 256, {
    int s = i / 32;
    int l = i % 32;
    int scale;
    int min;
    q4_k_scale_min(p->scales, s, &scale, &min);
    int q = (p->qs[32 * (s / 2) + l] >> (4 * (s % 2)) & 15) | (p->qh[l] >> s & 1) << 4;
    out[i] = half_to_float(p->d) * (float)scale * (float)q - half_to_float(p->dmin) * (float)min;
})
DEQUANTIZE(q6_k, 256, {
    int h = i / 128;
    int j = i / 32 % 4;
    int l = i % 32;
    int low = p->ql[64 * h + 32 * (j & 1) + l] >> (4 * (j >> 1)) & 15;
    int high = p->qh[32 * h + l] >> (2 * j) & 3;
    out[i] = half_to_float(p->d) * (float)p->scales[i / 16] * (float)((low | high << 4) - 32);
})
DEQUANTIZE(iq4_xs, 256, {
    int s = i / 32;
    int scale = ((p->scales_l[s / 2] >> (4 * (s & 1)) & 15) | (p->scales_h >> (2 * s) & 3) << 4) - 32;
    out[i] = half_to_float(p->d) * (float)scale * (float)kv[nibble(p->qs + 16 * s, i % 32)];
})

DEQUANTIZE(iq2_xxs, 256, {
    int k = i / 32;
    int l = i / 8 % 4;
    const uint8_t *a = (const uint8_t *)(p->qs + 4 * k);
    uint32_t bits = u32(a + 4);
    float y = half_to_float(p->d) * (0.5f + (float)(bits >> 28)) / 4 * (float)grid_iq2xxs[a[l]][i % 8];
    out[i] = with_sign(y, sign7(bits >> (7 * l) & 127), i % 8);
})
DEQUANTIZE(iq2_xs, 256, {
    int v = p->qs[i / 8];
    int scale = p->scales[i / 32] >> (4 * (i / 16 % 2)) & 15;
    float y = half_to_float(p->d) * (0.5f + (float)scale) / 4 * (float)grid_iq2xs[v & 511][i % 8];
    out[i] = with_sign(y, sign7((uint32_t)v >> 9), i % 8);
})
DEQUANTIZE(iq2_s, 256, {
    int g8 = i / 8;
    int k = i / 32;
    int l = g8 % 4;
    int index = p->qs[g8] | (p->qh[k] >> (2 * l) & 3) << 8;
    int scale = p->scales[k] >> (4 * (l / 2)) & 15;
    float y = half_to_float(p->d) * (0.5f + (float)scale) / 4 * (float)grid_iq2s[index][i % 8];
    out[i] = with_sign(y, p->signs[g8], i % 8);
})
DEQUANTIZE(iq3_xxs, 256, {
    int k = i / 32;
    int l = i / 8 % 4;
    uint32_t bits = u32(p->w + 4 * k);
    float y = half_to_float(p->d) * (0.5f + (float)(bits >> 28)) / 2 * (float)grid_iq3xxs[p->qs[i / 4]][i % 4];
    out[i] = with_sign(y, sign7(bits >> (7 * l) & 127), i % 8);
})
DEQUANTIZE(iq3_s, 256, {
    int k = i / 32;
    int index = p->qs[i / 4] | bit(p->qh, i / 4) << 8;
    int scale = p->scales[k / 2] >> (4 * (k & 1)) & 15;
    float y = half_to_float(p->d) * (float)(1 + 2 * scale) * (float)grid_iq3s[index][i % 4];
    out[i] = with_sign(y, p->signs[i / 8], i % 8);
})
DEQUANTIZE(iq1_s, 256, {
    int h = p->qh[i / 32];
    int l = i / 8 % 4;
    int index = p->qs[i / 8] | (h >> (3 * l) & 7) << 8;
    float delta = h & 0x8000 ? -0.125f : 0.125f;
    out[i] = half_to_float(p->d) * (float)(2 * (h >> 12 & 7) + 1) * ((float)grid_iq1[index][i % 8] + delta);
})
DEQUANTIZE(iq1_m, 256, {
    int k = i / 32;
    int l = i / 8 % 4;
    uint32_t d = 0;
    for (int t = 0; t < 4; t++) d |= u16(p->scales + 2 * t) >> 12 << (4 * t);
    int scale = u16(p->scales + 2 * (k / 2)) >> (6 * (k & 1) + 3 * (l / 2)) & 7;
    int bits = p->qh[i / 16] >> (4 * (i / 8 % 2)) & 15;
    int index = p->qs[i / 8] | (bits & 7) << 8;
    float delta = bits & 8 ? -0.125f : 0.125f;
    out[i] = half_to_float((uint16_t)d) * (float)(2 * scale + 1) * ((float)grid_iq1[index][i % 8] + delta);
})
