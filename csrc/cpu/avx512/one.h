/* one.h -- products with one token on AVX-512: what the kernels of the types share.
 *
 * The 16 lanes of a step are 16 superblocks that follow each other in memory: of one row, or of several short ones.
 * dot_<type>(w, x, ahead) is their values before x->d.  Integer sums stay spread over a vector for each superblock, and
 * are added up for all 16 by transposing.
 */
#ifndef MS4_AVX512_ONE_H
#define MS4_AVX512_ONE_H
#include "cpu/plain/prefetch.h"
#include "rows.h"

#define ONE_SUPERBLOCKS 16     /* of a row in one pass, and of one step */
/* The activations of the 16 superblocks of a step.  A row of n < 16 superblocks repeats. */
struct one_x {
    __m512i v[ONE_SUPERBLOCKS][4];
    union {
        int16_t blocks[ONE_SUPERBLOCKS][8] __attribute__((aligned(64)));   /* the sums of blocks */
        __m512i start[ONE_SUPERBLOCKS][4];                         /* -bias * x */
        __m512i block[8];                                           /* -bias * sum of block b */
        /* factor * sum, in pairs as group_pair has them */
        int16_t group[ONE_SUPERBLOCKS][16] __attribute__((aligned(64)));
    };
    __m512i grid[GRID_VECTORS];
    float d[ONE_SUPERBLOCKS];
};
/* The products of 16 superblocks that follow each other, before x->d.  Prefetching goes on past the last row, to
 * m->next or what follows: a prefetch cannot fault.
 * ahead: where the lines to prefetch meanwhile begin, as many bytes as these 16 superblocks have */
typedef __m512 dot_fn(const uint8_t *w, const struct one_x *x, const uint8_t *ahead);

/* What a product of one type needs; factor: of the sums; bytes: of a superblock. */
struct one_type {
    dot_fn *dot;
    enum x_order order;
    enum ms4_family family;
    int factor;
    size_t bytes;
    pack_grid_fn *pack_grid;
};
void mul_one_avx512(const struct ms4_mul *m, const struct one_type *t);
#define MUL_ONE(type, order, factor, pack_grid) \
    void mul_one_##type##_avx512(const struct ms4_mul *m) { \
        static const struct one_type t = { \
            dot_##type, order, FAMILY_OF(type), factor, SUPERBLOCK_BYTES(type), pack_grid \
        }; \
        mul_one_avx512(m, &t); \
    }

/* out[k]: lanes k of a[0..3] */
static inline void transpose_lanes(__m512i *out, const __m512i *a) {
    const __m512i t0 = _mm512_shuffle_i64x2(a[0], a[1], 0x44), t1 = _mm512_shuffle_i64x2(a[0], a[1], 0xee);
    const __m512i t2 = _mm512_shuffle_i64x2(a[2], a[3], 0x44), t3 = _mm512_shuffle_i64x2(a[2], a[3], 0xee);
    out[0] = _mm512_shuffle_i64x2(t0, t2, 0x88);
    out[1] = _mm512_shuffle_i64x2(t0, t2, 0xdd);
    out[2] = _mm512_shuffle_i64x2(t1, t3, 0x88);
    out[3] = _mm512_shuffle_i64x2(t1, t3, 0xdd);
}
/* Lane r of v[l] has 16 bytes of superblock 4l + r; after this v[j] has dword j of all of them, side by side. */
static inline void transpose_dwords(__m512i *v) {
    __m512i a[4];
    transpose_lanes(a, v);                  /* a[r], lane l: superblock 4l + r */
    const __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(a[2], a[3]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
    v[0] = _mm512_unpacklo_epi64(t0, t2);
    v[1] = _mm512_unpackhi_epi64(t0, t2);
    v[2] = _mm512_unpacklo_epi64(t1, t3);
    v[3] = _mm512_unpackhi_epi64(t1, t3);
}
/* Where the 16 superblocks of a step begin. */
INLINE void rows_of(const uint8_t **rows, const uint8_t *w, size_t bytes) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) rows[r] = w + (size_t)r * bytes;
}
/* Sums of four vectors: in each 128-bit lane the sums of the dwords of a[0], a[1], a[2], a[3] in that lane. */
static inline __m512i add_dwords(const __m512i *a) {
    const __m512i t0 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i t1 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(t0, t1), _mm512_unpackhi_epi64(t0, t1));
}
/* In each 128-bit lane: the sums of dwords 0 and 1, 2 and 3 of a, then of b.  (The casts are for the shuffle only.) */
static inline __m512i add_pairs(__m512 a, __m512 b) {
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
}
/* Lane l of the result: the sum of the lanes of a[l]. */
static inline __m512i add_lanes(const __m512i *a) {
    const __m512i t0 = _mm512_add_epi32(_mm512_shuffle_i64x2(a[0], a[1], 0x44), _mm512_shuffle_i64x2(a[0], a[1], 0xee));
    const __m512i t1 = _mm512_add_epi32(_mm512_shuffle_i64x2(a[2], a[3], 0x44), _mm512_shuffle_i64x2(a[2], a[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i64x2(t0, t1, 0x88), _mm512_shuffle_i64x2(t0, t1, 0xdd));
}
/* 16 bytes of each of four superblocks, one in each lane. */
INLINE __m512i load_four(const uint8_t *w, size_t step) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_two(w, w + step)), load_two(w + 2 * step, w + 3 * step), 1);
}
/* Lane r of v[l] has the dword of superblock 4l + r first; returns these dwords in order. */
static inline __m512i first_dwords(const __m512i *v) {
    const __m512i t = _mm512_unpacklo_epi64(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpacklo_epi32(v[2], v[3]));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), t);
}
#endif
