/* model.h -- what one loaded model is made of; shared by engine.c, session.c and the layer code. */
#ifndef MS4_MODEL_H
#define MS4_MODEL_H
#include "error.h"
#include "experts.h"
#include "files.h"
#include "matmul.h"
#include "memory.h"
#include "pool.h"
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct {
    float *attn_norm, *ffn_norm, *q_a_norm, *kv_a_norm;       /* owned copies, float */
    matrix q_a, q_b, kv_a, k_b, v_b, output;                  /* k_b and v_b: one slice per head */
    int32_t k_b_transposed;                                   /* 1: k_b has d_nope rows of kv_rank (out of attn_kv_b) */
    int32_t is_dense;
    matrix router;
    expert_view shared, dense;                                /* shared.gate.data == NULL: no shared expert */
    uint64_t bytes_per_step, bytes_per_expert;                /* what every step reads; what one expert has */
} layer_weights;

/* One FFN and the tokens that go through it in this step; routed, shared and dense ones look the same. */
typedef struct {
    expert_view w;
    int32_t first, n, first_item;                             /* its pairs; its first item in the gate/up run */
    float *hidden_f;                                          /* rows of silu(gate) * up, by pair */
    block_q8 *hidden_q;
    size_t f_stride, q_stride;
} ffn_job;

/* Buffers for the tokens that are computed together; they grow to the largest step seen. */
typedef struct {
    int32_t n_tokens;                                         /* room for so many */
    float *h, *x, *q_a, *q, *kv_a, *o, *rope;                 /* see layer.c */
    block_q8 *x_q, *q_a_q, *o_q;
    float *router, *chosen_weight, *pair_weight, *hidden_f, *shared_f;
    int32_t *chosen, *pair_token, *expert_first, *expert_ids;
    block_q8 *hidden_q, *shared_q;
    ffn_job *jobs;
    expert_view *views;
    int16_t *absorbed;                                        /* attention.c: queries, their scales, results by segment */
    float *absorbed_d, *partial;
    size_t absorbed_bytes, absorbed_d_bytes, partial_bytes;
    float **scratch;                                          /* per thread */
    size_t scratch_floats;
} workspace;

struct ms4_engine {
    ms4_shape shape;
    const struct ms4_ops *ops;
    pool *pool;
    files *files;
    experts *experts;
    layer_weights *layers;
    float *output_norm;
    matrix token_embd, output;
    int32_t n_batch, n_sessions;
    int32_t float_down;                                       /* some down matrix takes float activations */
    float **scales;                                           /* NVFP4 multipliers, owned */
    size_t n_scales;
    pthread_mutex_t turn;                                     /* sessions compute one at a time */
    workspace ws;
    ms4_stats stats;                                          /* guarded by `counting` */
    pthread_mutex_t counting;
};

/* Latents and rotated rope keys (SPEC 2.3): position t of a layer is kv_rank + d_rope 16-bit integers and two scales, as
 * ops->quantize_16 makes them of either part. */
typedef struct {
    int16_t *data;
    float *scales;                                            /* behind the data */
    size_t bytes, width, n_ctx;                               /* of both together; numbers of a position; positions of a layer */
} kv_cache;
static inline int16_t *kv_cache_at(const kv_cache *kv, int32_t layer, int32_t pos) {
    return kv->data + ((size_t)layer * kv->n_ctx + (size_t)pos) * kv->width;
}
static inline float *kv_scales_at(const kv_cache *kv, int32_t layer, int32_t pos) {
    return kv->scales + ((size_t)layer * kv->n_ctx + (size_t)pos) * 2;
}

struct ms4_session {
    ms4_engine *engine;
    kv_cache kv;
    int32_t n_ctx, length;
    atomic_int stop;
    _Atomic uint64_t done, total;
    uint64_t experts_used, bytes_read;                        /* of the running feed, as in ms4_stats */
};

/* A step: n tokens at positions pos .. pos + n - 1 of a session. */
typedef struct {
    ms4_engine *e;
    ms4_session *s;
    int32_t n, pos;
} step;

static inline size_t size_max(size_t a, size_t b) { return a > b ? a : b; }
static inline int32_t int_min(int32_t a, int32_t b) { return a < b ? a : b; }

int matrix_bind(const files *f, const ms4_tensor *t, matrix *out);   /* engine.c: checks a tensor and finds its bytes */
int workspace_grow(ms4_engine *e, int32_t n_tokens);          /* workspace.c */
int workspace_room(void *buffer, size_t *has, size_t needs);  /* buffer: of a pointer; bytes */
void workspace_close(ms4_engine *e);
/* layer.c: adds one layer to ws.h.  Only the last `keep` tokens come out, and become the step; the others leave their
 * latents in the kv cache. */
int layer_forward(step *st, int32_t layer, int32_t keep);
int attention_prepare(const step *st);                        /* attention.c: scratch for the step */
int attention_forward(const step *st, int32_t layer);         /* q, kv cache -> o */
int moe_forward(const step *st, int32_t layer);               /* moe.c: x -> added to h */
#endif
