/* tiles.c -- panels times many tokens on AVX2 with AVX-VNNI: one instruction for four products of bytes and their sum.
 * For the consumer processors of Intel since 2021, which have no AVX-512.
 *
 * The sums are the same integers as in avx2/tiles.c, so the results are the same bits.
 */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avxvnni")
#define TILES tiles_avxvnni
#define ALL_UNSIGNED 1
#include "cpu/avx2/panel.h"

#define TILE 6
INLINE __m256i broadcast4(const void *p) { return _mm256_set1_epi32((int)load_32(p)); }
/* One 32-bit sum per scale; a product of 16 bits is faster where the sum fits. */
INLINE void tile_chunk(__m256i *dots, const struct panel *p, const block_q8 *const *x, int n, int c, struct form f) {
    const int each = scale_width(f.family) / 4, narrow = 2 * each <= f.span;
    for (int s = 0; s < 8; s += each) {
        __m256i part[TILE], scale = _mm256_slli_epi32(p->scale[c * 2 + s / 4], 16);
        scale = narrow ? _mm256_srli_epi32(scale, 16) : _mm256_srai_epi32(scale, 16);
        for (int t = 0; t < n; t++) part[t] = _mm256_setzero_si256();
        for (int j = s; j < s + each; j++)
            for (int t = 0; t < n; t++)
                part[t] = _mm256_dpbusd_avx_epi32(part[t], p->q[c * 8 + j], broadcast4(x[t]->qs + c * 32 + j * 4));
        for (int t = 0; t < n; t++) {
            if (is_blocks(f.family)) { dots[s ? TILE + t : t] = part[t]; continue; }
            part[t] = narrow ? _mm256_madd_epi16(part[t], scale) : _mm256_mullo_epi32(part[t], scale);
            dots[t] = _mm256_add_epi32(dots[t], part[t]);
        }
    }
}
#include "cpu/avx2/tiles.h"
#endif
