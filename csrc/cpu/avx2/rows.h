/* rows.h -- opens one superblock of one row in AVX2 registers: unsigned quants, integer scales and mins.
 *
 * q[c] holds weights 32 c to 32 c + 31, with the type's bias added (BLOCK_TYPES, ROW_TYPES) so that none is
 * negative; three types have no bias and stay signed.  Scales and mins are 16 bits wide, one per 16 weights, those of
 * the even groups in the low half of the register and those of the odd groups in the high half.
 */
#ifndef MS4_AVX2_ROWS_H
#define MS4_AVX2_ROWS_H
#include "avx2.h"
#include "quant.h"
#include "cpu/plain/unpack.h"
#include <string.h>

#define PANEL_ROWS 8        /* rows of a panel, and rows added up together for one token: the lanes of a register */

struct row { __m256i q[8], scale, min; };
typedef void row_fn(struct row *o, const uint8_t *w, int n_blocks);
typedef __m256 scale_fn(const uint8_t *const *rows, int b);

INLINE __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
/* For what is used twice: else the compiler loads it twice, and loads are what decode has least to spare of. */
INLINE __m256i load_once(const void *p) {
    __m256i v = load_256(p);
    __asm__("" : "+x"(v));
    return v;
}
INLINE __m128i load_128(const void *p) { return _mm_loadu_si128(p); }
INLINE uint32_t load_32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
INLINE long long load_64(const void *p) { long long v; memcpy(&v, p, 8); return v; }

/* The low nibbles of 16 bytes, then the high ones. */
INLINE __m256i nibbles(const uint8_t *p) {
    __m128i v = load_128(p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
}
INLINE __m256i low_bits(__m256i v, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8((char)mask));
}
/* Bit `from` of every byte, moved to bit `to`. */
INLINE __m256i move_bit(__m256i v, int from, int to) {
    v = from < to ? _mm256_slli_epi16(v, to - from) : _mm256_srli_epi16(v, from - to);
    return _mm256_and_si256(v, _mm256_set1_epi8((char)(1 << to)));
}
/* Byte c of four repeated eight times: what bit k of 32 has to be compared with for lane k. */
INLINE __m256i bit_mask(uint32_t bits) {
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i each = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), spread);
    return _mm256_cmpeq_epi8(_mm256_and_si256(v, each), each);
}
/* 16 scales in order, as bytes or as 16 bits: even groups low, odd groups high. */
INLINE __m128i even_odd_bytes(__m128i v) {
    return _mm_shuffle_epi8(v, _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
}
INLINE __m256i even_odd_words(__m256i v) {
    const __m128i order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order)), 0xd8);
}
/* One scale per 32 weights. */
INLINE __m256i twice(__m128i v) { return _mm256_broadcastsi128_si256(v); }

/* --- float scales of eight rows, or of eight superblocks ------------------------------------------- */
#define NO_MIN(type) \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { return (void)rows, (void)b, _mm256_setzero_ps(); }
INLINE __m256 from_halves(const uint16_t *h) {
    return _mm256_cvtph_ps(_mm_set_epi16((short)h[7], (short)h[6], (short)h[5], (short)h[4], (short)h[3], (short)h[2],
                                         (short)h[1], (short)h[0]));
}
INLINE __m256 halves_at(const uint8_t *const *rows, size_t at) {
    uint16_t h[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) memcpy(h + r, rows[r] + at, 2);
    return from_halves(h);
}
/* Of block b; or of a superblock, d times factor.  min: any half for types without. */
#define HALVES(type, d, factor, min) \
    INLINE __m256 d_##type(const uint8_t *const *rows, int b) { \
        return _mm256_mul_ps(halves_at(rows, (size_t)b * sizeof(block_##type) + offsetof(block_##type, d)), \
                             _mm256_set1_ps(factor)); \
    } \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { \
        return halves_at(rows, (size_t)b * sizeof(block_##type) + offsetof(block_##type, min)); \
    }
/* Four bytes of each row. */
INLINE __m256i words_at(const uint8_t *const *rows, size_t at) {
    uint32_t v[PANEL_ROWS];
    for (int r = 0; r < PANEL_ROWS; r++) v[r] = load_32(rows[r] + at);
    return _mm256_set_epi32((int)v[7], (int)v[6], (int)v[5], (int)v[4], (int)v[3], (int)v[2], (int)v[1], (int)v[0]);
}

/* --- 32-blocks: chunk b of a superblock; a row has n of them --------------------------------------- */
#define AVX2_ROW(type) \
    INLINE void row_##type(struct row *o, const uint8_t *w, int n) { \
        for (int b = 0; b < 8; b++) o->q[b] = b < n ? chunk_##type(w, b) : _mm256_setzero_si256(); \
    }
#define AVX2_BLOCKS(type, body) \
    INLINE __m256i chunk_##type(const uint8_t *w, int b) { \
        const block_##type *p = (const block_##type *)w + b; \
        return body; \
    } \
    AVX2_ROW(type)
INLINE __m256i fifth_bits(const uint8_t *qh) { return _mm256_and_si256(bit_mask(load_32(qh)), _mm256_set1_epi8(16)); }
INLINE __m256i from_table(const int8_t *table, int bias, __m256i index) {
    __m128i t = _mm_add_epi8(load_128(table), _mm_set1_epi8((char)bias));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), index);
}
AVX2_BLOCKS(q4_0, nibbles(p->qs))
AVX2_BLOCKS(q4_1, nibbles(p->qs))
AVX2_BLOCKS(q5_0, _mm256_or_si256(nibbles(p->qs), fifth_bits(p->qh)))
AVX2_BLOCKS(q5_1, _mm256_or_si256(nibbles(p->qs), fifth_bits(p->qh)))
AVX2_BLOCKS(q8_0, load_once(p->qs))
AVX2_BLOCKS(iq4_nl, from_table(unpack_kv, 0, nibbles(p->qs)))
AVX2_BLOCKS(mxfp4, from_table(unpack_e2m1, 12, nibbles(p->qs)))
INLINE __m256i chunk_nvfp4(const uint8_t *w, int b) {
    const block_nvfp4 *p = (const block_nvfp4 *)w + b / 2;
    /* two sub-blocks of 8 bytes: the low and the high nibbles of each */
    __m256i v = nibbles(p->qs + b % 2 * 16);
    return from_table(unpack_e2m1, 12, _mm256_permute4x64_epi64(v, 0xd8));
}
AVX2_ROW(nvfp4)
/* Scales of eight rows or superblocks, as unpack_e8m0_half() and unpack_e4m3_half() have them: the lowest byte of each
 * lane, and byte i. */
INLINE __m256 floats_e8m0(__m256i v) {
    __m256i e = _mm256_and_si256(v, _mm256_set1_epi32(255));
    __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
INLINE __m256 floats_e4m3(__m256i v, int i) {
    const __m256i zero = _mm256_setzero_si256(), low = _mm256_set1_epi32(127);
    __m256i s = _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(i * 8)), _mm256_set1_epi32(255));
    __m256i size = _mm256_and_si256(s, low);
    __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(size, 20), _mm256_set1_epi32(119 << 23));
    __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-10f));
    __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), size);
    v = _mm256_blendv_epi8(normal, _mm256_castps_si256(small), is_small);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(v, zero, _mm256_cmpeq_epi32(s, low)));
}

INLINE __m256 d_mxfp4(const uint8_t *const *rows, int b) {
    return floats_e8m0(words_at(rows, (size_t)b * sizeof(block_mxfp4)));
}
INLINE __m256 d_nvfp4(const uint8_t *const *rows, int b) {
    return floats_e4m3(words_at(rows, (size_t)(b / 4) * sizeof(block_nvfp4)), b % 4);
}
NO_MIN(mxfp4) NO_MIN(nvfp4)
HALVES(q4_0, d, 1, d) HALVES(q4_1, d, 1, m) HALVES(q5_0, d, 1, d) HALVES(q5_1, d, 1, m) HALVES(q8_0, d, 1, d)
HALVES(iq4_nl, d, 1, d)
/* X(type, span, bias if it has one): span as panel.h has it, 0 for signed quants */
#define BLOCK_TYPES(X) \
    X(q4_0, 8, 8) X(q4_1, 8, 0) X(q5_0, 4, 16) X(q5_1, 4, 0) X(q8_0, 0, 128) X(iq4_nl, 0, 128) X(mxfp4, 4, 12) \
    X(nvfp4, 4, 12)

/* --- superblocks ------------------------------------------------------------------------------ */
INLINE void row_q2_k(struct row *o, const uint8_t *w, int n) {
    const block_q2_k *p = (const block_q2_k *)w;
    const __m128i mask = _mm_set1_epi8(15);
    (void)n;
    __m128i sc = even_odd_bytes(load_128(p->scales));
    o->scale = _mm256_cvtepu8_epi16(_mm_and_si128(sc, mask));
    o->min = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(sc, 4), mask));
    for (int s = 0; s < 8; s++) o->q[s] = low_bits(load_once(p->qs + s / 4 * 32), s % 4 * 2, 3);
}
INLINE void row_q3_k(struct row *o, const uint8_t *w, int n) {
    const block_q3_k *p = (const block_q3_k *)w;
    uint32_t a = load_32(p->scales), b = load_32(p->scales + 4), c = load_32(p->scales + 8);
    const uint32_t low = 0x0f0f0f0f, two = 0x03030303;
    (void)n;
    __m128i sc = _mm_set_epi32((int)((b >> 4 & low) | (c >> 6 & two) << 4), (int)((a >> 4 & low) | (c >> 4 & two) << 4),
                               (int)((b & low) | (c >> 2 & two) << 4), (int)((a & low) | (c & two) << 4));
    o->scale = _mm256_cvtepi8_epi16(even_odd_bytes(_mm_sub_epi8(sc, _mm_set1_epi8(32))));
    __m256i high = load_256(p->hmask);
    for (int s = 0; s < 8; s++)
        o->q[s] = _mm256_or_si256(low_bits(load_once(p->qs + s / 4 * 32), s % 4 * 2, 3), move_bit(high, s, 2));
}
/* The scales and mins of Q4_K and Q5_K. */
INLINE void row_scales_mins(struct row *o, const uint8_t *scales) {
    uint32_t a = load_32(scales), b = load_32(scales + 4), c = load_32(scales + 8);
    const uint32_t six = 0x3f3f3f3f, low = 0x0f0f0f0f, two = 0x03030303;
    __m128i v = _mm_set_epi32((int)((c >> 4 & low) | (b >> 6 & two) << 4), (int)(b & six),
                              (int)((c & low) | (a >> 6 & two) << 4), (int)(a & six));
    __m256i both = _mm256_cvtepu8_epi16(v);
    o->scale = _mm256_permute2x128_si256(both, both, 0x00);
    o->min = _mm256_permute2x128_si256(both, both, 0x11);
}
INLINE void row_q4_k(struct row *o, const uint8_t *w, int n) {
    const block_q4_k *p = (const block_q4_k *)w;
    (void)n;
    row_scales_mins(o, p->scales);
    for (int s = 0; s < 8; s++) o->q[s] = low_bits(load_once(p->qs + s / 2 * 32), s % 2 * 4, 15);
}
INLINE void row_q5_k(struct row *o, const uint8_t *w, int n) {
    const block_q5_k *p = (const block_q5_k *)w;
    (void)n;
    row_scales_mins(o, p->scales);
    __m256i high = load_256(p->qh);
    for (int s = 0; s < 8; s++)
        o->q[s] = _mm256_or_si256(low_bits(load_once(p->qs + s / 2 * 32), s % 2 * 4, 15), move_bit(high, s, 4));
}
INLINE void row_q6_k(struct row *o, const uint8_t *w, int n) {
    const block_q6_k *p = (const block_q6_k *)w;
    const __m256i two = _mm256_set1_epi8(0x30);
    (void)n;
    o->scale = _mm256_cvtepi8_epi16(even_odd_bytes(load_128(p->scales)));
    for (int h = 0; h < 2; h++) {
        __m256i first = load_once(p->ql + h * 64), second = load_once(p->ql + h * 64 + 32),
            high = load_once(p->qh + h * 32);
        __m256i *q = o->q + h * 4;
        q[0] = _mm256_or_si256(low_bits(first, 0, 15), _mm256_and_si256(_mm256_slli_epi16(high, 4), two));
        q[1] = _mm256_or_si256(low_bits(second, 0, 15), _mm256_and_si256(_mm256_slli_epi16(high, 2), two));
        q[2] = _mm256_or_si256(low_bits(first, 4, 15), _mm256_and_si256(high, two));
        q[3] = _mm256_or_si256(low_bits(second, 4, 15), _mm256_and_si256(_mm256_srli_epi16(high, 2), two));
    }
}
INLINE void row_iq4_xs(struct row *o, const uint8_t *w, int n) {
    const block_iq4_xs *p = (const block_iq4_xs *)w;
    uint32_t low = load_32(p->scales_l);
    (void)n;
    __m128i nibble =
        _mm_unpacklo_epi8(_mm_cvtsi32_si128((int)(low & 0x0f0f0f0f)), _mm_cvtsi32_si128((int)(low >> 4 & 0x0f0f0f0f)));
    /* bits 2 s and 2 s + 1 to the top of word s, and from there to bits 4 and 5 */
    __m128i top =
        _mm_mullo_epi16(_mm_set1_epi16((short)p->scales_h), _mm_set_epi16(1, 4, 16, 64, 256, 1024, 4096, 16384));
    top = _mm_slli_epi16(_mm_srli_epi16(top, 14), 4);
    o->scale = twice(_mm_sub_epi16(_mm_or_si128(_mm_cvtepu8_epi16(nibble), top), _mm_set1_epi16(32)));
    for (int s = 0; s < 8; s++) o->q[s] = from_table(unpack_kv, 0, nibbles(p->qs + s * 16));
}
HALVES(q2_k, d, 1, dmin) HALVES(q3_k, d, 1, d) HALVES(q4_k, d, 1, dmin) HALVES(q5_k, d, 1, dmin) HALVES(q6_k, d, 1, d)
HALVES(iq4_xs, d, 1, d)
/* X(type, span, bias if it has one); one.c has a way of its own for K_TYPES */
#define K_TYPES(X) X(q4_k, 8, 0) X(q5_k, 4, 0)
#define ROW_TYPES(X) X(q2_k, 8, 0) X(q3_k, 8, 4) X(q6_k, 2, 32) X(iq4_xs, 0, 128)
#endif
