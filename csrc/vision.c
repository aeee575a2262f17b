/* vision.c -- the vision tower and its projector: pixels in, rows for [IMG] positions out (SPEC 3.3, 3.4).
 *
 * A second program over the same device calls as the text model's, with buffers of its own, which live as long as an
 * image takes.  It gives way to steps of the text model after every layer.
 */
#include "cpu/cpu_device.h"
#include "engine.h"
#include "error.h"
#include "memory.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

#define FFN_PATCHES 2048       /* patches that go through an FFN, or come in, together */
#define PROJECTED 512          /* rows that go through the projector together */

struct ms4_vision {
    ms4_engine *engine;
    ms4_vision_shape shape;
    files *files;
    tower_weights weights;                                    /* in host memory */
    cuda_weights on_card;
    const tower_weights *at_home;                             /* the weights where the tower is computed */
    gpu *g;                                                   /* NULL: by the CPU */
    _Atomic uint64_t done;
};
/* One image on its way through the tower. */
typedef struct {
    ms4_vision *v;
    device *d;
    patch_grid grid;
    float *rope, *patches;     /* patches: FFN_PATCHES rows, on their way in */
    int32_t n;
    const int32_t *stop;
} image;

static int32_t d_head(const ms4_vision *v) { return v->shape.d_model / v->shape.n_head; }
static int32_t patch_floats(const ms4_vision *v) { return 3 * v->shape.patch_size * v->shape.patch_size; }
static int is_stopped(const image *im) { return im->stop && atomic_load((const atomic_int *)im->stop); }

/* --- the program ---------------------------------------------------------------------------- */
static int tower_layer_forward(const image *im, const tower_layer *w) {
    device *d = im->d;
    const float eps = im->v->shape.eps;
    const product first[] = { { .m = &w->q, .x = BUF_X, .y = BUF_Q }, { .m = &w->k, .x = BUF_X, .y = BUF_K },
                              { .m = &w->v, .x = BUF_X, .y = BUF_V } };
    const product out = { .m = &w->out, .x = BUF_X, .y = BUF_H, .add = 1 };
    TRY(DO(d, norm, BUF_H, &w->ln1, eps, BUF_X, im->n));
    TRY(DO(d, products, first, 3, im->n));
    TRY(DO(d, attend_patches, &im->grid));
    TRY(DO(d, products, &out, 1, im->n));
    TRY(DO(d, norm, BUF_H, &w->ln2, eps, BUF_X, im->n));
    for (int32_t t = 0; t < im->n; t += FFN_PATCHES) {
        const int32_t n = int_min(FFN_PATCHES, im->n - t);
        const ffn_share share = { .on = d, .every = &w->ffn, .row = t, .n = n, .whole = 1 };
        TRY(DO(d, ffn, &share, NULL));
    }
    return MS4_OK;
}
/* pixels -> H: each patch times the convolution, in the order channel, row, column; then ln_pre */
static int embed_patches(const image *im, const float *pixels) {
    const ms4_vision *v = im->v;
    const size_t side = (size_t)v->shape.patch_size, columns = (size_t)im->grid.columns;
    const size_t width = side * columns, height = side * (size_t)im->grid.rows;
    for (int32_t t = 0; t < im->n; t += FFN_PATCHES) {
        const int32_t n = int_min(FFN_PATCHES, im->n - t);
        const product p = { .m = &v->at_home->patch_embd, .x = BUF_PATCH, .y = BUF_H, .y_row = t };
        float *to = im->patches;
        for (size_t i = (size_t)t; i < (size_t)(t + n); i++)
            for (size_t c = 0; c < 3; c++)
                for (size_t r = 0; r < side; r++, to += side) {
                    const size_t row = c * height + i / columns * side + r, column = i % columns * side;
                    memcpy(to, pixels + row * width + column, side * sizeof *to);
                }
        TRY(DO(im->d, write, BUF_PATCH, n, im->patches));
        TRY(DO(im->d, products, &p, 1, n));
    }
    return DO(im->d, norm, BUF_H, &v->at_home->pre_ln, v->shape.eps, BUF_H, im->n);
}
/* H -> features: norm, merge x merge patches to one row, two products with GELU between. */
static int project(const image *im, float *features) {
    const tower_weights *w = im->v->at_home;
    const vector none = { 0 };
    device *d = im->d;
    const int32_t total = im->n / (im->grid.merge * im->grid.merge);
    const buffer from = w->input_norm.data ? BUF_X : BUF_H, merged = w->patch_merger.data ? BUF_O : BUF_MERGED;
    const product merger = { .m = &w->patch_merger, .x = BUF_MERGED, .y = BUF_O };
    const product one = { .m = &w->mm_1, .x = merged, .y = BUF_HIDDEN };
    const product two = { .m = &w->mm_2, .x = BUF_HIDDEN, .y = BUF_FEATURES };
    if (w->input_norm.data) TRY(DO(d, norm, BUF_H, &w->input_norm, im->v->shape.eps, BUF_X, im->n));
    for (int32_t t = 0; t < total; t += PROJECTED) {
        const int32_t n = int_min(PROJECTED, total - t);
        TRY(DO(d, merge_patches, &im->grid, from, t, n));
        if (merged == BUF_O) {
            TRY(DO(d, products, &merger, 1, n));
            TRY(DO(d, bias, BUF_O, &none, 0, n));
        }
        TRY(DO(d, products, &one, 1, n));
        TRY(DO(d, bias, BUF_HIDDEN, &w->bias_1, 1, n));
        TRY(DO(d, products, &two, 1, n));
        TRY(DO(d, bias, BUF_FEATURES, &w->bias_2, 0, n));
        TRY(DO(d, read, BUF_FEATURES, n, features + (size_t)t * (size_t)im->v->shape.d_out));
    }
    return MS4_OK;
}
/* --- an image -------------------------------------------------------------------------------- */
static void fill_rope(const image *im, int32_t most) {
    const int32_t width = d_head(im->v);
    float *rope = im->rope;
    for (int32_t pos = 0; pos < most; pos++)
        for (int32_t pair = 0; pair < width / 2; pair++) {
            int32_t f = pair < width / 4 ? 2 * pair : 2 * (pair - width / 4) + 1;     /* rows take even, columns odd */
            double angle = pos * pow(im->v->shape.rope_theta, -2.0 * f / width);
            *rope++ = (float)cos(angle);
            *rope++ = (float)sin(angle);
        }
}
static int open_device(const ms4_vision *v, device **out) {
    const ms4_engine *e = v->engine;
    return v->g ? cuda_device_open(v->g, e->ops, out) : cpu_device_open(e->ops, e->pool, out);
}
static int image_open(image *im) {
    const ms4_vision_shape *s = &im->v->shape;
    const tower_weights *w = im->v->at_home;
    const size_t d = (size_t)s->d_model, merged = d * (size_t)(s->merge * s->merge);
    const int32_t n = im->n, blocks = w->quantized;
    const int32_t most = im->grid.rows > im->grid.columns ? im->grid.rows : im->grid.columns;
    const int32_t chunk = int_min(n, FFN_PATCHES), out = int_min(n / (s->merge * s->merge), PROJECTED);
    const buffer_shape shapes[N_BUFFERS] = {
        [BUF_H] = { d, n, 0 }, [BUF_X] = { d, n, blocks }, [BUF_Q] = { d, n, 0 }, [BUF_K] = { d, n, 0 },
        [BUF_V] = { d, (n + ATTEND_KEYS - 1) / ATTEND_KEYS * ATTEND_KEYS, 0 },
        [BUF_PATCH] = { (size_t)patch_floats(im->v), chunk, blocks },
        [BUF_MERGED] = { merged, out, blocks },
        [BUF_O] = { w->patch_merger.data ? d : 0, out, blocks },
        [BUF_HIDDEN] = { (size_t)w->mm_1.n_rows, out, blocks },
        [BUF_FEATURES] = { (size_t)s->d_out, out, 0 },
    };
    im->rope = memory_take((size_t)most * (size_t)d_head(im->v), sizeof *im->rope);
    im->patches = memory_take((size_t)chunk * (size_t)patch_floats(im->v), sizeof *im->patches);
    FAIL_IF(!im->rope || !im->patches, MS4_ENOMEM, "no memory for an image of %d patches; lower --image-max-tokens", n);
    fill_rope(im, most);
    im->grid.rope = im->rope;
    TRY(open_device(im->v, &im->d));
    int status = DO(im->d, begin, shapes, (const atomic_int *)im->stop);
    FAIL_IF(status == MS4_ENOMEM, MS4_ENOMEM, "no memory for an image of %d patches; lower --image-max-tokens", n);
    return status;
}
static void image_close(image *im) {
    if (im->d) im->d->ops->close(im->d);
    memory_give(im->rope);
    memory_give(im->patches);
}
static int run_tower(image *im, const float *pixels, float *features) {
    ms4_vision *v = im->v;
    turn *t = &v->engine->turn;
    turn_take(t);
    int status = embed_patches(im, pixels);
    for (int32_t i = 0; i < v->shape.n_layer && !status && !is_stopped(im); i++) {
        status = tower_layer_forward(im, &v->at_home->layers[i]);
        atomic_fetch_add(&v->done, 1);
        turn_give(t);                          /* whoever waits goes first */
        turn_take(t);
    }
    if (!status && !is_stopped(im)) status = project(im, features);
    turn_give(t);
    return status;
}
static int encode(image *im, const float *pixels, float *features) {
    atomic_store(&im->v->done, 0);
    int status = image_open(im);
    if (!status) status = run_tower(im, pixels, features);
    image_close(im);
    *im = (image){ .v = im->v, .stop = im->stop, .grid = im->grid, .n = im->n };
    return status;
}
/* The CPU does it where the card failed, or has no room any more. */
static void go_home(ms4_vision *v) {
    char why[256];
    snprintf(why, sizeof why, "%s", ms4_error());
    engine_say(v->engine, why, "the CPU computes images from now on");
    v->g = NULL;
    v->at_home = &v->weights;
}
int ms4_vision_encode(ms4_vision *v, const float *pixels, int32_t width, int32_t height, float *features,
                      const int32_t *stop) {
    const int32_t side = v->shape.patch_size * v->shape.merge;
    FAIL_IF(width < side || height < side || width % side || height % side || width > 1 << 14 || height > 1 << 14,
            MS4_EARG, "an image of %d x %d pixels: both sides must be multiples of %d", width, height, side);
    image im = { .v = v, .stop = stop,
                 .grid = { .columns = width / v->shape.patch_size, .rows = height / v->shape.patch_size,
                           .merge = v->shape.merge, .n_head = v->shape.n_head } };
    im.n = im.grid.rows * im.grid.columns;
    int status = encode(&im, pixels, features);
    if (v->g && (status == MS4_EDEVICE || status == MS4_ENOMEM)) {
        go_home(v);
        status = encode(&im, pixels, features);
    }
    TRY(status);
    FAIL_IF(is_stopped(&im), MS4_ECANCELED, "canceled");
    size_t n = (size_t)(im.n / (v->shape.merge * v->shape.merge)) * (size_t)v->shape.d_out;
    for (size_t i = 0; i < n; i++)
        FAIL_IF(!isfinite(features[i]), MS4_ENUMBER,
                "the vision tower gave a number that is not finite; the mmproj file is damaged");
    return files_check(v->files);
}
int32_t ms4_vision_on_gpu(const ms4_vision *v) { return v->g != NULL; }
void ms4_vision_progress(const ms4_vision *v, uint64_t *done, uint64_t *total) {
    *done = atomic_load(&v->done);
    *total = (uint64_t)v->shape.n_layer;
}
/* --- opening ---------------------------------------------------------------------------------- */
/* The tower to the card, if there is room for it: else the CPU computes it, as where there is no card. */
static int open_on_card(ms4_vision *v) {
    ms4_engine *e = v->engine;
    turn_take(&e->turn);
    int status = card_tower(e->card, &v->weights, &v->shape, &v->on_card);
    turn_give(&e->turn);
    if (status == MS4_ENOMEM) return MS4_OK;
    TRY(status);
    v->g = e->card->g;
    v->at_home = &v->on_card.tower;
    return MS4_OK;
}
static int open_vision(ms4_vision *v, const ms4_tensor *tensors, size_t n_tensors, const char *path) {
    const ms4_vision_shape *s = &v->shape;
    const files_options how = { .load = MS4_LOAD_MAP };
    FAIL_IF(s->d_out != v->engine->shape.d_model, MS4_EMODEL,
            "%s: projects to %d values; the text model takes %d", path, s->d_out, v->engine->shape.d_model);
    FAIL_IF(s->n_layer < 1 || s->n_layer > 1024 || s->n_head < 1 || s->d_model < 1 || s->d_model > 1 << 16
                || s->d_model % s->n_head || d_head(v) % 8 || s->d_ffn < 1 || s->d_ffn > 1 << 20 || s->patch_size < 1
                || s->patch_size > 256 || s->merge < 1 || s->merge > 8 || !(s->eps >= 0) || !(s->rope_theta > 0),
            MS4_EMODEL, "%s: a vision tower of this shape is not supported", path);
    TRY(files_open(&path, 1, &how, v->engine->pool, &v->files));
    TRY(tower_weights_open(&v->weights, s, tensors, n_tensors, v->files, v->engine->ops));
    v->at_home = &v->weights;
    return v->engine->card ? open_on_card(v) : MS4_OK;
}
int ms4_vision_open(ms4_engine *engine, const ms4_vision_shape *shape, const ms4_tensor *tensors, size_t n_tensors,
                    const char *path, ms4_vision **out) {
    ms4_vision *v = memory_take(1, sizeof *v);
    FAIL_IF(!v, MS4_ENOMEM, "no memory for the vision tower");
    v->engine = engine;
    v->shape = *shape;
    int status = open_vision(v, tensors, n_tensors, path);
    if (status) {
        ms4_vision_close(v);
        return status;
    }
    *out = v;
    return MS4_OK;
}
void ms4_vision_close(ms4_vision *v) {
    if (!v) return;
    cuda_weights_close(&v->on_card);
    tower_weights_close(&v->weights);
    files_close(v->files);
    memory_give(v);
}
