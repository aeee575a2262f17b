/* divide.c -- how the memory of a card is divided between steps, the kv cache and slots for experts. */
#include "cuda/divide.h"
#include "error.h"
#include "kv_cache.h"
#include "numbers.h"
#include "quant.h"

#define N_CTX_USUAL 32768                                     /* positions that memory is set aside for */
#define LEAST_BATCH 32
#define MOST_BATCH 32768                                      /* rows are the second number of some grids */
#define LONG_BATCH 8192                                       /* beyond it, longer ones gain little */

/* Bytes of gate, up and what comes of them, for one token in the layer that needs most: its experts, or a dense FFN. */
static uint64_t ffn_bytes(const ms4_shape *s, const layer_weights *layers) {
    const uint64_t k = (uint64_t)s->n_expert_used;
    uint64_t most = 0;
    for (int32_t i = 0; i < s->n_layer; i++) {
        const layer_weights *w = &layers[i];
        const uint64_t routed = w->has_experts ? k * (uint64_t)s->d_expert : 0;
        const uint64_t every = (uint64_t)(w->has_experts ? s->d_shared : s->d_dense);
        const int blocks = w->has_experts ? matrix_quantized(&w->experts.down) : matrix_quantized(&w->every.down);
        const uint64_t width = routed + every;
        const uint64_t bytes = 8 * width + (blocks ? sizeof(block_q8) * (width / SUPERBLOCK + k + 1) : 4 * width);
        if (bytes > most) most = bytes;
    }
    return most;
}
/* Bytes that the buffers of a step of n tokens take, and a little more: what cuda_device.c and its neighbours need. */
static uint64_t step_bytes(const ms4_shape *s, const layer_weights *layers, const divide_what *what, int32_t tokens) {
    const uint64_t n = (uint64_t)tokens;
    const uint64_t d = (uint64_t)s->d_model, heads = (uint64_t)s->n_head, rank = (uint64_t)s->kv_rank;
    const uint64_t k = (uint64_t)s->n_expert_used, rope = (uint64_t)s->d_rope;
    const uint64_t floats = 3 * d + rank + rope + (uint64_t)s->q_rank + heads * (uint64_t)(s->d_nope + s->d_rope)
                          + heads * (uint64_t)s->d_value + heads * (rank + (rank + rope) / 2 + 3)
                          + (uint64_t)s->n_expert + 2 * k * d + rope + 64;
    const uint64_t blocks = (d + (uint64_t)s->q_rank + heads * (uint64_t)s->d_value) / SUPERBLOCK + 3;
    const uint64_t bytes = 4 * floats + blocks * sizeof(block_q8) + ffn_bytes(s, layers);
    return n * bytes + 4 * (uint64_t)s->n_vocab * (n < 32 ? n : 32) + ((uint64_t)8 << 20)
         + 2 * what->experts / ((uint64_t)s->n_expert * (uint64_t)s->n_layer + 1) + what->partial;
}
static uint64_t kv_bytes(const ms4_shape *s, int32_t n) {
    const uint64_t row = 2 * (uint64_t)(s->kv_rank + s->d_rope) + KV_SCALES * sizeof(float);
    return (uint64_t)((n + SEGMENT_KEYS - 1) / SEGMENT_KEYS * SEGMENT_KEYS) * row * (uint64_t)s->n_layer;
}
/* Steps twice as long halve how often a prompt's experts are copied, where they have no slot; their buffers take slots
 * from the tokens after it, so they get at most a tenth of the room. */
static int32_t longer(const ms4_shape *s, const layer_weights *layers, const divide_what *what, int32_t n) {
    if (what->experts <= what->room - what->room / 4) return n;
    while (n < LONG_BATCH && step_bytes(s, layers, what, 2 * n) <= what->room / 10) n *= 2;
    return n;
}
int divide(const ms4_shape *s, const layer_weights *layers, const divide_what *what, divided *out) {
    const uint64_t room = what->room, quarter = room / 4;
    int32_t n = int_min(what->n_batch, MOST_BATCH);
    while (what->may_choose && n > LEAST_BATCH && step_bytes(s, layers, what, n) > quarter) n /= 2;
    if (what->may_choose) n = longer(s, layers, what, n);
    const uint64_t step = step_bytes(s, layers, what, n), kv = kv_bytes(s, int_min(s->n_ctx_train, N_CTX_USUAL));
    FAIL_IF(step + kv_bytes(s, 1) > room, MS4_ENOMEM, "no room on the GPU for the buffers of a step: %llu MB are "
            "needed beside the dense weights, %llu MB are left; use a larger --vram or --device cpu",
            (unsigned long long)(step >> 20), (unsigned long long)(room >> 20));
    out->n_batch = n;
    out->aside = step + (kv < quarter ? kv : quarter);
    out->slots = out->aside < room ? room - out->aside : 0;
    return MS4_OK;
}
