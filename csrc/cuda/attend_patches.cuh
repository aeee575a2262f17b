/* attend_patches.cuh -- attention of all patches to all, for heads of 64: queries, keys and values in shared memory.
 *
 * What a thread has is said in patches.cuh; its columns here are 4 from 4 * (its number % 8) on, and 4 that lie 32
 * further.  Queries and keys lie transposed, so that a column of 4 of either is one load for 16 fma.  The next tile is
 * on its way, in registers, while one is computed.
 */
#ifndef MS4_ATTEND_PATCHES_CUH
#define MS4_ATTEND_PATCHES_CUH
#include "patches.cuh"

#define HEAD 64
_Static_assert(ATTEND_PATCHES == 64 && TILE_KEYS == 32, "128 threads copy 64 queries and 32 keys");
struct patch_room { float *weights, *q, *k, *v; };
struct key_tile { float_4 k[4], v[4]; };        /* of a thread: 16 columns of a key, 16 numbers of a row of values */
DEV float_4 no_numbers() { return { 0, 0, 0, 0 }; }
/* Keys and values from `first` on; those that there are not are zero. */
DEV void load_tile(key_tile &tile, const attend_patches_args &a, const patch_place &at, int first) {
    const int tid = (int)threadIdx.x, key = first + tid % 32, row = first + tid / 4;
    const float *k = patch_row(a.k, a, at, key) + tid / 32 * 16, *v = patch_row(a.v, a, at, row) + tid % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        tile.k[i] = key < a.n ? *(const float_4 *)(k + 4 * i) : no_numbers();
        tile.v[i] = row < a.n ? *(const float_4 *)(v + 16 * i) : no_numbers();
    }
}
DEV void store_tile(const patch_room &room, const key_tile &tile) {
    const int tid = (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int c = 0; c < 4; c++) room.k[(tid / 32 * 16 + 4 * i + c) * KEY_STRIDE + tid % 32] = tile.k[i].v[c];
        *(float_4 *)(room.v + tid / 4 * HEAD + tid % 4 * 4 + 16 * i) = tile.v[i];
    }
}
DEV void load_queries(const patch_room &room, const attend_patches_args &a, const patch_place &at) {
    const int query = (int)threadIdx.x % 64, column = (int)threadIdx.x / 64 * 32;
    const float *q = patch_row(a.q, a, at, at.first + query) + column;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float_4 part = *(const float_4 *)(q + 4 * i);
#pragma unroll
        for (int c = 0; c < 4; c++) room.q[(column + 4 * i + c) * QUERY_STRIDE + query] = part.v[c];
    }
}
DEV void head_scores(float (*s)[OWN], const patch_room &room, const patch_place &at) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < OWN; j++) s[i][j] = 0;
#pragma unroll 8
    for (int c = 0; c < HEAD; c++) {
        const float_4 q = *(const float_4 *)(room.q + c * QUERY_STRIDE + at.query);
        const float_4 k = *(const float_4 *)(room.k + c * KEY_STRIDE + at.key);
#pragma unroll
        for (int i = 0; i < OWN; i++)
#pragma unroll
            for (int j = 0; j < OWN; j++) s[i][j] = __fmaf_rn(q.v[i], k.v[j], s[i][j]);
    }
}
DEV bool for_head_patches(const attend_patches_args &a) {
    return a.d_head == HEAD && a.stride % 4 == 0 && at_16(a.q) && at_16(a.k) && at_16(a.v) && at_16(a.x);
}
DEV void attend_head_patches(const patch_room &room, const attend_patches_args &a) {
    const patch_place at = patch_place_of(a);
    float m[OWN], l[OWN], factor[OWN], o[OWN][OWN_COLUMNS], s[OWN][OWN];
    for (int i = 0; i < OWN; i++) {
        m[i] = MINUS_INFINITY;
        l[i] = 0;
        for (int c = 0; c < OWN_COLUMNS; c++) o[i][c] = 0;
    }
    key_tile tile;
    load_tile(tile, a, at, 0);
    load_queries(room, a, at);
    for (int first = 0; first < a.n; first += TILE_KEYS) {
        store_tile(room, tile);
        __syncthreads();
        load_tile(tile, a, at, first + TILE_KEYS);
        head_scores(s, room, at);
        show_weights(room.weights, s, at, a.n - first, m, l, factor);
        add_values(o, factor, room.weights, at.query, [&](int j, float *v) {
            const float_4 left = *(const float_4 *)(room.v + j * HEAD + at.key);
            const float_4 right = *(const float_4 *)(room.v + j * HEAD + 32 + at.key);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                v[c] = left.v[c];
                v[4 + c] = right.v[c];
            }
        });
        __syncthreads();                        /* before the next tile is stored */
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        float *x = patch_row(a.x, a, at, at.first + at.query + i) + at.key;
        if (at.first + at.query + i >= a.n) continue;
#pragma unroll
        for (int c = 0; c < OWN_COLUMNS; c++) x[c / 4 * 32 + c % 4] = __fdiv_rn(o[i][c], l[i]);
    }
}
KERNEL(attend_patches, attend_patches_args, 128) {
    SHARED(float, weights, TILE_KEYS * QUERY_STRIDE);
    SHARED(float, q, HEAD * QUERY_STRIDE);
    SHARED(float, k, HEAD * KEY_STRIDE);
    SHARED(float, v, TILE_KEYS * HEAD);
    if (for_head_patches(a)) attend_head_patches({ weights, q, k, v }, a);
    else attend_any_patches(weights, a);
}
#endif
