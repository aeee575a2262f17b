/* one_k.c -- products with one token on AVX-512: Q4_K and Q5_K. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "one.h"

/* Blocks in the lanes of a pair of vectors: w0 and w1 are 16-byte chunks 0..3 and 4..7; even ones are first halves of
 * blocks, odd ones second halves, so that both halves of a block add up in one lane. */
static inline __m512i even_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0x88); }
static inline __m512i odd_chunks(__m512i w0, __m512i w1) { return _mm512_shuffle_i64x2(w0, w1, 0xdd); }
static inline __m512i lane_bytes(int a, int b, int c, int d) {
    const __m256i low = _mm256_setr_m128i(_mm_set1_epi8((char)a), _mm_set1_epi8((char)b));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                              _mm256_setr_m128i(_mm_set1_epi8((char)c), _mm_set1_epi8((char)d)), 1);
}
/* From the headers of four superblocks, one in each lane: there the 8 scales, then the 8 mins. */
static inline __m512i k_scales(__m512i header) {
    /* dwords 1, 3, 2, 3 have the low bits, in the upper nibbles of 3 those of the last mins; two more are in 1 and 2 */
    const __m512i low =
        _mm512_srlv_epi32(_mm512_shuffle_epi32(header, 0xed), _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0, 4)));
    const __m512i top = _mm512_srli_epi32(_mm512_shuffle_epi32(header, 0x95), 2);
    const __m512i bits = _mm512_broadcast_i32x4(_mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    return _mm512_ternarylogic_epi32(_mm512_and_si512(low, bits), top,
                                     _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x30303030, 0, 0x30303030)), 0xf8);
}
/* The products of the 8 blocks of four superblocks: even blocks in the lanes of even[r], odd ones in those of odd[r].
 * The four go side by side through each step, so that neighbouring instructions do not wait for each other. */
INLINE void dot_k_four(__m512i *even, __m512i *odd, const uint8_t *w, const __m512i (*x)[4], const uint8_t *ahead,
                       const int has_high) {
    const size_t n = has_high ? 11 : 9, at = has_high ? offsetof(block_q5_k, qs) : offsetof(block_q4_k, qs);
    const size_t bytes = has_high ? sizeof(block_q5_k) : sizeof(block_q4_k);
    __m512i v[2][4];
    for (int r = 0; r < 4; r++) {
        const __m512i w0 = load_once(w + (size_t)r * bytes + at), w1 = load_once(w + (size_t)r * bytes + at + 64);
        v[0][r] = even_chunks(w0, w1);
        v[1][r] = odd_chunks(w0, w1);
        prefetch_after(v[1][r], ahead, (size_t)r, n, 4 * bytes);
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; h++) {
        __m512i low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = low_nibbles(v[h][r]);
        for (int r = 0; r < 4; r++) high[r] = high_nibbles(v[h][r]);
        if (has_high) prefetch_after(low[3], ahead, 9 + h, n, 4 * bytes);
        if (h) prefetch_after(high[3], ahead, 5, n, 4 * bytes);
        for (int r = 0; r < 4 && has_high; r++) {
            const uint8_t *qh = w + (size_t)r * bytes + offsetof(block_q5_k, qh) + 16 * h;
            const __m512i bits = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)qh));
            low[r] =
                _mm512_mask_add_epi8(low[r], _mm512_test_epi8_mask(bits, lane_bytes(1, 4, 16, 64)), low[r],
                                     _mm512_set1_epi8(16));
            high[r] =
                _mm512_mask_add_epi8(high[r], _mm512_test_epi8_mask(bits, lane_bytes(2, 8, 32, 128)), high[r],
                                     _mm512_set1_epi8(16));
        }
        for (int r = 0; r < 4; r++)
            even[r] = _mm512_dpbusd_epi32(h ? even[r] : _mm512_setzero_si512(), low[r], x[r][h]);
        if (!h) prefetch_after(even[3], ahead, 4, n, 4 * bytes);
        for (int r = 0; r < 4; r++)
            odd[r] = _mm512_dpbusd_epi32(h ? odd[r] : _mm512_setzero_si512(), high[r], x[r][2 + h]);
        if (h) prefetch_after(odd[3], ahead, 6, n, 4 * bytes);
    }
}
/* Dwords hold at most 8 * 31 * 127, so those of two superblocks fit 16 bits, and one instruction scales and adds both.
 * scales: 8 of the first superblock, 8 of the second, in every lane */
static inline __m512i scale_k_two(const __m512i *even, const __m512i *odd, __m512i scales, __m512i spread) {
    const __m512i acc = _mm512_madd_epi16(_mm512_packs_epi32(even[0], even[1]), _mm512_shuffle_epi8(scales, spread));
    return _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(odd[0], odd[1]),
                               _mm512_shuffle_epi8(scales, _mm512_add_epi16(spread, _mm512_set1_epi16(1))));
}
INLINE __m512 dot_k(const uint8_t *w, const struct one_x *x, const uint8_t *ahead, const int has_high) {
    const size_t bytes = has_high ? sizeof(block_q5_k) : sizeof(block_q4_k), n = has_high ? 11 : 9;
    /* lane l: byte 2l of the first superblock's scales in four words, then of the second's */
    const __m128i base = _mm_setr_epi16(-32768, -32768, -32768, -32768, -32760, -32760, -32760, -32760);
    const __m512i spread = _mm512_add_epi16(_mm512_broadcast_i32x4(base),
                                            _mm512_and_si512(lane_bytes(0, 2, 4, 6), _mm512_set1_epi16(255)));
    const __m512i first = _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2),
        odd_fours = _mm512_setr_epi64(1, 3, 5, 7, 1, 3, 5, 7);
    __m512i sums[4], mins[4], header[4];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++, w += 4 * bytes, ahead += 4 * bytes) {
        __m512i even[4], odd[4];
        dot_k_four(even, odd, w, x->v + 4 * l, ahead, has_high);
        __asm__ volatile("" ::: "memory");
        header[l] = load_four(w, bytes);
        __m512i scales = k_scales(header[l]);
        prefetch_after(scales, ahead, 7, n, 4 * bytes);
        const __m512i min_words =
            _mm512_cvtepu8_epi16(_mm512_castsi512_si256(_mm512_permutexvar_epi64(odd_fours, scales)));
        mins[l] = _mm512_madd_epi16(min_words, load_512(x->blocks[4 * l]));
        __m512i a = scale_k_two(even, odd, _mm512_permutexvar_epi64(first, scales), spread);
        prefetch_after(a, ahead, 8, n, 4 * bytes);
        const __m512i b =
            scale_k_two(even + 2, odd + 2,
                        _mm512_permutexvar_epi64(_mm512_add_epi64(first, _mm512_set1_epi64(4)), scales), spread);
        sums[l] = add_pairs(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    }
    const __m512i d = first_dwords(header),
        order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i min_sums = _mm512_permutexvar_epi32(order, add_dwords(mins));
    const __m512 t = _mm512_mul_ps(halves_to_floats(d), _mm512_cvtepi32_ps(add_lanes(sums)));
    return _mm512_fnmadd_ps(halves_to_floats(_mm512_srli_epi32(d, 16)), _mm512_cvtepi32_ps(min_sums), t);
}
static __m512 dot_q4_k(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) { return dot_k(w, x, ahead, 0); }
static __m512 dot_q5_k(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) { return dot_k(w, x, ahead, 1); }
MUL_ONE(q4_k, K_ORDER, 0, NULL)
MUL_ONE(q5_k, K_ORDER, 0, NULL)
#endif
