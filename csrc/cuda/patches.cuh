/* patches.cuh -- the vision tower's own steps: 2D rope, attention of all patches to all, merging.
 *
 * Attention: a block has a head and 64 patches as queries, and takes keys 32 at a time.  A thread has 4 queries: their
 * scores with 4 keys, and then columns of their o, 8 at a time; 8 neighbouring lanes have the same queries.  So the
 * weights of a tile go from lane to lane within a warp.
 */
#ifndef MS4_PATCHES_CUH
#define MS4_PATCHES_CUH
#include "latents.cuh"
#include "rows.cuh"

/* The warps of all parts take heads in turn. */
KERNEL(rotate_patches, rotate_args, 128) {
    const int lane = (int)threadIdx.x & 31, warps = (int)blockDim.x / 32, t = (int)blockIdx.x;
    const float *row = a.rope + (size_t)(t / a.columns) * (size_t)a.d_head;
    const float *column = a.rope + (size_t)(t % a.columns) * (size_t)a.d_head;
    for (int h = (int)blockIdx.y * warps + (int)threadIdx.x / 32; h < a.n_head; h += (int)gridDim.y * warps) {
        const size_t at = (size_t)t * a.stride + (size_t)h * (size_t)a.d_head;
        for (int i = 2 * lane; i < a.d_head; i += 64) {
            const float *turn = (i < a.d_head / 2 ? row : column) + i;
            float *q = a.q + at + i;
            q[0] = __fmul_rn(q[0], a.scale);
            q[1] = __fmul_rn(q[1], a.scale);
            rotate_pair(q, turn);
            rotate_pair(a.k + at + i, turn);
        }
    }
}

/* --- attention --------------------------------------------------------------------------------------------------- */
#define TILE_KEYS 32
#define OWN 4                                   /* queries of a thread, and keys that it scores them with */
#define OWN_COLUMNS 8
#define QUERY_STRIDE (ATTEND_PATCHES + 4)       /* floats of a row of queries, or of weights, side by side */
#define KEY_STRIDE (TILE_KEYS + 4)              /* likewise of keys */
struct patch_place {                            /* of a thread */
    int first, query, key, n;                   /* of the block; its first query there, its first key in a tile; keys */
    size_t column;                              /* of the head, in all rows */
};
DEV patch_place patch_place_of(const attend_patches_args &a) {
    const int tid = (int)threadIdx.x;
    return { (int)blockIdx.x * ATTEND_PATCHES, tid / 8 * OWN, tid % 8 * OWN, a.n,
             (size_t)blockIdx.y * (size_t)a.d_head };
}
/* Where row t of q, k, v or x has this head; rows that there are not are the last one. */
template <class T> DEV T *patch_row(T *rows, const attend_patches_args &a, const patch_place &at, int t) {
    return rows + (size_t)(t < a.n ? t : a.n - 1) * a.stride + at.column;
}
/* Of 8 lanes with the same queries. */
DEV float largest_8(float x) {
    for (int j = 4; j; j >>= 1) {
        const float other = __shfl_xor_sync(ALL, x, j);
        x = x > other ? x : other;
    }
    return x;
}
/* One query's scores with this thread's keys become weights; n: keys of the tile that there are.  Returns the factor
 * for what o holds. */
DEV float tile_weights(float *s, int key, int n, float &m, float &l) {
    float top = MINUS_INFINITY;
    for (int j = 0; j < OWN; j++) {
        s[j] = key + j < n ? s[j] : MINUS_INFINITY;
        top = top > s[j] ? top : s[j];
    }
    top = largest_8(top);
    top = m > top ? m : top;
    const float shift = top == MINUS_INFINITY ? 0 : top, factor = exp_dev(__fsub_rn(m, shift));
    float part[OWN];
    for (int j = 0; j < OWN; j++) {
        s[j] = exp_dev(__fsub_rn(s[j], shift));
        part[j] = s[j];
        for (int lanes = 4; lanes; lanes >>= 1) part[j] = __fadd_rn(part[j], __shfl_xor_sync(ALL, part[j], lanes));
    }
    l = __fmaf_rn(l, factor, __fadd_rn(__fadd_rn(part[0], part[2]), __fadd_rn(part[1], part[3])));
    m = top;
    return factor;
}
/* All of a thread's scores to weights, which its lanes show each other in `weights`: rows of keys, by query. */
DEV void show_weights(float *weights, float (*s)[OWN], const patch_place &at, int keys, float *m, float *l,
                      float *factor) {
    for (int i = 0; i < OWN; i++) factor[i] = tile_weights(s[i], at.key, keys, m[i], l[i]);
    __syncwarp();                               /* the weights of the tile before have been read */
    for (int j = 0; j < OWN; j++)
        *(float_4 *)(weights + (at.key + j) * QUERY_STRIDE + at.query) = { s[0][j], s[1][j], s[2][j], s[3][j] };
    __syncwarp();
}
/* o = o * factor, then the keys one by one; value(j): where the columns of key j are. */
template <class F> DEV void add_values(float (*o)[OWN_COLUMNS], const float *factor, const float *weights, int query,
                                       F value) {
    for (int i = 0; i < OWN; i++)
        for (int c = 0; c < OWN_COLUMNS; c++) o[i][c] = __fmul_rn(o[i][c], factor[i]);
#pragma unroll 4
    for (int j = 0; j < TILE_KEYS; j++) {
        const float_4 p = *(const float_4 *)(weights + j * QUERY_STRIDE + query);
        float v[OWN_COLUMNS];
        value(j, v);
        for (int i = 0; i < OWN; i++)
            for (int c = 0; c < OWN_COLUMNS; c++) o[i][c] = __fmaf_rn(p.v[i], v[c], o[i][c]);
    }
}

/* Any shape: everything from where it lies; o waits in x. */
DEV void attend_any_patches(float *weights, const attend_patches_args &a) {
    const patch_place at = patch_place_of(a);
    float m[OWN], l[OWN], factor[OWN];
    for (int i = 0; i < OWN; i++) {
        m[i] = MINUS_INFINITY;
        l[i] = 0;
    }
    for (int first = 0; first < a.n; first += TILE_KEYS) {
        float s[OWN][OWN];
        for (int i = 0; i < OWN; i++)
            for (int j = 0; j < OWN; j++) {
                const float *q = patch_row(a.q, a, at, at.first + at.query + i);
                const float *k = patch_row(a.k, a, at, first + at.key + j);
                s[i][j] = 0;
                for (int c = 0; c < a.d_head; c++) s[i][j] = __fmaf_rn(q[c], k[c], s[i][j]);
            }
        show_weights(weights, s, at, a.n - first, m, l, factor);
        for (int column = at.key / OWN * OWN_COLUMNS; column < a.d_head; column += 8 * OWN_COLUMNS) {
            float o[OWN][OWN_COLUMNS];
            for (int i = 0; i < OWN; i++)
                for (int c = 0; c < OWN_COLUMNS; c++)
                    o[i][c] = first ? patch_row(a.x, a, at, at.first + at.query + i)[column + c] : 0.0f;
            add_values(o, factor, weights, at.query, [&](int j, float *v) {
                const float *from = patch_row(a.v, a, at, first + j) + column;
                for (int c = 0; c < OWN_COLUMNS; c++) v[c] = first + j < a.n ? from[c] : 0.0f;
            });
            const bool ends = first + TILE_KEYS >= a.n;
            for (int i = 0; i < OWN; i++)
                for (int c = 0; c < OWN_COLUMNS && at.first + at.query + i < a.n; c++)
                    patch_row(a.x, a, at, at.first + at.query + i)[column + c]
                        = ends ? __fdiv_rn(o[i][c], l[i]) : o[i][c];
        }
    }
}

/* --- the projector ----------------------------------------------------------------------------------------------- */
KERNEL(merge_patches, merge_args, 128) {
    const int square = a.merge * a.merge, across = a.columns / a.merge, at = a.first + (int)blockIdx.x;
    const int y = at / across * a.merge, x = at % across * a.merge;
    float *to = a.to + (size_t)blockIdx.x * a.to_stride;
    block_q8 *q = a.q ? a.q + (size_t)blockIdx.x * a.blocks : nullptr;
    each_superblock_of_part(a.width * square, [&](int column) {
        put_superblock(to, q, column, a.width * square, [&](int k) {
            float_4 v;
            for (int i = 0; i < 4; i++) {
                const int c = (k + i) / square, place = (k + i) % square;
                const int patch = (y + place / a.merge) * a.columns + x + place % a.merge;
                v.v[i] = k + i < a.width * square ? a.from[(size_t)patch * a.from_stride + (size_t)c] : 0.0f;
            }
            return v;
        });
    });
}
#endif
