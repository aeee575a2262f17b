/* segment.cuh -- attention over a segment of the kv cache (ops.h, attend_segment), for any shape.
 *
 * A block of 256 threads has a row of the step and ATTEND_HEADS heads.  Scores of all keys come first, a thread having
 * a key and every second head; then weights, 16 lanes a head, each being a partial sum; then the sums of the values, a
 * thread having columns of all heads.  (attend.cuh has tensor cores for the shape of the real model; what they share
 * with this, weights and folding, is here.)
 */
#ifndef MS4_SEGMENT_CUH
#define MS4_SEGMENT_CUH
#include "floats.cuh"

#define ATTEND_THREADS 256
#define SCORE_STRIDE 132       /* floats of a row of scores: not all heads in one bank */

/* Keys of a segment that a row may see, and where they lie. */
struct seen_keys { const int16_t *rows; const float *d; int n; };       /* d: three floats a key */
DEV int seen_of(int position, int segment) {
    const int n = position + 1 - segment * KV_ROWS;
    return n > KV_ROWS ? KV_ROWS : n;
}
DEV seen_keys keys_of(const kv_span &span, size_t layer_offset, int position, int segment, int width) {
    const int16_t *rows = (const int16_t *)(span.blocks[segment] + layer_offset);
    return { rows, (const float *)(rows + KV_ROWS * (size_t)width), seen_of(position, segment) };
}
DEV float rope_score(const float *q_d, const float *d, int of_rope) {
    return __fmul_rn(__fmul_rn(q_d[1], d[1]), __int2float_rn(of_rope));
}
DEV float add_latent_score(const float *q_d, const float *d, int of_latents, float s) {
    return __fmaf_rn(__fmul_rn(q_d[0], d[0]), __int2float_rn(of_latents), s);
}
DEV float score_of(const float *q_d, const float *d, int of_latents, int of_rope) {
    return add_latent_score(q_d, d, of_latents, rope_score(q_d, d, of_rope));
}
DEV float larger_float(float a, float b) { return a > b ? a : b; }
/* Of 16 lanes; NaN may win or lose: see segment_weights_plain, where the sums find it. */
DEV float largest_16(float x) {
    for (int j = 8; j; j >>= 1) x = larger_float(x, __shfl_xor_sync(ALL, x, j));
    return x;
}
/* What a weight of 1 stands for; most: the largest weight, sum: that of weights times largest latents. */
DEV float weights_unit(float most, float sum) {
    const float by_sum = __fmul_rn(sum, 1.0f / 0x1.fp+30f), by_most = __fmul_rn(most, 1.0f / 32767.0f);
    return by_sum < by_most ? by_most : by_sum;
}
DEV float weights_factor(float unit) { return unit < 0x1p-100f ? 0.0f : __fdiv_rn(1.0f, unit); }
/* No integer is taken from a NaN. */
DEV bool usable_unit(float unit) { return unit < __uint_as_float(INFINITY_BITS); }
DEV int16_t weight_16(float w, float factor, float unit) {
    return usable_unit(unit) ? (int16_t)whole_bits(w, factor) : (int16_t)0;
}
struct segment_result { float m, l, unit; };
/* The scores of a head, those of unseen keys -infinity, become its weights, put(key, weight); 16 lanes of a warp have a
 * head.  d: three floats of each of the n keys that are seen. */
template <class F> DEV segment_result segment_weights(const float *score, const float *d, int n, F put) {
    const int j = (int)threadIdx.x & 15;
    float s[KV_ROWS / 16], top = MINUS_INFINITY, part = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < KV_ROWS / 16; i++) {
        s[i] = score[16 * i + j];
        top = larger_float(top, s[i]);
    }
    top = largest_16(top);
    const float shift = top == MINUS_INFINITY ? 0 : top;
    float most = 0;
#pragma unroll
    for (int i = 0; i < KV_ROWS / 16; i++) {
        const int key = 16 * i + j;
        s[i] = exp_dev(__fsub_rn(s[i], shift));
        part = __fadd_rn(part, s[i]);
        s[i] = key < n ? __fmul_rn(s[i], d[3 * key]) : 0.0f;
        most = larger_float(most, s[i]);
        sum = __fmaf_rn(s[i], key < n ? d[3 * key + 2] : 0.0f, sum);
    }
    most = largest_16(most);
    const segment_result r = { top, tree_16(part), weights_unit(most, tree_16(sum)) };
    const float factor = weights_factor(r.unit);
#pragma unroll
    for (int i = 0; i < KV_ROWS / 16; i++) put(16 * i + j, weight_16(s[i], factor, r.unit));
    return r;
}

/* --- folding ----------------------------------------------------------------------------------------------------- */
/* { m2, l2, o2 } into { m, l, o }: fold_sums does m and l and gives what each o needs; old is -1 where nothing changes,
 * as those keys were not seen. */
struct fold_factors { float old, fresh; };
DEV fold_factors fold_sums(float &m, float &l, float m2, float l2) {
    if (l2 == 0) return { -1, 0 };
    const float top = larger_float(m, m2);
    const fold_factors f = { exp_dev(__fsub_rn(m, top)), exp_dev(__fsub_rn(m2, top)) };
    m = top;
    l = __fmaf_rn(l2, f.fresh, __fmul_rn(l, f.old));
    return f;
}
DEV float fold_one(const fold_factors &f, float o, float o2) {
    return f.old < 0 ? o : __fmaf_rn(o2, f.fresh, __fmul_rn(o, f.old));
}

/* --- any shape --------------------------------------------------------------------------------------------------- */
/* Shared memory of a block. */
struct segment_room {
    float *score;                               /* ATTEND_HEADS rows of SCORE_STRIDE */
    int16_t *weights;                           /* ATTEND_HEADS rows of KV_ROWS */
    float *m, *l, *unit;                        /* of heads */
};
DEV segment_room segment_room_at(char *shared) {
    float *score = (float *)shared, *m = score + ATTEND_HEADS * SCORE_STRIDE;
    return { score, (int16_t *)(m + 4 * ATTEND_HEADS), m, m + ATTEND_HEADS, m + 2 * ATTEND_HEADS };
}
_Static_assert(SEGMENT_ROOM == ATTEND_HEADS * (SCORE_STRIDE * 4 + 4 * 4 + KV_ROWS * 2), "scores, sums, weights");

/* The sum of eight products of 16-bit integers; exact modulo 2^32, as all of these sums. */
DEV unsigned dot_8(const uint4 &x, const uint4 &y, unsigned sum) {
    const unsigned a[4] = { x.x, x.y, x.z, x.w }, b[4] = { y.x, y.y, y.z, y.w };
    for (int i = 0; i < 4; i++) {
        sum += (unsigned)((int)(int16_t)a[i] * (int)(int16_t)b[i]);
        sum += (unsigned)(((int)a[i] >> 16) * ((int)b[i] >> 16));
    }
    return sum;
}
/* Whole sums of columns [first, end) of a key and of every second head from h on. */
DEV void dot_heads(unsigned *sums, const int16_t *key, const int16_t *q, int h, int heads, int width, int first,
                   int end) {
    for (int i = 0; i < ATTEND_HEADS / 2; i++) sums[i] = 0;
    for (int c = first; c < end; c += 8) {
        const uint4 k = *(const uint4 *)(key + c);
        for (int i = 0; i < ATTEND_HEADS / 2; i++) {
            const int head = h + 2 * i < heads ? h + 2 * i : 0;
            sums[i] = dot_8(k, *(const uint4 *)(q + (size_t)head * (size_t)width + c), sums[i]);
        }
    }
}
/* Scores and weights of `heads` heads, q and q_d being those of the first; ends with a barrier. */
DEV void segment_scores(const segment_room &room, const int16_t *q, const float *q_d, int heads, const seen_keys &keys,
                        int rank, int d_rope) {
    const int j = (int)threadIdx.x % KV_ROWS, h = (int)threadIdx.x / KV_ROWS, row = (int)threadIdx.x / 16;
    const int16_t *key = keys.rows + (size_t)j * (size_t)(rank + d_rope);
    unsigned of_latents[ATTEND_HEADS / 2], of_rope[ATTEND_HEADS / 2];
    if (j < keys.n) {
        dot_heads(of_latents, key, q, h, heads, rank + d_rope, 0, rank);
        dot_heads(of_rope, key, q, h, heads, rank + d_rope, rank, rank + d_rope);
    }
    for (int i = 0; i < ATTEND_HEADS / 2; i++) {
        const int head = h + 2 * i;
        const bool seen = j < keys.n && head < heads;
        room.score[head * SCORE_STRIDE + j]
            = seen ? score_of(q_d + 2 * head, keys.d + 3 * j, (int)of_latents[i], (int)of_rope[i]) : MINUS_INFINITY;
    }
    __syncthreads();
    int16_t *weights = room.weights + row * KV_ROWS;
    const segment_result r = segment_weights(room.score + row * SCORE_STRIDE, keys.d, keys.n,
                                             [&](int i, int16_t w) { weights[i] = w; });
    if (((int)threadIdx.x & 15) == 0) {
        room.m[row] = r.m;
        room.l[row] = r.l;
        room.unit[row] = r.unit;
    }
    __syncthreads();
}
/* Calls use(head, column, its o) for all heads (more than there are) and the columns of this thread. */
template <class F>
DEV void segment_values(const segment_room &room, const seen_keys &keys, int rank, int d_rope, F use) {
    for (int c = (int)threadIdx.x; c < rank; c += ATTEND_THREADS) {
        unsigned sum[ATTEND_HEADS];
#pragma unroll
        for (int h = 0; h < ATTEND_HEADS; h++) sum[h] = 0;
        for (int j = 0; j < keys.n; j++) {
            const int value = keys.rows[(size_t)j * (size_t)(rank + d_rope) + (size_t)c];
#pragma unroll
            for (int h = 0; h < ATTEND_HEADS; h++) sum[h] += (unsigned)(value * room.weights[h * KV_ROWS + j]);
        }
#pragma unroll
        for (int h = 0; h < ATTEND_HEADS; h++) use(h, c, __fmul_rn(__int2float_rn((int)sum[h]), room.unit[h]));
    }
}
#endif
