/* run_products.c -- shares matrix products out over the pool: an item is a chunk of rows times a tile of tokens. */
#include "cpu_device.h"
#include "error.h"
#include "sample.h"
#include <string.h>

#define MAX_CHUNK_ROWS 256
#define MAX_PRODUCTS 4         /* of one run */

void cpu_mul(const struct ms4_ops *ops, const matrix *m, const activations *x, const int32_t *x_rows, int32_t n_tokens,
             float *y, size_t y_stride, const uint8_t *next) {
    int quantized = matrix_quantized(m);
    struct ms4_mul mul = {
        .w = m->data, .row_bytes = m->row_bytes, .n_rows = m->n_rows, .n_cols = m->n_cols, .n_tokens = n_tokens,
        .x = quantized ? (const void *)x->q : (const void *)x->f,
        .x_stride = quantized ? x->q_stride * sizeof(block_q8) : x->f_stride * sizeof(float),
        .x_rows = x_rows, .y = y, .y_stride = y_stride, .next = next,
    };
    ops->mul[m->type](&mul);
    if (!m->scales) return;
    for (int32_t t = 0; t < n_tokens; t++)
        for (int32_t r = 0; r < m->n_rows; r++) y[(size_t)t * y_stride + (size_t)r] *= m->scales[0];
}
int32_t cpu_rows_per_item(const pool *p, int32_t n_rows, int32_t n_tokens) {
    int32_t most = n_tokens < 8 ? 128 : MAX_CHUNK_ROWS, items = 8 * pool_size(p);
    int32_t step = n_tokens < 8 ? 16 : 32;                    /* rows that kernels take at a time */
    int32_t rows = (n_rows / items + step - 1) / step * step;
    return rows < step ? step : rows > most ? most : rows;
}

/* A product's addresses. */
typedef struct { const matrix *m; activations x; float *y; size_t y_stride; int32_t add; } placed;
typedef struct {
    const struct ms4_ops *ops;
    placed products[MAX_PRODUCTS];
    int32_t n_tokens, rows, first_item[MAX_PRODUCTS + 1];
} product_run;

static activations from_row(activations x, int32_t t) {
    if (x.f) x.f += (size_t)t * x.f_stride;
    if (x.q) x.q += (size_t)t * x.q_stride;
    return x;
}
static void product_item(void *context, int32_t item, int32_t thread) {
    const product_run *run = context;
    int32_t which = 0;
    (void)thread;
    while (item >= run->first_item[which + 1]) which++;
    const placed *p = &run->products[which];
    int32_t chunks = (p->m->n_rows + run->rows - 1) / run->rows;
    item -= run->first_item[which];
    int32_t row = item % chunks * run->rows, token = item / chunks * TOKEN_TILE;
    int32_t n_rows = int_min(run->rows, p->m->n_rows - row), n_tokens = int_min(TOKEN_TILE, run->n_tokens - token);
    const matrix part = matrix_rows(p->m, 0, row, n_rows);
    const activations x = from_row(p->x, token);
    float *y = p->y + (size_t)token * p->y_stride + (size_t)row;
    if (!p->add) {
        cpu_mul(run->ops, &part, &x, NULL, n_tokens, y, p->y_stride, NULL);
        return;
    }
    enum { STEP = 16 };                        /* tokens whose results wait on the stack to be added */
    float sum[STEP * MAX_CHUNK_ROWS];
    for (int32_t t = 0; t < n_tokens; t += STEP) {
        const activations rest = from_row(x, t);
        int32_t n = int_min(STEP, n_tokens - t);
        cpu_mul(run->ops, &part, &rest, NULL, n, sum, MAX_CHUNK_ROWS, NULL);
        for (int32_t i = 0; i < n; i++)
            run->ops->add_scaled(y + (size_t)(t + i) * p->y_stride, sum + (size_t)i * MAX_CHUNK_ROWS, 1,
                                 (size_t)n_rows);
    }
}
static void run_products(const cpu_device *d, product_run *run, int32_t n_products) {
    int32_t tiles = (run->n_tokens + TOKEN_TILE - 1) / TOKEN_TILE, items = 0, n_rows = 0;
    run->ops = d->ops;
    for (int32_t i = 0; i < n_products; i++) n_rows += run->products[i].m->n_rows;
    run->rows = cpu_rows_per_item(d->pool, n_rows * tiles, run->n_tokens);
    for (int32_t i = 0; i < n_products; i++) {
        run->first_item[i] = items;
        items += (run->products[i].m->n_rows + run->rows - 1) / run->rows * tiles;
    }
    run->first_item[n_products] = items;
    pool_run(d->pool, product_item, run, items, d->stop);
}
int cpu_products(device *base, const product *p, int32_t n_products, int32_t n) {
    const cpu_device *d = (const cpu_device *)base;
    product_run run = { .n_tokens = n };
    for (int32_t i = 0; i < n_products; i++)
        run.products[i] = (placed){ p[i].m, cpu_x(d, p[i].x, p[i].x_row), cpu_row(d, p[i].y, p[i].y_row),
                                    d->rows[p[i].y].width, p[i].add };
    run_products(d, &run, n_products);
    return MS4_OK;
}
/* Straight into the caller's memory if all is wanted, and that lies in one piece. */
int cpu_logits(device *base, const matrix *m, const row_wanted *w, int32_t n) {
    cpu_device *d = (cpu_device *)base;
    const size_t width = (size_t)m->n_rows, bytes = width * sizeof(float);
    const int straight = !w->k && wanted_alike(w, n, width) == n;
    if (!straight) TRY(cpu_need(&d->logits, (size_t)n * bytes));
    float *out = straight ? w->out : d->logits.at;
    product_run run = { .n_tokens = n, .products = { { m, cpu_x(d, BUF_X, 0), out, width, 0 } } };
    run_products(d, &run, 1);
    for (const row_wanted *end = w + n; !straight && w < end; w++, out += width) {
        if (!w->k) memcpy(w->out, out, bytes);
        else TRY(sample_highest(d->ops, out, width, (size_t)w->among, (size_t)w->k, w->out, w->ids));
    }
    return MS4_OK;
}
