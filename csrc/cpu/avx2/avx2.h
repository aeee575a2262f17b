/* avx2.h -- what the AVX2 files share.  Included after their target pragma. */
#ifndef MS4_AVX2_H
#define MS4_AVX2_H
#include "cpu/plain/plain.h"
#include <immintrin.h>

/* many.c; one.c: n_cols a multiple of 256 */
#define X(type, ...) mul_fn mul_##type##_avx2, mul_##type##_avxvnni, mul_one_##type##_avx2;
MS4_QUANTIZED_TYPES(X)
#undef X
/* float.c */
mul_fn mul_f32_avx2, mul_f16_avx2, mul_bf16_avx2;
/* attend.c */
void attend_avx2(const struct ms4_attend *a);
void transpose_keys_avx2(float *kt, const float *k, size_t k_stride, int32_t n_keys, int32_t d);
/* segment.c; ../avxvnni/segment.c */
void open_segment_avx2(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys);
void attend_segment_avx2(const struct ms4_attend_segment *a);
void attend_segment_avxvnni(const struct ms4_attend_segment *a);

/* v[r] lane c becomes v[c] lane r. */
INLINE void transpose_8(__m256i *v) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}
/* Lane r: the sum of the low half of v[r], and of the high half.  (hadd would take twice as long.) */
INLINE void sum_halves(__m256i *low, __m256i *high, const __m256i *v) {
    __m256i a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; i++)
        b[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(a[2 * i], a[2 * i + 1]),
                                _mm256_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    *low = _mm256_permute2x128_si256(b[0], b[1], 0x20);
    *high = _mm256_permute2x128_si256(b[0], b[1], 0x31);
}
/* Lane r: the sum of all lanes of v[r]. */
INLINE __m256i sum_each(const __m256i *v) {
    __m256i low, high;
    sum_halves(&low, &high, v);
    return _mm256_add_epi32(low, high);
}
#endif
