/* weights.c -- binds the tensors of a table to their places in the files, and checks each against the shape.
 *
 * Afterwards nobody checks a size again: whatever kernels and devices take for granted about a matrix is made sure of
 * here.  Norms and biases become floats of our own, and so do the scales of NVFP4 tensors.
 */
#include "weights.h"
#include "error.h"
#include "memory.h"
#include <string.h>

typedef struct {                               /* what binding needs all the time */
    const files *files;
    const struct ms4_ops *ops;
    owned_list *owned;
    const char *prefix;                        /* of messages: which file */
} binder;

/* n * size bytes that live as long as the weights; NULL if there are none. */
static void *owned_take(owned_list *list, size_t n, size_t size) {
    if (list->n == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        void **item = memory_take(room, sizeof *item);
        if (!item) return NULL;
        if (list->n) memcpy(item, list->item, list->n * sizeof *item);
        memory_give(list->item);
        list->item = item;
        list->room = room;
    }
    void *p = memory_take(n, size);
    if (p) list->item[list->n++] = p;
    return p;
}
static void owned_give(owned_list *list) {
    for (size_t i = 0; i < list->n; i++) memory_give(list->item[i]);
    memory_give(list->item);
    *list = (owned_list){ 0 };
}
/* --- one tensor --------------------------------------------------------------------------- */
static int type_of(int32_t id) {
    for (int i = 0; i < MS4_N_TYPES; i++)
        if (ms4_type_infos[i].id == id) return i;
    return -1;
}
static int bind(const binder *b, const ms4_tensor *t, matrix *out) {
    const int64_t most = INT32_MAX / 2;
    int type = type_of(t->type);
    FAIL_IF(out->data, MS4_EMODEL, "%stensor role %d of layer %d appears twice", b->prefix, t->role, t->layer);
    FAIL_IF(type < 0, MS4_EMODEL, "%stensor role %d of layer %d: type %d is not supported",
            b->prefix, t->role, t->layer, t->type);
    const struct ms4_type_info *info = &ms4_type_infos[type];
    for (int i = 0; i < 3; i++)
        FAIL_IF(t->dims[i] < 1 || t->dims[i] > most, MS4_EMODEL, "%stensor role %d of layer %d: bad dimensions",
                b->prefix, t->role, t->layer);
    FAIL_IF(t->dims[0] % info->weights, MS4_EMODEL, "%stensor role %d of layer %d: its rows end inside a block",
            b->prefix, t->role, t->layer);
    uint64_t row = (uint64_t)(t->dims[0] / info->weights) * (uint64_t)info->bytes, slice, bytes;
    FAIL_IF(__builtin_mul_overflow(row, (uint64_t)t->dims[1], &slice)
                || __builtin_mul_overflow(slice, (uint64_t)t->dims[2], &bytes) || bytes != t->bytes,
            MS4_EMODEL, "%stensor role %d of layer %d: its dimensions do not give %llu bytes",
            b->prefix, t->role, t->layer, (unsigned long long)t->bytes);
    const uint8_t *data = files_at(b->files, t->file, t->offset, bytes);
    FAIL_IF(!data, MS4_EMODEL, "%stensor role %d of layer %d lies outside its file", b->prefix, t->role, t->layer);
    FAIL_IF((uintptr_t)data % 4, MS4_EMODEL, "%stensor role %d of layer %d is not aligned",
            b->prefix, t->role, t->layer);
    *out = (matrix){ .data = data, .row_bytes = row, .slice_bytes = slice, .type = type, .n_rows = (int32_t)t->dims[1],
                     .n_cols = (int32_t)t->dims[0], .n_slices = (int32_t)t->dims[2] };
    if (!t->scales) return MS4_OK;
    float *scales = owned_take(b->owned, (size_t)out->n_slices, sizeof *scales);
    FAIL_IF(!scales, MS4_ENOMEM, "no memory for tensor scales");
    memcpy(scales, t->scales, (size_t)out->n_slices * sizeof *scales);
    out->scales = scales;
    return MS4_OK;
}
static int expect(const binder *b, const matrix *m, const char *name, int32_t layer, int32_t columns, int32_t rows,
                  int32_t slices) {
    FAIL_IF(!m->data, MS4_EMODEL, "%s%s of layer %d is missing", b->prefix, name, layer);
    FAIL_IF(m->n_cols != columns || m->n_rows != rows || m->n_slices != slices, MS4_EMODEL,
            "%s%s of layer %d is %d x %d x %d; expected %d x %d x %d", b->prefix, name, layer, m->n_cols, m->n_rows,
            m->n_slices, columns, rows, slices);
    return MS4_OK;
}
static int bind_vector(const binder *b, const matrix *m, const char *name, int32_t layer, int32_t n, vector *out) {
    TRY(expect(b, m, name, layer, n, 1, 1));
    float *data = owned_take(b->owned, (size_t)n, sizeof *data);
    FAIL_IF(!data, MS4_ENOMEM, "no memory for %s", name);
    b->ops->dequantize[m->type](data, m->data, (size_t)n);
    *out = (vector){ data, n };
    return MS4_OK;
}
static int bind_optional(const binder *b, const matrix *m, const char *name, int32_t n, vector *out) {
    return m->data ? bind_vector(b, m, name, -1, n, out) : MS4_OK;
}
/* Puts the tensors of a table into `roles`: n_roles for each layer, and once more for what is in no layer. */
static int bind_table(const binder *b, const ms4_tensor *tensors, size_t n, int32_t n_layer, int32_t n_roles,
                      matrix *roles, uint64_t *bytes) {
    for (size_t i = 0; i < n; i++) {
        const ms4_tensor *t = &tensors[i];
        FAIL_IF(t->role < 0 || t->role >= n_roles || t->layer < -1 || t->layer >= n_layer, MS4_EMODEL,
                "%stensor %zu has role %d in layer %d", b->prefix, i, t->role, t->layer);
        size_t row = (size_t)(t->layer < 0 ? n_layer : t->layer);
        TRY(bind(b, t, &roles[row * (size_t)n_roles + (size_t)t->role]));
        *bytes += t->bytes;
    }
    return MS4_OK;
}
static int any_quantized(const matrix *roles, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (roles[i].data && matrix_quantized(&roles[i])) return 1;
    return 0;
}
/* --- the text model ----------------------------------------------------------------------- */
/* k_b and v_b out of attn_kv_b: per head d_nope rows of W_uk, then d_value rows of W_uv.  W_uk is transposed there:
 * d_nope rows of kv_rank, where attn_k_b has kv_rank rows of d_nope.  The scale of the one tensor is that of every
 * head. */
static int split_kv_b(const binder *b, const ms4_shape *s, const matrix *kv_b, layer_weights *w) {
    w->k_b = w->v_b = *kv_b;
    w->k_b.slice_bytes = w->v_b.slice_bytes = (size_t)(s->d_nope + s->d_value) * kv_b->row_bytes;
    w->k_b.n_slices = w->v_b.n_slices = s->n_head;
    w->k_b.n_rows = s->d_nope;
    w->k_b.transposed = 1;
    w->v_b.n_rows = s->d_value;
    w->v_b.data += (size_t)s->d_nope * kv_b->row_bytes;
    if (!kv_b->scales) return MS4_OK;
    float *scales = owned_take(b->owned, (size_t)s->n_head, sizeof *scales);
    FAIL_IF(!scales, MS4_ENOMEM, "no memory for tensor scales");
    for (int32_t i = 0; i < s->n_head; i++) scales[i] = kv_b->scales[0];
    w->k_b.scales = w->v_b.scales = scales;
    return MS4_OK;
}
static int bind_attention(const binder *b, const ms4_shape *s, const matrix *r, int32_t layer, layer_weights *w) {
    int32_t d_q = s->n_head * (s->d_nope + s->d_rope), d_kv = s->n_head * (s->d_nope + s->d_value);
    TRY(bind_vector(b, &r[MS4_ATTN_NORM], "attn_norm", layer, s->d_model, &w->attn_norm));
    TRY(bind_vector(b, &r[MS4_FFN_NORM], "ffn_norm", layer, s->d_model, &w->ffn_norm));
    TRY(bind_vector(b, &r[MS4_ATTN_Q_A_NORM], "attn_q_a_norm", layer, s->q_rank, &w->q_a_norm));
    TRY(bind_vector(b, &r[MS4_ATTN_KV_A_NORM], "attn_kv_a_norm", layer, s->kv_rank, &w->kv_a_norm));
    TRY(expect(b, &r[MS4_ATTN_Q_A], "attn_q_a", layer, s->d_model, s->q_rank, 1));
    TRY(expect(b, &r[MS4_ATTN_Q_B], "attn_q_b", layer, s->q_rank, d_q, 1));
    TRY(expect(b, &r[MS4_ATTN_KV_A_MQA], "attn_kv_a_mqa", layer, s->d_model, s->kv_rank + s->d_rope, 1));
    TRY(expect(b, &r[MS4_ATTN_OUTPUT], "attn_output", layer, s->n_head * s->d_value, s->d_model, 1));
    w->q_a = r[MS4_ATTN_Q_A];
    w->q_b = r[MS4_ATTN_Q_B];
    w->kv_a = r[MS4_ATTN_KV_A_MQA];
    w->output = r[MS4_ATTN_OUTPUT];
    if (r[MS4_ATTN_KV_B].data) {
        TRY(expect(b, &r[MS4_ATTN_KV_B], "attn_kv_b", layer, s->kv_rank, d_kv, 1));
        return split_kv_b(b, s, &r[MS4_ATTN_KV_B], w);
    }
    TRY(expect(b, &r[MS4_ATTN_K_B], "attn_k_b", layer, s->d_nope, s->kv_rank, s->n_head));
    TRY(expect(b, &r[MS4_ATTN_V_B], "attn_v_b", layer, s->kv_rank, s->d_value, s->n_head));
    w->k_b = r[MS4_ATTN_K_B];
    w->v_b = r[MS4_ATTN_V_B];
    return MS4_OK;
}
static int check_ffn(const binder *b, const ffn_weights *f, const char *name, int32_t layer, int32_t d_model,
                     int32_t d_hidden, int32_t n) {
    TRY(expect(b, &f->gate, name, layer, d_model, d_hidden, n));
    TRY(expect(b, &f->up, name, layer, d_model, d_hidden, n));
    return expect(b, &f->down, name, layer, d_hidden, d_model, n);
}
static int bind_experts(const binder *b, const ms4_shape *s, const matrix *r, int32_t layer, ffn_weights *out) {
    const matrix *fused = &r[MS4_FFN_GATE_UP_EXPS];
    *out = (ffn_weights){ .gate = r[MS4_FFN_GATE_EXPS], .up = r[MS4_FFN_UP_EXPS], .down = r[MS4_FFN_DOWN_EXPS] };
    if (fused->data) {                         /* of each expert first the rows of gate, then those of up */
        TRY(expect(b, fused, "ffn_gate_up_exps", layer, s->d_model, 2 * s->d_expert, s->n_expert));
        out->gate = out->up = *fused;
        out->gate.n_rows = out->up.n_rows = s->d_expert;
        out->up.data += (size_t)s->d_expert * fused->row_bytes;
    }
    return check_ffn(b, out, "ffn_*_exps", layer, s->d_model, s->d_expert, s->n_expert);
}
static int bind_ffn(const binder *b, const ms4_shape *s, const matrix *r, int32_t layer, layer_weights *w) {
    w->has_experts = layer >= s->n_dense_layer;
    w->has_every = !w->has_experts || s->d_shared;
    if (!w->has_experts) {
        w->every = (ffn_weights){ .gate = r[MS4_FFN_GATE], .up = r[MS4_FFN_UP], .down = r[MS4_FFN_DOWN] };
        return check_ffn(b, &w->every, "ffn_gate, ffn_up or ffn_down", layer, s->d_model, s->d_dense, 1);
    }
    TRY(expect(b, &r[MS4_FFN_GATE_INP], "ffn_gate_inp", layer, s->d_model, s->n_expert, 1));
    w->router = r[MS4_FFN_GATE_INP];
    TRY(bind_experts(b, s, r, layer, &w->experts));
    if (!w->has_every) return MS4_OK;
    w->every = (ffn_weights){ .gate = r[MS4_FFN_GATE_SHEXP], .up = r[MS4_FFN_UP_SHEXP], .down = r[MS4_FFN_DOWN_SHEXP] };
    return check_ffn(b, &w->every, "ffn_*_shexp", layer, s->d_model, s->d_shared, 1);
}
static uint64_t ffn_bytes(const ffn_weights *f) {
    return matrix_bytes(&f->gate) + matrix_bytes(&f->up) + matrix_bytes(&f->down);
}
static int bind_text(const binder *b, const ms4_shape *s, const matrix *roles, text_weights *w) {
    const matrix *whole = &roles[(size_t)s->n_layer * MS4_N_ROLES];
    w->token_embd = whole[MS4_TOKEN_EMBD];
    w->output = whole[MS4_OUTPUT];
    TRY(expect(b, &w->token_embd, "token_embd", -1, s->d_model, s->n_vocab, 1));
    TRY(expect(b, &w->output, "output", -1, s->d_model, s->n_vocab, 1));
    TRY(bind_vector(b, &whole[MS4_OUTPUT_NORM], "output_norm", -1, s->d_model, &w->output_norm));
    for (int32_t i = 0; i < s->n_layer; i++) {
        const matrix *r = &roles[(size_t)i * MS4_N_ROLES];
        layer_weights *l = &w->layers[i];
        TRY(bind_attention(b, s, r, i, l));
        TRY(bind_ffn(b, s, r, i, l));
        l->bytes_per_step = matrix_bytes(&l->q_a) + matrix_bytes(&l->q_b) + matrix_bytes(&l->kv_a)
                          + (uint64_t)s->n_head * (matrix_bytes(&l->k_b) + matrix_bytes(&l->v_b))
                          + matrix_bytes(&l->output) + matrix_bytes(&l->router) + ffn_bytes(&l->every);
        l->bytes_per_expert = ffn_bytes(&l->experts);
    }
    return MS4_OK;
}
int text_weights_open(text_weights *w, const ms4_shape *s, const ms4_tensor *tensors, size_t n, const files *f,
                      const struct ms4_ops *ops) {
    const binder b = { f, ops, &w->owned, "" };
    size_t n_roles = ((size_t)s->n_layer + 1) * MS4_N_ROLES;
    for (size_t i = 0; i < n; i++)
        FAIL_IF((tensors[i].layer < 0) != (tensors[i].role <= MS4_OUTPUT), MS4_EMODEL,
                "tensor role %d cannot be in layer %d", tensors[i].role, tensors[i].layer);
    matrix *roles = memory_take(n_roles, sizeof *roles);
    w->layers = memory_take((size_t)s->n_layer, sizeof *w->layers);
    int status = roles && w->layers ? bind_table(&b, tensors, n, s->n_layer, MS4_N_ROLES, roles, &w->bytes)
                                    : error_set(MS4_ENOMEM, "no memory for the tensor table");
    if (!status) status = bind_text(&b, s, roles, w);
    if (!status) w->quantized = any_quantized(roles, n_roles);
    memory_give(roles);
    return status;
}
void text_weights_close(text_weights *w) {
    memory_give(w->layers);
    owned_give(&w->owned);
    *w = (text_weights){ 0 };
}
static uint64_t mix(uint64_t h, const void *data, size_t n) {                  /* FNV-1a */
    for (const uint8_t *p = data; n--; p++) h = (h ^ *p) * 0x100000001b3u;
    return h;
}
static uint64_t mix_vector(uint64_t h, const vector *v) { return mix(h, v->data, (size_t)v->n * sizeof *v->data); }
static uint64_t mix_matrix(uint64_t h, const matrix *m) {
    if (!m->data) return mix(h, "", 1);
    const int32_t numbers[] = { m->type, m->n_rows, m->n_cols, m->n_slices };
    const size_t bytes = (size_t)matrix_bytes(m), ends = bytes < 256 ? bytes : 256;
    const uint8_t *last = m->data + (size_t)(m->n_slices - 1) * m->slice_bytes + bytes - ends;
    return mix(mix(mix(h, numbers, sizeof numbers), m->data, ends), last, ends);
}
static uint64_t mix_ffn(uint64_t h, const ffn_weights *f) {
    return mix_matrix(mix_matrix(mix_matrix(h, &f->gate), &f->up), &f->down);
}
uint64_t text_weights_fingerprint(const text_weights *w, const ms4_shape *s) {
    const int32_t numbers[] = { s->n_layer, s->n_dense_layer, s->n_vocab, s->d_model, s->n_head, s->d_nope, s->d_rope,
                                s->d_value, s->kv_rank, s->n_expert, s->n_expert_used, s->router_norm, s->temp_length };
    const double reals[] = { s->norm_eps, s->router_scale, s->attn_scale, s->temp_beta };
    uint64_t h = mix(mix(0xcbf29ce484222325u, numbers, sizeof numbers), reals, sizeof reals);
    h = mix(h, s->rope_freq, (size_t)s->d_rope / 2 * sizeof *s->rope_freq);
    h = mix_matrix(mix_matrix(mix_vector(h, &w->output_norm), &w->token_embd), &w->output);
    for (const layer_weights *l = w->layers; l < w->layers + s->n_layer; l++) {
        const vector *norms[] = { &l->attn_norm, &l->q_a_norm, &l->kv_a_norm, &l->ffn_norm };
        const matrix *matrices[] = { &l->q_a, &l->q_b, &l->kv_a, &l->k_b, &l->v_b, &l->output, &l->router };
        for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) h = mix_vector(h, norms[i]);
        for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) h = mix_matrix(h, matrices[i]);
        h = mix_ffn(mix_ffn(h, &l->every), &l->experts);
    }
    return h;
}
/* --- the vision tower --------------------------------------------------------------------- */
static int bind_tower_layer(const binder *b, const ms4_vision_shape *s, const matrix *r, int32_t layer,
                            tower_layer *w) {
    int32_t d = s->d_model;
    TRY(bind_vector(b, &r[MS4_V_LN1], "ln1", layer, d, &w->ln1));
    TRY(bind_vector(b, &r[MS4_V_LN2], "ln2", layer, d, &w->ln2));
    TRY(expect(b, &r[MS4_V_ATTN_Q], "attn_q", layer, d, d, 1));
    TRY(expect(b, &r[MS4_V_ATTN_K], "attn_k", layer, d, d, 1));
    TRY(expect(b, &r[MS4_V_ATTN_V], "attn_v", layer, d, d, 1));
    TRY(expect(b, &r[MS4_V_ATTN_OUT], "attn_out", layer, d, d, 1));
    w->q = r[MS4_V_ATTN_Q];
    w->k = r[MS4_V_ATTN_K];
    w->v = r[MS4_V_ATTN_V];
    w->out = r[MS4_V_ATTN_OUT];
    w->ffn = (ffn_weights){ .gate = r[MS4_V_FFN_GATE], .up = r[MS4_V_FFN_UP], .down = r[MS4_V_FFN_DOWN],
                            .gelu = s->gelu };
    return check_ffn(b, &w->ffn, "ffn_gate, ffn_up or ffn_down", layer, d, s->d_ffn, 1);
}
static int bind_tower(const binder *b, const ms4_vision_shape *s, const matrix *roles, tower_weights *w) {
    const matrix *r = &roles[(size_t)s->n_layer * MS4_N_VISION_ROLES];
    int32_t d = s->d_model, patch = 3 * s->patch_size * s->patch_size, d_1 = r[MS4_MM_1].n_rows;
    for (int32_t i = 0; i < s->n_layer; i++)
        TRY(bind_tower_layer(b, s, &roles[(size_t)i * MS4_N_VISION_ROLES], i, &w->layers[i]));
    TRY(expect(b, &r[MS4_V_PATCH_EMBD], "patch_embd", -1, patch, d, 1));
    TRY(bind_vector(b, &r[MS4_V_PRE_LN], "pre_ln", -1, d, &w->pre_ln));
    TRY(bind_optional(b, &r[MS4_MM_INPUT_NORM], "mm.input_norm", d, &w->input_norm));
    FAIL_IF(s->merge == 1 && r[MS4_MM_PATCH_MERGER].data, MS4_EMODEL, "%sa patch merger, but merge size 1", b->prefix);
    if (s->merge > 1) TRY(expect(b, &r[MS4_MM_PATCH_MERGER], "mm.patch_merger", -1, d * s->merge * s->merge, d, 1));
    TRY(expect(b, &r[MS4_MM_1], "mm.1", -1, d, d_1, 1));
    TRY(expect(b, &r[MS4_MM_2], "mm.2", -1, d_1, s->d_out, 1));
    TRY(bind_optional(b, &r[MS4_MM_1_BIAS], "mm.1.bias", d_1, &w->bias_1));
    w->patch_embd = r[MS4_V_PATCH_EMBD];
    w->patch_merger = r[MS4_MM_PATCH_MERGER];
    w->mm_1 = r[MS4_MM_1];
    w->mm_2 = r[MS4_MM_2];
    return bind_optional(b, &r[MS4_MM_2_BIAS], "mm.2.bias", s->d_out, &w->bias_2);
}
int tower_weights_open(tower_weights *w, const ms4_vision_shape *s, const ms4_tensor *tensors, size_t n, const files *f,
                       const struct ms4_ops *ops) {
    const binder b = { f, ops, &w->owned, "mmproj: " };
    size_t n_roles = ((size_t)s->n_layer + 1) * MS4_N_VISION_ROLES;
    uint64_t bytes = 0;
    matrix *roles = memory_take(n_roles, sizeof *roles);
    w->layers = memory_take((size_t)s->n_layer, sizeof *w->layers);
    int status = roles && w->layers ? bind_table(&b, tensors, n, s->n_layer, MS4_N_VISION_ROLES, roles, &bytes)
                                    : error_set(MS4_ENOMEM, "no memory for the vision tower");
    if (!status) status = bind_tower(&b, s, roles, w);
    if (!status) w->quantized = any_quantized(roles, n_roles);
    memory_give(roles);
    return status;
}
void tower_weights_close(tower_weights *w) {
    memory_give(w->layers);
    owned_give(&w->owned);
    *w = (tower_weights){ 0 };
}
