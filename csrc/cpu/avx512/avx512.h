/* avx512.h -- what the AVX-512 files share.  Included after their target pragma. */
#ifndef MS4_AVX512_H
#define MS4_AVX512_H
#include "cpu/plain/plain.h"
#include <immintrin.h>

#define PANEL_ROWS 16       /* rows of a panel, and rows added up together for one token: the lanes of a register */

/* many.c; one.c: n_cols a multiple of 256 */
#define X(type, ...) mul_fn mul_##type##_avx512, mul_one_##type##_avx512;
MS4_QUANTIZED_TYPES(X)
#undef X
/* float.c */
mul_fn mul_f32_avx512, mul_f16_avx512, mul_bf16_avx512;
/* attend.c */
void attend_avx512(const struct ms4_attend *a);
void transpose_keys_avx512(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d);
/* segment.c */
void open_segment_avx512(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys);
void attend_segment_avx512(const struct ms4_attend_segment *a);

static inline __mmask16 lanes_512(int n) {
    return n >= 16 ? (__mmask16)0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}
/* exp_plain for 16 numbers. */
static inline __m512 exp_512(__m512 x) {
    const __m512 magic = _mm512_set1_ps(PLAIN_ROUND);
    /* NaN, as the second, stays */
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(0x1.715476p+0f), magic), magic);
    const __m512 r =
        _mm512_fmadd_ps(n, _mm512_set1_ps(0x1.05c61p-29f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0x1.62e43p-1f), x));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.6a2432p-10f), r, _mm512_set1_ps(0x1.1239e4p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.5558f2p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555492p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffcp-2f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
/* 16 vectors of 16 floats: element j of vector i <-> element i of vector j */
static inline void transpose_16_512(__m512 *v) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    for (int i = 0; i < 4; i++) {              /* b[4 g + i]: rows 4 g .. 4 g + 3, columns i, 4 + i, 8 + i, 12 + i */
        __m512 x = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), y = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        __m512 z = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), w = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        v[i] = _mm512_shuffle_f32x4(x, y, 0x88);
        v[8 + i] = _mm512_shuffle_f32x4(x, y, 0xdd);
        v[4 + i] = _mm512_shuffle_f32x4(z, w, 0x88);
        v[12 + i] = _mm512_shuffle_f32x4(z, w, 0xdd);
    }
}
#endif
