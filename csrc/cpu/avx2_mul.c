/* avx2_mul.c -- products with quantised weights on AVX2: one token at a time, or a panel of rows for many tokens.
 *
 * Both open rows with avx2_rows.h, sum integers exactly inside a superblock, and then do the same float operations
 * with one output row per lane, so they agree bit for bit.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "avx2_rows.h"
#include "plain.h"

#define ROWS 8              /* rows of a panel, and rows computed together for one token: the lanes of a register */

/* What a type's quants are like.  span: how many products of pairs, each at most 127 * (2 * the largest quant), fit 16
 * bits when added up; 0: the quants are signed.  Those with a bias have it in their panel too. */
struct form { enum family family; int span, biased; };
/* X(form, family, span, biased) */
#define FORMS(X) \
    X(mins_8, FAMILY_MINS, 8, 0) X(mins_4, FAMILY_MINS, 4, 0) X(scales_4, FAMILY_SCALES, 4, 1) \
    X(scales_2, FAMILY_SCALES, 2, 1) X(scales_1, FAMILY_SCALES, 1, 1) X(scales_signed, FAMILY_SCALES, 0, 0) \
    X(blocks_8, FAMILY_BLOCKS, 8, 1) X(blocks_4, FAMILY_BLOCKS, 4, 1) X(blocks_signed, FAMILY_BLOCKS, 0, 0) \
    X(blocks_min_8, FAMILY_BLOCKS_MIN, 8, 0) X(blocks_min_4, FAMILY_BLOCKS_MIN, 4, 0) \
    X(blocks_16, FAMILY_BLOCKS_16, 4, 1)
/* X(type, form, bias) */
#define AVX2_TYPES(X) \
    X(q4_0, blocks_8, 8) X(q4_1, blocks_min_8, 0) X(q5_0, blocks_4, 16) X(q5_1, blocks_min_4, 0) \
    X(q8_0, blocks_signed, 0) X(iq4_nl, blocks_signed, 0) X(mxfp4, blocks_4, 12) X(nvfp4, blocks_16, 12) \
    X(q2_k, mins_4, 0) X(q3_k, scales_4, 4) X(q4_k, mins_8, 0) X(q5_k, mins_4, 0) X(q6_k, scales_2, 32) \
    X(iq4_xs, scales_signed, 0) X(iq2_xxs, scales_1, 43) X(iq2_xs, scales_1, 43) X(iq2_s, scales_1, 43) \
    X(iq3_xxs, scales_1, 62) X(iq3_s, scales_4, 15) X(iq1_s, scales_4, 9) X(iq1_m, scales_4, 9)

typedef void row_fn(struct row *o, const uint8_t *w, int n_blocks);
typedef __m256 scale_fn(const uint8_t *const *rows, int b);
/* The superblock of eight rows at once; b: the block whose scale or min is meant. */
struct opener { row_fn *row; scale_fn *d, *m; size_t bytes; struct form form; int bias; };

INLINE int is_blocks(enum family f) { return f != FAMILY_SCALES && f != FAMILY_MINS; }

/* --- float scales of eight rows ------------------------------------------------------------------ */
INLINE __m256 from_halves(const uint16_t *h) {
    return _mm256_cvtph_ps(_mm_set_epi16((short)h[7], (short)h[6], (short)h[5], (short)h[4], (short)h[3], (short)h[2],
                                         (short)h[1], (short)h[0]));
}
INLINE __m256 halves_at(const uint8_t *const *rows, size_t at) {
    uint16_t h[ROWS];
    for (int r = 0; r < ROWS; r++) memcpy(h + r, rows[r] + at, 2);
    return from_halves(h);
}
/* X(type, offset of d, factor, offset of the min) */
#define HALVES(type, d_at, factor, m_at) \
    INLINE __m256 d_##type(const uint8_t *const *rows, int b) { \
        return _mm256_mul_ps(halves_at(rows, (size_t)b * sizeof(block_##type) + (d_at)), _mm256_set1_ps(factor)); \
    } \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { \
        return halves_at(rows, (size_t)b * sizeof(block_##type) + (m_at)); \
    }
HALVES(q4_0, 0, 1, 0) HALVES(q4_1, 0, 1, 2) HALVES(q5_0, 0, 1, 0) HALVES(q5_1, 0, 1, 2) HALVES(q8_0, 0, 1, 0)
HALVES(iq4_nl, 0, 1, 0) HALVES(q2_k, 80, 1, 82) HALVES(q3_k, 108, 1, 0) HALVES(q4_k, 0, 1, 2) HALVES(q5_k, 0, 1, 2)
HALVES(q6_k, 208, 1, 0) HALVES(iq4_xs, 0, 1, 0) HALVES(iq2_xxs, 0, 0.125f, 0) HALVES(iq2_xs, 0, 0.125f, 0)
HALVES(iq2_s, 0, 0.125f, 0) HALVES(iq3_xxs, 0, 0.25f, 0) HALVES(iq3_s, 0, 1, 0) HALVES(iq1_s, 0, 0.125f, 0)

INLINE __m256 d_iq1_m(const uint8_t *const *rows, int b) {
    uint16_t h[ROWS];
    for (int r = 0; r < ROWS; r++) h[r] = d_of_iq1_m(rows[r]);
    return (void)b, _mm256_mul_ps(from_halves(h), _mm256_set1_ps(0.125f));
}
/* Four bytes of each row. */
INLINE __m256i words_at(const uint8_t *const *rows, size_t at) {
    uint32_t v[ROWS];
    for (int r = 0; r < ROWS; r++) v[r] = load32(rows[r] + at);
    return _mm256_set_epi32((int)v[7], (int)v[6], (int)v[5], (int)v[4], (int)v[3], (int)v[2], (int)v[1], (int)v[0]);
}
INLINE __m256 d_mxfp4(const uint8_t *const *rows, int b) { return floats_e8m0(words_at(rows, (size_t)b * sizeof(block_mxfp4))); }
INLINE __m256 d_nvfp4(const uint8_t *const *rows, int b) {
    return floats_e4m3(words_at(rows, (size_t)(b / 4) * sizeof(block_nvfp4)), b % 4);
}
#define NO_MIN(type) \
    INLINE __m256 m_##type(const uint8_t *const *rows, int b) { return (void)rows, (void)b, _mm256_setzero_ps(); }
NO_MIN(iq1_m) NO_MIN(mxfp4) NO_MIN(nvfp4)

/* --- moving lanes ---------------------------------------------------------------------------------- */
/* Copies between y and a register; the last rows may be fewer than eight. */
INLINE __m256 load_rows(const float *y, int n) {
    float part[ROWS] = { 0 };
    if (n >= ROWS) return _mm256_loadu_ps(y);
    memcpy(part, y, (size_t)n * sizeof *y);
    return _mm256_loadu_ps(part);
}
INLINE void store_rows(float *y, __m256 v, int n) {
    float part[ROWS];
    _mm256_storeu_ps(n >= ROWS ? y : part, v);
    if (n < ROWS) memcpy(y, part, (size_t)n * sizeof *y);
}
/* Where the rows of a group begin; rows beyond the last one repeat it, and their results are not stored. */
INLINE void find_rows(const uint8_t **rows, const struct ms4_mul *m, int first) {
    for (int r = 0; r < ROWS; r++) {
        int row = first + r < m->n_rows ? first + r : m->n_rows - 1;
        rows[r] = m->w + (size_t)row * m->row_bytes;
    }
}
/* Eight rows are too many streams for the hardware's prefetchers: asks for the same superblock of the next group. */
INLINE void next_superblock(const uint8_t **rows, const struct ms4_mul *m, size_t bytes) {
    for (int r = 0; r < ROWS; r++) {
        const char *ahead = (const char *)rows[r] + ROWS * m->row_bytes;
        for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T1);
        rows[r] += bytes;
    }
}
INLINE int blocks_here(const struct ms4_mul *m, int i) {
    int n = m->n_cols - i * SUPERBLOCK;
    return n >= SUPERBLOCK ? 8 : n / 32;
}

/* --- many tokens ---------------------------------------------------------------------------------------- */
/* One superblock of eight rows, opened, with the rows in the lanes: four weights (or two 16-bit numbers) of each. */
struct panel {
    __m256i q[SUPERBLOCK / 4];
    __m256i scale[16];          /* of group g, twice */
    __m256i low[8];             /* of groups 2 p and 2 p + 1: the min, or scale * bias */
    __m256i bias;               /* in every 16-bit lane */
    __m256 d[16], m[8];
};
INLINE void open_panel(struct panel *p, const uint8_t *const *rows, int n_blocks, struct opener t) {
    const int blocks = is_blocks(t.form.family);
    __m256i scale[ROWS], low[ROWS], q[ROWS][8];
    p->bias = _mm256_set1_epi16((short)t.bias);
    for (int r = 0; r < ROWS; r++) {
        struct row o;
        t.row(&o, rows[r], n_blocks);
        for (int c = 0; c < 8; c++) q[r][c] = o.q[c];
        if (blocks) continue;
        __m256i even = o.scale, odd = _mm256_permute2x128_si256(even, even, 0x11);
        scale[r] = _mm256_inserti128_si256(_mm256_unpacklo_epi16(even, odd), _mm256_castsi256_si128(_mm256_unpackhi_epi16(even, odd)), 1);
        even = t.form.family == FAMILY_MINS ? o.min : _mm256_mullo_epi16(o.scale, p->bias);
        odd = _mm256_permute2x128_si256(even, even, 0x11);
        low[r] = _mm256_inserti128_si256(_mm256_unpacklo_epi16(even, odd), _mm256_castsi256_si128(_mm256_unpackhi_epi16(even, odd)), 1);
    }
    for (int c = 0; c < 8; c++) {
        __m256i v[8];
        for (int r = 0; r < ROWS; r++) v[r] = q[r][c];
        transpose_8(v);
        for (int j = 0; j < 8; j++) p->q[c * 8 + j] = v[j];
    }
    if (blocks) {
        int n_scales = t.form.family == FAMILY_BLOCKS_16 ? 2 * n_blocks : n_blocks;
        for (int b = 0; b < n_scales; b++) p->d[b] = t.d(rows, b);
        if (t.form.family == FAMILY_BLOCKS_MIN) for (int b = 0; b < n_blocks; b++) p->m[b] = t.m(rows, b);
        return;
    }
    transpose_8(scale);
    transpose_8(low);
    for (int g = 0; g < 8; g++) {
        p->scale[2 * g] = _mm256_blend_epi16(scale[g], _mm256_slli_epi32(scale[g], 16), 0xaa);
        p->scale[2 * g + 1] = _mm256_blend_epi16(scale[g], _mm256_srli_epi32(scale[g], 16), 0x55);
        p->low[g] = low[g];
    }
    p->d[0] = t.d(rows, 0);
    if (t.form.family == FAMILY_MINS) p->m[0] = t.m(rows, 0);
}

#define TILE 4              /* tokens whose sums are held in registers together */
INLINE __m256i broadcast4(const void *p) { return _mm256_set1_epi32((int)load32(p)); }
/* Without this the compiler turns long sums into trees, with more terms alive than there are registers. */
INLINE __m256i keep_order(__m256i v) {
    __asm__("" : "+x"(v));
    return v;
}
/* Adds group pair p (32 weights) of n tokens to dots: one 16-bit sum per span, then times the scale. */
INLINE void tile_chunk(__m256i *dots, const struct panel *p, const block_q8 *const *x, int n, int c, struct form f) {
    const int span = f.span ? f.span : 1, blocks = is_blocks(f.family), wide = f.family != FAMILY_BLOCKS_16;
    for (int s = 0; s < 8; s += span) {
        __m256i part[TILE];
        for (int j = s; j < s + span; j++) {
            __m256i w = p->q[c * 8 + j], magnitude = f.span ? w : _mm256_abs_epi8(w);
            for (int t = 0; t < n; t++) {
                __m256i b = broadcast4(x[t]->qs + c * 32 + j * 4);
                __m256i v = _mm256_maddubs_epi16(magnitude, f.span ? b : _mm256_sign_epi8(b, w));
                part[t] = j == s ? v : keep_order(_mm256_add_epi16(part[t], v));
            }
        }
        __m256i scale = blocks ? _mm256_set1_epi16(1) : p->scale[c * 2 + s / 4];
        for (int t = 0; t < n; t++) {
            __m256i v = _mm256_madd_epi16(part[t], scale);
            int start = blocks && (s == 0 || (!wide && s == 4));
            int at = !wide && s >= 4 ? TILE + t : t;
            dots[at] = start ? v : _mm256_add_epi32(dots[at], v);
        }
    }
}
INLINE void tile_superblock(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, struct form f) {
    __m256i dots[TILE];
    for (int t = 0; t < n; t++) dots[t] = _mm256_setzero_si256();
    for (int c = 0; c < 8; c++) tile_chunk(dots, p, x, n, c, f);
    for (int t = 0; t < n; t++) {
        __m256i low = _mm256_setzero_si256();
        if (f.biased || f.family == FAMILY_MINS)
            for (int g = 0; g < 8; g++)
                low = _mm256_add_epi32(low, _mm256_madd_epi16(p->low[g], broadcast4(x[t]->sums + g * 2)));
        if (f.biased) dots[t] = _mm256_sub_epi32(dots[t], low);
        __m256 v = _mm256_mul_ps(p->d[0], _mm256_cvtepi32_ps(dots[t]));
        if (f.family == FAMILY_MINS) v = _mm256_fnmadd_ps(p->m[0], _mm256_cvtepi32_ps(low), v);
        y[t] = _mm256_fmadd_ps(_mm256_set1_ps(x[t]->d), v, y[t]);
    }
}
INLINE void tile_blocks(const struct panel *p, const block_q8 *const *x, __m256 *y, int n, int n_blocks, struct form f) {
    const int wide = f.family != FAMILY_BLOCKS_16;
    __m256 v[TILE];
    for (int t = 0; t < n; t++) v[t] = _mm256_setzero_ps();
    for (int b = 0; b < n_blocks; b++) {
        __m256i dots[2 * TILE];
        tile_chunk(dots, p, x, n, b, f);
        for (int t = 0; t < n; t++) {
            __m256i sums = broadcast4(x[t]->sums + b * 2);
            if (wide) {
                if (f.biased) dots[t] = _mm256_sub_epi32(dots[t], _mm256_madd_epi16(sums, p->bias));
                v[t] = _mm256_fmadd_ps(p->d[b], _mm256_cvtepi32_ps(dots[t]), v[t]);
                if (f.family == FAMILY_BLOCKS_MIN)
                    v[t] = _mm256_fmadd_ps(p->m[b], _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))), v[t]);
                continue;
            }
            __m256i even = _mm256_madd_epi16(_mm256_and_si256(sums, _mm256_set1_epi32(0xffff)), p->bias);
            __m256i odd = _mm256_madd_epi16(_mm256_andnot_si256(_mm256_set1_epi32(0xffff), sums), p->bias);
            v[t] = _mm256_fmadd_ps(p->d[2 * b], _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[t], even)), v[t]);
            v[t] = _mm256_fmadd_ps(p->d[2 * b + 1], _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[TILE + t], odd)), v[t]);
        }
    }
    for (int t = 0; t < n; t++) y[t] = _mm256_fmadd_ps(_mm256_set1_ps(x[t]->d), v[t], y[t]);
}
/* n tokens from `token` on, times superblock i of the panel; y begins at zero. */
INLINE void tile(const struct ms4_mul *m, const struct panel *p, int token, int n, int i, int first, struct form f) {
    const block_q8 *x[TILE];
    __m256 y[TILE];
    float *out[TILE];
    int n_lanes = m->n_rows - first;
    for (int t = 0; t < n; t++) {
        x[t] = mul_blocks(m, token + t) + i;
        out[t] = m->y + (size_t)(token + t) * m->y_stride + first;
        y[t] = i == 0 ? _mm256_setzero_ps() : load_rows(out[t], n_lanes);
    }
    if (is_blocks(f.family)) tile_blocks(p, x, y, n, blocks_here(m, i), f);
    else tile_superblock(p, x, y, n, f);
    for (int t = 0; t < n; t++) store_rows(out[t], y[t], n_lanes);
}
/* All tokens times superblock i of the panel. */
typedef void tiles_fn(const struct ms4_mul *m, const struct panel *p, int i, int first);
#define X(name, family, span, biased) \
    static __attribute__((noinline)) void tiles_##name(const struct ms4_mul *m, const struct panel *p, int i, int first) { \
        const struct form f = { family, span, biased }; \
        int token = 0; \
        for (; token + TILE <= m->n_tokens; token += TILE) tile(m, p, token, TILE, i, first, f); \
        if (m->n_tokens - token >= 2) { tile(m, p, token, 2, i, first, f); token += 2; } \
        if (m->n_tokens > token) tile(m, p, token, 1, i, first, f); \
    } \
    enum { FAMILY_##name = family, SPAN_##name = span, BIASED_##name = biased };
FORMS(X)
#undef X
INLINE void prefill(const struct ms4_mul *m, struct opener t, tiles_fn *tiles) {
    for (int first = 0; first < m->n_rows; first += ROWS) {
        const uint8_t *rows[ROWS];
        find_rows(rows, m, first);
        for (int i = 0; i * SUPERBLOCK < m->n_cols; i++) {
            struct panel p;
            open_panel(&p, rows, blocks_here(m, i), t);
            tiles(m, &p, i, first);
            next_superblock(rows, m, t.bytes);
        }
    }
}

#define X(type, name, bias) \
    void avx2_mul_##type(const struct ms4_mul *m) { \
        const struct form form = { (enum family)FAMILY_##name, SPAN_##name, BIASED_##name }; \
        const struct opener t = { row_##type, d_##type, m_##type, SUPERBLOCK_BYTES(type), form, bias }; \
        if (m->n_tokens == 1 && m->n_cols % SUPERBLOCK == 0) avx2_gemv_##type(m); \
        else prefill(m, t, tiles_##name); \
    }
AVX2_TYPES(X)
#endif
