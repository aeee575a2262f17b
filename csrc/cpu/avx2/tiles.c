/* tiles.c -- panels times many tokens on AVX2: sums of pairs of products fit 16 bits. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define TILES tiles_avx2
#define ALL_UNSIGNED 0
#include "panel.h"

#define TILE 4              /* tokens whose sums are held in registers together */
INLINE __m256i broadcast4(const void *p) { return _mm256_set1_epi32((int)load_32(p)); }
/* Without this the compiler turns long sums into trees, with more terms alive than there are registers. */
INLINE __m256i keep_order(__m256i v) {
    __asm__("" : "+x"(v));
    return v;
}
/* One 16-bit sum per span, or per scale, then times the scale. */
INLINE void tile_chunk(__m256i *dots, const struct panel *p, const block_q8 *const *x, int n, int c, struct form f) {
    const int most = scale_width(f.family) / 4, span = f.span > most ? most : f.span ? f.span : 1;
    const int blocks = is_blocks(f.family), wide = f.family != FAMILY_blocks_16;
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
#include "tiles.h"
#endif
