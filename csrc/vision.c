/* vision.c -- the vision tower and its projector: pixels in, rows for [IMG] positions out (SPEC 3.3, 3.4).
 *
 * Same kernels, threads and block types as the text model.  A patch attends to all patches of its image and to no
 * others; keys are taken a tile at a time with a running softmax, so memory grows with the patches, not with their
 * square.  FFN and projector go through FFN_TOKENS patches at a time.
 */
#include "model.h"
#include <string.h>

#define FFN_TOKENS 2048
#define QUERY_GROUP 128        /* queries of one attention item */

typedef struct { matrix m[MS4_N_VISION_ROLES]; float *ln1, *ln2; } vision_layer;

struct ms4_vision {
    ms4_engine *engine;
    ms4_vision_shape shape;
    files *files;
    vision_layer *layers;                      /* n_layer, and one more for what is in no layer */
    float *pre_ln, *input_norm, *bias_1, *bias_2;
    atomic_int stop;
    _Atomic uint64_t done;
};

/* One image on its way through the tower; n = rows x columns patches, all arrays n rows unless said otherwise. */
typedef struct {
    ms4_vision *v;
    int32_t rows, columns, n;
    float *h, *x, *q, *k, *value, *kt;         /* d_model wide; kt: per head, tiles of keys transposed */
    float *hidden, *merged;                    /* FFN_TOKENS rows: gate and up; projector */
    block_q8 *quants;                          /* FFN_TOKENS rows of the widest activation */
    float *rope;                               /* d_head: cos, sin of each pair */
    const vision_layer *layer;
} image;

static int32_t d_head(const ms4_vision *v) { return v->shape.d_model / v->shape.n_head; }

/* --- products ----------------------------------------------------------------------------- */
typedef struct { const struct ms4_ops *ops; const float *x; size_t stride; block_q8 *out; size_t width; int32_t n; } quantise_job;
static void quantise_item(void *context, int32_t item, int32_t thread) {
    const quantise_job *job = context;
    (void)thread;
    for (int32_t t = item * 16; t < int_min(item * 16 + 16, job->n); t++)
        job->ops->quantize(job->out + (size_t)t * blocks_of(job->width), job->x + (size_t)t * job->stride, job->width);
}
/* y = m x (add: y += m x) for n rows x of m->n_cols floats, FFN_TOKENS at a time. */
static void multiply(image *im, const matrix *m, const float *x, size_t x_stride, int32_t n, float *y, size_t y_stride, int add) {
    ms4_engine *e = im->v->engine;
    for (int32_t t = 0; t < n; t += FFN_TOKENS) {
        int32_t part = int_min(FFN_TOKENS, n - t);
        const float *from = x + (size_t)t * x_stride;
        if (matrix_quantised(m)) {
            quantise_job job = { e->ops, from, x_stride, im->quants, (size_t)m->n_cols, part };
            pool_run(e->pool, quantise_item, &job, (part + 15) / 16, &im->v->stop);
        }
        product p = { m, { (float *)from, im->quants, x_stride, blocks_of((size_t)m->n_cols) }, y + (size_t)t * y_stride, y_stride, add };
        matmul(e->pool, e->ops, &p, 1, part, &im->v->stop);
    }
}
/* --- element-wise ------------------------------------------------------------------------- */
typedef struct { image *im; const float *x, *weight; float *y; int32_t n; } norm_job;
static void norm_item(void *context, int32_t item, int32_t thread) {
    const norm_job *job = context;
    size_t d = (size_t)job->im->v->shape.d_model;
    (void)thread;
    for (int32_t t = item * 16; t < int_min(item * 16 + 16, job->n); t++)
        job->im->v->engine->ops->rms_norm(job->y + (size_t)t * d, job->x + (size_t)t * d, job->weight, d, job->im->v->shape.eps);
}
static void normalise(image *im, const float *x, const float *weight, float *y) {
    norm_job job = { im, x, weight, y, im->n };
    pool_run(im->v->engine->pool, norm_item, &job, (im->n + 15) / 16, &im->v->stop);
}
static float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

typedef struct { image *im; float *gate; size_t width; int32_t n; } activate_job;
/* rows of [gate | up], width floats each -> activation(gate) * up in place of gate */
static void activate_item(void *context, int32_t item, int32_t thread) {
    const activate_job *job = context;
    (void)thread;
    for (int32_t t = item * 16; t < int_min(item * 16 + 16, job->n); t++) {
        float *gate = job->gate + (size_t)t * 2 * job->width, *up = gate + job->width;
        if (!job->im->v->shape.gelu) job->im->v->engine->ops->silu_mul(gate, gate, up, job->width);
        else
            for (size_t i = 0; i < job->width; i++) gate[i] = gelu(gate[i]) * up[i];
    }
}
/* --- attention ---------------------------------------------------------------------------- */
/* Rotates a head in place: the first half of its pairs by the patch's row, the second by its column. */
static void rotate_item(void *context, int32_t item, int32_t thread) {
    image *im = context;
    const ms4_vision_shape *s = &im->v->shape;
    int32_t width = d_head(im->v);
    float scale = 1 / sqrtf((float)width);
    (void)thread;
    for (int32_t t = item * 16; t < int_min(item * 16 + 16, im->n); t++) {
        const float *row = im->rope + (size_t)(t / im->columns) * (size_t)width;
        const float *column = im->rope + (size_t)(t % im->columns) * (size_t)width;
        for (int32_t i = 0; i < s->d_model; i += 2) {
            int32_t at = i % width;
            const float *turn = (at < width / 2 ? row : column) + at;
            float *q = im->q + (size_t)t * (size_t)s->d_model + i, *k = im->k + (size_t)t * (size_t)s->d_model + i;
            float q0 = q[0] * scale, q1 = q[1] * scale, k0 = k[0], k1 = k[1];
            q[0] = q0 * turn[0] - q1 * turn[1];
            q[1] = q0 * turn[1] + q1 * turn[0];
            k[0] = k0 * turn[0] - k1 * turn[1];
            k[1] = k0 * turn[1] + k1 * turn[0];
        }
    }
}
static int32_t n_tiles(const image *im) { return (im->n + ATTEND_KEYS - 1) / ATTEND_KEYS; }
static void transpose_item(void *context, int32_t item, int32_t thread) {
    image *im = context;
    size_t d = (size_t)im->v->shape.d_model, width = (size_t)d_head(im->v);
    int32_t tile = item, n = int_min(ATTEND_KEYS, im->n - tile * ATTEND_KEYS);
    (void)thread;
    for (size_t head = 0; head < (size_t)im->v->shape.n_head; head++)
        im->v->engine->ops->transpose_keys(im->kt + (head * (size_t)n_tiles(im) + (size_t)tile) * ATTEND_KEYS * width,
                                           im->k + (size_t)tile * ATTEND_KEYS * d + head * width, d, n, (int32_t)width);
}
/* An item is a head and a group of queries: x = softmax(q k) v */
static void attend_item(void *context, int32_t item, int32_t thread) {
    image *im = context;
    const ms4_vision_shape *s = &im->v->shape;
    size_t d = (size_t)s->d_model, width = (size_t)d_head(im->v), head = (size_t)(item % s->n_head);
    int32_t first = item / s->n_head * QUERY_GROUP, end = int_min(first + QUERY_GROUP, im->n), tiles = n_tiles(im);
    float m[QUERY_GROUP], l[QUERY_GROUP];
    (void)thread;
    for (int32_t t = first; t < end; t++) {
        m[t - first] = -INFINITY;
        l[t - first] = 0;
        memset(im->x + (size_t)t * d + head * width, 0, width * sizeof(float));
    }
    for (int32_t tile = 0; tile < tiles; tile++) {
        int32_t key = tile * ATTEND_KEYS, n_keys[ATTEND_ROWS];
        for (int32_t i = 0; i < ATTEND_ROWS; i++) n_keys[i] = int_min(ATTEND_KEYS, im->n - key);
        for (int32_t t = first; t < end; t += ATTEND_ROWS) {
            struct ms4_attend a = {
                .q = im->q + (size_t)t * d + head * width, .q_stride = d, .o = im->x + (size_t)t * d + head * width, .o_stride = d,
                .kt = im->kt + (head * (size_t)tiles + (size_t)tile) * ATTEND_KEYS * width,
                .v = im->value + (size_t)key * d + head * width, .v_stride = d, .m = m + t - first, .l = l + t - first,
                .n_keys = n_keys, .n_q = int_min(ATTEND_ROWS, end - t), .d_k = (int32_t)width, .d_v = (int32_t)width };
            im->v->engine->ops->attend(&a);
        }
    }
    for (int32_t t = first; t < end; t++)
        for (size_t i = 0; i < width; i++) im->x[(size_t)t * d + head * width + i] /= l[t - first];
}
/* --- the tower ---------------------------------------------------------------------------- */
static void tower_layer(image *im) {
    ms4_vision *v = im->v;
    const matrix *w = im->layer->m;
    pool *p = v->engine->pool;
    size_t d = (size_t)v->shape.d_model, d_ffn = (size_t)v->shape.d_ffn;
    normalise(im, im->h, im->layer->ln1, im->x);
    multiply(im, &w[MS4_V_ATTN_Q], im->x, d, im->n, im->q, d, 0);
    multiply(im, &w[MS4_V_ATTN_K], im->x, d, im->n, im->k, d, 0);
    multiply(im, &w[MS4_V_ATTN_V], im->x, d, im->n, im->value, d, 0);
    pool_run(p, rotate_item, im, (im->n + 15) / 16, &v->stop);
    pool_run(p, transpose_item, im, n_tiles(im), &v->stop);
    pool_run(p, attend_item, im, (im->n + QUERY_GROUP - 1) / QUERY_GROUP * v->shape.n_head, &v->stop);
    multiply(im, &w[MS4_V_ATTN_OUT], im->x, d, im->n, im->h, d, 1);
    normalise(im, im->h, im->layer->ln2, im->x);
    for (int32_t t = 0; t < im->n; t += FFN_TOKENS) {
        int32_t n = int_min(FFN_TOKENS, im->n - t);
        multiply(im, &w[MS4_V_FFN_GATE], im->x + (size_t)t * d, d, n, im->hidden, 2 * d_ffn, 0);
        multiply(im, &w[MS4_V_FFN_UP], im->x + (size_t)t * d, d, n, im->hidden + d_ffn, 2 * d_ffn, 0);
        activate_job job = { im, im->hidden, d_ffn, n };
        pool_run(p, activate_item, &job, (n + 15) / 16, &v->stop);
        multiply(im, &w[MS4_V_FFN_DOWN], im->hidden, 2 * d_ffn, n, im->h + (size_t)t * d, d, 1);
    }
}
/* pixels -> h: each patch times the convolution, in the order channel, row, column; then ln_pre */
static void embed_patches(image *im, const float *pixels) {
    const ms4_vision_shape *s = &im->v->shape;
    size_t side = (size_t)s->patch_size, width = side * (size_t)im->columns, height = side * (size_t)im->rows;
    size_t d = (size_t)s->d_model, patch = 3 * side * side;
    for (int32_t t = 0; t < im->n; t += FFN_TOKENS) {
        int32_t n = int_min(FFN_TOKENS, im->n - t);
        for (int32_t i = 0; i < n; i++) {
            size_t y = (size_t)((t + i) / im->columns) * side, x = (size_t)((t + i) % im->columns) * side;
            float *to = im->hidden + (size_t)i * patch;
            for (size_t c = 0; c < 3; c++)
                for (size_t r = 0; r < side; r++, to += side)
                    memcpy(to, pixels + (c * height + y + r) * width + x, side * sizeof *to);
        }
        multiply(im, &im->v->layers[s->n_layer].m[MS4_V_PATCH_EMBD], im->hidden, patch, n, im->h + (size_t)t * d, d, 0);
    }
    normalise(im, im->h, im->v->pre_ln, im->h);
}
/* Row `first + i` of the merged grid: its merge x merge patches, channel-major (SPEC 3.4). */
static void gather_merged(const image *im, int32_t first, int32_t n) {
    size_t d = (size_t)im->v->shape.d_model, m = (size_t)im->v->shape.merge, columns = (size_t)im->columns / m;
    for (size_t i = 0; i < (size_t)n; i++) {
        size_t y = ((size_t)first + i) / columns * m, x = ((size_t)first + i) % columns * m;
        float *to = im->merged + i * d * m * m;
        for (size_t dy = 0; dy < m; dy++)
            for (size_t dx = 0; dx < m; dx++) {
                const float *from = im->x + ((y + dy) * (size_t)im->columns + x + dx) * d;
                for (size_t c = 0; c < d; c++) to[c * m * m + dy * m + dx] = from[c];
            }
    }
}
static void add_bias(float *y, const float *bias, size_t width, int32_t n) {
    for (int32_t t = 0; bias && t < n; t++)
        for (size_t i = 0; i < width; i++) y[(size_t)t * width + i] += bias[i];
}
static void project(image *im, float *features) {
    ms4_vision *v = im->v;
    const matrix *w = v->layers[v->shape.n_layer].m;
    int32_t merge = v->shape.merge, total = im->n / (merge * merge);
    size_t d = (size_t)v->shape.d_model, d_out = (size_t)v->shape.d_out, d_1 = (size_t)w[MS4_MM_1].n_rows;
    float *x = im->h;
    if (v->input_norm) normalise(im, im->h, v->input_norm, x = im->x);
    for (int32_t t = 0; t < total; t += FFN_TOKENS / 4) {
        int32_t n = int_min(FFN_TOKENS / 4, total - t);
        const float *in = x + (size_t)t * d;
        if (w[MS4_MM_PATCH_MERGER].data) {
            gather_merged(im, t, n);
            multiply(im, &w[MS4_MM_PATCH_MERGER], im->merged, d * (size_t)(merge * merge), n, im->q, d, 0);
            in = im->q;
        }
        multiply(im, &w[MS4_MM_1], in, d, n, im->merged, d_1, 0);
        add_bias(im->merged, v->bias_1, d_1, n);
        for (size_t i = 0; i < (size_t)n * d_1; i++) im->merged[i] = gelu(im->merged[i]);
        multiply(im, &w[MS4_MM_2], im->merged, d_1, n, features + (size_t)t * d_out, d_out, 0);
        add_bias(features + (size_t)t * d_out, v->bias_2, d_out, n);
    }
}
static void fill_rope(image *im) {
    int32_t width = d_head(im->v), most = im->rows > im->columns ? im->rows : im->columns;
    for (int32_t pos = 0; pos < most; pos++)
        for (int32_t pair = 0; pair < width / 2; pair++) {
            int32_t f = pair < width / 4 ? 2 * pair : 2 * (pair - width / 4) + 1;     /* rows take even, columns odd */
            double angle = pos * pow(im->v->shape.rope_theta, -2.0 * f / width);
            im->rope[(size_t)pos * (size_t)width + 2 * (size_t)pair] = (float)cos(angle);
            im->rope[(size_t)pos * (size_t)width + 2 * (size_t)pair + 1] = (float)sin(angle);
        }
}
static int image_open(image *im) {
    const ms4_vision_shape *s = &im->v->shape;
    const matrix *w = im->v->layers[s->n_layer].m;
    size_t n = (size_t)im->n, d = (size_t)s->d_model, merged = d * (size_t)(s->merge * s->merge);
    size_t widest = size_max(size_max(merged, (size_t)s->d_ffn), size_max((size_t)w[MS4_MM_1].n_rows, 3 * (size_t)(s->patch_size * s->patch_size)));
    size_t chunk = n < FFN_TOKENS ? n : FFN_TOKENS, most = (size_t)(im->rows > im->columns ? im->rows : im->columns);
    im->h = memory_take(n * d, sizeof(float));
    im->x = memory_take(n * d, sizeof(float));
    im->q = memory_take(n * d, sizeof(float));
    im->k = memory_take(n * d, sizeof(float));
    im->value = memory_take((size_t)n_tiles(im) * ATTEND_KEYS * d, sizeof(float));
    im->kt = memory_take((size_t)n_tiles(im) * ATTEND_KEYS * d, sizeof(float));
    im->hidden = memory_take(chunk * size_max(2 * (size_t)s->d_ffn, 3 * (size_t)(s->patch_size * s->patch_size)), sizeof(float));
    im->merged = memory_take(chunk * size_max(merged, (size_t)w[MS4_MM_1].n_rows), sizeof(float));
    im->quants = memory_take(chunk * blocks_of(widest), sizeof(block_q8));
    im->rope = memory_take(most * (size_t)d_head(im->v), sizeof(float));
    FAIL_IF(!im->h || !im->x || !im->q || !im->k || !im->value || !im->kt || !im->hidden || !im->merged || !im->quants || !im->rope,
            MS4_ENOMEM, "no memory for an image of %d patches; lower --image-max-tokens", im->n);
    return MS4_OK;
}
static void image_close(image *im) {
    void *all[] = { im->h, im->x, im->q, im->k, im->value, im->kt, im->hidden, im->merged, im->quants, im->rope };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) memory_give(all[i]);
}
static int run_tower(image *im, const float *pixels, float *features) {
    ms4_vision *v = im->v;
    TRY(image_open(im));
    fill_rope(im);
    embed_patches(im, pixels);
    for (int32_t i = 0; i < v->shape.n_layer; i++) {
        im->layer = &v->layers[i];
        tower_layer(im);
        FAIL_IF(atomic_load(&v->stop), MS4_ECANCELED, "canceled");
        atomic_fetch_add(&v->done, 1);
    }
    project(im, features);
    FAIL_IF(atomic_load(&v->stop), MS4_ECANCELED, "canceled");
    size_t n = (size_t)(im->n / (v->shape.merge * v->shape.merge)) * (size_t)v->shape.d_out;
    for (size_t i = 0; i < n; i++)
        FAIL_IF(!isfinite(features[i]), MS4_ENUMBER, "the vision tower gave a number that is not finite; the mmproj file is damaged");
    return files_check(v->files);
}
int ms4_vision_encode(ms4_vision *v, const float *pixels, int32_t width, int32_t height, float *features) {
    int32_t side = v->shape.patch_size * v->shape.merge;
    FAIL_IF(width < side || height < side || width % side || height % side || width > 1 << 14 || height > 1 << 14, MS4_EARG,
            "an image of %d x %d pixels: both sides must be multiples of %d", width, height, side);
    image im = { .v = v, .rows = height / v->shape.patch_size, .columns = width / v->shape.patch_size };
    im.n = im.rows * im.columns;
    pthread_mutex_lock(&v->engine->turn);
    atomic_store(&v->stop, 0);
    atomic_store(&v->done, 0);
    int status = run_tower(&im, pixels, features);
    image_close(&im);
    pthread_mutex_unlock(&v->engine->turn);
    return status;
}
void ms4_vision_cancel(ms4_vision *v) { atomic_store(&v->stop, 1); }
void ms4_vision_progress(const ms4_vision *v, uint64_t *done, uint64_t *total) {
    *done = atomic_load(&v->done);
    *total = (uint64_t)v->shape.n_layer;
}
/* --- opening ------------------------------------------------------------------------------ */
static int want(const matrix *m, const char *name, int32_t layer, int32_t columns, int32_t rows) {
    FAIL_IF(!m->data, MS4_EMODEL, "mmproj: %s of layer %d is missing", name, layer);
    FAIL_IF(m->n_cols != columns || m->n_rows != rows, MS4_EMODEL, "mmproj: %s of layer %d is %d x %d; expected %d x %d", name,
            layer, m->n_cols, m->n_rows, columns, rows);
    return MS4_OK;
}
/* A vector as floats of our own; an absent optional one stays NULL. */
static int vector(const ms4_vision *v, const matrix *m, const char *name, int32_t layer, int32_t n, int optional, float **out) {
    if (optional && !m->data) return MS4_OK;
    TRY(want(m, name, layer, n, 1));
    *out = memory_take((size_t)n, sizeof **out);
    FAIL_IF(!*out, MS4_ENOMEM, "no memory for %s", name);
    v->engine->ops->dequantize[m->type](*out, m->data, (size_t)n);
    return MS4_OK;
}
static int check_layer(ms4_vision *v, int32_t i) {
    static const struct { int32_t role; const char *name; } square[] = {
        { MS4_V_ATTN_Q, "attn_q" }, { MS4_V_ATTN_K, "attn_k" }, { MS4_V_ATTN_V, "attn_v" }, { MS4_V_ATTN_OUT, "attn_out" } };
    vision_layer *l = &v->layers[i];
    int32_t d = v->shape.d_model, d_ffn = v->shape.d_ffn;
    for (size_t j = 0; j < sizeof square / sizeof *square; j++) TRY(want(&l->m[square[j].role], square[j].name, i, d, d));
    TRY(want(&l->m[MS4_V_FFN_GATE], "ffn_gate", i, d, d_ffn));
    TRY(want(&l->m[MS4_V_FFN_UP], "ffn_up", i, d, d_ffn));
    TRY(want(&l->m[MS4_V_FFN_DOWN], "ffn_down", i, d_ffn, d));
    TRY(vector(v, &l->m[MS4_V_LN1], "ln1", i, d, 0, &l->ln1));
    return vector(v, &l->m[MS4_V_LN2], "ln2", i, d, 0, &l->ln2);
}
static int check_projector(ms4_vision *v) {
    const matrix *w = v->layers[v->shape.n_layer].m;
    int32_t d = v->shape.d_model, merge = v->shape.merge, d_1 = w[MS4_MM_1].n_rows;
    TRY(want(&w[MS4_V_PATCH_EMBD], "patch_embd", -1, 3 * v->shape.patch_size * v->shape.patch_size, d));
    TRY(vector(v, &w[MS4_V_PRE_LN], "pre_ln", -1, d, 0, &v->pre_ln));
    TRY(vector(v, &w[MS4_MM_INPUT_NORM], "mm.input_norm", -1, d, 1, &v->input_norm));
    if (merge > 1) TRY(want(&w[MS4_MM_PATCH_MERGER], "mm.patch_merger", -1, d * merge * merge, d));
    FAIL_IF(merge == 1 && w[MS4_MM_PATCH_MERGER].data, MS4_EMODEL, "mmproj: a patch merger, but merge size 1");
    TRY(want(&w[MS4_MM_1], "mm.1", -1, d, d_1));
    TRY(want(&w[MS4_MM_2], "mm.2", -1, d_1, v->shape.d_out));
    TRY(vector(v, &w[MS4_MM_1_BIAS], "mm.1.bias", -1, d_1, 1, &v->bias_1));
    return vector(v, &w[MS4_MM_2_BIAS], "mm.2.bias", -1, v->shape.d_out, 1, &v->bias_2);
}
static int open_vision(ms4_vision *v, const ms4_tensor *tensors, size_t n_tensors, const char *path) {
    const ms4_vision_shape *s = &v->shape;
    files_options how = { .load = MS4_LOAD_MAP };
    FAIL_IF(s->d_out != v->engine->shape.d_model, MS4_EMODEL, "%s: projects to %d values; the text model takes %d", path, s->d_out,
            v->engine->shape.d_model);
    FAIL_IF(s->n_layer < 1 || s->n_layer > 1024 || s->n_head < 1 || s->d_model < 1 || s->d_model > 1 << 16 || s->d_model % s->n_head
                || d_head(v) % 8 || s->d_ffn < 1 || s->d_ffn > 1 << 20 || s->patch_size < 1 || s->patch_size > 256 || s->merge < 1
                || s->merge > 8 || !(s->eps >= 0) || !(s->rope_theta > 0),
            MS4_EMODEL, "%s: a vision tower of this shape is not supported", path);
    v->layers = memory_take((size_t)s->n_layer + 1, sizeof *v->layers);
    FAIL_IF(!v->layers, MS4_ENOMEM, "no memory for the vision tower");
    TRY(files_open(&path, 1, &how, v->engine->pool, &v->files));
    for (size_t i = 0; i < n_tensors; i++) {
        const ms4_tensor *t = &tensors[i];
        FAIL_IF(t->role < 0 || t->role >= MS4_N_VISION_ROLES || t->layer < -1 || t->layer >= s->n_layer || t->scales, MS4_EMODEL,
                "%s: tensor %zu has role %d in layer %d", path, i, t->role, t->layer);
        matrix *place = &v->layers[t->layer < 0 ? s->n_layer : t->layer].m[t->role];
        FAIL_IF(place->data, MS4_EMODEL, "%s: tensor role %d of layer %d appears twice", path, t->role, t->layer);
        TRY(matrix_bind(v->files, t, place));
    }
    for (int32_t i = 0; i < s->n_layer; i++) TRY(check_layer(v, i));
    return check_projector(v);
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
    for (int32_t i = 0; v->layers && i < v->shape.n_layer; i++) {
        memory_give(v->layers[i].ln1);
        memory_give(v->layers[i].ln2);
    }
    memory_give(v->layers);
    memory_give(v->pre_ln);
    memory_give(v->input_norm);
    memory_give(v->bias_1);
    memory_give(v->bias_2);
    files_close(v->files);
    memory_give(v);
}
