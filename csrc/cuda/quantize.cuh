/* quantize.cuh -- floats to blocks of 8-bit integers (ops.h, quantize). */
#ifndef MS4_QUANTIZE_CUH
#define MS4_QUANTIZE_CUH

/* One warp: a superblock, of which n floats exist.  Lane l has the floats 8 l .. 8 l + 7; v is that of floats that do
 * not exist, too: 0. */
DEV void quantize_superblock(block_q8 *out, const float *v, int n) {
    int lane = (int)threadIdx.x & 31, own = n - 8 * lane;
    unsigned largest = 0;
    for (int i = 0; i < 8; i++) {
        unsigned u = __float_as_uint(v[i]) & 0x7fffffffu;
        largest = u > largest ? u : largest;
    }
    largest = __reduce_max_sync(ALL, largest);
    float top = __uint_as_float(largest);
    bool finite = largest < 0x7f800000u, good = finite && !(top < 0x1p-121f);
    float factor = __fdiv_rn(127.0f, good ? top : 1.0f);
    int sum = 0;
    unsigned words[2] = { 0, 0 };
    for (int i = 0; i < 8; i++) {
        int q = (int)(int8_t)__float_as_uint(__fadd_rn(__fmul_rn(v[i], factor), ROUND_MAGIC));
        q = good && i < own ? q : 0;
        sum += q;
        words[i / 4] |= (unsigned)(q & 255) << i % 4 * 8;
    }
    sum += __shfl_xor_sync(ALL, sum, 1);
    uint2 both = { words[0], words[1] };
    *(uint2 *)(out->qs + 8 * lane) = both;
    if (lane % 2 == 0) out->sums[lane / 2] = (int16_t)sum;
    if (lane < 8) {
        float d = good ? __fdiv_rn(top, 127.0f) : finite ? 0.0f : __uint_as_float(0x7fc00000u);
        (&out->d)[lane] = lane ? 0.0f : d;
    }
}
/* Superblock i of a row of `width` floats at x. */
DEV void quantize_part(block_q8 *row, const float *x, int width, int i) {
    int lane = (int)threadIdx.x & 31, at = i * SUPERBLOCK + lane * 8;
    float v[8];
    for (int k = 0; k < 8; k++) v[k] = at + k < width ? x[at + k] : 0.0f;
    quantize_superblock(row + i, v, width - i * SUPERBLOCK < SUPERBLOCK ? width - i * SUPERBLOCK : SUPERBLOCK);
}
KERNEL(quantize_rows, quantize_args, 256) {
    const float *x = a.x + (size_t)blockIdx.x * a.x_stride;
    block_q8 *q = a.q + (size_t)blockIdx.x * a.blocks;
    int n = (a.width + SUPERBLOCK - 1) / SUPERBLOCK;
    for (int i = (int)threadIdx.x / 32; i < n; i += (int)blockDim.x / 32) quantize_part(q, x, a.width, i);
}
#endif
