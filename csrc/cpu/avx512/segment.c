/* segment.c -- attention over a segment of the kv cache on AVX-512: segment.h's arithmetic, bit for bit. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "avx512.h"
#include "cpu/plain/segment.h"

/* n rows: their sums stay in registers. */
INLINE void block_rows_512(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b, int n_pairs,
                           const int n, const uint8_t *next, int n_lines) {
    __m512i sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int i = 0; i < n_pairs; i++, b += 2 * SEGMENT_BLOCK) {
        if (i < n_lines) _mm_prefetch((const char *)next + (size_t)i * 64, _MM_HINT_T1);
        const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + SEGMENT_BLOCK);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            int32_t pair;
            memcpy(&pair, a[r] + 2 * i, sizeof pair);
            const __m512i x = _mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], x, b0);
            sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], x, b1);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
        _mm512_storeu_si512(c + (size_t)r * c_stride, sum[r][0]);
        _mm512_storeu_si512(c + (size_t)r * c_stride + 16, sum[r][1]);
    }
}
static inline void block_product_512(int32_t *c, size_t c_stride, const int16_t *const *a, const int16_t *b,
                                     int n_pairs, int n_rows, const uint8_t *next, int n_lines) {
    if (n_rows == 8) { block_rows_512(c, c_stride, a, b, n_pairs, 8, next, n_lines); return; }
    for (int r = 0; r < n_rows;) {
        int32_t *to = c + (size_t)r * c_stride;
        if (n_rows - r >= 4) { block_rows_512(to, c_stride, a + r, b, n_pairs, 4, next, n_lines); r += 4; }
        else { block_rows_512(to, c_stride, a + r, b, n_pairs, 1, next, n_lines); r++; }
    }
}
static inline void segment_weights_512(int16_t *weights, const int32_t *latent, const int32_t *rope,
                                       const struct ms4_segment *s, const float *q_d, int32_t n_keys, float *m,
                                       float *l, float *unit) {
    const int n = blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    const __m512 q0 = _mm512_set1_ps(q_d[0]), q1 = _mm512_set1_ps(q_d[1]), none = _mm512_set1_ps(-INFINITY);
    __m512 score[SEGMENT_KEYS / 16], top = none, part = _mm512_setzero_ps(), sum = part;
    for (int j = 0; j < n; j += 16) {
        const __m512 d0 = _mm512_mul_ps(q0, _mm512_loadu_ps(s->d + j));
        const __m512 d1 = _mm512_mul_ps(q1, _mm512_loadu_ps(s->d + SEGMENT_KEYS + j));
        const __m512 of_rope = _mm512_mul_ps(d1, _mm512_cvtepi32_ps(_mm512_loadu_si512(rope + j)));
        const __m512 x = _mm512_fmadd_ps(d0, _mm512_cvtepi32_ps(_mm512_loadu_si512(latent + j)), of_rope);
        score[j / 16] = _mm512_mask_mov_ps(none, lanes_512(n_keys - j), x);
        top = _mm512_max_ps(top, score[j / 16]);
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(largest == -INFINITY ? 0 : largest);       /* -inf - -inf would be NaN */
    top = part;
    for (int j = 0; j < n; j += 16) {
        const __m512 p = exp_512(_mm512_sub_ps(score[j / 16], shift));
        part = _mm512_add_ps(part, p);
        score[j / 16] = _mm512_maskz_mul_ps(lanes_512(n_keys - j), p, _mm512_loadu_ps(s->d + j));    /* not 0 * NaN */
        top = _mm512_max_ps(top, score[j / 16]);
        sum = _mm512_fmadd_ps(score[j / 16], _mm512_loadu_ps(s->d + 2 * SEGMENT_KEYS + j), sum);
    }
    *m = largest;
    *l = _mm512_reduce_add_ps(part);
    *unit = weights_unit(_mm512_reduce_max_ps(top), _mm512_reduce_add_ps(sum));
    const __m512 factor = _mm512_set1_ps(weights_factor(*unit));
    for (int j = 0; j < n; j += 16)
        _mm256_storeu_si256((void *)(weights + j),
                            _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(score[j / 16], factor))));
}
void attend_segment_avx512(const struct ms4_attend_segment *a) {
    attend_segment_16(a, 8, block_product_512, segment_weights_512);
}

void open_segment_avx512(struct ms4_segment *s, const int16_t *rows, const float *d, int32_t n_keys) {
    size_t width = (size_t)(s->rank + s->d_rope), pairs = width / 2;
    int n = blocks_of_keys(n_keys) * SEGMENT_BLOCK;
    open_scales(s, d, n_keys);
    for (int key = 0; key < n; key += 16)
        for (size_t i = 0; i < pairs; i += 16) {
            __m512 v[16];
            __mmask16 lanes = lanes_512((int)(pairs - i));
            for (int j = 0; j < 16; j++)
                v[j] = key + j < n_keys
                    ? _mm512_maskz_loadu_ps(lanes, (const float *)(const void *)(rows + (size_t)(key + j) * width) + i)
                                        : _mm512_setzero_ps();
            transpose_16_512(v);
            int16_t *to = s->keys + ((size_t)(key / SEGMENT_BLOCK) * pairs + i) * 2 * SEGMENT_BLOCK
                + key % SEGMENT_BLOCK * 2;
            for (size_t j = 0; j < 16 && i + j < pairs; j++) _mm512_storeu_ps(to + j * 2 * SEGMENT_BLOCK, v[j]);
        }
    /* lane l of the quads: quads l and l + 4 of the row, so that lanes of unpacked pairs come in order */
    const __m512i quads = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    for (int32_t i = 0; i < s->rank; i += SEGMENT_BLOCK) {
        __mmask32 there = s->rank - i >= SEGMENT_BLOCK ? 0xffffffffu : (1u << (s->rank - i)) - 1;
        int16_t *to = s->values + (size_t)i * SEGMENT_KEYS;
        for (int j = 0; j < n; j += 2, to += 2 * SEGMENT_BLOCK) {
            __m512i even = _mm512_maskz_loadu_epi16(j < n_keys ? there : 0, rows + (size_t)j * width + (size_t)i);
            __m512i odd =
                _mm512_maskz_loadu_epi16(j + 1 < n_keys ? there : 0, rows + (size_t)(j + 1) * width + (size_t)i);
            even = _mm512_permutexvar_epi64(quads, even);
            odd = _mm512_permutexvar_epi64(quads, odd);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(even, odd));
            _mm512_storeu_si512(to + SEGMENT_BLOCK, _mm512_unpackhi_epi16(even, odd));
        }
    }
}
#endif
