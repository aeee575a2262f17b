/* cuda_device.c -- the card as a device: its table of calls and its buffers. */
#include "cuda/cuda_device.h"
#include "memory.h"
#include "weights.h"

#define MOST_PARTIAL ((size_t)64 << 20)

static int begin(device *base, const buffer_shape shapes[N_BUFFERS], const atomic_int *stop) {
    cuda_device *d = (cuda_device *)base;
    d->stop = stop;
    d->tables.ready = 0;
    d->ahead = NULL;
    d->late = 0;
    d->rope_of = NULL;
    TRY(gpu_enter(d->g));
    TRY(gpu_tape(d->g, 0));
    for (int i = 0; i < N_BUFFERS; i++) {
        cuda_rows *r = &d->rows[i];
        const buffer_shape *s = &shapes[i];
        r->width = s->floats;
        r->blocks = s->blocks ? blocks_of(s->floats) : 0;
        TRY(gpu_need(d->g, &r->room_f, (size_t)s->rows * r->width * sizeof *r->f));
        TRY(gpu_need(d->g, &r->room_q, (size_t)s->rows * r->blocks * sizeof *r->q));
        r->f = r->room_f.at;
        r->q = s->blocks ? r->room_q.at : NULL;
    }
    /* A token of a text model: so few rows that its launches take longer than its kernels. */
    if (shapes[BUF_H].rows != 1 || !shapes[BUF_ROUTER].floats) return MS4_OK;
    const buffer_shape *pairs = &shapes[BUF_PAIRS];
    TRY(gpu_pinned(d->g, &d->brought, (size_t)pairs->rows * pairs->floats * sizeof(float)));
    return gpu_tape(d->g, 1);
}
static int wait(device *base) {
    cuda_device *d = (cuda_device *)base;
    TRY(gpu_enter(d->g));
    TRY(gpu_tape(d->g, 0));
    TRY(cuda_bring_choices(d));
    return gpu_wait(d->g);
}
static void close_device(device *base) {
    cuda_device *d = (cuda_device *)base;
    gpu_buffer *rooms[] = { &d->tables.room, &d->queries, &d->queries_d, &d->latent, &d->partial, &d->gate, &d->up,
                            &d->hidden, &d->pairs, &d->logits, &d->ranked, &d->kept, &d->rope, &d->routing,
                            &d->choice, &d->streamed };
    gpu_enter(d->g);
    gpu_settle(d->g);                                         /* not gpu_wait: who closes need not hold the turn */
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) gpu_drop(d->g, rooms[i]);
    for (int i = 0; i < 2; i++) {
        gpu_event_close(d->g, d->begun[i]);
        gpu_event_close(d->g, d->arrived[i]);
        gpu_event_close(d->g, d->used[i]);
    }
    gpu_event_close(d->g, d->asked);
    for (int i = 0; i < N_BUFFERS; i++) {
        gpu_drop(d->g, &d->rows[i].room_f);
        gpu_drop(d->g, &d->rows[i].room_q);
    }
    gpu_unpin(d->g, d->chosen.at);
    gpu_unpin(d->g, d->x_pinned.at);
    gpu_unpin(d->g, d->told.at);
    gpu_unpin(d->g, d->choices.at);
    gpu_unpin(d->g, d->brought.at);
    gpu_unpin(d->g, d->few.at);
    memory_give(d->shorts);
    memory_give(d->products);
    memory_give(d);
}
static const struct device_ops calls = {
    .name = "cuda", .begin = begin, .wait = wait, .close = close_device, .write = cuda_write, .read = cuda_read,
    .norm = cuda_norm, .products = cuda_products, .ffn = cuda_ffn, .brought = cuda_brought,
    .embed = cuda_embed, .latents = cuda_latents, .queries = cuda_queries, .attend = cuda_attend, .keep = cuda_keep,
    .route = cuda_route, .send = cuda_send, .fetch = cuda_fetch, .sum_pairs = cuda_sum_pairs, .logits = cuda_logits,
    .recall = cuda_recall,
    .attend_patches = cuda_attend_patches, .merge_patches = cuda_merge_patches, .bias = cuda_bias,
};
int cuda_device_open(gpu *g, const struct ms4_ops *ops, device **out) {
    cuda_device *d = memory_take(1, sizeof *d);
    FAIL_IF(!d, MS4_ENOMEM, "no memory for a device");
    d->base.ops = &calls;
    d->g = g;
    d->ops = ops;
    d->partial_bytes = gpu_room(g) / 64 < MOST_PARTIAL ? (size_t)(gpu_room(g) / 64) : MOST_PARTIAL;
    *out = &d->base;
    return MS4_OK;
}
