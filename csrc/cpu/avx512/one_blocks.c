/* one_blocks.c -- products with one token on AVX-512: the types with a float scale for each block, and IQ4_XS.
 * A superblock's weights come as four vectors in BLOCK_ORDER: both halves of a block add up in one 128-bit lane. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "one.h"

/* Blocks 0..3 in the lanes of out[0], 4..7 in those of out[1]; the nibbles of a block go through a table. */
static inline void dot_nibbles(__m512i *out, __m512i w0, __m512i w1, __m512i table, const __m512i *x, __m512i start0,
                               __m512i start1) {
    const __m512i a = _mm512_shuffle_epi8(table, low_nibbles(w0)), b = _mm512_shuffle_epi8(table, high_nibbles(w0));
    const __m512i c = _mm512_shuffle_epi8(table, low_nibbles(w1)), d = _mm512_shuffle_epi8(table, high_nibbles(w1));
    out[0] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start0, a, x[0]), b, x[1]);
    out[1] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start1, c, x[2]), d, x[3]);
}
/* Halves of E8M0 scales, as the quants are doubled. */
static inline __m512 e8m0_halves(__m512i e) {
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2)), small));
}
enum block_kind { NIBBLE_BLOCKS, EXPONENT_BLOCKS };
/* Eight blocks of 18 bytes: the quants of blocks 0..3 and 4..7, and all scales in the first lane of the last.
 * Unaligned loads are what limits these types, so there are no more than needed. */
static inline void split_nibble_blocks(__m512i *out, const uint8_t *w) {
    const __m512i lane = _mm512_setr_epi64(0x0001000100010001, 0x0001000100010001, 0x000a000a000a000a,
                                           0x000a000a000a000a, 0x0013001300130013, 0x0013001300130013,
                                           0x001c001c001c001c, 0x001c001c001c001c);
    const __m512i first = _mm512_add_epi16(lane, _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7)));
    /* bytes 72.. are words 4.. of b, and from 128 on words 24.. of c */
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(4));
    const __m512i both = _mm512_mask_add_epi16(second, 0xff000000, second, _mm512_set1_epi16(24));
    const __m512i scales = _mm512_castsi128_si512(_mm_setr_epi16(0, 9, 18, 27, 36, 45, 54, 63));
    const __m512i a = load_once(w), b = load_once(w + 64), c = load_512(w + 80);
    out[0] = _mm512_permutex2var_epi16(a, first, b);
    out[1] = _mm512_permutex2var_epi16(b, both, c);
    out[2] = _mm512_permutex2var_epi16(a, scales, b);
}
/* Eight blocks of 17 bytes: the same, but the scales are spread: byte b of lane b % 4 is that of block b. */
static inline void split_exponent_blocks(__m512i *out, const uint8_t *w) {
    const __m512i bytes = _mm512_setr_epi32(255, 0, 0, 0, 255 << 8, 0, 0, 0, 255 << 16, 0, 0, 0, -0x1000000, 0, 0, 0);
    const size_t size = sizeof(block_mxfp4);
    out[0] = load_four(w + 1, size);
    out[1] = load_four(w + 1 + 4 * size, size);
    out[2] =
        _mm512_or_si512(_mm512_and_si512(load_512(w), bytes),
                        _mm512_and_si512(load_512(w + 64), _mm512_slli_epi64(bytes, 32)));
}
/* Lane r: the scales of a[r]. */
static inline __m512i first_lanes(const __m512i *a) {
    const __m256i low = _mm256_setr_m128i(_mm512_castsi512_si128(a[0]), _mm512_castsi512_si128(a[1]));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                              _mm256_setr_m128i(_mm512_castsi512_si128(a[2]), _mm512_castsi512_si128(a[3])), 1);
}
/* size: of a block */
INLINE __m512 dot_blocks(const uint8_t *w, const struct one_x *x, const uint8_t *ahead, const size_t size,
                         const enum block_kind kind, const __m512i table) {
    __m512i four[2][4], blocks[8], scales[4];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        const uint8_t *lines = ahead + (size_t)(32 * l) * size;
        __m512i out[2][4], d_of[4];
#pragma GCC unroll 4
        for (size_t r = 0; r < 4; r++) {
            const uint8_t *p = w + ((size_t)(4 * l) + r) * 8 * size;
            const __m512i *s = x->v[(size_t)(4 * l) + r];
            __m512i dots[2], parts[3];
            if (kind == NIBBLE_BLOCKS) split_nibble_blocks(parts, p);
            else split_exponent_blocks(parts, p);
            prefetch_after(parts[0], lines, 2 * r, 8, 32 * size);
            dot_nibbles(dots, parts[0], parts[1], table, s, _mm512_setzero_si512(), _mm512_setzero_si512());
            prefetch_after(dots[0], lines, 2 * r + 1, 8, 32 * size);
            d_of[r] = parts[2];
            out[0][r] = dots[0];
            out[1][r] = dots[1];
        }
        scales[l] = kind == NIBBLE_BLOCKS ? first_lanes(d_of) : add_lanes(d_of);
        four[0][l] = add_dwords(out[0]);
        four[1][l] = add_dwords(out[1]);
    }
    transpose_lanes(blocks, four[0]);
    transpose_lanes(blocks + 4, four[1]);
    transpose_dwords(scales);
    __m512 t = _mm512_setzero_ps();
    for (int b = 0; b < 8; b++) {
        __m512 factor;
        if (kind == EXPONENT_BLOCKS) factor = e8m0_halves(byte_of(scales[b / 4], b % 4));
        else factor = halves_to_floats(b % 2 ? _mm512_srli_epi32(scales[b / 2], 16) : scales[b / 2]);
        t = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(_mm512_add_epi32(blocks[b], x->block[b])), t);
    }
    return t;
}
#define DOT_BLOCKS(type, kind, table) \
    static __m512 dot_##type(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) { \
        return dot_blocks(w, x, ahead, sizeof(block_##type), kind, table); \
    }
DOT_BLOCKS(q4_0, NIBBLE_BLOCKS, identity_table())
DOT_BLOCKS(iq4_nl, NIBBLE_BLOCKS, kv_table())
DOT_BLOCKS(mxfp4, EXPONENT_BLOCKS, e2m1_table())

/* --- Q8_0 ------------------------------------------------------------------------------------ */
/* In each half of the result: the sums of the dwords of a[0], a[1], a[2], a[3] in that half. */
static inline __m256i add_dwords_256(const __m256i *a) {
    const __m256i t0 = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
    const __m256i t1 = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(t0, t1), _mm256_unpackhi_epi64(t0, t1));
}
/* A block is a vector of 256 bits here: wider ones would be put together from two loads. */
static __m512 dot_q8_0(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) {
    const __m256i top = _mm256_set1_epi8(-128);
    uint16_t d[8][16];
    __m128i rows[2][16] __attribute__((aligned(64)));       /* the products of blocks 0..3 and 4..7 */
    __m512i blocks[8];
#pragma GCC unroll 1
    for (size_t r = 0; r < 16; r++, w += 8 * sizeof(block_q8_0), ahead += 8 * sizeof(block_q8_0)) {
        const __m256i *v = (const void *)x->v[r];
        __m256i dot[8];
#pragma GCC unroll 8
        for (size_t b = 0; b < 8; b++) {
            const uint8_t *p = w + b * sizeof(block_q8_0);
            memcpy(&d[b][r], p, sizeof **d);
            dot[b] =
                _mm256_dpbusd_epi32(_mm256_setzero_si256(),
                                    _mm256_xor_si256(load_256(p + offsetof(block_q8_0, qs)), top), v[b]);
            prefetch_after(dot[b], ahead, b, 8, 8 * sizeof(block_q8_0));
        }
        const __m256i first = add_dwords_256(dot), second = add_dwords_256(dot + 4);
        const __m256i sums =
            _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                             _mm256_permute2x128_si256(first, second, 0x31));
        rows[0][r] = _mm256_castsi256_si128(sums);
        rows[1][r] = _mm256_extracti128_si256(sums, 1);
    }
    for (int k = 0; k < 2; k++) {
        for (int l = 0; l < 4; l++) blocks[4 * k + l] = load_512(&rows[k][4 * l]);
        transpose_dwords(blocks + 4 * k);
    }
    __m512 t = _mm512_setzero_ps();
    for (int b = 0; b < 8; b++)
        t = _mm512_fmadd_ps(_mm512_cvtph_ps(load_256(d[b])),
                            _mm512_cvtepi32_ps(_mm512_add_epi32(blocks[b], x->block[b])), t);
    return t;
}

/* --- IQ4_XS ---------------------------------------------------------------------------------- */
/* The 8 scales of a superblock as bytes: the 16 of two neighbours side by side in a 128-bit lane, as unpack leaves
 * them. */
static inline void iq4_xs_scales(__m512i *pairs, __m512i h0, __m512i h1) {
    const __m512i two = _mm512_set1_epi8(3);
    /* byte k of `high`: bits 4k.. of scales_h, two bits for block 2k and two for 2k + 1 */
    __m512i high = _mm512_srli_epi32(h0, 16);
    high = _mm512_and_si512(_mm512_or_si512(high, _mm512_slli_epi32(high, 8)), _mm512_set1_epi32(0x00ff00ff));
    high = _mm512_or_si512(high, _mm512_slli_epi32(high, 4));
    const __m512i even = _mm512_or_si512(low_nibbles(h1), _mm512_slli_epi16(_mm512_and_si512(high, two), 4));
    const __m512i odd =
        _mm512_or_si512(high_nibbles(h1), _mm512_slli_epi16(_mm512_and_si512(_mm512_srli_epi16(high, 2), two), 4));
    const __m512i e = _mm512_sub_epi8(even, _mm512_set1_epi8(32)), o = _mm512_sub_epi8(odd, _mm512_set1_epi8(32));
    pairs[0] = _mm512_unpacklo_epi8(e, o);
    pairs[1] = _mm512_unpackhi_epi8(e, o);
}
static __m512 dot_iq4_xs(const uint8_t *w, const struct one_x *x, const uint8_t *ahead) {
    const uint8_t *rows[16];
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4)), table = kv_table();
    __m512i h[4], pairs[2], sums[4];
    rows_of(rows, w, sizeof(block_iq4_xs));
    /* as all headers are read first: on Zen 4 8 kB ahead give 0.75 of the bandwidth, 24 kB 0.88 */
    ahead += 16384;
    load_transposed(h, rows, 0);
    iq4_xs_scales(pairs, h[0], h[1]);
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        const uint8_t *lines = ahead + (size_t)(4 * l) * sizeof(block_iq4_xs);
        __m512i acc[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const uint8_t *q = w + (size_t)(4 * l + r) * sizeof(block_iq4_xs) + offsetof(block_iq4_xs, qs);
            const __m128i bytes = _mm_loadl_epi64((const void *)((const char *)&pairs[r / 2] + 16 * l + r % 2 * 8));
            const __m512i scales = _mm512_castsi256_si512(_mm256_cvtepi8_epi32(bytes));
            __m512i dots[2];
            dot_nibbles(dots, load_once(q), load_once(q + 64), table, x->v[4 * l + r], x->start[4 * l + r][0],
                        x->start[4 * l + r][2]);
            prefetch_after(dots[0], lines, 2 * (size_t)r, 8, 4 * sizeof(block_iq4_xs));
            const __m512i low = _mm512_mullo_epi32(dots[0], _mm512_permutexvar_epi32(first, scales));
            const __m512i high = _mm512_mullo_epi32(dots[1], _mm512_permutexvar_epi32(second, scales));
            acc[r] = _mm512_add_epi32(low, high);
            prefetch_after(acc[r], lines, 2 * (size_t)r + 1, 8, 4 * sizeof(block_iq4_xs));
        }
        sums[l] = add_dwords(acc);
    }
    return _mm512_mul_ps(halves_to_floats(h[0]), _mm512_cvtepi32_ps(add_lanes(sums)));
}

MUL_ONE(q4_0, BLOCK_ORDER, -8, NULL)
MUL_ONE(q8_0, NATURAL, -128, NULL)
MUL_ONE(iq4_nl, BLOCK_ORDER, -128, NULL)
MUL_ONE(mxfp4, BLOCK_ORDER, -12, NULL)
MUL_ONE(iq4_xs, BLOCK_ORDER, -128, NULL)
#endif
