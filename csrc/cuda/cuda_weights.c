/* cuda_weights.c -- brings the dense weights to the card, once. */
#include "cuda/cuda_weights.h"
#include "memory.h"
#include <string.h>

#define ALIGNED 256

/* Goes through all that is to be brought, twice: first to see how much it is, then, with memory, to bring it. */
typedef struct {
    gpu *g;
    const struct ms4_ops *ops;
    uint8_t *memory;                                          /* NULL: only count */
    size_t used;
    int status;                                               /* the first failure; nothing is brought after it */
} loader;

/* Room for so many bytes; NULL while counting, or after a failure. */
static void *place(loader *l, size_t bytes) {
    void *at = l->memory && !l->status ? l->memory + l->used : NULL;
    l->used += (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
    return at;
}
static const void *bring(loader *l, const void *from, size_t bytes) {
    void *to = place(l, bytes);
    if (to) l->status = gpu_upload(l->g, to, from, bytes);
    return to;
}
static void bring_vector(loader *l, vector *v) {
    if (v->data) v->data = bring(l, v->data, (size_t)v->n * sizeof *v->data);
}
/* Of one slice. */
static void bring_matrix(loader *l, matrix *m) {
    if (m->data) m->data = bring(l, m->data, (size_t)matrix_bytes(m));
    m->slice_bytes = (size_t)m->n_rows * m->row_bytes;
}
static void bring_ffn(loader *l, ffn_weights *f) {
    bring_matrix(l, &f->gate);
    bring_matrix(l, &f->up);
    bring_matrix(l, &f->down);
}
/* Slice s as floats, turned where rows are columns elsewhere.  Its scale is in them, as on the CPU. */
static void open_slice(const struct ms4_ops *ops, const matrix *m, int32_t s, float *out, float *spare) {
    const matrix slice = matrix_rows(m, s, 0, m->n_rows);
    const size_t rows = (size_t)m->n_rows, columns = (size_t)m->n_cols;
    float *flat = m->transposed ? spare : out;
    for (size_t r = 0; r < rows; r++)
        ops->dequantize[m->type](flat + r * columns, slice.data + r * m->row_bytes, columns);
    for (size_t i = 0; slice.scales && i < rows * columns; i++) flat[i] *= slice.scales[0];
    for (size_t r = 0; m->transposed && r < rows; r++)
        for (size_t c = 0; c < columns; c++) out[c * rows + r] = flat[r * columns + c];
}
static void bring_heads(loader *l, matrix *m) {
    const size_t floats = (size_t)m->n_rows * (size_t)m->n_cols, bytes = floats * sizeof(float);
    uint8_t *to = place(l, (size_t)m->n_slices * bytes);
    float *room = to ? memory_take(2 * floats, sizeof *room) : NULL;
    if (to && !room) l->status = error_set(MS4_ENOMEM, "no memory to bring weights to the GPU");
    for (int32_t s = 0; s < m->n_slices && room && !l->status; s++) {
        open_slice(l->ops, m, s, room, room + floats);
        l->status = gpu_upload(l->g, to + (size_t)s * bytes, room, bytes);
    }
    memory_give(room);
    const int32_t rows = m->transposed ? m->n_cols : m->n_rows, columns = m->transposed ? m->n_rows : m->n_cols;
    *m = (matrix){ .data = to, .row_bytes = (size_t)columns * sizeof(float), .slice_bytes = bytes,
                   .type = MS4_TYPE_f32, .n_rows = rows, .n_cols = columns, .n_slices = m->n_slices };
}
static void bring_layer(loader *l, layer_weights *w) {
    vector *vectors[] = { &w->attn_norm, &w->q_a_norm, &w->kv_a_norm, &w->ffn_norm };
    matrix *matrices[] = { &w->q_a, &w->q_b, &w->kv_a, &w->output, &w->router };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) bring_vector(l, vectors[i]);
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) bring_matrix(l, matrices[i]);
    bring_heads(l, &w->k_b);
    bring_heads(l, &w->v_b);
    if (w->has_every) bring_ffn(l, &w->every);
}
static void bring_text(loader *l, const text_weights *host, const ms4_shape *s, text_weights *out) {
    layer_weights *layers = out->layers;
    *out = *host;
    out->layers = layers;
    out->owned = (owned_list){ 0 };
    memcpy(layers, host->layers, (size_t)s->n_layer * sizeof *layers);
    bring_vector(l, &out->output_norm);
    bring_matrix(l, &out->output);
    for (int32_t i = 0; i < s->n_layer; i++) bring_layer(l, &layers[i]);
}
static void bring_tower(loader *l, const tower_weights *host, const ms4_vision_shape *s, tower_weights *out) {
    tower_layer *layers = out->layers;
    *out = *host;
    out->layers = layers;
    out->owned = (owned_list){ 0 };
    memcpy(layers, host->layers, (size_t)s->n_layer * sizeof *layers);
    vector *vectors[] = { &out->pre_ln, &out->input_norm, &out->bias_1, &out->bias_2 };
    matrix *matrices[] = { &out->patch_embd, &out->patch_merger, &out->mm_1, &out->mm_2 };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) bring_vector(l, vectors[i]);
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) bring_matrix(l, matrices[i]);
    for (tower_layer *t = layers; t < layers + s->n_layer; t++) {
        matrix *of_layer[] = { &t->q, &t->k, &t->v, &t->out };
        bring_vector(l, &t->ln1);
        bring_vector(l, &t->ln2);
        for (size_t i = 0; i < sizeof of_layer / sizeof *of_layer; i++) bring_matrix(l, of_layer[i]);
        bring_ffn(l, &t->ffn);
    }
}
/* Memory for what was counted. */
static int room_for(cuda_weights *w, loader *l) {
    TRY(gpu_take(l->g, l->used, &w->memory));
    w->bytes = l->used;
    *l = (loader){ .g = l->g, .ops = l->ops, .memory = w->memory };
    return MS4_OK;
}
int cuda_text_open(gpu *g, const text_weights *host, const ms4_shape *s, const struct ms4_ops *ops, cuda_weights *out) {
    loader l = { .g = g, .ops = ops };
    out->g = g;
    out->text.layers = memory_take((size_t)s->n_layer, sizeof *out->text.layers);
    FAIL_IF(!out->text.layers, MS4_ENOMEM, "no memory for the tensor table");
    bring_text(&l, host, s, &out->text);
    TRY(room_for(out, &l));
    bring_text(&l, host, s, &out->text);
    TRY(l.status);
    return gpu_wait(g);
}
int cuda_tower_open(gpu *g, const tower_weights *host, const ms4_vision_shape *s, cuda_weights *out) {
    loader l = { .g = g };
    out->g = g;
    out->tower.layers = memory_take((size_t)s->n_layer, sizeof *out->tower.layers);
    FAIL_IF(!out->tower.layers, MS4_ENOMEM, "no memory for the vision tower");
    bring_tower(&l, host, s, &out->tower);
    TRY(room_for(out, &l));
    bring_tower(&l, host, s, &out->tower);
    TRY(l.status);
    return gpu_wait(g);
}
void cuda_weights_close(cuda_weights *w) {
    if (w->g && w->memory) {
        gpu_enter(w->g);
        gpu_settle(w->g);
        gpu_give(w->g, w->memory, w->bytes);
    }
    memory_give(w->text.layers);
    memory_give(w->tower.layers);
    *w = (cuda_weights){ 0 };
}
