/* checkproducts.h -- of checkkernels.c: products with every type of weights, against the reference and against each
 * other, and their speed. */
#ifndef CHECKPRODUCTS_H
#define CHECKPRODUCTS_H
#include "checkharness.h"

#define MARK 12345.0f       /* fills what a kernel must leave alone */

static int mul_type;

struct product { struct ms4_mul m; size_t n_y; int extreme; };

static int quantized(void) { return ms4_type_infos[mul_type].quantized; }
static int random_columns(void) {
    int unit = ms4_type_infos[mul_type].weights;
    if (unit == SUPERBLOCK) return SUPERBLOCK * between(1, 16);
    if (rnd() % 3 == 0) return SUPERBLOCK * between(1, 6);
    return unit == 1 ? between(1, 600) : unit * between(1, 640 / unit);
}
static struct product random_product(int n_rows, int n_tokens, int n_cols, int extreme) {
    const struct ms4_type_info *info = &ms4_type_infos[mul_type];
    struct product p = { .m = { .n_rows = n_rows, .n_tokens = n_tokens, .n_cols = n_cols }, .extreme = extreme };
    struct ms4_mul *m = &p.m;
    size_t n_blocks = ((size_t)n_cols + SUPERBLOCK - 1) / SUPERBLOCK;
    int n_x = rnd() & 1 ? n_tokens : between(1, n_tokens + 2), gap = between(0, 2);
    m->row_bytes = (size_t)n_cols / (size_t)info->weights * (size_t)info->bytes;
    uint8_t *w = guarded((size_t)n_rows * m->row_bytes);
    fill_weights(mul_type, w, (size_t)n_rows * (size_t)n_cols, extreme);
    m->w = w;
    if (n_x != n_tokens || rnd() & 1) {
        int32_t *rows = guarded((size_t)n_tokens * sizeof *rows);
        for (int t = 0; t < n_tokens; t++) rows[t] = between(0, n_x - 1);
        m->x_rows = rows;
    }
    m->x_stride = quantized() ? (n_blocks + (size_t)gap) * sizeof(block_q8) : ((size_t)n_cols + (size_t)gap * 16) * 4;
    size_t x_row = quantized() ? n_blocks * sizeof(block_q8) : (size_t)n_cols * 4;
    uint8_t *x = guarded(m->x_stride * (size_t)(n_x - 1) + x_row);
    for (int t = 0; t < n_x; t++) {
        float *row = (float *)(void *)(x + (size_t)t * m->x_stride);
        if (quantized()) fill_blocks((block_q8 *)row, (size_t)n_cols, extreme);
        else for (int k = 0; k < n_cols; k++) row[k] = uniform();
    }
    m->x = x;
    m->y_stride = (size_t)n_rows + (size_t)gap * 3;
    p.n_y = m->y_stride * (size_t)(n_tokens - 1) + (size_t)n_rows;
    m->y = guarded_floats(p.n_y);
    return p;
}
static const void *product_x(const struct ms4_mul *m, int t) {
    return (const uint8_t *)m->x + (size_t)(m->x_rows ? m->x_rows[t] : t) * m->x_stride;
}
/* The result of the kernel in p.m.y, whose gaps are marked; a copy of it is returned. */
static float *run_mul(const struct product *p) {
    float *y = guarded_floats(p->n_y);
    for (size_t i = 0; i < p->n_y; i++) p->m.y[i] = MARK;
    fast->mul[mul_type](&p->m);
    memcpy(y, p->m.y, p->n_y * sizeof *y);
    return y;
}
/* A term is rounded at most twelve times in its superblock (eight additions of blocks, three factors, the reference's
 * own result), and once for each superblock whose value is added. */
static void compare_product(const struct product *p, const float *y) {
    const struct ms4_mul *m = &p->m;
    const int roundings = 12 + (m->n_cols + SUPERBLOCK - 1) / SUPERBLOCK;
    float *x = guarded_floats((size_t)m->n_cols), want;
    for (int t = 0; t < m->n_tokens; t++) {
        for (int k = 0; k < m->n_cols; k++) {
            const block_q8 *b = (const block_q8 *)product_x(m, t) + k / SUPERBLOCK;
            x[k] = quantized() ? b->d * (float)b->qs[k % SUPERBLOCK] : ((const float *)product_x(m, t))[k];
        }
        for (int r = 0; r < m->n_rows; r++) {
            struct ms4_mul one = *m;
            one.w += (size_t)r * m->row_bytes;
            one.x = product_x(m, t);
            one.x_rows = NULL;
            one.y = &want;
            one.n_rows = one.n_tokens = 1;
            ref->mul[mul_type](&one);
            double magnitude = magnitude_of(mul_type, one.w, (size_t)m->n_cols, x);
            expect(fabs((double)y[(size_t)t * m->y_stride + (size_t)r] - want) <= roundings * 0x1p-24 * magnitude,
                   "wrong product");
        }
        for (size_t i = (size_t)m->n_rows; i < m->y_stride && t + 1 < m->n_tokens; i++)
            expect(y[(size_t)t * m->y_stride + i] == MARK, "wrote between rows of y");
    }
}
/* One token at a time, and the rows in two parts. */
static void compare_splits(const struct product *p, const float *y) {
    struct product part = *p;
    for (size_t i = 0; i < p->n_y; i++) p->m.y[i] = MARK;
    for (int t = 0; t < p->m.n_tokens; t++) {
        part.m.x = product_x(&p->m, t);
        part.m.x_rows = NULL;
        part.m.y = p->m.y + (size_t)t * p->m.y_stride;
        part.m.n_tokens = 1;
        fast->mul[mul_type](&part.m);
    }
    expect(same_bits(y, p->m.y, p->n_y), "one token at a time gives other bits");
    for (size_t i = 0; i < p->n_y; i++) p->m.y[i] = MARK;
    int first = between(0, p->m.n_rows);
    part = *p;
    part.m.n_rows = first;
    if (first) fast->mul[mul_type](&part.m);
    part.m.n_rows = p->m.n_rows - first;
    part.m.w += (size_t)first * p->m.row_bytes;
    part.m.y += first;
    if (part.m.n_rows) fast->mul[mul_type](&part.m);
    expect(same_bits(y, p->m.y, p->n_y), "rows in two calls give other bits");
}
/* Activations that were not finite have d = NaN: that token's results must be NaN, the others' not. */
static void check_nan(void) {
    struct product p = random_product(between(1, 20), 5, quantized() ? 512 : 48, 0);
    int bad = between(0, 4);
    p.m.x_rows = NULL;
    p.m.x_stride = (quantized() ? 2 * sizeof(block_q8) : 48 * 4);
    uint8_t *x = guarded(p.m.x_stride * 5);
    for (int t = 0; t < 5; t++) {
        block_q8 *row = (block_q8 *)(void *)(x + (size_t)t * p.m.x_stride);
        float *numbers = (float *)(void *)row;
        if (quantized()) fill_blocks(row, 512, 0);
        else for (int k = 0; k < 48; k++) numbers[k] = uniform();
        if (t == bad && quantized()) { memset(row, 0, sizeof *row); row->d = NAN; }
        else if (t == bad) numbers[between(0, 47)] = NAN;
    }
    p.m.x = x;
    const float *y = run_mul(&p);
    for (int t = 0; t < 5; t++)
        for (int r = 0; r < p.m.n_rows; r++)
            expect(!isnan(y[(size_t)t * p.m.y_stride + (size_t)r]) == (t != bad), "NaN went astray");
}
static void check_mul(void) {
    for (int i = 0; i < 48; i++) {
        int n_rows = i < 2 ? 40 : between(1, 40), n_tokens = i < 2 ? 20 : rnd() & 1 ? between(1, 20) : between(1, 4);
        int n_cols = random_columns();
        while (n_rows * n_tokens * n_cols > 200000 && n_rows > 1) n_rows = i < 2 ? n_rows - 1 : between(1, n_rows - 1);
        struct product p = random_product(n_rows, n_tokens, n_cols, i % 4 < 3 ? i % 3 : 0);
        const float *y = run_mul(&p);
        compare_product(&p, y);
        compare_splits(&p, y);
        hash_floats(y, p.n_y);
        release_all();
    }
    check_nan();
}

static struct ms4_mul timed;
static void run_timed(const struct ms4_ops *ops) { ops->mul[mul_type](&timed); }
/* A product of given shape, made of few different bytes but in as much memory as it takes. */
static double time_shape(const struct ms4_ops *ops, int n_rows, int n_tokens) {
    const struct ms4_type_info *info = &ms4_type_infos[mul_type];
    int n_cols = 4096;
    release_all();
    timed = (struct ms4_mul){ .n_rows = n_rows, .n_cols = n_cols, .n_tokens = n_tokens, .y_stride = (size_t)n_rows };
    timed.row_bytes = (size_t)(n_cols / info->weights * info->bytes);
    timed.x_stride = quantized() ? (size_t)n_cols / SUPERBLOCK * sizeof(block_q8) : (size_t)n_cols * 4;
    uint8_t *w = guarded(timed.row_bytes * (size_t)n_rows), *x = guarded(timed.x_stride * (size_t)n_tokens);
    int n_fill = n_rows < 16 ? n_rows : 16;
    fill_weights(mul_type, w, (size_t)n_fill * (size_t)n_cols, 0);
    for (int r = n_fill; r < n_rows; r++)
        memcpy(w + (size_t)r * timed.row_bytes, w + (size_t)(r % 16) * timed.row_bytes, timed.row_bytes);
    for (int t = 0; t < n_tokens; t++) {
        float *row = (float *)(void *)(x + (size_t)t * timed.x_stride);
        if (quantized()) fill_blocks((block_q8 *)row, (size_t)n_cols, 0);
        else for (int k = 0; k < n_cols; k++) row[k] = uniform();
    }
    timed.w = w;
    timed.x = x;
    timed.y = guarded_floats((size_t)n_rows * (size_t)n_tokens);
    return best_time(run_timed, ops);
}
static void time_mul(void) {
    size_t row_bytes = (size_t)(4096 / ms4_type_infos[mul_type].weights * ms4_type_infos[mul_type].bytes);
    int large = (int)(96e6 / (double)row_bytes), small = (int)(256e3 / (double)row_bytes);
    double from_ram = time_shape(fast, large, 1), from_cache = time_shape(fast, small, 1);
    double many = time_shape(fast, 512, 64), slow = time_shape(ref, 4, 1);
    printf("  decode %5.1f GB/s (cached %5.1f GB/s, %5.1f ns per 256 weights, %5.0fx ref)  prefill %6.1f GMAC/s",
           (double)large * (double)row_bytes / from_ram * 1e-9, (double)small * (double)row_bytes / from_cache * 1e-9,
           from_cache / small / 16 * 1e9, slow / 4 / (from_cache / small), 512 * 4096 * 64.0 / many * 1e-9);
}
#endif
