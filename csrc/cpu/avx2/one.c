/* one.c -- quantized weights times one token on AVX2: bound by memory, so they are read once and in order.
 *
 * A step takes eight superblocks that follow each other in memory: of one row, or of several short ones; they are the
 * lanes of its result.  dot_<type>(w, x, at) is their values before x->d.  The values wait in a buffer until eight
 * rows are done; then each row adds up its own, in the order of ops.h.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "avx2.h"
#include "grid_rows.h"
#include "rows.h"
#include "cpu/plain/plain.h"
#include "cpu/plain/prefetch.h"

#define STEP 8                  /* superblocks */
#define ONE_SUPERBLOCKS 16     /* of a row in one pass */
#define LARGEST_BYTES SUPERBLOCK_BYTES(q8_0)

/* How a type's activations are laid out: as they are, with the sums of even groups before those of odd ones; or for two
 * blocks that lie 64 weights apart side by side. */
enum x_order { NATURAL, K_ORDER };
struct x_superblock { __m256i v[8], sums; };
#define X_SUPERBLOCKS (ONE_SUPERBLOCKS + STEP)
struct one_x {
    /* These repeat after the row's last superblock, so that a step can begin at any. */
    struct x_superblock superblock[X_SUPERBLOCKS];
    /* Sums of blocks: for K_ORDER 16-bit pairs, 0 and 2, 1 and 3, 4 and 6, 5 and 7; else single ones, of 32 or of 16
     * weights, times -bias (or 1). */
    int32_t sums[16][X_SUPERBLOCKS];
    float d[ONE_SUPERBLOCKS];
};
typedef __m256 dot_fn(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead);
struct one_type { enum x_order order; int bias, narrow; size_t bytes; };

/* --- activations ------------------------------------------------------------------------------------ */
static void order_x(struct x_superblock *s, const block_q8 *x, enum x_order order) {
    static const uint8_t k_chunks[16] = { 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15 };
    if (order == NATURAL) memcpy(s->v, x->qs, sizeof s->v);
    else
        for (int c = 0; c < 16; c++) memcpy((char *)s->v + 16 * c, x->qs + 16 * k_chunks[c], 16);
    s->sums = even_odd_words(load_256(x->sums));
}
static void sum_x(struct one_x *x, int i, const block_q8 *from, const struct one_type *t) {
    const int factor = t->bias ? -t->bias : 1;
    for (int b = 0; b < 16 && t->narrow; b++) x->sums[b][i] = from->sums[b] * factor;
    for (int b = 0; b < 8 && !t->narrow; b++) x->sums[b][i] = (from->sums[2 * b] + from->sums[2 * b + 1]) * factor;
    if (t->order != K_ORDER) return;
    for (int p = 0; p < 4; p++) {
        const int b = p / 2 * 4 + p % 2;
        x->sums[p][i] = (x->sums[b][i] & 0xffff) | (int32_t)((uint32_t)x->sums[b + 2][i] << 16);
    }
}
static void open_x(struct one_x *x, const block_q8 *blocks, int n, const struct one_type *t) {
    for (int i = 0; i < n + (n % STEP ? STEP - 1 : 0); i++) {
        order_x(&x->superblock[i], blocks + i % n, t->order);
        sum_x(x, i, blocks + i % n, t);
        if (i < n) x->d[i] = blocks[i].d;
    }
}

/* --- all rows ------------------------------------------------------------------------------------------ */
/* y[r] += d[i] * value[r * n + i], i ascending, for eight rows. */
static void add_values(float *y, const float *d, const float *value, int n) {
    __m256 sum = _mm256_loadu_ps(y);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i v[PANEL_ROWS];
        for (int r = 0; r < PANEL_ROWS; r++) v[r] = load_256(value + r * n + i);
        transpose_8(v);
        for (int j = 0; j < 8; j++) sum = _mm256_fmadd_ps(_mm256_set1_ps(d[i + j]), _mm256_castsi256_ps(v[j]), sum);
    }
    _mm256_storeu_ps(y, sum);
    for (; i < n; i++)
        for (int r = 0; r < PANEL_ROWS; r++) y[r] = __builtin_fmaf(d[i], value[r * n + i], y[r]);
}
/* One pass over n superblocks, from the first-th, of all rows. */
INLINE void mul_pass(const struct ms4_mul *m, const struct one_type *t, const struct one_x *x, int first, int n,
                     dot_fn *dot) {
    const uint8_t *end = m->w + (size_t)m->n_rows * m->row_bytes;
    const int together = m->row_bytes == (size_t)n * t->bytes;      /* then superblocks follow each other across rows */
    for (int r0 = 0; r0 < m->n_rows; r0 += PANEL_ROWS) {
        const int n_rows = m->n_rows - r0 < PANEL_ROWS ? m->n_rows - r0 : PANEL_ROWS, total = n_rows * n;
        float value[PANEL_ROWS * ONE_SUPERBLOCKS] __attribute__((aligned(32))), y[PANEL_ROWS] = { 0 }, *out = m->y + r0;
        const uint8_t *rows = m->w + (size_t)r0 * m->row_bytes + (size_t)first * t->bytes;
        for (int i = 0, at = 0; i < total; i += STEP, at = (at + STEP) % n) {
            const uint8_t *w = rows + (size_t)(i / n) * m->row_bytes + (size_t)at * t->bytes;
            const uint8_t *ahead = w + prefetch_ahead;
            uint8_t copy[STEP * LARGEST_BYTES];
            if (m->next && ahead >= end) ahead = m->next + (ahead - end);
            if (i + STEP > total || !(together || at + STEP <= n)) {
                for (int s = 0; s < STEP; s++) {
                    const int one = i + s < total ? i + s : total - 1;
                    const uint8_t *from = rows + (size_t)(one / n) * m->row_bytes + (size_t)(one % n) * t->bytes;
                    memcpy(copy + (size_t)s * t->bytes, from, t->bytes);
                }
                w = copy;
            }
            _mm256_store_ps(value + i, dot(w, x, at, ahead));
        }
        if (first) memcpy(y, out, (size_t)n_rows * sizeof *y);
        add_values(y, x->d, value, n);
        memcpy(out, y, (size_t)n_rows * sizeof *y);
    }
}
INLINE void mul_one(const struct ms4_mul *m, const struct one_type *t, dot_fn *dot) {
    struct one_x x;
    const int n_superblocks = m->n_cols / SUPERBLOCK;
    for (int first = 0; first < n_superblocks; first += ONE_SUPERBLOCKS) {
        const int n = n_superblocks - first < ONE_SUPERBLOCKS ? n_superblocks - first : ONE_SUPERBLOCKS;
        open_x(&x, mul_blocks(m, 0) + first, n, t);
        mul_pass(m, t, &x, first, n, dot);
    }
}

/* --- superblock types ----------------------------------------------------------------------------------- */
INLINE __m256 to_floats(__m256i v) { return _mm256_cvtepi32_ps(v); }
/* Products of pairs of 32 weights. */
INLINE __m256i pairs(__m256i q, __m256i x, int is_signed) {
    return is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)) : _mm256_maddubs_epi16(q, x);
}
/* Words c of the low half to all of the low half, and of the high half likewise: moved, so that only four masks for
 * the shuffle are needed, which then stay in registers. */
INLINE __m256i scale_of_chunk(__m256i scale, int c) {
    scale = c < 4 ? scale : _mm256_srli_si256(scale, 8);
    return _mm256_shuffle_epi8(scale, _mm256_set1_epi16((short)(c % 4 * 0x202 + 0x100)));
}
/* From opened rows: the dots and the sums of mins of a step. */
INLINE void dot_rows(__m256i *dots, __m256i *mins, const uint8_t *w, const struct x_superblock *x, const uint8_t *ahead,
                     row_fn *open, size_t bytes, int bias, int is_signed, int has_min) {
#pragma GCC unroll 1
    for (int s = 0; s < STEP; s++, w += bytes, ahead += bytes) {
        struct row o;
        __m256i dot = _mm256_setzero_si256();
        open(&o, w, 8);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            dot = _mm256_add_epi32(dot,
                                   _mm256_madd_epi16(pairs(o.q[c], x[s].v[c], is_signed), scale_of_chunk(o.scale, c)));
            prefetch_after(dot, ahead, c, 8, bytes);
        }
        if (bias) {
            __m256i low = _mm256_mullo_epi16(o.scale, _mm256_set1_epi16((short)bias));
            dot = _mm256_sub_epi32(dot, _mm256_madd_epi16(low, x[s].sums));
        }
        dots[s] = dot;
        if (has_min) mins[s] = _mm256_madd_epi16(o.min, x[s].sums);
    }
}
/* Where the superblocks of a step begin. */
INLINE void rows_of(const uint8_t **rows, const uint8_t *w, size_t bytes) {
    for (int s = 0; s < STEP; s++) rows[s] = w + (size_t)s * bytes;
}
INLINE __m256 dot_opened(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead, row_fn *open,
                         scale_fn *d, scale_fn *min, size_t bytes, enum ms4_family family, int span, int bias) {
    const uint8_t *rows[STEP];
    __m256i dots[STEP], mins[STEP];
    dot_rows(dots, mins, w, x->superblock + at, ahead, open, bytes, span ? bias : 0, !span, has_min(family));
    rows_of(rows, w, bytes);
    const __m256 v = _mm256_mul_ps(d(rows, 0), to_floats(sum_each(dots)));
    return has_min(family) ? _mm256_fnmadd_ps(min(rows, 0), to_floats(sum_each(mins)), v) : v;
}
#define X(type, span, bias) \
    INLINE __m256 dot_##type(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead) { \
        return dot_opened(w, x, at, ahead, row_##type, d_##type, m_##type, sizeof(block_##type), FAMILY_OF(type), \
                          span, bias); \
    }
ROW_TYPES(X) IQ1_TYPES(X)
#undef X

/* --- IQ2, IQ3 ------------------------------------------------------------------------------------------- */
typedef void find_fn(struct grid_row *o, const uint8_t *w);
typedef __m256i magnitudes_fn(const struct grid_row *g, int c);
/* The activations get the signs, and the magnitudes are multiplied as they are. */
INLINE void dot_grid(__m256i *dots, const uint8_t *w, const struct x_superblock *x, const uint8_t *ahead, find_fn *find,
                     magnitudes_fn *magnitudes, size_t bytes) {
    struct grid_row g[STEP];
#pragma GCC unroll 1
    for (size_t s = 0; s < STEP; s++) find(&g[s], w + s * bytes);
#pragma GCC unroll 1
    for (int s = 0; s < STEP; s++, ahead += bytes) {
        __m256i dot = _mm256_setzero_si256();
        leave_in_memory(&g[s]);
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            const __m256i sign = _mm256_or_si256(bit_mask(g[s].negative[c]), _mm256_set1_epi8(1));
            const __m256i p = _mm256_maddubs_epi16(magnitudes(&g[s], c), _mm256_sign_epi8(x[s].v[c], sign));
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(p, scale_of_chunk(g[s].scale, c)));
            prefetch_after(dot, ahead, c, 8, bytes);
        }
        dots[s] = dot;
    }
}
#define X(type, ...) \
    INLINE __m256 dot_##type(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead) { \
        const uint8_t *rows[STEP]; \
        __m256i dots[STEP]; \
        dot_grid(dots, w, x->superblock + at, ahead, find_##type, magnitudes_##type, sizeof(block_##type)); \
        rows_of(rows, w, sizeof(block_##type)); \
        return _mm256_mul_ps(d_##type(rows, 0), to_floats(sum_each(dots))); \
    }
GRID_TYPES(X)
#undef X

/* --- Q4_K, Q5_K ------------------------------------------------------------------------------------------- */
/* out[j], lane s: dword j of the 16 bytes at w + s * bytes */
INLINE void load_transposed(__m256i *out, const uint8_t *w, size_t bytes) {
    __m256i a[4];
    for (size_t s = 0; s < 4; s++)
        a[s] = _mm256_set_m128i(load_128(w + (s + 4) * bytes), load_128(w + s * bytes));
    const __m256i t0 = _mm256_unpacklo_epi32(a[0], a[1]), t1 = _mm256_unpackhi_epi32(a[0], a[1]);
    const __m256i t2 = _mm256_unpacklo_epi32(a[2], a[3]), t3 = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(t0, t2);
    out[1] = _mm256_unpackhi_epi64(t0, t2);
    out[2] = _mm256_unpacklo_epi64(t1, t3);
    out[3] = _mm256_unpackhi_epi64(t1, t3);
}
/* The 6-bit scales of a superblock, a byte each.  Done in general registers: they are idle here. */
INLINE uint64_t k_scales(const uint8_t *p) {
    const uint32_t a = load_32(p), c = load_32(p + 8);
    return (a & 0x3f3f3f3f) | (uint64_t)((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
}
/* The factors and the 6-bit mins of eight superblocks, mins of four blocks to a dword. */
struct k_header { __m256 d, dmin; __m256i mins[2]; };
INLINE struct k_header load_k_header(const uint8_t *w, size_t bytes) {
    struct k_header k;
    __m256i h[4];
    const __m256i six = _mm256_set1_epi8(63), four = _mm256_set1_epi8(15), top = _mm256_set1_epi8(48);
    load_transposed(h, w, bytes);
    __m256i halves =
        _mm256_packus_epi32(_mm256_and_si256(h[0], _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(h[0], 16));
    halves = _mm256_permute4x64_epi64(halves, 0xd8);
    k.d = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    k.dmin = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    k.mins[0] = _mm256_and_si256(h[2], six);
    k.mins[1] =
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(h[3], 4), four),
                        _mm256_and_si256(_mm256_srli_epi16(h[2], 2), top));
    return k;
}
INLINE __m256i sum_k_mins(const __m256i *mins, const struct one_x *x, int at) {
    const __m256i low = _mm256_set1_epi16(255);
    __m256i sum = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(mins[h], low), load_256(x->sums[2 * h] + at)));
        sum = _mm256_add_epi32(sum,
                               _mm256_madd_epi16(_mm256_srli_epi16(mins[h], 8), load_256(x->sums[2 * h + 1] + at)));
    }
    return sum;
}
/* Bytes a and b of every eight as 16 bits, throughout the low and the high half. */
INLINE __m256i spread_bytes(int a, int b) {
    return _mm256_set_m128i(_mm_set1_epi16((short)(0x8000 | b)), _mm_set1_epi16((short)(0x8000 | a)));
}
INLINE __m256i shifts(int low, int high) { return _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low)); }
/* One superblock.  A block's products fit 16 bits, so its two halves are added up before they meet the scale. */
INLINE __m256i dot_k_one(const uint8_t *qs, const uint8_t *qh, uint64_t scales, const __m256i *x, const uint8_t *ahead,
                         size_t bytes, int has_high) {
    const __m256i four = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16),
        scale = _mm256_set1_epi64x((long long)scales);
    __m256i dot = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
        __m256i low = dot, high = dot;
        const __m256i first = load_once(qs + h * 64), second = load_once(qs + h * 64 + 32);
        for (int half = 0; half < 2; half++) {
            const __m256i w = half ? _mm256_permute2x128_si256(first, second, 0x31)
                : _mm256_permute2x128_si256(first, second, 0x20);
            __m256i q0 = _mm256_and_si256(w, four), q1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), four);
            if (has_high) {         /* bits 4 h to 4 h + 3 are those of blocks 0, 1 and, in the high half, 2, 3 */
                const __m256i b = _mm256_broadcastsi128_si256(load_128(qh + half * 16));
                /* shifts, of 32-bit lanes: in the low half, in the high half */
                const __m256i up_0 = shifts(4, 2), up_1 = shifts(3, 1), down_0 = shifts(0, 2), down_1 = shifts(1, 3);
                const __m256i b0 = h ? _mm256_srlv_epi32(b, down_0) : _mm256_sllv_epi32(b, up_0);
                const __m256i b1 = h ? _mm256_srlv_epi32(b, down_1) : _mm256_sllv_epi32(b, up_1);
                q0 = _mm256_or_si256(q0, _mm256_and_si256(b0, bit));
                q1 = _mm256_or_si256(q1, _mm256_and_si256(b1, bit));
            }
            const __m256i p0 = _mm256_maddubs_epi16(q0, x[h * 4 + half]),
                p1 = _mm256_maddubs_epi16(q1, x[h * 4 + 2 + half]);
            low = half ? _mm256_add_epi16(low, p0) : p0;
            high = half ? _mm256_add_epi16(high, p1) : p1;
        }
        const __m256i here = h ? _mm256_srli_epi64(scale, 32) : scale;
        prefetch_after(low, ahead, 2 * h, 4, bytes);
        prefetch_after(high, ahead, 2 * h + 1, 4, bytes);
        low = _mm256_madd_epi16(low, _mm256_shuffle_epi8(here, spread_bytes(0, 2)));
        high = _mm256_madd_epi16(high, _mm256_shuffle_epi8(here, spread_bytes(1, 3)));
        dot = _mm256_add_epi32(h ? _mm256_add_epi32(dot, low) : low, high);
    }
    return dot;
}
INLINE __m256 dot_k(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead, int has_high) {
    const size_t bytes = has_high ? sizeof(block_q5_k) : sizeof(block_q4_k), qs = bytes - 128;
    __m256i dots[STEP];
#pragma GCC unroll 1
    for (int s = 0; s < STEP; s += 2) {
        const uint8_t *one = w + (size_t)s * bytes, *two = one + bytes;
        const uint8_t *lines = ahead + (size_t)s * bytes;
        dots[s] = dot_k_one(one + qs, one + 16, k_scales(one + 4), x->superblock[at + s].v, lines, bytes, has_high);
        dots[s + 1] = dot_k_one(two + qs, two + 16, k_scales(two + 4), x->superblock[at + s + 1].v, lines + bytes,
                                bytes, has_high);
    }
    const struct k_header k = load_k_header(w, bytes);
    const __m256 v = _mm256_mul_ps(k.d, to_floats(sum_each(dots)));
    return _mm256_fnmadd_ps(k.dmin, to_floats(sum_k_mins(k.mins, x, at)), v);
}
INLINE __m256 dot_q4_k(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead) {
    return dot_k(w, x, at, ahead, 0);
}
INLINE __m256 dot_q5_k(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead) {
    return dot_k(w, x, at, ahead, 1);
}

/* --- 32-blocks ---------------------------------------------------------------------------------------------- */
typedef __m256i chunk_fn(const uint8_t *w, int b);
/* Block b of all eight superblocks, then the next: so that block sums come out side by side. */
INLINE __m256 dot_blocks(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead, chunk_fn *chunk,
                         scale_fn *d, scale_fn *min, size_t bytes, enum ms4_family family, int span, int bias) {
    const uint8_t *rows[STEP];
    __m256 v = _mm256_setzero_ps();
    rows_of(rows, w, bytes);
#pragma GCC unroll 1
    for (int b = 0; b < 8; b++) {
        __m256i p[STEP];
#pragma GCC unroll 8
        for (int s = 0; s < STEP; s++) {
            p[s] = _mm256_madd_epi16(pairs(chunk(w + (size_t)s * bytes, b), x->superblock[at + s].v[b], !span),
                                     _mm256_set1_epi16(1));
            prefetch_after(p[s], ahead + (size_t)b * bytes, s, STEP, bytes);
        }
        if (family == FAMILY_blocks_16) {
            __m256i even, odd;
            sum_halves(&even, &odd, p);
            even = _mm256_add_epi32(even, load_256(x->sums[2 * b] + at));
            odd = _mm256_add_epi32(odd, load_256(x->sums[2 * b + 1] + at));
            v = _mm256_fmadd_ps(d(rows, 2 * b), to_floats(even), v);
            v = _mm256_fmadd_ps(d(rows, 2 * b + 1), to_floats(odd), v);
            continue;
        }
        __m256i sum = sum_each(p);
        if (span && bias) sum = _mm256_add_epi32(sum, load_256(x->sums[b] + at));
        v = _mm256_fmadd_ps(d(rows, b), to_floats(sum), v);
        if (has_min(family)) v = _mm256_fmadd_ps(min(rows, b), to_floats(load_256(x->sums[b] + at)), v);
    }
    return v;
}
#define X(type, span, bias) \
    INLINE __m256 dot_##type(const uint8_t *w, const struct one_x *x, int at, const uint8_t *ahead) { \
        return dot_blocks(w, x, at, ahead, chunk_##type, d_##type, m_##type, SUPERBLOCK_BYTES(type), FAMILY_OF(type), \
                          span, bias); \
    }
BLOCK_TYPES(X)
#undef X

#define MUL_ONE(type, order, bias) \
    void mul_one_##type##_avx2(const struct ms4_mul *m) { \
        const struct one_type t = { order, bias, FAMILY_OF(type) == FAMILY_blocks_16, SUPERBLOCK_BYTES(type) }; \
        mul_one(m, &t, dot_##type); \
    }
#define X(type, span, bias) MUL_ONE(type, NATURAL, (span) ? (bias) : 0)
BLOCK_TYPES(X)
#undef X
#define X(type, ...) MUL_ONE(type, NATURAL, 0)
ROW_TYPES(X) GRID_TYPES(X) IQ1_TYPES(X)
#undef X
#define X(type, ...) MUL_ONE(type, K_ORDER, 0)
K_TYPES(X)
#undef X
#endif
