/* rows.cuh -- what is done to each row of a step on its own: norm, blocks of activations, biases, copies, sums.
 *
 * A block has a row, or a part of one: superblocks of 256 floats go round the warps of all parts.  In one of them a
 * lane has four floats from 4 * lane on, and four that lie 128 further.
 */
#ifndef MS4_ROWS_CUH
#define MS4_ROWS_CUH
#include "floats.cuh"

/* Calls use(first column) for the superblocks of this warp; parts: of a row. */
template <class F> DEV void each_superblock(int width, int part, int parts, F use) {
    const int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    for (int b = part * warps + warp; b * SUPERBLOCK < width; b += parts * warps) use(b * SUPERBLOCK);
}
template <class F> DEV void each_superblock_of_part(int width, F use) {
    each_superblock(width, (int)blockIdx.y, (int)gridDim.y, use);
}
DEV int lane_column(int column) { return column + 4 * ((int)threadIdx.x & 31); }
/* Writes what value(k) gives for columns k .. k + 3 of a superblock: as floats to f, as a block into q, or both. */
template <class F> DEV void put_superblock(float *f, block_q8 *q, int column, int width, F value) {
    const int k = lane_column(column);
    const float_4 a = value(k), b = value(k + 128);
    if (f) {
        store_4(f, k, width, a);
        store_4(f, k + 128, width, b);
    }
    if (q) quantize_block(q + column / SUPERBLOCK, a, b);
}

/* Shared memory: the upper partial sums, then the factor; and the row, if it is no longer than NORM_STAGED.  The first
 * two warps have a partial sum a lane. */
KERNEL(norm_rows, norm_args, 256) {
    SMEM(smem);
    float *room = (float *)smem, *row = room + 64;
    const int tid = (int)threadIdx.x, width = a.width;
    const bool staged = width <= NORM_STAGED;
    const float *x = a.x + (size_t)blockIdx.x * a.x_stride;
    if (staged)
        for (int k = 4 * tid; k < width; k += 4 * (int)blockDim.x) store_4(row, k, width, load_4(x, k, width));
    __syncthreads();
    float part = 0;
    if (tid < 64 && staged) {
#pragma unroll 16
        for (int k = tid; k < width; k += 64) part = __fmaf_rn(row[k], row[k], part);
    } else if (tid < 64) {
#pragma unroll 16
        for (int k = tid; k < width; k += 64) part = __fmaf_rn(x[k], x[k], part);
    }
    if (tid >= 32 && tid < 64) room[tid] = part;
    __syncthreads();
    if (tid < 32) {
        const float factor = norm_factor(tree_32(__fadd_rn(part, room[tid + 32])), width, a.eps);
        if (!tid) room[0] = factor;
    }
    __syncthreads();
    const float factor = room[0];
    float *y = a.y + (size_t)blockIdx.x * a.y_stride;
    block_q8 *q = a.q ? a.q + (size_t)blockIdx.x * a.blocks : nullptr;
    each_superblock(width, 0, 1, [&](int column) {
        put_superblock(y, q, column, width, [&](int k) {
            float_4 v = staged ? load_4(row, k, width) : load_4(x, k, width);
            const float_4 w = load_4(a.weight, k, width);
            for (int i = 0; i < 4; i++) v.v[i] = __fmul_rn(__fmul_rn(v.v[i], factor), w.v[i]);
            return v;
        });
    });
}
KERNEL(quantize_rows, quantize_args, 256) {
    const float *x = a.x + (size_t)blockIdx.x * a.x_stride;
    block_q8 *q = a.q + (size_t)blockIdx.x * a.blocks;
    each_superblock_of_part(a.width, [&](int column) {
        put_superblock(nullptr, q, column, a.width, [&](int k) { return load_4(x, k, a.width); });
    });
}
KERNEL(act_rows, act_args, 256) {
    const size_t at = (size_t)blockIdx.x * (size_t)a.width;
    const float *gate = a.gate + at, *up = a.up + at;
    float *f = a.f ? a.f + at : nullptr;
    block_q8 *q = a.q ? a.q + (size_t)blockIdx.x * a.blocks : nullptr;
    each_superblock_of_part(a.width, [&](int column) {
        put_superblock(f, q, column, a.width, [&](int k) {
            const float_4 g = load_4(gate, k, a.width), u = load_4(up, k, a.width);
            float_4 v;
            for (int i = 0; i < 4; i++)
                v.v[i] = a.gelu ? gelu_mul_dev(g.v[i], u.v[i]) : silu_mul_dev(g.v[i], u.v[i]);
            return v;
        });
    });
}
KERNEL(bias_rows, bias_args, 256) {
    float *b = a.b + (size_t)blockIdx.x * a.stride;
    block_q8 *q = a.q ? a.q + (size_t)blockIdx.x * a.blocks : nullptr;
    each_superblock_of_part(a.width, [&](int column) {
        put_superblock(b, q, column, a.width, [&](int k) {
            float_4 v = load_4(b, k, a.width);
            const float_4 bias = a.bias ? load_4(a.bias, k, a.width) : float_4{};
            for (int i = 0; i < 4; i++) {
                if (a.bias) v.v[i] = __fadd_rn(v.v[i], bias.v[i]);
                if (a.gelu) v.v[i] = gelu_dev(v.v[i]);
            }
            return v;
        });
    });
}
KERNEL(gather_rows, gather_args, 256) {
    const float *from = a.from + (size_t)a.rows[blockIdx.x] * a.stride;
    float *to = a.to + (size_t)blockIdx.x * a.stride;
    each_superblock_of_part(a.width, [&](int column) {
        put_superblock(to, nullptr, column, a.width, [&](int k) { return load_4(from, k, a.width); });
    });
}
KERNEL(sum_pairs, sum_args, 256) {
    const size_t first = (size_t)blockIdx.x * (size_t)a.k;
    float *h = a.h + (size_t)blockIdx.x * a.stride;
    each_superblock_of_part(a.width, [&](int column) {
        put_superblock(h, nullptr, column, a.width, [&](int k) {
            float_4 v = load_4(h, k, a.width);
#pragma unroll 4
            for (int j = 0; j < a.k; j++) {
                const float weight = a.weight[first + (size_t)j];
                const size_t row = a.row ? (size_t)a.row[first + (size_t)j] : first + (size_t)j;
                const float_4 y = load_4(a.pairs + row * a.stride, k, a.width);
                for (int i = 0; i < 4; i++) v.v[i] = __fmaf_rn(weight, y.v[i], v.v[i]);
            }
            return v;
        });
    });
}
#endif
