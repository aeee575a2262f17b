/* attend.cuh -- attention over the kv cache: by segment and then folded, or both at once for many rows. */
#ifndef MS4_ATTEND_CUH
#define MS4_ATTEND_CUH
#include "latents.cuh"
#include "attend_mma.cuh"
#include "attend_tile.cuh"

DEV int heads_from(int n_head, int first) { return n_head - first < ATTEND_HEADS ? n_head - first : ATTEND_HEADS; }

/* --- a row and a segment ----------------------------------------------------------------------------------------- */
DEV void attend_any_segment(char *shared, const segments_args &a, const seen_keys &keys, size_t at, int heads,
                            float *out) {
    const segment_room room = segment_room_at(shared);
    const size_t stride = (size_t)a.rank + 2;
    segment_scores(room, a.q + at * (size_t)(a.rank + a.d_rope), a.q_d + 2 * at, heads, keys, a.rank, a.d_rope);
    if ((int)threadIdx.x < heads) {
        out[threadIdx.x * stride] = room.m[threadIdx.x];
        out[threadIdx.x * stride + 1] = room.l[threadIdx.x];
    }
    segment_values(room, keys, a.rank, a.d_rope, [&](int h, int c, float o) {
        if (h < heads) out[(size_t)h * stride + 2 + (size_t)c] = o;
    });
}
KERNEL(attend_segments, segments_args, ATTEND_THREADS) {
    SMEM(shared);
    const int segment = (int)blockIdx.x, t = (int)blockIdx.y, head = (int)blockIdx.z * ATTEND_HEADS;
    const kv_span span = a.spans[a.row_span[t]];
    const int position = span.pos + a.first + t - span.first;
    if (seen_of(position, segment) <= 0) return;
    const seen_keys keys = keys_of(span, a.layer_offset, position, segment, a.rank + a.d_rope);
    const size_t at = (size_t)t * (size_t)a.n_head + (size_t)head;
    float *out = a.partial + (((size_t)t * (size_t)a.most + (size_t)segment) * (size_t)a.n_head + (size_t)head)
               * ((size_t)a.rank + 2);
    const int heads = heads_from(a.n_head, head);
    if (tensor_shape(a.rank, a.d_rope))
        attend_mma_segment(shared, a.q + at * (KEY_BYTES / 2), a.q_d + 2 * at, heads, keys, out);
    else attend_any_segment(shared, a, keys, at, heads, out);
}

/* --- folding ----------------------------------------------------------------------------------------------------- */
#define FOLD_WARPS 4
#define FOLD_COLUMNS 8                          /* of a lane at a time */
/* A warp folds the segments [first, end), results `stride` floats apart, to `to`: { m, l }, and o to `o`. */
DEV void fold_group(const float *from, size_t stride, int first, int end, int rank, float *to, float *o) {
    const int lane = (int)threadIdx.x & 31;
    for (int c = lane; c < rank; c += 32 * FOLD_COLUMNS) {
        float m = MINUS_INFINITY, l = 0, sum[FOLD_COLUMNS];
        for (int i = 0; i < FOLD_COLUMNS; i++) sum[i] = 0;
#pragma unroll 2
        for (int s = first; s < end; s++) {
            const float *result = from + (size_t)s * stride;
            const fold_factors f = fold_sums(m, l, result[0], result[1]);
            for (int i = 0; i < FOLD_COLUMNS; i++)
                if (c + 32 * i < rank) sum[i] = fold_one(f, sum[i], result[2 + c + 32 * i]);
        }
        for (int i = 0; i < FOLD_COLUMNS; i++) if (c + 32 * i < rank) o[c + 32 * i] = sum[i];
        if (!c) {
            to[0] = m;
            to[1] = l;
        }
    }
}
/* Four groups of segments at a time, one a warp; then all threads fold these into the result, a thread having every
 * 128th column. */
KERNEL(fold_segments, fold_args, 128) {
    SHARED(float, sums, 2 * FOLD_WARPS);
    SHARED(float, group, FOLD_WARPS * MOST_RANK);
    const int t = (int)blockIdx.y, tid = (int)threadIdx.x, warp = tid / 32, threads = 32 * FOLD_WARPS;
    const kv_span span = a.spans[a.row_span[t]];
    const int n = (span.pos + a.first + t - span.first) / KV_ROWS + 1;
    const size_t stride = (size_t)a.n_head * ((size_t)a.rank + 2);
    const float *from = a.partial + (size_t)t * (size_t)a.most * stride + blockIdx.x * ((size_t)a.rank + 2);
    float m = MINUS_INFINITY, l = 0, o[MOST_RANK / threads];
    for (int i = 0; i < MOST_RANK / threads; i++) o[i] = 0;
    for (int first = 0; first < n; first += FOLD_WARPS * SEGMENT_GROUP) {
        const int own = first + warp * SEGMENT_GROUP, end = own + SEGMENT_GROUP < n ? own + SEGMENT_GROUP : n;
        if (own < n) fold_group(from, stride, own, end, a.rank, sums + 2 * warp, group + warp * MOST_RANK);
        __syncthreads();
        for (int w = 0; w < FOLD_WARPS && first + w * SEGMENT_GROUP < n; w++) {
            const fold_factors f = fold_sums(m, l, sums[2 * w], sums[2 * w + 1]);
            for (int i = 0; i < MOST_RANK / threads; i++)
                if (tid + threads * i < a.rank) o[i] = fold_one(f, o[i], group[w * MOST_RANK + tid + threads * i]);
        }
        __syncthreads();
    }
    float *x = a.x + ((size_t)t * (size_t)a.n_head + blockIdx.x) * (size_t)a.rank;
    for (int i = 0; i < MOST_RANK / threads; i++)
        if (tid + threads * i < a.rank) x[tid + threads * i] = __fdiv_rn(o[i], l);
}

/* --- many rows --------------------------------------------------------------------------------------------------- */
/* Running sums of a block's heads, and the factors that the o of the last fold need: a thread has a head. */
struct running { float *m, *l, *old, *fresh; };
#define RUNNING_ROOM (4 * ATTEND_HEADS * 4)
DEV running running_at(char *shared) {
    float *at = (float *)shared;
    return { at, at + ATTEND_HEADS, at + 2 * ATTEND_HEADS, at + 3 * ATTEND_HEADS };
}
DEV void running_start(const running &r) {
    if (threadIdx.x < ATTEND_HEADS) {
        r.m[threadIdx.x] = MINUS_INFINITY;
        r.l[threadIdx.x] = 0;
    }
}
/* Ends with a barrier. */
DEV void running_fold(const running &r, const float *m, const float *l) {
    if (threadIdx.x < ATTEND_HEADS) {
        const int h = (int)threadIdx.x;
        const fold_factors f = fold_sums(r.m[h], r.l[h], m[h], l[h]);
        r.old[h] = f.old;
        r.fresh[h] = f.fresh;
    }
    __syncthreads();
}
DEV fold_factors running_factors(const running &r, int h) { return { r.old[h], r.fresh[h] }; }

/* A row after the other.  Shared memory: that of a segment; sums of the group and of all; o of the group.  Those of all
 * are in x, each element with the thread that has its column. */
DEV void attend_any_rows(char *shared, const attend_rows_args &a, const attend_tile &tile, int head, int heads) {
    const segment_room room = segment_room_at(shared);
    const running group = running_at(shared + SEGMENT_ROOM), all = running_at(shared + SEGMENT_ROOM + RUNNING_ROOM);
    float *o = (float *)(shared + SEGMENT_ROOM + 2 * RUNNING_ROOM);
    const kv_span span = a.spans[tile.span];
    const int width = a.rank + a.d_rope, tid = (int)threadIdx.x;
    for (int t = tile.first; t < tile.first + tile.n; t++) {
        const int position = span.pos + t - span.first, last = position / KV_ROWS;
        const size_t at = (size_t)t * (size_t)a.n_head + (size_t)head;
        float *x = a.x + at * (size_t)a.rank;
        __syncthreads();                        /* the row before has read its sums */
        running_start(all);
        for (int segment = 0; segment <= last; segment++) {
            const bool begins = segment % SEGMENT_GROUP == 0;
            const seen_keys keys = keys_of(span, a.layer_offset, position, segment, width);
            if (begins) running_start(group);
            segment_scores(room, a.q + at * (size_t)width, a.q_d + 2 * at, heads, keys, a.rank, a.d_rope);
            running_fold(group, room.m, room.l);
            segment_values(room, keys, a.rank, a.d_rope, [&](int h, int c, float value) {
                float *own = o + h * a.rank + c;
                *own = fold_one(running_factors(group, h), begins ? 0.0f : *own, value);
            });
            if (segment != last && (segment + 1) % SEGMENT_GROUP) continue;
            running_fold(all, group.m, group.l);
            for (int c = tid; c < heads * a.rank; c += ATTEND_THREADS)
                x[c] = fold_one(running_factors(all, c / a.rank), segment < SEGMENT_GROUP ? 0.0f : x[c], o[c]);
        }
        for (int c = tid; c < heads * a.rank; c += ATTEND_THREADS) x[c] = __fdiv_rn(x[c], all.l[c / a.rank]);
    }
}
KERNEL(attend_rows, attend_rows_args, ATTEND_THREADS) {
    SMEM(shared);
    const int head = (int)blockIdx.y * ATTEND_HEADS;
    const int heads = heads_from(a.n_head, head);
    if (tensor_shape(a.rank, a.d_rope)) attend_mma_tile(shared, a, a.tiles[blockIdx.x], head, heads);
    else attend_any_rows(shared, a, a.tiles[blockIdx.x], head, heads);
}
#endif
