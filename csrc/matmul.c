/* matmul.c -- shares matrix products out over the pool.
 *
 * An item is a chunk of rows times a tile of tokens.  Every output element is computed whole by one kernel call, so
 * how the work was cut never shows in a result.
 */
#include "matmul.h"

#define MAX_CHUNK_ROWS 256

void matrix_mul(const struct ms4_ops *ops, const matrix *m, const activations *x, const int32_t *x_rows,
                int32_t n_tokens, float *y, size_t y_stride, const uint8_t *next) {
    int quantised = matrix_quantised(m);
    struct ms4_mul mul = {
        .w = m->data, .row_bytes = m->row_bytes, .n_rows = m->n_rows, .n_cols = m->n_cols, .n_tokens = n_tokens,
        .x = quantised ? (const void *)x->q : (const void *)x->f,
        .x_stride = quantised ? x->q_stride * sizeof(block_q8) : x->f_stride * sizeof(float),
        .x_rows = x_rows, .y = y, .y_stride = y_stride, .next = next,
    };
    ops->mul[m->type](&mul);
    if (!m->scales) return;
    for (int32_t t = 0; t < n_tokens; t++)
        for (int32_t r = 0; r < m->n_rows; r++) y[(size_t)t * y_stride + (size_t)r] *= m->scales[0];
}

int32_t rows_per_item(const pool *p, int32_t n_rows, int32_t n_tokens) {
    int32_t most = n_tokens < 8 ? 128 : MAX_CHUNK_ROWS, items = 8 * pool_size(p);
    int32_t step = n_tokens < 8 ? 16 : 32;                    /* rows that kernels take at a time */
    int32_t rows = (n_rows / items + step - 1) / step * step;
    return rows < step ? step : rows > most ? most : rows;
}

typedef struct {
    const struct ms4_ops *ops;
    const product *products;
    int32_t n_products, n_tokens, rows, first_item[MAX_PRODUCTS + 1];
} matmul_job;

static void matmul_item(void *context, int32_t item, int32_t thread) {
    const matmul_job *job = context;
    int32_t which = 0;
    (void)thread;
    while (item >= job->first_item[which + 1]) which++;
    const product *p = &job->products[which];
    int32_t chunks = (p->m->n_rows + job->rows - 1) / job->rows;
    item -= job->first_item[which];
    int32_t row = item % chunks * job->rows, token = item / chunks * TOKEN_TILE;
    int32_t n_rows = p->m->n_rows - row < job->rows ? p->m->n_rows - row : job->rows;
    int32_t n_tokens = job->n_tokens - token < TOKEN_TILE ? job->n_tokens - token : TOKEN_TILE;
    matrix part = matrix_rows(p->m, 0, row, n_rows);
    activations x = p->x;
    if (x.f) x.f += (size_t)token * x.f_stride;
    if (x.q) x.q += (size_t)token * x.q_stride;
    float *y = p->y + (size_t)token * p->y_stride + (size_t)row;
    if (!p->add) {
        matrix_mul(job->ops, &part, &x, NULL, n_tokens, y, p->y_stride, NULL);
        return;
    }
    enum { STEP = 16 };                        /* tokens whose results wait on the stack to be added */
    float sum[STEP * MAX_CHUNK_ROWS];
    for (int32_t t = 0; t < n_tokens; t += STEP) {
        int32_t n = n_tokens - t < STEP ? n_tokens - t : STEP;
        activations rest = x;
        if (rest.f) rest.f += (size_t)t * x.f_stride;
        if (rest.q) rest.q += (size_t)t * x.q_stride;
        matrix_mul(job->ops, &part, &rest, NULL, n, sum, MAX_CHUNK_ROWS, NULL);
        for (int32_t i = 0; i < n; i++)
            job->ops->add_scaled(y + (size_t)(t + i) * p->y_stride, sum + (size_t)i * MAX_CHUNK_ROWS, 1, (size_t)n_rows);
    }
}
void matmul(pool *p, const struct ms4_ops *ops, const product *products, int32_t n_products, int32_t n_tokens,
            const atomic_int *stop) {
    matmul_job job = { .ops = ops, .products = products, .n_products = n_products, .n_tokens = n_tokens,
                       .rows = 16 };
    int32_t tiles = (n_tokens + TOKEN_TILE - 1) / TOKEN_TILE, n = 0, n_rows = 0;
    for (int32_t i = 0; i < n_products; i++) n_rows += products[i].m->n_rows;
    job.rows = rows_per_item(p, n_rows * tiles, n_tokens);
    for (int32_t i = 0; i < n_products; i++) {
        job.first_item[i] = n;
        n += (products[i].m->n_rows + job.rows - 1) / job.rows * tiles;
    }
    job.first_item[n_products] = n;
    pool_run(p, matmul_item, &job, n, stop);
}
