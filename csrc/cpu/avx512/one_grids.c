/* one_grids.c -- products with one token on AVX-512: IQ2 and IQ3. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "grid_rows.h"
#include "one.h"

static inline __m512i signed_x(const __m512i *x, const struct grid_row *g, int i) {
    return signed_bytes(x[i], g->negative[i]);
}
/* QUAD_ORDER: the dwords of all four products add up to the 16-groups.  scales: bytes, one for each */
static inline __m512i scale_quads(const struct grid_row *g, const __m512i *x, __m128i scales) {
    __m512i dot[2];         /* two, as one alone would wait for its own last addition */
    for (int h = 0; h < 2; h++) dot[h] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), g->q[h], signed_x(x, g, h));
    for (int h = 0; h < 2; h++) dot[h] = _mm512_dpbusd_epi32(dot[h], g->q[2 + h], signed_x(x, g, 2 + h));
    return _mm512_mullo_epi32(_mm512_add_epi32(dot[0], dot[1]), _mm512_cvtepi8_epi32(scales));
}
/* BLOCK_ORDER: blocks 0..3 in the lanes of one sum, 4..7 in those of the other */
static inline __m512i scale_halves(const struct grid_row *g, const __m512i *x, __m128i scales) {
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6),
        s = _mm512_cvtepi8_epi32(scales);
    __m512i dot[2];
    for (int h = 0; h < 2; h++) {
        dot[h] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), g->q[2 * h], signed_x(x, g, 2 * h));
        dot[h] = _mm512_dpbusd_epi32(dot[h], g->q[2 * h + 1], signed_x(x, g, 2 * h + 1));
    }
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    return _mm512_add_epi32(_mm512_mullo_epi32(dot[0], _mm512_permutexvar_epi32(first, s)),
                            _mm512_mullo_epi32(dot[1], _mm512_permutexvar_epi32(second, s)));
}
INLINE __m512 dot_grid(const uint8_t *w, const struct one_x *x, const uint8_t *ahead, size_t bytes, grid_rows_fn *open,
                       grid_scales_fn *scales_of, const enum x_order order, __m512 d) {
    __m512i sums[4];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        __m512i acc[4];
        for (int r = 0; r < 4; r += 2) {
            const uint8_t *two[2] = { w + (size_t)(4 * l + r) * bytes, w + (size_t)(4 * l + r + 1) * bytes };
            struct grid_row g[2];
            open(g, two, x->grid);
            for (int k = 0; k < 2; k++) {
                const __m512i *s = x->v[4 * l + r + k];
                const __m128i scales = scales_of(two[k]);
                acc[r + k] = order == QUAD_ORDER ? scale_quads(&g[k], s, scales) : scale_halves(&g[k], s, scales);
                prefetch_after(acc[r + k], ahead + (size_t)(4 * l) * bytes, (size_t)(r + k), 4, 4 * bytes);
            }
        }
        sums[l] = add_dwords(acc);
    }
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(add_lanes(sums)));
}
#define X(type, order, d_of_rows) \
    static __m512 dot_##type(const uint8_t *first, const struct one_x *x, const uint8_t *ahead) { \
        const uint8_t *w[16]; \
        rows_of(w, first, sizeof(block_##type)); \
        return dot_grid(first, x, ahead, sizeof(block_##type), rows_##type, scales_##type, order, d_of_rows); \
    }
GRID_TYPES(X)
#undef X
#define X(type, order, d_of_rows) MUL_ONE(type, order, 0, pack_##type)
GRID_TYPES(X)
#undef X
#endif
