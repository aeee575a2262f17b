/* card.c -- puts a model on a card: says how its memory is divided, and opens what lives there. */
#include "cuda/card.h"
#include "memory.h"

#define N_CTX_USUAL 32768                                     /* positions that memory is set aside for */
#define LEAST_BATCH 32

/* Bytes that the buffers of a step of n tokens take, and a little more: what cuda_device.c and its neighbours need. */
static uint64_t step_bytes(const ms4_shape *s, uint64_t n) {
    const uint64_t d = (uint64_t)s->d_model, heads = (uint64_t)s->n_head, rank = (uint64_t)s->kv_rank;
    const uint64_t k = (uint64_t)s->n_expert_used, rope = (uint64_t)s->d_rope;
    const uint64_t widest = (uint64_t)(s->d_dense > s->d_expert + s->d_shared ? s->d_dense : s->d_expert + s->d_shared);
    const uint64_t floats = 3 * d + rank + rope + (uint64_t)s->q_rank + heads * (uint64_t)(s->d_nope + s->d_rope)
                          + heads * (uint64_t)s->d_value + heads * (rank + (rank + rope) / 2 + 3)
                          + (uint64_t)s->n_expert + (k + 1) * widest * 2 + 2 * k * d + rope + 64;
    const uint64_t quantised = 320 * ((d + (uint64_t)s->q_rank + heads * (uint64_t)s->d_value
                                       + (k + 1) * widest) / SUPERBLOCK + k + 4);
    return n * (4 * floats + quantised) + 4 * (uint64_t)s->n_vocab * (n < 32 ? n : 32) + ((uint64_t)8 << 20);
}
static uint64_t kv_bytes(const ms4_shape *s, uint64_t n) {
    const uint64_t row = 2 * (uint64_t)(s->kv_rank + s->d_rope) + KV_SCALES * sizeof(float);
    return (n + SEGMENT_KEYS - 1) / SEGMENT_KEYS * SEGMENT_KEYS * row * (uint64_t)s->n_layer;
}
/* Bytes for slots: what is left when steps and the kv cache have their part, each at most a quarter. */
static int divide(const card *c, const ms4_shape *s, int32_t *n_batch, int may_shrink, uint64_t *slots) {
    const uint64_t room = gpu_room(c->g);
    const int32_t n_ctx = int_min(s->n_ctx_train, N_CTX_USUAL);
    while (may_shrink && *n_batch > LEAST_BATCH && step_bytes(s, (uint64_t)*n_batch) > room / 4) *n_batch /= 2;
    uint64_t aside = step_bytes(s, (uint64_t)*n_batch), kv = kv_bytes(s, (uint64_t)n_ctx);
    FAIL_IF(aside + kv_bytes(s, 1) > room, MS4_ENOMEM, "no room on the GPU for the buffers of a step: %llu MB are "
            "needed beside the dense weights, %llu MB are left; use a larger --vram or --device cpu",
            (unsigned long long)(aside >> 20), (unsigned long long)(room >> 20));
    aside += kv < room / 4 ? kv : room / 4;
    *slots = aside < room ? room - aside : 0;
    return MS4_OK;
}
static int open_parts(card *c, const ms4_options *o, const ms4_shape *s, const text_weights *host,
                      const struct ms4_ops *ops, int32_t *n_batch, int may_shrink) {
    const gpu_options how = { o->code, o->vram, o->device == MS4_DEVICE_CUDA_SAFE };
    uint64_t slots = 0;
    FAIL_IF(s->kv_rank > MOST_RANK, MS4_EDEVICE, "the GPU takes latents of %d numbers at most; this model has %d",
            MOST_RANK, s->kv_rank);
    TRY(gpu_open(&how, &c->g));
    TRY(cuda_text_open(c->g, host, s, ops, &c->weights));
    TRY(cuda_kv_open(c->g, &c->kv));
    TRY(cuda_device_open(c->g, ops, &c->device));
    TRY(divide(c, s, n_batch, may_shrink, &slots));
    return s->n_dense_layer < s->n_layer ? vram_open(c->g, s, host->layers, slots, &c->slots) : MS4_OK;
}
int card_open(const ms4_options *o, const ms4_shape *s, const text_weights *host, const struct ms4_ops *ops,
              int32_t *n_batch, int may_shrink, card **out) {
    card *c = memory_take(1, sizeof *c);
    FAIL_IF(!c, MS4_ENOMEM, "no memory for the GPU");
    int status = open_parts(c, o, s, host, ops, n_batch, may_shrink);
    if (status) {
        card_close(c);
        return status;
    }
    *out = c;
    return MS4_OK;
}
void card_count(card *c, ms4_stats *out) {
    out->vram_bytes = gpu_used(c->g);
    if (c->slots) vram_count(c->slots, out);
}
void card_close(card *c) {
    if (!c) return;
    vram_close(c->slots);
    if (c->device) c->device->ops->close(c->device);
    cuda_kv_close(c->kv);
    cuda_weights_close(&c->weights);
    gpu_close(c->g);
    memory_give(c);
}
