/* attend_mma.cuh -- attention on tensor cores, in the shape of the real model: one segment for one row.
 *
 * A block has a segment and ATTEND_HEADS heads.  Scores: a warp has 16 keys, for all heads.  Weights: 16 lanes a head.
 * Values: a warp has 32 latents, for all heads and keys.  Keys that a row does not see are left out of shared memory:
 * whatever is there instead is an integer, and gets a weight of 0.
 */
#ifndef MS4_ATTEND_MMA_CUH
#define MS4_ATTEND_MMA_CUH
#include "fragments.cuh"

struct mma_room {              /* the scores take the place of the queries */
    char *keys;
    float *d, *score, *unit;
    char *q, *weights;
};
DEV mma_room mma_room_at(char *shared) {
    char *d = shared + KV_ROWS * KEY_BYTES, *q = d + KV_ROWS * 12, *weights = q + ATTEND_HEADS * KEY_BYTES;
    char *unit = weights + ATTEND_HEADS * WEIGHT_BYTES;
    return { shared, (float *)d, (float *)q, (float *)unit, q, weights };
}
_Static_assert(MMA_SEGMENT_ROOM
               == KV_ROWS * (KEY_BYTES + 12) + ATTEND_HEADS * (KEY_BYTES + WEIGHT_BYTES + 4), "mma_room");
_Static_assert(ATTEND_HEADS * SCORE_STRIDE * 4 <= ATTEND_HEADS * KEY_BYTES, "scores in the place of queries");

/* A warp copies the keys that it needs first, so it may begin before others have theirs. */
DEV void mma_copy(const mma_room &room, const int16_t *q, int heads, const seen_keys &keys) {
    const int tid = (int)threadIdx.x, warp = tid / 32, key = warp * 16, n = keys.n - key < 16 ? keys.n - key : 16;
    copy_rows(room.q, q, heads, tid, ATTEND_THREADS);
    copy_scales(room.d, keys.d, keys.n, tid, ATTEND_THREADS);
    copy_commit();
    copy_rows(room.keys + key * KEY_BYTES, keys.rows + (size_t)key * (KEY_BYTES / 2), n, tid & 31, 32);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    copy_wait<0>();
    __syncwarp();
}
DEV void mma_scores(const mma_room &room, const float *q_d, int heads, int n_keys) {
    const int lane = (int)threadIdx.x & 31, first = (int)threadIdx.x / 32 * 16, row = lane / 4, column = lane % 4 * 2;
    const int rows_q = lane_rows(0, KEY_BYTES), rows_k = lane_rows(first, KEY_BYTES);
    products latent[2] = {}, rope[2] = {};
#pragma unroll
    for (int k = 0; k < KEY_BYTES / 64; k++) {
        fragment_a a;
        fragment_b b;
        load_a(a, room.q, rows_q, KEY_BYTES, k);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            load_b(b, room.keys + tile * 8 * KEY_BYTES, rows_k, k);
            multiply(k < TENSOR_RANK / 32 ? latent[tile] : rope[tile], a, b);
        }
    }
    __syncthreads();                            /* all have read the queries */
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = row + i / 2 * 8, j = first + tile * 8 + column + i % 2;
            const float *of_head = q_d + 2 * (h < heads ? h : 0);
            const float s = score_of(of_head, room.d + 3 * j, whole(latent[tile], i), whole(rope[tile], i));
            room.score[h * SCORE_STRIDE + j] = j < n_keys ? s : MINUS_INFINITY;
        }
    __syncthreads();
}
DEV void mma_weights(const mma_room &room, int heads, int n_keys, float *out) {
    const int row = (int)threadIdx.x / 16;
    const segment_result r = segment_weights(room.score + row * SCORE_STRIDE, room.d, n_keys, [&](int key, int16_t w) {
        *(int16_t *)(room.weights + chunk_at(row, WEIGHT_BYTES, key / 8) + key % 8 * 2) = w;
    });
    if (((int)threadIdx.x & 15) == 0) {
        room.unit[row] = r.unit;
        if (row < heads) {
            out[row * (TENSOR_RANK + 2)] = r.m;
            out[row * (TENSOR_RANK + 2) + 1] = r.l;
        }
    }
    __syncthreads();
}
DEV void mma_values(const mma_room &room, int heads, float *out) {
    const int lane = (int)threadIdx.x & 31, chunk = (int)threadIdx.x / 32 * 4, row = lane / 4, column = lane % 4 * 2;
    const int rows_w = lane_rows(0, WEIGHT_BYTES);
    products o[4] = {};
#pragma unroll
    for (int k = 0; k < KV_ROWS / 32; k++) {
        fragment_a a;
        fragment_b b;
        load_a(a, room.weights, rows_w, WEIGHT_BYTES, k);
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            load_values(b, room.keys, lane, chunk + tile, k);
            multiply(o[tile], a, b);
        }
    }
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int h = row + 8 * half;
            const float unit = room.unit[h];
            const float first = __fmul_rn(__int2float_rn(whole(o[tile], 2 * half)), unit);
            const float second = __fmul_rn(__int2float_rn(whole(o[tile], 2 * half + 1)), unit);
            float *to = out + h * (TENSOR_RANK + 2) + 2 + (chunk + tile) * 8 + column;
            if (h < heads) {
                to[0] = first;
                to[1] = second;
            }
        }
}
DEV void attend_mma_segment(char *shared, const int16_t *q, const float *q_d, int heads, const seen_keys &keys,
                            float *out) {
    const mma_room room = mma_room_at(shared);
    mma_copy(room, q, heads, keys);
    mma_scores(room, q_d, heads, keys.n);
    mma_weights(room, heads, keys.n, out);
    mma_values(room, heads, out);
}
#endif
