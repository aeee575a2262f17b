/* floats.cuh -- what ops.h says of floats, for a warp: sums of 16 and of 64, quantize and quantize_16.
 *
 * The order of operations is the one of cpu/plain/plain.h and segment.h.  Functions that exchange values between lanes
 * are called by whole warps.
 */
#ifndef MS4_FLOATS_CUH
#define MS4_FLOATS_CUH
#include "dev.cuh"

#define MINUS_INFINITY __int_as_float((int)0xff800000u)
#define INFINITY_BITS 0x7f800000u
#define NOT_A_NUMBER __int_as_float(0x7fc00000)

/* Four floats that lie at a multiple of 16 bytes. */
struct alignas(16) float_4 { float v[4]; };
DEV bool at_16(const void *p) { return ((uintptr_t)p & 15) == 0; }
/* Floats k to k + 3 of a row of n; those that it does not have are 0. */
DEV float_4 load_4(const float *row, int k, int n) {
    if (k + 4 <= n && at_16(row)) return *(const float_4 *)(row + k);
    float_4 x;
    for (int i = 0; i < 4; i++) x.v[i] = k + i < n ? row[k + i] : 0.0f;
    return x;
}
DEV void store_4(float *row, int k, int n, const float_4 &x) {
    if (k + 4 <= n && at_16(row)) *(float_4 *)(row + k) = x;
    else for (int i = 0; i < 4; i++) if (k + i < n) row[k + i] = x.v[i];
}

DEV float rint_magic(float x) { return __fsub_rn(__fadd_rn(x, ROUND_MAGIC), ROUND_MAGIC); }
/* The integer next to x * factor, in the lowest bits. */
DEV unsigned whole_bits(float x, float factor) { return __float_as_uint(__fadd_rn(__fmul_rn(x, factor), ROUND_MAGIC)); }

/* --- across a warp ----------------------------------------------------------------------------------------------- */
/* The tree over partial sums that lie in 32 (or in each 16) lanes; all of them get the sum.  An addition is the same
 * from both sides. */
DEV float tree_16(float part) {
    for (int j = 8; j; j >>= 1) part = __fadd_rn(part, __shfl_xor_sync(ALL, part, j));
    return part;
}
DEV float tree_32(float part) { return tree_16(__fadd_rn(part, __shfl_xor_sync(ALL, part, 16))); }
/* The sum of 64 of fma(u, u, part), u = x * unit: a lane has two partial sums. */
DEV float sum_squares(const float *x, int n, float unit) {
    const int lane = (int)threadIdx.x & 31;
    float low = 0, high = 0;
#pragma unroll 4
    for (int k = lane; k < n; k += 64) {
        const float u = __fmul_rn(x[k], unit);
        low = __fmaf_rn(u, u, low);
        if (k + 32 < n) {
            const float v = __fmul_rn(x[k + 32], unit);
            high = __fmaf_rn(v, v, high);
        }
    }
    return tree_32(__fadd_rn(low, high));
}
DEV float norm_factor(float squares, int n, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, __int2float_rn(n)), eps)));
}
DEV unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
DEV unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

/* A warp writes a block of 256 floats: each lane has four from 4 * lane on (a), and four from 128 further (b). */
DEV void quantize_block(block_q8 *out, const float_4 &a, const float_4 &b) {
    const int lane = (int)threadIdx.x & 31;
    unsigned bits = 0, word[2] = { 0, 0 };
    for (int i = 0; i < 4; i++) bits = larger(bits, larger(magnitude_bits(a.v[i]), magnitude_bits(b.v[i])));
    bits = __reduce_max_sync(ALL, bits);
    const bool finite = bits < INFINITY_BITS, any = finite && __uint_as_float(bits) >= 0x1p-121f;
    const float most = any ? __uint_as_float(bits) : 1.0f, factor = __fdiv_rn(127.0f, most);
    int sum[2] = { 0, 0 };
    for (int i = 0; i < 4; i++) {
        const int q0 = any ? (int8_t)whole_bits(a.v[i], factor) : 0, q1 = any ? (int8_t)whole_bits(b.v[i], factor) : 0;
        word[0] |= (unsigned)(q0 & 255) << 8 * i;
        word[1] |= (unsigned)(q1 & 255) << 8 * i;
        sum[0] += q0;
        sum[1] += q1;
    }
    for (int h = 0; h < 2; h++) {
        ((unsigned *)out->qs)[32 * h + lane] = word[h];
        sum[h] += __shfl_xor_sync(ALL, sum[h], 1);
        sum[h] += __shfl_xor_sync(ALL, sum[h], 2);
        if ((lane & 3) == 0) out->sums[8 * h + lane / 4] = (int16_t)sum[h];
    }
    if (!lane) out->d = any ? __fdiv_rn(most, 127.0f) : finite ? 0.0f : NOT_A_NUMBER;
    else if (lane < 8) out->unused[lane - 1] = 0;
}
/* quantize_16 by a warp; returns d.  Lane l reads x[l], x[l + 32], ... only. */
DEV float quantize_16(int16_t *out, const float *x, int n, float *largest) {
    const int lane = (int)threadIdx.x & 31;
    unsigned bits = 0;
#pragma unroll 4
    for (int k = lane; k < n; k += 32) bits = larger(bits, magnitude_bits(x[k]));
    bits = __reduce_max_sync(ALL, bits);
    const bool finite = bits < INFINITY_BITS, any = finite && __uint_as_float(bits) >= 0x1p-100f;
    const float most = any ? __uint_as_float(bits) : 1.0f, one = __fdiv_rn(1.0f, most);
    const float length = __fsqrt_rn(sum_squares(x, n, one)), by_length = __fdiv_rn((float)LENGTH_16, length);
    const float top = by_length < 32767.0f ? by_length : 32767.0f, factor = __fmul_rn(top, one);
#pragma unroll 4
    for (int k = lane; k < n; k += 32) out[k] = any ? (int16_t)whole_bits(x[k], factor) : (int16_t)0;
    if (largest && !lane) *largest = any ? rint_magic(__fmul_rn(most, factor)) : 0.0f;
    return any ? __fdiv_rn(most, top) : finite ? 0.0f : NOT_A_NUMBER;
}
#endif
