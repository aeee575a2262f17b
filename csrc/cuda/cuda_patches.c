/* cuda_patches.c -- the vision tower's own steps (SPEC 3.3, 3.4): attention of all patches to all, merging, biases. */
#include "cuda/cuda_device.h"
#include <math.h>

/* The angles of the image's grid, uploaded once. */
static int rope(cuda_device *d, const patch_grid *g, size_t d_head) {
    const int32_t most = g->rows > g->columns ? g->rows : g->columns;
    const size_t bytes = (size_t)most * d_head * sizeof *g->rope;
    if (d->rope_of == g->rope) return MS4_OK;
    TRY(gpu_need(d->g, &d->rope, bytes));
    TRY(gpu_upload(d->g, d->rope.at, g->rope, bytes));
    d->rope_of = g->rope;
    return MS4_OK;
}
int cuda_attend_patches(device *base, const patch_grid *g) {
    cuda_device *d = (cuda_device *)base;
    const size_t width = d->rows[BUF_Q].width, d_head = width / (size_t)g->n_head;
    const int32_t n = g->rows * g->columns;
    if (cuda_stopped(d)) return MS4_OK;
    TRY(rope(d, g, d_head));
    const rotate_args rotate = { cuda_row(d, BUF_Q, 0), cuda_row(d, BUF_K, 0), d->rope.at, width, n, g->columns,
                                 g->n_head, (int32_t)d_head, 1 / sqrtf((float)d_head), 0 };
    const attend_patches_args args = { cuda_row(d, BUF_Q, 0), cuda_row(d, BUF_K, 0), cuda_row(d, BUF_V, 0),
                                       cuda_row(d, BUF_X, 0), width, n, g->n_head, (int32_t)d_head, 0 };
    TRY(gpu_launch(d->g, KERNEL_rotate_patches, &rotate, (gpu_grid){ n, 1, 1 }, 0));
    TRY(gpu_launch(d->g, KERNEL_attend_patches, &args,
                   (gpu_grid){ (n + ATTEND_PATCHES - 1) / ATTEND_PATCHES, g->n_head, 1 }, 0));
    return cuda_quantize(d, BUF_X, 0, n);
}
int cuda_merge_patches(device *base, const patch_grid *g, buffer from, int32_t first, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    const cuda_rows *f = &d->rows[from], *to = &d->rows[BUF_MERGED];
    const merge_args args = { f->f, to->f, to->q, f->width, to->width, to->blocks, first, n, g->columns, g->merge,
                              (int32_t)f->width, 0 };
    return gpu_launch(d->g, KERNEL_merge_patches, &args, (gpu_grid){ n, 1, 1 }, 0);
}
int cuda_bias(device *base, buffer b, const vector *bias, int32_t gelu, int32_t n) {
    cuda_device *d = (cuda_device *)base;
    const cuda_rows *r = &d->rows[b];
    const bias_args args = { r->f, bias->data, r->q, r->width, r->blocks, n, (int32_t)r->width, gelu, 0 };
    return gpu_launch(d->g, KERNEL_bias_rows, &args, (gpu_grid){ n, 1, 1 }, 0);
}
