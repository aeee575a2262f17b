/* avx512_grids.h -- the types whose weights are rows of a grid (IQ1, IQ2, IQ3), and NVFP4.
 *
 * A superblock is unpacked for itself: indices and signs with vectors, the grid's rows one by one.  Both kinds of product
 * take the result: panels transpose it, single tokens multiply it as it is.
 */
#ifndef MS4_AVX512_GRIDS_H
#define MS4_AVX512_GRIDS_H
#include "avx512_gemv.h"

/* 256 weights in order: unsigned magnitudes, and which are negative (IQ2, IQ3); or weight + IQ1_OFFSET (IQ1). */
struct grid_row {
    __m512i q[4];
    __mmask64 negative[4];
    __m128i scales;             /* bytes, one for each 16-group */
};
#define IQ1_OFFSET 16
typedef void grid_row_fn(struct grid_row *out, const uint8_t *w);

/* Lane g (of 32 words): g / 4 or g / 2; and shifts that go with g % 4 or g % 2 */
static inline __m512i words_of_four(void) {
    return _mm512_setr_epi32(0, 0, 0x10001, 0x10001, 0x20002, 0x20002, 0x30003, 0x30003, 0x40004, 0x40004, 0x50005, 0x50005, 0x60006, 0x60006,
                             0x70007, 0x70007);
}
static inline __m512i words_of_two(void) {
    return _mm512_setr_epi32(0, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005, 0x60006, 0x70007, 0x80008, 0x90009, 0xa000a, 0xb000b, 0xc000c,
                             0xd000d, 0xe000e, 0xf000f);
}
static inline __m512i shifts_of_four(int step) { return _mm512_set1_epi64((int64_t)step << 16 | (int64_t)(2 * step) << 32 | (int64_t)(3 * step) << 48); }

/* Eight bytes each: plain loads beat a gather in panels; four bytes each: a gather wins. */
static inline void look_up_eight(struct grid_row *out, const int8_t (*grid)[8], __m512i index) {
    uint16_t at[32];
    int64_t row[8];
    _mm512_storeu_si512(at, index);
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 8; k++) memcpy(&row[k], grid[at[8 * i + k]], sizeof *row);
        out->q[i] = _mm512_set_epi64(row[7], row[6], row[5], row[4], row[3], row[2], row[1], row[0]);
    }
}
static inline void look_up_four(struct grid_row *out, const int8_t (*grid)[4], __m512i low, __m512i high) {
    out->q[0] = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(low)), grid, 4);
    out->q[1] = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(low, 1)), grid, 4);
    out->q[2] = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), grid, 4);
    out->q[3] = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), grid, 4);
}
/* The eighth sign of each seven (in words or dwords) makes their number even. */
static inline __m512i add_parity(__m512i x) {
    __m512i t = _mm512_xor_si512(x, _mm512_srli_epi32(x, 4));
    t = _mm512_xor_si512(t, _mm512_srli_epi32(t, 2));
    t = _mm512_and_si512(_mm512_xor_si512(t, _mm512_srli_epi32(t, 1)), _mm512_set1_epi16(1));
    return _mm512_or_si512(x, _mm512_slli_epi16(t, 7));
}
static inline void set_signs(struct grid_row *out, const void *bytes) { memcpy(out->negative, bytes, 32); }
/* Eight words of 32 bits: 4 x 7 signs and 4 bits of scale. */
static inline void signs_and_scales(struct grid_row *out, __m256i words) {
    const __m512i shifts = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 7, 14, 21)), seven = _mm512_set1_epi32(127);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i w = _mm512_castsi256_si512(words);
    uint8_t signs[32];
    for (int h = 0; h < 2; h++) {
        const __m512i four = _mm512_permutexvar_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(4 * h)), w);
        const __m512i x = _mm512_and_si512(_mm512_srlv_epi32(four, shifts), seven);
        _mm_storeu_si128((void *)(signs + 16 * h), _mm512_cvtepi32_epi8(add_parity(x)));
    }
    set_signs(out, signs);
    const __m128i s = _mm256_cvtepi32_epi8(_mm256_add_epi32(_mm256_slli_epi32(_mm256_srli_epi32(words, 28), 1), _mm256_set1_epi32(1)));
    out->scales = _mm_unpacklo_epi8(s, s);
}
/* 2 * nibble + 1, the low nibble of each byte first */
static inline __m128i nibble_scales(__m128i bytes) {
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15)), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m128i s = _mm_unpacklo_epi8(low, high);
    return _mm_add_epi8(_mm_add_epi8(s, s), _mm_set1_epi8(1));
}

static inline void row_iq2_xxs(struct grid_row *out, const uint8_t *w) {
    const __m512i v = _mm512_loadu_si512(w + offsetof(block_iq2_xxs, qs));
    look_up_eight(out, grid_iq2xxs, _mm512_cvtepu8_epi16(_mm512_cvtepi64_epi32(v)));
    signs_and_scales(out, _mm512_cvtepi64_epi32(_mm512_srli_epi64(v, 32)));
}
static inline void row_iq2_xs(struct grid_row *out, const uint8_t *w) {
    const __m512i v = _mm512_loadu_si512(w + offsetof(block_iq2_xs, qs));
    __m512i x = _mm512_srli_epi16(v, 9), t = _mm512_xor_si512(x, _mm512_srli_epi16(x, 4));
    t = _mm512_xor_si512(t, _mm512_srli_epi16(t, 2));
    t = _mm512_and_si512(_mm512_xor_si512(t, _mm512_srli_epi16(t, 1)), _mm512_set1_epi16(1));
    const __m256i signs = _mm512_cvtepi16_epi8(_mm512_or_si512(x, _mm512_slli_epi16(t, 7)));
    set_signs(out, &signs);
    look_up_eight(out, grid_iq2xs, _mm512_and_si512(v, _mm512_set1_epi16(511)));
    out->scales = nibble_scales(_mm_loadl_epi64((const void *)(w + offsetof(block_iq2_xs, scales))));
}
/* qs[g] with two (three) more bits from each of eight words */
static inline __m512i index_with_high(const uint8_t *qs, __m512i words, int step, int mask) {
    const __m512i high = _mm512_and_si512(_mm512_srlv_epi16(words, shifts_of_four(step)), _mm512_set1_epi16((short)mask));
    return _mm512_or_si512(_mm512_cvtepu8_epi16(load_256(qs)), _mm512_slli_epi16(high, 8));
}
static inline void row_iq2_s(struct grid_row *out, const uint8_t *w) {
    const __m128i qh = _mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)(w + offsetof(block_iq2_s, qh))));
    const __m512i words = _mm512_permutexvar_epi16(words_of_four(), _mm512_castsi128_si512(qh));
    look_up_eight(out, grid_iq2s, index_with_high(w + offsetof(block_iq2_s, qs), words, 2, 3));
    set_signs(out, w + offsetof(block_iq2_s, signs));
    out->scales = nibble_scales(_mm_loadl_epi64((const void *)(w + offsetof(block_iq2_s, scales))));
}
static inline void row_iq3_xxs(struct grid_row *out, const uint8_t *w) {
    const uint8_t *qs = w + offsetof(block_iq3_xxs, qs);
    look_up_four(out, grid_iq3xxs, _mm512_cvtepu8_epi16(load_256(qs)), _mm512_cvtepu8_epi16(load_256(qs + 32)));
    signs_and_scales(out, load_256(w + offsetof(block_iq3_xxs, w)));
}
static inline void row_iq3_s(struct grid_row *out, const uint8_t *w) {
    const uint8_t *qs = w + offsetof(block_iq3_s, qs);
    const __m512i bit = _mm512_set1_epi16(256);
    __m512i index[2];
    for (int h = 0; h < 2; h++) {
        uint32_t high;
        memcpy(&high, w + offsetof(block_iq3_s, qh) + 4 * h, sizeof high);
        index[h] = _mm512_cvtepu8_epi16(load_256(qs + 32 * h));
        index[h] = _mm512_mask_add_epi16(index[h], high, index[h], bit);
    }
    look_up_four(out, grid_iq3s, index[0], index[1]);
    set_signs(out, w + offsetof(block_iq3_s, signs));
    int32_t scales;
    memcpy(&scales, w + offsetof(block_iq3_s, scales), sizeof scales);
    const __m128i s = nibble_scales(_mm_cvtsi32_si128(scales));
    out->scales = _mm_unpacklo_epi8(s, s);
}
/* Weights 8 * G + 1, or - 1 where a bit of minus (one for each 8 weights) is set; + IQ1_OFFSET. */
static inline void finish_iq1(struct grid_row *out, uint32_t minus) {
    for (int i = 0; i < 4; i++) {
        const __m512i eight = _mm512_and_si512(_mm512_slli_epi16(out->q[i], 3), _mm512_set1_epi8(-8));
        const __m512i delta = _mm512_mask_blend_epi64((__mmask8)(minus >> 8 * i), _mm512_set1_epi8(IQ1_OFFSET + 1), _mm512_set1_epi8(IQ1_OFFSET - 1));
        out->q[i] = _mm512_add_epi8(eight, delta);
        out->negative[i] = 0;
    }
}
static inline void row_iq1_s(struct grid_row *out, const uint8_t *w) {
    const __m128i qh = _mm_loadu_si128((const void *)(w + offsetof(block_iq1_s, qh)));
    const __m512i words = _mm512_permutexvar_epi16(words_of_four(), _mm512_castsi128_si512(qh));
    look_up_eight(out, grid_iq1, index_with_high(w + offsetof(block_iq1_s, qs), words, 3, 7));
    finish_iq1(out, _mm512_movepi16_mask(words));
    const __m128i s = _mm_and_si128(_mm_srli_epi16(qh, 12), _mm_set1_epi16(7));
    const __m128i bytes = _mm_cvtepi16_epi8(_mm_add_epi16(_mm_add_epi16(s, s), _mm_set1_epi16(1)));
    out->scales = _mm_unpacklo_epi8(bytes, bytes);
}
static inline void row_iq1_m(struct grid_row *out, const uint8_t *w) {
    const __m256i qh = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(w + offsetof(block_iq1_m, qh))));
    const __m512i words = _mm512_srlv_epi16(_mm512_permutexvar_epi16(words_of_two(), _mm512_castsi256_si512(qh)), _mm512_set1_epi32(4 << 16));
    const __m512i high = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(7)), 8);
    look_up_eight(out, grid_iq1, _mm512_or_si512(_mm512_cvtepu8_epi16(load_256(w + offsetof(block_iq1_m, qs))), high));
    finish_iq1(out, _mm512_test_epi16_mask(words, _mm512_set1_epi16(8)));
    const __m512i t = _mm512_castsi128_si512(_mm_loadl_epi64((const void *)(w + offsetof(block_iq1_m, scales))));
    const __m512i s = _mm512_and_si512(_mm512_srlv_epi16(_mm512_permutexvar_epi16(words_of_four(), t), shifts_of_four(3)), _mm512_set1_epi16(7));
    out->scales = _mm256_castsi256_si128(_mm512_cvtepi16_epi8(_mm512_add_epi16(_mm512_add_epi16(s, s), _mm512_set1_epi16(1))));
}
/* d of 16 superblocks, times `factor`; IQ1_M has its bits spread over the scales. */
static inline __m512 grid_d(panel_rows w, float factor) { return _mm512_mul_ps(load_halves(w, 0), _mm512_set1_ps(factor)); }
static inline __m512 grid_d_iq1_m(panel_rows w) {
    uint16_t d[16];
    for (int l = 0; l < 16; l++) {
        const uint8_t *s = w[l] + offsetof(block_iq1_m, scales);
        d[l] = (uint16_t)(s[1] >> 4 | (s[3] >> 4) << 4 | (s[5] >> 4) << 8 | (s[7] >> 4) << 12);
    }
    return _mm512_mul_ps(_mm512_cvtph_ps(load_256(d)), _mm512_set1_ps(0.125f));
}

/* --- panels ---------------------------------------------------------------------------------- */
static inline __attribute__((always_inline)) void fill_grid(struct panel *p, panel_rows rows, grid_row_fn *row, int is_iq1) {
    __m512i q[PANEL_ROWS][4], scales[4];
    __m128i row_scales[PANEL_ROWS];
    const uint8_t *at[PANEL_ROWS], *scales_at[PANEL_ROWS];
#pragma GCC unroll 1
    for (int r = 0; r < PANEL_ROWS; r++) {
        struct grid_row g;
        row(&g, rows[r]);
        for (int i = 0; i < 4; i++)
            q[r][i] = is_iq1 ? g.q[i] : _mm512_xor_si512(_mm512_mask_sub_epi8(g.q[i], g.negative[i], _mm512_setzero_si512(), g.q[i]), _mm512_set1_epi8(-128));
        row_scales[r] = g.scales;
        at[r] = (const uint8_t *)q[r];
        scales_at[r] = (const uint8_t *)&row_scales[r];
    }
    for (int c = 0; c < 16; c++) load_transposed(p->q + 4 * c, at, (size_t)c * 16);
    load_transposed(scales, scales_at, 0);
    for (int g = 0; g < 16; g++) p->scale[g] = byte_of(scales[g / 4], g % 4);
}
/* --- one token ------------------------------------------------------------------------------- */
/* Two superblocks: dwords hold at most 4 * 62 * 127, so those of two fit 16 bits. */
static inline __attribute__((always_inline)) __m512 dot_grid_two(panel_rows w, const struct x_superblock *const *x, grid_row_fn *row) {
    struct grid_row g[2];
    __m512i dot[4][2], acc = _mm512_setzero_si512();
    for (int r = 0; r < 2; r++) {
        row(&g[r], w[r]);
        for (int i = 0; i < 4; i++) {
            const __m512i v = x[r]->v[i];
            dot[i][r] = _mm512_dpbusd_epi32(x[r]->start[i], g[r].q[i], _mm512_mask_sub_epi8(v, g[r].negative[i], _mm512_setzero_si512(), v));
        }
    }
    const __m512i scales = _mm512_cvtepi8_epi16(_mm256_setr_m128i(g[0].scales, g[1].scales));
    for (int i = 0; i < 4; i++)
        acc = _mm512_dpwssd_epi32(acc, _mm512_packs_epi32(dot[i][0], dot[i][1]), words_to_lanes(scales, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3));
    return _mm512_castsi512_ps(acc);
}
static inline __attribute__((always_inline)) __m512 dot_grid(panel_rows w, const struct gemv_x *x, int from, const uint8_t *ahead, size_t bytes,
                                                             grid_row_fn *row, __m512 d) {
    __m512i sums[4];
#pragma GCC unroll 1
    for (int l = 0; l < 4; l++) {
        prefetch_quarter(ahead, l, bytes);
        const __m512 first = dot_grid_two(w + 4 * l, x->of + from + 4 * l, row);
        sums[l] = add_pairs(first, dot_grid_two(w + 4 * l + 2, x->of + from + 4 * l + 2, row));
    }
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(add_lanes(sums)));
}
/* X(type, d of 16 rows, is IQ1) */
#define GRID_TYPES(X) \
    X(iq2_xxs, grid_d(w, 0.125f), 0) X(iq2_xs, grid_d(w, 0.125f), 0) X(iq2_s, grid_d(w, 0.125f), 0) X(iq3_xxs, grid_d(w, 0.25f), 0) \
    X(iq3_s, grid_d(w, 1.0f), 0) X(iq1_s, grid_d(w, 0.125f), 1) X(iq1_m, grid_d_iq1_m(w), 1)
#define X(type, d_of_rows, is_iq1) \
    static void fill_##type(struct panel *p, panel_rows w, int blocks) { \
        (void)blocks; \
        p->d = d_of_rows; \
        fill_grid(p, w, row_##type, is_iq1); \
    } \
    static __attribute__((noinline)) __m512 dot_##type(panel_rows w, const struct gemv_x *x, int from, const uint8_t *ahead) { \
        return dot_grid(w, x, from, ahead, sizeof(block_##type), row_##type, d_of_rows); \
    }
GRID_TYPES(X)
#undef X

/* --- NVFP4 ----------------------------------------------------------------------------------- */
static void fill_nvfp4(struct panel *p, panel_rows rows, int blocks) {
    for (int b = blocks; b < 8; b++) clear_block(p, b);
    for (int g = 2 * blocks; g < 16; g++) p->factor[g] = _mm512_setzero_ps();
    for (int g = 0; g < 2 * blocks; g += 2) {
        const size_t block = (size_t)g / 4 * sizeof(block_nvfp4), scale = block + (size_t)g % 4;
        __m512i v[4];
        load_transposed(v, rows, block + offsetof(block_nvfp4, qs) + (size_t)g % 4 * 8);
        for (int k = 0; k < 2; k++) {
            float d[PANEL_ROWS];
            for (int r = 0; r < PANEL_ROWS; r++) d[r] = unpack_e4m3_half(rows[r][scale + (size_t)k]);
            p->factor[g + k] = _mm512_loadu_ps(d);
            for (int j = 0; j < 2; j++) {
                p->q[4 * (g + k) + j] = _mm512_shuffle_epi8(e2m1_table(), low_nibbles(v[2 * k + j]));
                p->q[4 * (g + k) + 2 + j] = _mm512_shuffle_epi8(e2m1_table(), high_nibbles(v[2 * k + j]));
            }
        }
    }
}
#endif
