/* panel.h -- one superblock of 16 rows, opened for products with many tokens on AVX-512.
 *
 * It is transposed: dword k holds columns 4k..4k+3 of every row side by side, so that vpdpbusd with a broadcast dword
 * of activations adds 4 columns to 16 results.  The bytes are unsigned: weight + bias; the sums begin at -bias * (sum
 * of activations), so they are exact and the bias costs nothing.  many.c opens panels, tiles.c multiplies them.
 */
#ifndef MS4_AVX512_PANEL_H
#define MS4_AVX512_PANEL_H
#include "avx512.h"

#define PANELS 2                /* multiplied side by side: what is loaded of the activations serves 32 rows */
#define TILE 8                  /* tokens of a register tile, at most */
#define CHUNK 64                /* tokens that share one unpacking */

/* What the integer sums of a superblock become is its family's matter, but for Q2_K and Q3_K, whose scales are inside
 * the bytes, so that one sum goes through all of them. */
struct form { enum ms4_family family; int in_bytes; };
static inline int has_bias(const struct form f) { return !has_min(f.family); }
/* The parts of a superblock whose sums get a scale of their own. */
static inline int parts_of(const struct form f) { return f.in_bytes ? 8 : SUPERBLOCK / scale_width(f.family); }

struct panel {
    __m512i q[64];
    union { __m512i scale[16]; __m512 factor[16]; };
    /* mins of K types: pairs of int16, of 16-groups (mins_16) or of blocks; of 32-blocks: floats */
    union { __m512i min[8]; __m512 add[8]; };
    __m512 d, dmin;
    const __m512i *grid;            /* set before the first panel is opened */
};

/* Rows read side by side make memory several times slower than rows read in order, so they are prefetched in order:
 * the next rows while these are multiplied, one prefetch for each column of a panel, as those in a row hold up the
 * loads behind them.  step: bytes from one to the next; where it is less than a line, some ask for the same. */
struct ahead { const uint8_t *at; size_t step; };

/* tiles.c: adds superblock i of the PANELS panels p, times n_tokens rows x, to y. */
typedef void tiles_fn(const struct panel *p, const block_q8 *const *x, size_t i, float *y, int n_tokens, int bias,
                      struct ahead next);
tiles_fn tiles_bytes, tiles_bytes_min, tiles_scales_16, tiles_scales_32, tiles_mins_32;
tiles_fn tiles_blocks, tiles_blocks_min, tiles_blocks_16;

/* Opens a panel from superblock data at rows[0..15]; blocks: how many blocks are there (32-blocks only). */
typedef void open_fn(struct panel *p, const uint8_t *const *rows, int blocks);

#endif
