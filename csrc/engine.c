/* engine.c -- opens a model: files, worker threads, and every tensor of the table bound to its place and checked. */
#include "model.h"
#include <stdlib.h>
#include <string.h>

static int type_of(int32_t id) {
    for (int i = 0; i < MS4_N_TYPES; i++)
        if (ms4_type_infos[i].id == id) return i;
    return -1;
}
/* --- one tensor --------------------------------------------------------------------------- */
int matrix_bind(const files *f, const ms4_tensor *t, matrix *out) {
    int type = type_of(t->type);
    FAIL_IF(type < 0, MS4_EMODEL, "tensor role %d of layer %d: type %d is not supported", t->role, t->layer, t->type);
    const struct ms4_type_info *info = &ms4_type_infos[type];
    int64_t most = INT32_MAX / 2;
    FAIL_IF(t->dims[0] < 1 || t->dims[1] < 1 || t->dims[2] < 1 || t->dims[0] > most || t->dims[1] > most || t->dims[2] > most
                || t->dims[0] % info->weights,
            MS4_EMODEL, "tensor role %d of layer %d: bad dimensions", t->role, t->layer);
    uint64_t row = (uint64_t)(t->dims[0] / info->weights) * (uint64_t)info->bytes, slice, bytes;
    FAIL_IF(__builtin_mul_overflow(row, (uint64_t)t->dims[1], &slice) || __builtin_mul_overflow(slice, (uint64_t)t->dims[2], &bytes)
                || bytes != t->bytes,
            MS4_EMODEL, "tensor role %d of layer %d: its dimensions do not give %llu bytes", t->role, t->layer,
            (unsigned long long)t->bytes);
    const uint8_t *data = files_at(f, t->file, t->offset, bytes);
    FAIL_IF(!data, MS4_EMODEL, "tensor role %d of layer %d lies outside its file", t->role, t->layer);
    FAIL_IF((uintptr_t)data % 4, MS4_EMODEL, "tensor role %d of layer %d is not aligned", t->role, t->layer);
    *out = (matrix){ .data = data, .row_bytes = row, .slice_bytes = slice, .type = type,
                     .n_rows = (int32_t)t->dims[1], .n_cols = (int32_t)t->dims[0], .n_slices = (int32_t)t->dims[2] };
    if (!t->scales) return MS4_OK;
    float *scales = memory_take((size_t)out->n_slices, sizeof *scales);   /* owned by whoever binds */
    FAIL_IF(!scales, MS4_ENOMEM, "no memory for tensor scales");
    memcpy(scales, t->scales, (size_t)out->n_slices * sizeof *scales);
    out->scales = scales;
    return MS4_OK;
}
static int expect(const matrix *m, const char *name, int32_t layer, int32_t columns, int32_t rows, int32_t slices) {
    FAIL_IF(!m->data, MS4_EMODEL, "%s of layer %d is missing", name, layer);
    FAIL_IF(m->n_cols != columns || m->n_rows != rows || m->n_slices != slices, MS4_EMODEL,
            "%s of layer %d is %d x %d x %d; expected %d x %d x %d", name, layer, m->n_cols, m->n_rows, m->n_slices,
            columns, rows, slices);
    return MS4_OK;
}
static int copy_norm(const ms4_engine *e, const matrix *m, const char *name, int32_t layer, int32_t n, float **out) {
    TRY(expect(m, name, layer, n, 1, 1));
    *out = memory_take((size_t)n, sizeof **out);
    FAIL_IF(!*out, MS4_ENOMEM, "no memory for %s", name);
    e->ops->dequantize[m->type](*out, m->data, (size_t)n);
    return MS4_OK;
}
/* --- one layer ---------------------------------------------------------------------------- */
static int bind_attention(ms4_engine *e, const matrix *r, int32_t layer) {
    const ms4_shape *s = &e->shape;
    layer_weights *w = &e->layers[layer];
    int32_t d_q = s->n_head * (s->d_nope + s->d_rope), d_kv = s->n_head * (s->d_nope + s->d_value);
    TRY(copy_norm(e, &r[MS4_ATTN_NORM], "attn_norm", layer, s->d_model, &w->attn_norm));
    TRY(copy_norm(e, &r[MS4_FFN_NORM], "ffn_norm", layer, s->d_model, &w->ffn_norm));
    TRY(copy_norm(e, &r[MS4_ATTN_Q_A_NORM], "attn_q_a_norm", layer, s->q_rank, &w->q_a_norm));
    TRY(copy_norm(e, &r[MS4_ATTN_KV_A_NORM], "attn_kv_a_norm", layer, s->kv_rank, &w->kv_a_norm));
    TRY(expect(&r[MS4_ATTN_Q_A], "attn_q_a", layer, s->d_model, s->q_rank, 1));
    TRY(expect(&r[MS4_ATTN_Q_B], "attn_q_b", layer, s->q_rank, d_q, 1));
    TRY(expect(&r[MS4_ATTN_KV_A_MQA], "attn_kv_a_mqa", layer, s->d_model, s->kv_rank + s->d_rope, 1));
    TRY(expect(&r[MS4_ATTN_OUTPUT], "attn_output", layer, s->n_head * s->d_value, s->d_model, 1));
    w->q_a = r[MS4_ATTN_Q_A];
    w->q_b = r[MS4_ATTN_Q_B];
    w->kv_a = r[MS4_ATTN_KV_A_MQA];
    w->output = r[MS4_ATTN_OUTPUT];
    if (!r[MS4_ATTN_KV_B].data) {
        TRY(expect(&r[MS4_ATTN_K_B], "attn_k_b", layer, s->d_nope, s->kv_rank, s->n_head));
        TRY(expect(&r[MS4_ATTN_V_B], "attn_v_b", layer, s->kv_rank, s->d_value, s->n_head));
        w->k_b = r[MS4_ATTN_K_B];
        w->v_b = r[MS4_ATTN_V_B];
        return MS4_OK;
    }
    TRY(expect(&r[MS4_ATTN_KV_B], "attn_kv_b", layer, s->kv_rank, d_kv, 1));
    w->k_b = w->v_b = r[MS4_ATTN_KV_B];        /* per head: d_nope rows of W_uk, then d_value rows of W_uv */
    w->k_b.slice_bytes = w->v_b.slice_bytes = (size_t)(s->d_nope + s->d_value) * w->k_b.row_bytes;
    w->k_b.n_slices = w->v_b.n_slices = s->n_head;
    w->k_b.n_rows = s->d_nope;
    w->v_b.n_rows = s->d_value;
    w->v_b.data += (size_t)s->d_nope * w->v_b.row_bytes;
    w->k_b_transposed = 1;
    return MS4_OK;
}
static int check_ffn(const expert_view *v, const char *name, int32_t layer, int32_t d_model, int32_t d_hidden, int32_t n) {
    TRY(expect(&v->gate, name, layer, d_model, d_hidden, n));
    TRY(expect(&v->up, name, layer, d_model, d_hidden, n));
    return expect(&v->down, name, layer, d_hidden, d_model, n);
}
static int bind_experts(const ms4_engine *e, const matrix *r, int32_t layer, expert_view *out) {
    const ms4_shape *s = &e->shape;
    const matrix *fused = &r[MS4_FFN_GATE_UP_EXPS];
    *out = (expert_view){ r[MS4_FFN_GATE_EXPS], r[MS4_FFN_UP_EXPS], r[MS4_FFN_DOWN_EXPS] };
    if (fused->data) {
        TRY(expect(fused, "ffn_gate_up_exps", layer, s->d_model, 2 * s->d_expert, s->n_expert));
        out->gate = out->up = *fused;
        out->gate.n_rows = out->up.n_rows = s->d_expert;
        out->up.data += (size_t)s->d_expert * fused->row_bytes;
    }
    return check_ffn(out, "ffn_*_exps", layer, s->d_model, s->d_expert, s->n_expert);
}
static int bind_ffn(ms4_engine *e, const matrix *r, int32_t layer, expert_view *experts) {
    const ms4_shape *s = &e->shape;
    layer_weights *w = &e->layers[layer];
    w->is_dense = layer < s->n_dense_layer;
    if (w->is_dense) {
        w->dense = (expert_view){ r[MS4_FFN_GATE], r[MS4_FFN_UP], r[MS4_FFN_DOWN] };
        e->float_down |= w->dense.down.data && !matrix_quantised(&w->dense.down);
        return check_ffn(&w->dense, "ffn_gate, ffn_up or ffn_down", layer, s->d_model, s->d_dense, 1);
    }
    TRY(expect(&r[MS4_FFN_GATE_INP], "ffn_gate_inp", layer, s->d_model, s->n_expert, 1));
    w->router = r[MS4_FFN_GATE_INP];
    TRY(bind_experts(e, r, layer, experts));
    e->float_down |= !matrix_quantised(&experts->down);
    if (!s->d_shared) return MS4_OK;
    w->shared = (expert_view){ r[MS4_FFN_GATE_SHEXP], r[MS4_FFN_UP_SHEXP], r[MS4_FFN_DOWN_SHEXP] };
    TRY(check_ffn(&w->shared, "ffn_*_shexp", layer, s->d_model, s->d_shared, 1));
    e->float_down |= !matrix_quantised(&w->shared.down);
    return MS4_OK;
}
static uint64_t view_bytes(const expert_view *v) { return matrix_bytes(&v->gate) + matrix_bytes(&v->up) + matrix_bytes(&v->down); }
static void count_bytes(const ms4_engine *e, layer_weights *w, const expert_view *experts) {
    uint64_t heads = (uint64_t)e->shape.n_head;
    w->bytes_per_step = matrix_bytes(&w->q_a) + matrix_bytes(&w->q_b) + matrix_bytes(&w->kv_a) + matrix_bytes(&w->output)
                      + heads * (matrix_bytes(&w->k_b) + matrix_bytes(&w->v_b)) + matrix_bytes(&w->router)
                      + view_bytes(&w->shared) + view_bytes(&w->dense);
    w->bytes_per_expert = w->is_dense ? 0 : view_bytes(experts);
}
/* --- the whole ---------------------------------------------------------------------------- */
static int bind_all(ms4_engine *e, const ms4_tensor *tensors, size_t n_tensors, matrix *roles, expert_view *experts) {
    const ms4_shape *s = &e->shape;
    size_t n_layer = (size_t)s->n_layer;
    for (size_t i = 0; i < n_tensors; i++) {
        const ms4_tensor *t = &tensors[i];
        FAIL_IF(t->role < 0 || t->role >= MS4_N_ROLES || t->layer < -1 || t->layer >= s->n_layer, MS4_EMODEL,
                "tensor %zu has role %d in layer %d", i, t->role, t->layer);
        FAIL_IF((t->layer < 0) != (t->role <= MS4_OUTPUT), MS4_EMODEL, "tensor role %d cannot be in layer %d", t->role, t->layer);
        matrix *place = &roles[(size_t)(t->layer < 0 ? s->n_layer : t->layer) * MS4_N_ROLES + (size_t)t->role];
        FAIL_IF(place->data, MS4_EMODEL, "tensor role %d of layer %d appears twice", t->role, t->layer);
        TRY(matrix_bind(e->files, t, place));
        e->stats.bytes_weights += t->bytes;
    }
    const matrix *whole = &roles[n_layer * MS4_N_ROLES];
    e->token_embd = whole[MS4_TOKEN_EMBD];
    e->output = whole[MS4_OUTPUT];
    TRY(expect(&e->token_embd, "token_embd", -1, s->d_model, s->n_vocab, 1));
    TRY(expect(&e->output, "output", -1, s->d_model, s->n_vocab, 1));
    TRY(copy_norm(e, &whole[MS4_OUTPUT_NORM], "output_norm", -1, s->d_model, &e->output_norm));
    for (int32_t i = 0; i < s->n_layer; i++) {
        const matrix *r = &roles[(size_t)i * MS4_N_ROLES];
        TRY(bind_attention(e, r, i));
        TRY(bind_ffn(e, r, i, &experts[i]));
        count_bytes(e, &e->layers[i], &experts[i]);
    }
    return experts_open(s->n_layer, experts, &e->experts);
}
static int bind_table(ms4_engine *e, const ms4_tensor *tensors, size_t n_tensors) {
    size_t n_layer = (size_t)e->shape.n_layer;
    matrix *roles = memory_take((n_layer + 1) * MS4_N_ROLES, sizeof *roles);
    expert_view *experts = memory_take(n_layer, sizeof *experts);
    int status = roles && experts ? bind_all(e, tensors, n_tensors, roles, experts)
                                  : error_set(MS4_ENOMEM, "no memory for the tensor table");
    size_t n = 0;                              /* scale arrays live as long as the engine */
    e->scales = memory_take((n_layer + 1) * MS4_N_ROLES, sizeof *e->scales);
    for (size_t i = 0; roles && i < (n_layer + 1) * MS4_N_ROLES; i++) {
        if (!roles[i].scales) continue;
        if (e->scales) e->scales[n++] = (float *)roles[i].scales;
        else memory_give((float *)roles[i].scales);
    }
    if (!status && !e->scales) status = error_set(MS4_ENOMEM, "no memory for the tensor table");
    e->n_scales = n;
    memory_give(roles);
    memory_give(experts);
    return status;
}
/* What kernels and buffers take for granted. */
static int check_shape(const ms4_shape *s) {
    const int32_t positive[] = { s->n_layer, s->n_vocab, s->n_ctx_train, s->d_model, s->n_head, s->d_nope, s->d_rope, s->d_value,
                                 s->q_rank, s->kv_rank };
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++)
        FAIL_IF(positive[i] < 1 || positive[i] > 1 << 24, MS4_EMODEL, "shape value %zu is %d", i, positive[i]);
    FAIL_IF(s->n_layer > 4096 || s->n_head > 4096, MS4_EMODEL, "%d layers, %d heads", s->n_layer, s->n_head);
    FAIL_IF(s->d_rope % 8 || s->d_rope > 256 || s->d_nope % 8 || s->d_value % 8 || s->kv_rank % 8, MS4_EMODEL,
            "head widths %d, %d, %d and %d must be multiples of 8", s->d_rope, s->d_nope, s->d_value, s->kv_rank);
    FAIL_IF(s->n_dense_layer < 0 || s->n_dense_layer > s->n_layer, MS4_EMODEL, "%d of %d layers dense", s->n_dense_layer, s->n_layer);
    int has_experts = s->n_dense_layer < s->n_layer;
    FAIL_IF(has_experts && (s->n_expert < 1 || s->n_expert > 65536 || s->n_expert_used < 1 || s->n_expert_used > s->n_expert
                            || s->n_expert_used > 256 || s->d_expert < 1 || s->d_expert > 1 << 24),
            MS4_EMODEL, "%d of %d experts, %d wide", s->n_expert_used, s->n_expert, s->d_expert);
    FAIL_IF(s->d_shared < 0 || s->d_shared > 1 << 24 || s->d_dense < 0 || s->d_dense > 1 << 24, MS4_EMODEL, "FFN width");
    FAIL_IF(!isfinite(s->attn_scale) || !isfinite(s->temp_beta) || s->temp_length < 0 || !(s->norm_eps >= 0), MS4_EMODEL,
            "a constant of the shape is not a finite number");
    return MS4_OK;
}
static int open_parts(ms4_engine *e, const ms4_tensor *tensors, size_t n_tensors, const char *const *paths, size_t n_paths,
                      const ms4_options *o) {
    files_options how = { o->load, o->progress, o->user };
    const char *isa = getenv("MS4_ISA");
    TRY(check_shape(&e->shape));
    FAIL_IF(o->load < MS4_LOAD_AUTO || o->load > MS4_LOAD_COPY, MS4_EARG, "load mode %d", o->load);
    FAIL_IF(o->n_batch < 0 || o->n_batch > 1 << 16, MS4_EARG, "batch of %d tokens: 1 to 65536", o->n_batch);
    e->ops = ms4_ops_for(isa && *isa ? isa : NULL);
    FAIL_IF(!e->ops, MS4_EARG, "MS4_ISA=%.40s: no such kernel table here", isa);
    e->n_batch = o->n_batch ? o->n_batch : 2048;
    TRY(pool_open(o->n_threads ? o->n_threads : pool_default_threads(), &e->pool));
    TRY(files_open(paths, n_paths, &how, e->pool, &e->files));
    return bind_table(e, tensors, n_tensors);
}
int ms4_engine_open(const ms4_shape *shape, const ms4_tensor *tensors, size_t n_tensors, const char *const *paths,
                    size_t n_paths, const ms4_options *options, ms4_engine **out) {
    ms4_engine *e = memory_take(1, sizeof *e);
    FAIL_IF(!e, MS4_ENOMEM, "no memory for the engine");
    e->shape = *shape;
    pthread_mutex_init(&e->turn, NULL);
    pthread_mutex_init(&e->counting, NULL);
    size_t n_layer = shape->n_layer > 0 ? (size_t)shape->n_layer : 0;
    e->layers = memory_take(n_layer, sizeof *e->layers);
    int status = e->layers ? open_parts(e, tensors, n_tensors, paths, n_paths, options)
                           : error_set(MS4_ENOMEM, "no memory for %zu layers", n_layer);
    if (status) {
        ms4_engine_close(e);
        return status;
    }
    *out = e;
    return MS4_OK;
}
void ms4_engine_close(ms4_engine *e) {
    if (!e) return;
    if (e->pool) workspace_close(e);
    pool_close(e->pool);
    experts_close(e->experts);
    for (int32_t i = 0; e->layers && i < e->shape.n_layer; i++) {
        layer_weights *w = &e->layers[i];
        float *owned[] = { w->attn_norm, w->ffn_norm, w->q_a_norm, w->kv_a_norm };
        for (size_t j = 0; j < sizeof owned / sizeof *owned; j++) memory_give(owned[j]);
    }
    for (size_t i = 0; i < e->n_scales; i++) memory_give(e->scales[i]);
    memory_give(e->scales);
    memory_give(e->layers);
    memory_give(e->output_norm);
    files_close(e->files);
    pthread_mutex_destroy(&e->turn);
    pthread_mutex_destroy(&e->counting);
    memory_give(e);
}
void ms4_engine_stats(ms4_engine *e, ms4_stats *out) {
    pthread_mutex_lock(&e->counting);
    *out = e->stats;
    pthread_mutex_unlock(&e->counting);
    out->n_threads = pool_size(e->pool);
    out->load = files_load(e->files);
    out->isa = e->ops->isa;
}
