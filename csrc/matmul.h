/* matmul.h -- matrices of a model file, and products with them shared out over the pool. */
#ifndef MS4_MATMUL_H
#define MS4_MATMUL_H
#include "ops.h"
#include "pool.h"
#define TOKEN_TILE 128         /* tokens that one item of work takes at most: their activations stay in the L2 cache */

/* Weights as they lie in the file: n_slices (experts, heads; else 1) of n_rows rows of n_cols columns. */
typedef struct {
    const uint8_t *data;
    size_t row_bytes, slice_bytes;
    const float *scales;       /* per slice, or NULL: multiplies the results (NVFP4) */
    int32_t type, n_rows, n_cols, n_slices;
} matrix;

/* Rows of activations, as floats, as block_q8, or both; a row of q has q_stride blocks. */
typedef struct {
    float *f;
    block_q8 *q;
    size_t f_stride, q_stride;
} activations;

static inline size_t blocks_of(size_t n) { return (n + SUPERBLOCK - 1) / SUPERBLOCK; }
static inline int matrix_quantised(const matrix *m) { return ms4_type_infos[m->type].quantised; }
/* Bytes of one slice; 0 if there is no such matrix.  (slice_bytes is larger where gate and up lie in one tensor.) */
static inline uint64_t matrix_bytes(const matrix *m) { return m->data ? (uint64_t)m->n_rows * m->row_bytes : 0; }
/* Rows [first, first + n) of slice s as a matrix of its own. */
static inline matrix matrix_rows(const matrix *m, int32_t s, int32_t first, int32_t n) {
    matrix part = *m;
    part.data += (size_t)s * m->slice_bytes + (size_t)first * m->row_bytes;
    part.n_rows = n;
    part.n_slices = 1;
    part.scales = m->scales ? m->scales + s : NULL;
    return part;
}
/* y[t * y_stride + r] = rows of m (slice 0) times row x_rows[t] (NULL: t) of x, in the calling thread.
 * next: weights that the thread will read afterwards, or NULL: a hint for prefetching. */
void matrix_mul(const struct ms4_ops *ops, const matrix *m, const activations *x, const int32_t *x_rows,
                int32_t n_tokens, float *y, size_t y_stride, const uint8_t *next);

/* One product of several that share a run of the pool: y = m x for n_tokens tokens; add != 0 adds to y instead. */
typedef struct {
    const matrix *m;
    activations x;
    float *y;
    size_t y_stride;
    int add;
} product;
#define MAX_PRODUCTS 4
void matmul(pool *p, const struct ms4_ops *ops, const product *products, int32_t n_products, int32_t n_tokens,
            const atomic_int *stop);
/* Rows that one item of work takes, of n_rows in all: enough items to balance, few enough to be cheap. */
int32_t rows_per_item(const pool *p, int32_t n_rows, int32_t n_tokens);
#endif
