/* cuda_tokens.c -- rows in and out, norms, products, logits. */
#include "cuda/cuda_device.h"
#include "memory.h"
#include <string.h>

_Static_assert(MS4_MOST_HIGHEST <= HIGHEST_K, "a span may not ask for more than a launch can keep");
#define LOGIT_BYTES ((size_t)16 << 20)                        /* of the logits that are on the card together */

/* --- rows in and out -------------------------------------------------------------------------------------------- */
int cuda_quantize(cuda_device *d, buffer b, int32_t first, int32_t n) {
    const cuda_rows *r = &d->rows[b];
    if (!r->q) return MS4_OK;
    const quantize_args args = { cuda_row(d, b, first), cuda_blocks(d, b, first), r->width, r->blocks, n,
                                 (int32_t)r->width };
    return gpu_launch(d->g, KERNEL_quantize_rows, &args, (gpu_grid){ n, 1, 1 }, 0);
}
int cuda_write(device *base, buffer b, int32_t n, const float *from) {
    cuda_device *d = (cuda_device *)base;
    TRY(gpu_upload(d->g, cuda_row(d, b, 0), from, (size_t)n * d->rows[b].width * sizeof *from));
    return cuda_quantize(d, b, 0, n);
}
int cuda_read(device *base, buffer b, int32_t n, float *to) {
    cuda_device *d = (cuda_device *)base;
    return gpu_download(d->g, to, cuda_row(d, b, 0), (size_t)n * d->rows[b].width * sizeof *to);
}
/* The table of embeddings stays in host memory: a row is a few kilobytes, the table hundreds of megabytes. */
int cuda_embed(device *base, const matrix *m, const int32_t *tokens, const float *rows, int32_t first, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    enum { AT_ONCE = 64 };
    const size_t width = d->rows[BUF_H].width, bytes = width * sizeof(float);
    float *room = memory_take((size_t)int_min(n, AT_ONCE), bytes);
    FAIL_IF(!room, MS4_ENOMEM, "no memory for the embeddings of a step; use a smaller batch");
    int status = MS4_OK;
    for (int32_t t = 0; t < n && !status; t += AT_ONCE) {
        const int32_t part = int_min(AT_ONCE, n - t);
        for (int32_t i = 0; i < part; i++) {
            float *h = room + (size_t)i * width;
            if (tokens[t + i] == MS4_ROW) {
                memcpy(h, rows, bytes);
                rows += width;
                continue;
            }
            d->ops->dequantize[m->type](h, m->data + (size_t)tokens[t + i] * m->row_bytes, width);
            for (size_t k = 0; m->scales && k < width; k++) h[k] *= m->scales[0];
        }
        status = gpu_upload(d->g, cuda_row(d, BUF_H, first + t), room, (size_t)part * bytes);
    }
    memory_give(room);
    return status;
}
/* Rows of a buffer, as floats or as blocks, to the front: through other memory, as neighbours may overlap. */
static int gather(cuda_device *d, void *rows, size_t row_bytes, const int32_t *which, int32_t n) {
    const gather_args args = { .from = rows, .to = d->kept.at, .rows = which, .stride = row_bytes / sizeof(float),
                               .n = n, .width = (int32_t)(row_bytes / sizeof(float)) };
    TRY(gpu_launch(d->g, KERNEL_gather_rows, &args, (gpu_grid){ n, 1, 1 }, 0));
    return gpu_copy(d->g, rows, d->kept.at, (size_t)n * row_bytes);
}
int cuda_keep(device *base, const int32_t *rows, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    const cuda_rows *h = &d->rows[BUF_H], *x = &d->rows[BUF_X];
    const size_t bytes = (size_t)n * sizeof *rows, floats = h->width * sizeof(float);
    const size_t blocks = x->q ? x->blocks * sizeof *x->q : 0;
    int32_t *staged, *card;
    d->tables.ready = 0;                                      /* there are other rows now */
    TRY(gpu_need(d->g, &d->kept, (size_t)n * (floats > blocks ? floats : blocks)));
    TRY(gpu_stage(d->g, bytes, (void **)&staged, (void **)&card));
    memcpy(staged, rows, bytes);
    TRY(gpu_show(d->g, card, staged, bytes));
    TRY(gather(d, h->f, floats, card, n));
    TRY(gather(d, x->f, x->width * sizeof(float), card, n));
    return blocks ? gather(d, x->q, blocks, card, n) : MS4_OK;
}
int cuda_norm(device *base, buffer x, const vector *w, float eps, buffer y, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    const norm_args args = { cuda_row(d, x, 0), w->data, cuda_row(d, y, 0), cuda_blocks(d, y, 0), d->rows[x].width,
                             d->rows[y].width, d->rows[y].blocks, n, w->n, eps, 0 };
    return gpu_launch(d->g, KERNEL_norm_rows, &args, (gpu_grid){ n, 1, 1 }, norm_shared(w->n));
}
/* --- products --------------------------------------------------------------------------------------------------- */
gpu_product cuda_product(const matrix *m, const void *x, size_t x_stride, float *y, size_t y_stride, int32_t n) {
    return (gpu_product){ { .w = m->data, .row_bytes = m->row_bytes, .x = x, .x_stride = x_stride, .y = y,
                            .y_stride = y_stride, .scale = m->scales ? m->scales[0] : 1, .scaled = m->scales != NULL,
                            .n_rows = m->n_rows, .n_cols = m->n_cols, .n_tokens = n }, m->type };
}
int cuda_room_products(cuda_device *d, int32_t n) {
    if (n <= d->room_products) return MS4_OK;
    memory_give(d->products);
    d->room_products = 0;
    d->products = memory_take((size_t)n, sizeof *d->products);
    FAIL_IF(!d->products, MS4_ENOMEM, "no memory for the products of a step");
    d->room_products = n;
    return MS4_OK;
}
/* Row `row` of a buffer as this matrix reads it, and the bytes to the next one. */
static const void *operand(const cuda_device *d, const matrix *m, buffer b, int32_t row, size_t *stride) {
    const cuda_rows *r = &d->rows[b];
    *stride = matrix_quantized(m) ? r->blocks * sizeof *r->q : r->width * sizeof *r->f;
    return matrix_quantized(m) ? (const void *)cuda_blocks(d, b, row) : (const void *)cuda_row(d, b, row);
}
int cuda_products(device *base, const product *p, int32_t n_products, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    size_t stride;
    if (cuda_stopped(d)) return MS4_OK;
    TRY(cuda_room_products(d, n_products));
    for (int32_t i = 0; i < n_products; i++) {
        const void *x = operand(d, p[i].m, p[i].x, p[i].x_row, &stride);
        d->products[i] = cuda_product(p[i].m, x, stride, cuda_row(d, p[i].y, p[i].y_row), d->rows[p[i].y].width, n);
        d->products[i].job.add = p[i].add;
    }
    return gpu_products(d->g, d->products, n_products);
}
/* --- logits ----------------------------------------------------------------------------------------------------- */
/* *out, on the card: the highest of n rows of logits there, and behind them all their ids; launch by launch, each from
 * what the one before has kept. */
static int rank_rows(cuda_device *d, const float *logits, const row_wanted *w, int32_t n, int32_t width, float **out) {
    highest_args args = { .logits = logits, .stride = (size_t)width, .n_rows = n, .n = width, .among = w->among,
                          .k = w->k };
    const size_t most = 2 * (size_t)n * (size_t)highest_parts(width, w->k) * (size_t)w->k;
    TRY(gpu_need(d->g, &d->ranked, 2 * most * sizeof(float)));
    float *to = d->ranked.at, *other = to + most;
    for (;;) {
        const int32_t parts = highest_parts(args.n, args.k);
        args.to = to;
        args.to_ids = (int32_t *)to + (size_t)n * (size_t)parts * (size_t)w->k;
        TRY(gpu_launch(d->g, KERNEL_highest_rows, &args, (gpu_grid){ parts, n, 1 }, 0));
        *out = to;
        if (parts == 1) return MS4_OK;
        args.logits = args.to;
        args.ids = args.to_ids;
        args.n = parts * w->k;
        args.stride = (size_t)args.n;
        to = other;
        other = *out;
    }
}
/* What n rows of logits on the card want that want the same. */
static int bring_logits(cuda_device *d, const float *logits, const row_wanted *w, int32_t n, int32_t width) {
    const size_t k = (size_t)w->k, count = (size_t)n * k, bytes = 2 * count * sizeof(float);
    float *highest = NULL;
    if (k) TRY(gpu_pinned(d->g, &d->few, bytes));
    if (k) TRY(rank_rows(d, logits, w, n, width, &highest));
    TRY(cuda_bring_choices(d));
    if (!k) return gpu_download(d->g, w->out, logits, (size_t)n * (size_t)width * sizeof *logits);
    TRY(gpu_fetch(d->g, d->few.at, highest, bytes));
    TRY(gpu_wait(d->g));
    highest = d->few.at;
    for (const row_wanted *end = w + n; w < end; w++, highest += k) {
        memcpy(w->out, highest, k * sizeof *w->out);
        memcpy(w->ids, highest + count, k * sizeof *w->ids);
    }
    return MS4_OK;
}
int cuda_logits(device *base, const matrix *m, const row_wanted *w, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    const size_t width = (size_t)m->n_rows, row_bytes = width * sizeof(float);
    const int32_t most = row_bytes < LOGIT_BYTES ? (int32_t)(LOGIT_BYTES / row_bytes) : 1;
    TRY(gpu_need(d->g, &d->logits, (size_t)int_min(n, most) * row_bytes));
    for (int32_t t = 0; t < n; t += most) {
        const int32_t part = int_min(most, n - t);
        size_t stride;
        const void *x = operand(d, m, BUF_X, t, &stride);
        const gpu_product p = cuda_product(m, x, stride, d->logits.at, width, part);
        TRY(gpu_products(d->g, &p, 1));
        for (int32_t i = 0, alike; i < part; i += alike) {
            alike = wanted_alike(w + t + i, part - i, width);
            const float *logits = (const float *)d->logits.at + (size_t)i * width;
            TRY(bring_logits(d, logits, w + t + i, alike, m->n_rows));
        }
    }
    return gpu_tape(d->g, 0);
}
