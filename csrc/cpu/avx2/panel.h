/* panel.h -- a superblock of eight rows, opened for products with many tokens on AVX2 (many.c), and who multiplies it
 * (tiles.c, ../avxvnni/tiles.c). */
#ifndef MS4_AVX2_PANEL_H
#define MS4_AVX2_PANEL_H
#include "rows.h"

/* span: how many products of pairs, each at most 127 * (2 * the largest quant), fit 16 bits when added up; 0: the
 * quants are signed. */
struct form { enum ms4_family family; int span; };
INLINE int blocks_here(const struct ms4_mul *m, int i) {
    int n = m->n_cols - i * SUPERBLOCK;
    return n >= SUPERBLOCK ? 8 : n / 32;
}

/* One superblock of eight rows, opened, with the rows in the lanes: four weights (or two 16-bit numbers) of each. */
struct panel {
    __m256i q[SUPERBLOCK / 4];
    __m256i scale[16];          /* of group g, twice */
    __m256i low[8];             /* of groups 2 p and 2 p + 1: the min, or scale * bias */
    __m256i bias;               /* in every 16-bit lane */
    __m256 d[16], m[8];
};
/* All tokens times superblock i of the panel. */
typedef void tiles_fn(const struct ms4_mul *m, const struct panel *p, int i, int first);
/* By family and span.  all_unsigned: quants of signed types shall get a bias of 128 too. */
struct tiles { tiles_fn *of[FAMILY_blocks_16 + 1][9]; int all_unsigned; };
extern const struct tiles tiles_avx2, tiles_avxvnni;
#endif
