/* tiles.c -- panels times many tokens on AVX-512: the innermost loops of prefill. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "panel.h"


static inline __m512i broadcast_dword(const void *p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }

/* vpdpbusd, written out because GCC moves each sum to another register and back. */
INLINE __m512i dot_add(__m512i sum, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
/* Where the sums of a token begin (starts) and the sums that its mins multiply (for dpwssd: pairs of int16). */
struct tile_sums { int32_t start[16]; float block[8]; int16_t pair[8]; };

INLINE void tile_sums_of(struct tile_sums *s, const block_q8 *x, const struct form f, int bias) {
    const __m256i sums = _mm256_load_si256((const void *)x->sums);
    const __m256i blocks = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    if (has_bias(f)) {
        if (parts_of(f) == 16)
            _mm512_storeu_si512(s->start, _mm512_mullo_epi32(_mm512_cvtepi16_epi32(sums), _mm512_set1_epi32(-bias)));
        else if (f.in_bytes) {
            __m128i t = _mm_add_epi32(_mm256_castsi256_si128(blocks), _mm256_extracti128_si256(blocks, 1));
            t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
            s->start[0] = -bias * _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
        } else _mm256_storeu_si256((void *)s->start, _mm256_mullo_epi32(blocks, _mm256_set1_epi32(-bias)));
    }
    if (f.family == FAMILY_blocks_min) _mm256_storeu_ps(s->block, _mm256_cvtepi32_ps(blocks));
    if (f.family == FAMILY_mins_32) _mm_storeu_si128((void *)s->pair, _mm256_cvtepi32_epi16(blocks));
}

/* As prefetch_after, but of an address: naming the memory itself makes the tiles 3 % slower. */
INLINE void prefetch_step(struct ahead *a, __m512i *sum) {
    __asm__ volatile("prefetcht1 (%1)" : "+v"(*sum) : "r"(a->at));
    a->at += a->step;
}
#define FOR_EACH(k, m) for (int k = 0; k < n; k++) for (int m = 0; m < PANELS; m++)
/* Adds one superblock to the results of n tokens (a constant, at most TILE) and the rows of the panels p. */
INLINE void tile_add(const struct panel *p, const block_q8 *const *rows, size_t i, float *y, const struct form f,
                     int bias, const int n, struct ahead *next) {
    const int parts = parts_of(f), is_float = is_blocks(f.family);
    struct tile_sums s[TILE];
    const block_q8 *x[TILE];
    __m512i dot[TILE][PANELS], odd[TILE][PANELS], total[TILE][PANELS];
    __m512 t[TILE][PANELS];
    for (int k = 0; k < n; k++) {
        x[k] = rows[k] + i;
        if (!(f.in_bytes && has_min(f.family))) tile_sums_of(&s[k], x[k], f, bias);
    }
    FOR_EACH(k, m) {
        total[k][m] = f.in_bytes && has_bias(f) ? _mm512_set1_epi32(s[k].start[0]) : _mm512_setzero_si512();
        t[k][m] = _mm512_setzero_ps();
    }
#pragma GCC unroll 1
    for (int b = 0; b < parts; b++) {
        /* few tokens: two sums each, as one alone would wait for its own last addition */
        FOR_EACH(k, m) {
            if (f.in_bytes) dot[k][m] = total[k][m];
            else dot[k][m] = has_bias(f) ? _mm512_set1_epi32(s[k].start[b]) : _mm512_setzero_si512();
            odd[k][m] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int j = 64 / parts * b; j < 64 / parts * (b + 1); j++) {
            __m512i w[PANELS];
            for (int m = 0; m < PANELS; m++) w[m] = p[m].q[j];
            for (int k = 0; k < n; k++) {
                const __m512i v = broadcast_dword(x[k]->qs + 4 * j);
                __m512i *sums = j % 2 && n < 3 ? odd[k] : dot[k];
                for (int m = 0; m < PANELS; m++) {
                    sums[m] = dot_add(sums[m], w[m], v);
                    if (k == m * (n / PANELS)) prefetch_step(next, sums + m);
                }
            }
        }
        FOR_EACH(k, m) {
            const __m512i sum = n < 3 ? _mm512_add_epi32(dot[k][m], odd[k][m]) : dot[k][m];
            if (f.in_bytes) total[k][m] = sum;
            else if (!is_float) total[k][m] = _mm512_add_epi32(total[k][m], _mm512_mullo_epi32(sum, p[m].scale[b]));
            else {
                t[k][m] = _mm512_fmadd_ps(p[m].factor[b], _mm512_cvtepi32_ps(sum), t[k][m]);
                if (has_min(f.family)) t[k][m] = _mm512_fmadd_ps(p[m].add[b], _mm512_set1_ps(s[k].block[b]), t[k][m]);
            }
        }
    }
    FOR_EACH(k, m) {
        if (!is_float) t[k][m] = _mm512_mul_ps(p[m].d, _mm512_cvtepi32_ps(total[k][m]));
        if (has_min(f.family) && !is_float) {
            __m512i mins = _mm512_setzero_si512();
            for (int b = 0; b < (f.in_bytes ? 8 : 4); b++)
                mins = _mm512_dpwssd_epi32(mins, p[m].min[b],
                                           broadcast_dword(f.in_bytes ? x[k]->sums + 2 * b : s[k].pair + 2 * b));
            t[k][m] = _mm512_fnmadd_ps(p[m].dmin, _mm512_cvtepi32_ps(mins), t[k][m]);
        }
        float *sum = y + (k * PANELS + m) * PANEL_ROWS;
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_set1_ps(x[k]->d), t[k][m], _mm512_load_ps(sum)));
    }
}
/* All tokens of a chunk, in tiles of nearly equal size. */
#define TILES(name, family, in_bytes) \
    void tiles_##name(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int bias, \
                      struct ahead next) { \
        const struct form f = { FAMILY_##family, in_bytes }; \
        int tiles = (n_tokens + TILE - 1) / TILE; \
        next.step /= (size_t)(PANELS * 64 * tiles); \
        for (; tiles > 0; tiles--) { \
            const int n = n_tokens / tiles; \
            switch (n) { \
                case 1: tile_add(p, x, i, y, f, bias, 1, &next); break; \
                case 2: tile_add(p, x, i, y, f, bias, 2, &next); break; \
                case 3: tile_add(p, x, i, y, f, bias, 3, &next); break; \
                case 4: tile_add(p, x, i, y, f, bias, 4, &next); break; \
                case 5: tile_add(p, x, i, y, f, bias, 5, &next); break; \
                case 6: tile_add(p, x, i, y, f, bias, 6, &next); break; \
                case 7: tile_add(p, x, i, y, f, bias, 7, &next); break; \
                default: tile_add(p, x, i, y, f, bias, 8, &next); break; \
            } \
            n_tokens -= n; \
            x += n; \
            y += PANELS * PANEL_ROWS * n; \
        } \
    }
TILES(bytes, scales_16, 1)
TILES(bytes_min, mins_16, 1)
TILES(scales_16, scales_16, 0)
TILES(scales_32, scales_32, 0)
TILES(mins_32, mins_32, 0)
TILES(blocks, blocks, 0)
TILES(blocks_min, blocks_min, 0)
TILES(blocks_16, blocks_16, 0)
#endif
