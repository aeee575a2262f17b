/* segment.c -- attention over the kv cache on AVX2. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ADD_PAIRS(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#include "segment.h"

/* Eight pairs, of which n are there: 4 or more. */
INLINE __m256i load_pairs(const int16_t *x, size_t n) {
    __m128i low = _mm_loadu_si128((const void *)x);
    __m128i high = n >= 8 ? _mm_loadu_si128((const void *)(x + 8)) : _mm_setzero_si128();
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
void attend_segment_avx2(const struct ms4_attend_segment *a) {
    attend_segment_16(a, SEGMENT_ROWS, block_product_avx2, segment_weights_plain);
}
void open_segment_avx2(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys) {
    size_t width = (size_t)(s->rank + s->d_rope), pairs = width / 2;
    int n = blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    open_scales(s, d, n_keys);
    for (int key = 0; key < n; key += 8)
        for (size_t i = 0; i < pairs; i += 8) {
            __m256i v[8];
            for (int j = 0; j < 8; j++)
                v[j] = key + j < n_keys ? load_pairs(rows + (size_t)(key + j) * width + 2 * i, pairs - i)
                                        : _mm256_setzero_si256();
            transpose_8(v);
            int16_t *to = s->keys + ((size_t)(key / SEGMENT_BLOCK) * pairs + i) * 2 * SEGMENT_BLOCK
                + key % SEGMENT_BLOCK * 2;
            for (size_t j = 0; j < 8 && i + j < pairs; j++)
                _mm256_storeu_si256((void *)(to + j * 2 * SEGMENT_BLOCK), v[j]);
        }
    size_t columns = segment_values_size(s->rank) / SEGMENT_KEYS;
    for (size_t i = 0; i < columns; i += 16)
        for (int j = 0; j < n; j += 2) {
            size_t there = i < (size_t)s->rank ? ((size_t)s->rank - i) / 2 : 0;
            const int16_t *row = rows + (size_t)j * width + i;
            __m256i even = there && j < n_keys ? load_pairs(row, there) : _mm256_setzero_si256();
            __m256i odd = there && j + 1 < n_keys ? load_pairs(row + width, there) : _mm256_setzero_si256();
            even = _mm256_permute4x64_epi64(even, 0xd8);        /* so that the lanes of unpacked pairs come in order */
            odd = _mm256_permute4x64_epi64(odd, 0xd8);
            int16_t *to = s->values + (i / SEGMENT_BLOCK * SEGMENT_KEYS + (size_t)j) * SEGMENT_BLOCK
                + i % SEGMENT_BLOCK * 2;
            _mm256_storeu_si256((void *)to, _mm256_unpacklo_epi16(even, odd));
            _mm256_storeu_si256((void *)(to + 16), _mm256_unpackhi_epi16(even, odd));
        }
}
#endif
