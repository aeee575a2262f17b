/* latents.cuh -- attention's rows: latents into the kv cache, queries, and queries as 16-bit integers. */
#ifndef MS4_LATENTS_CUH
#define MS4_LATENTS_CUH
#include "floats.cuh"

/* The pair at x, turned; turn: cosine and sine. */
DEV void rotate_pair(float *x, const float *turn) {
    const float a = x[0], b = x[1], c = turn[0], s = turn[1];
    x[0] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
    x[1] = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
}
/* The first warp has the latent, the second the rope key. */
KERNEL(latents_rows, latents_args, 64) {
    const int lane = (int)threadIdx.x & 31, t = (int)blockIdx.x;
    const kv_place place = a.places[t];
    const size_t width = (size_t)(a.rank + a.d_rope);
    int16_t *rows = (int16_t *)(place.block + a.layer_offset), *to = rows + (size_t)place.at * width;
    float *d = (float *)(rows + KV_ROWS * width) + 3 * place.at, *kv = a.kv + (size_t)t * a.stride;
    if (threadIdx.x < 32) {
        const float factor = norm_factor(sum_squares(kv, a.rank, 1), a.rank, a.eps);
        for (int k = lane; k < a.rank; k += 32) kv[k] = __fmul_rn(__fmul_rn(kv[k], factor), a.weight[k]);
        const float scale = quantize_16(to, kv, a.rank, d + 2);
        if (!lane) d[0] = scale;
    } else {
        float *key = kv + a.rank;
        const float *rope = a.rope + (size_t)t * (size_t)a.d_rope;
        for (int i = 2 * lane; i < a.d_rope; i += 64) rotate_pair(key + i, rope + i);
        __syncwarp();                           /* quantize_16 gives lanes other columns */
        const float scale = quantize_16(to + a.rank, key, a.d_rope, nullptr);
        if (!lane) d[1] = scale;
    }
}
/* The warps of all parts take heads in turn. */
KERNEL(queries_rows, queries_args, 128) {
    const int lane = (int)threadIdx.x & 31, warps = (int)blockDim.x / 32, d_head = a.d_nope + a.d_rope;
    const float scale = a.scale[blockIdx.x], *rope = a.rope + (size_t)blockIdx.x * (size_t)a.d_rope;
    for (int h = (int)blockIdx.y * warps + (int)threadIdx.x / 32; h < a.n_head; h += (int)gridDim.y * warps) {
        float *q = a.q + (size_t)blockIdx.x * a.stride + (size_t)h * (size_t)d_head;
        for (int i = lane; i < a.d_nope; i += 32) q[i] = __fmul_rn(q[i], scale);
        q += a.d_nope;
        for (int i = 2 * lane; i < a.d_rope; i += 64) {
            rotate_pair(q + i, rope + i);
            q[i] = __fmul_rn(q[i], scale);
            q[i + 1] = __fmul_rn(q[i + 1], scale);
        }
    }
}
KERNEL(query_16_rows, query_16_args, 32) {
    const size_t at = (size_t)blockIdx.y * (size_t)a.n_head + blockIdx.x;
    const float *q = a.q + (size_t)blockIdx.y * a.q_stride + (size_t)blockIdx.x * (size_t)(a.d_nope + a.d_rope);
    int16_t *out = a.out + at * (size_t)(a.rank + a.d_rope);
    const float of_latent = quantize_16(out, a.absorbed + at * (size_t)a.rank, a.rank, nullptr);
    const float of_rope = quantize_16(out + a.rank, q + a.d_nope, a.d_rope, nullptr);
    if (threadIdx.x == 0) {
        a.out_d[2 * at] = of_latent;
        a.out_d[2 * at + 1] = of_rope;
    }
}
#endif
