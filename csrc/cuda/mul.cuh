/* mul.cuh -- quantized weights times a few tokens: kernels mul_<type>, for rows of any length.
 *
 * A warp takes a row and opens it superblock by superblock, 8 weights a lane; sums inside a superblock are integers, so
 * lanes may add them in any order, and every lane runs the chain over the superblocks that ops.h prescribes.
 */
#ifndef MS4_MUL_CUH
#define MS4_MUL_CUH
#include "job.cuh"
#include "mul_staged.cuh"
#include "unpack.cuh"

/* What a lane has of a superblock of type T: its unit (unpack.cuh), and the scales that hold for it.  Of 32-blocks the
 * last superblock may have n < 256 weights; lanes beyond have zeros. */
template <class T> struct lane_weights {
    uint2 q;
    int scale, min;
    float d, dmin;
};
template <class T> DEV lane_weights<T> open_unit(const uint8_t *p, int lane, int n) {
    lane_weights<T> w = { { 0, 0 }, 0, 0, 0, 0 };
    if (8 * lane >= n) return w;
    w.q = T::quants(p, lane, T::book());
    if constexpr (form<T>::BLOCKS) {
        w.d = T::block_d(p, 8 * lane / form<T>::WIDTH);
        w.dmin = T::block_m(p, lane / 4);
    } else {
        w.scale = T::scale(p, lane / 2);
        w.min = T::min(p, lane / 2);
        w.d = T::d(p);
        w.dmin = T::dmin(p);
    }
    return w;
}
/* The value of a superblock without x's own scale; the same in all lanes. */
template <class T> DEV float value_of(const lane_weights<T> &w, const block_q8 *x, int lane, int n) {
    const int2 xq = *(const int2 *)(x->qs + 8 * lane);
    int dot = dp4a_ss((int)w.q.x, xq.x, dp4a_ss((int)w.q.y, xq.y, 0));
    if constexpr (!form<T>::BLOCKS) {
        const float t = __fmul_rn(w.d, __int2float_rn(__reduce_add_sync(ALL, w.scale * dot)));
        if (!form<T>::MINS) return t;
        const int mins = __reduce_add_sync(ALL, lane % 2 ? 0 : w.min * x->sums[lane / 2]);
        return __fmaf_rn(-w.dmin, __int2float_rn(mins), t);
    } else {
        constexpr int WIDTH = form<T>::WIDTH, LANES = WIDTH / 8;
        for (int with = 1; with < LANES; with *= 2) dot += __shfl_xor_sync(ALL, dot, with);
        const float own = __int2float_rn(dot);
        const float sums = __int2float_rn(x->sums[lane / 4 * 2] + x->sums[lane / 4 * 2 + 1]);
        float t = 0;
        for (int from = 0; from < n / 8; from += LANES) {
            t = __fmaf_rn(__shfl_sync(ALL, w.d, from), __shfl_sync(ALL, own, from), t);
            if (form<T>::MINS) t = __fmaf_rn(__shfl_sync(ALL, w.dmin, from), __shfl_sync(ALL, sums, from), t);
        }
        return t;
    }
}
template <class T> DEV void mul_any(const tile &at) {
    const mul_job &j = at.job;
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const block_q8 *x[MUL_TOKENS];
#pragma unroll
    for (int t = 0; t < MUL_TOKENS; t++) x[t] = (const block_q8 *)row_of_x(j, at.token + t);
    for (int r = warp; r < MUL_ROWS && at.row + r < j.n_rows; r += MUL_THREADS / 32) {
        const uint8_t *p = row_of_w(j, at.row + r);
        float y[MUL_TOKENS] = {};
        for (int i = 0; i * SUPERBLOCK < j.n_cols; i++, p += T::BYTES) {
            const int n = j.n_cols - i * SUPERBLOCK < SUPERBLOCK ? j.n_cols - i * SUPERBLOCK : SUPERBLOCK;
            const lane_weights<T> w = open_unit<T>(p, lane, n);
#pragma unroll
            for (int t = 0; t < MUL_TOKENS; t++)
                if (at.token + t < j.n_tokens) y[t] = __fmaf_rn(x[t][i].d, value_of(w, x[t] + i, lane, n), y[t]);
        }
#pragma unroll
        for (int t = 0; t < MUL_TOKENS; t++)
            if (lane == t) store(j, at.row + r, at.token + t, y[t]);
    }
}
template <class T> DEV void mul_quantized(const mul_args &a) {
    SMEM(shared);
    const tile &at = tile_of_block<MUL_ROWS, MUL_TOKENS>(a);
    if (!at.job.w) return;
    if (can_stage<T>(at.job)) mul_staged<T>(shared, at);
    else mul_any<T>(at);
}
#endif
