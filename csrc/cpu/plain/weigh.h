/* weigh.h -- what choosing a token (sample.c) does with every logit of the vocabulary: finding the highest ones, and
 * exponentials in double precision.
 *
 * Every kernel table has these same lines, ref too, compiled for its own ISA.  They use no fused multiply-add, and the
 * order of their sums is fixed: all tables give the same bits, so that a seed gives the same tokens on every machine.
 */
#ifndef MS4_WEIGH_H
#define MS4_WEIGH_H
#include "ops.h"

typedef union { double d; uint64_t u; } weigh_bits;
#define WEIGH_ROUND 6755399441055744.0      /* 1.5 * 2^52: adding it rounds a double to the nearest even integer */

/* e^x for -708 <= x <= 0, within 2 ulp: x = k ln 2 + r, then 1 + r + r^2 q(r), then 2^k.  q is the interpolation of
 * (e^r - 1 - r) / r^2 at the ten Chebyshev nodes of |r| <= ln 2 / 2: e^r is right to 2e-17.  The first part of ln 2 has
 * 32 bits, so its product with k is exact. */
static inline double exp_weigh(double x) {
    weigh_bits k = { .d = x * 0x1.71547652b82fep+0 + WEIGH_ROUND };
    double whole = k.d - WEIGH_ROUND;
    double r = x - whole * 0x1.62e42fee00000p-1 - whole * 0x1.a39ef35793c76p-33;
    double r2 = r * r, r4 = r2 * r2;             /* q in pairs: short chains, as nothing else would fill the waiting */
    double q0 = 0x1.0000000000001p-1 + 0x1.5555555555556p-3 * r;
    double q2 = 0x1.5555555553d63p-5 + 0x1.11111111109b3p-7 * r;
    double q4 = 0x1.6c16c1788bd90p-10 + 0x1.a01a01a7c41d5p-13 * r;
    double q6 = 0x1.a019b90d2ae7ap-16 + 0x1.71de0dae63bb3p-19 * r;
    double q8 = 0x1.289185613a3d6p-22 + 0x1.af38a9b0ec855p-26 * r;
    double q = (q0 + q2 * r2) + ((q4 + q6 * r2) + q8 * r4) * r4;
    weigh_bits power = { .u = (k.u + 1023) << 52 };      /* k as an integer is in the lowest bits */
    return (r2 * q + r + 1.0) * power.d;
}
/* Adds 64 numbers as a tree: j with j + 32, then + 16, and so on. */
static inline double sum_64_weigh(double *part) {
    for (int j = 0; j < 32; j++) part[j] += part[j + 32];
    for (int j = 0; j < 16; j++) part[j] += part[j + 16];
    for (int j = 0; j < 8; j++) part[j] += part[j + 8];
    for (int j = 0; j < 4; j++) part[j] += part[j + 4];
    return (part[0] + part[2]) + (part[1] + part[3]);
}
/* The weight if it is one of a likely token, else 0: by its bits, because gcc makes branches of `?:` here. */
static inline double kept_weigh(double w, double least) {
    weigh_bits v = { .d = w };
    v.u &= w >= least ? UINT64_MAX : 0;
    return v.d;
}
static inline void weigh_plain(double *restrict w, const float *restrict x, size_t n, const struct ms4_weighing *how,
                               double *restrict sums) {
    double likely[WEIGH_BLOCK / 2], others[WEIGH_BLOCK / 2];
    const double highest = how->highest, temperature = how->temperature, least = how->least;
    for (size_t i = 0; i < n; i++) {
        double nats = ((double)x[i] - highest) / temperature;
        w[i] = nats < -708.0 ? -708.0 : nats;    /* below, 2^k would be no normal number */
    }
    for (size_t i = 0; i < n; i++) w[i] = exp_weigh(w[i]);      /* apart: in one loop the limit becomes a branch */
    for (size_t i = n; i < WEIGH_BLOCK; i++) w[i] = 0;
    for (size_t j = 0; j < WEIGH_BLOCK / 2; j++) {
        double a = kept_weigh(w[j], least), b = kept_weigh(w[j + WEIGH_BLOCK / 2], least);
        likely[j] = a + b;
        others[j] = (w[j] - a) + (w[j + WEIGH_BLOCK / 2] - b);
    }
    sums[0] = sum_64_weigh(likely);
    sums[1] = sum_64_weigh(others);
}
/* The bits of floats, those of negative ones turned over, are in order as whole numbers are, which may be compared in
 * any grouping; infinity and NaN are at both ends. */
static inline int block_tops_plain(float *tops, const float *x, size_t n) {
    union { float f; int32_t i; } v;
    int32_t all_high = INT32_MIN, all_low = INT32_MAX;
    for (size_t length; n; n -= length, x += length) {
        int32_t high = INT32_MIN, low = INT32_MAX;
        length = n < WEIGH_BLOCK ? n : WEIGH_BLOCK;
        for (size_t i = 0; i < length; i++) {
            v.f = x[i];
            int32_t order = v.i ^ (v.i >> 31 & INT32_MAX);
            high = order > high ? order : high;
            low = order < low ? order : low;
        }
        v.i = high ^ (high >> 31 & INT32_MAX);
        *tops++ = v.f;
        all_high = high > all_high ? high : all_high;
        all_low = low < all_low ? low : all_low;
    }
    return all_high < 0x7f800000 && all_low >= -0x7f800000;
}
#endif
