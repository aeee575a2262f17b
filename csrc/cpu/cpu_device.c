/* cpu_device.c -- the CPU as a device: its table of calls, its buffers, its scratch memory. */
#include "cpu_device.h"
#include "error.h"
#include "memory.h"
#include <stdlib.h>
#include <string.h>

int cpu_ops_here(const struct ms4_ops **out) {
    const char *isa = getenv("MS4_ISA");
    *out = ms4_ops_for(isa && *isa ? isa : NULL);
    FAIL_IF(!*out, MS4_EARG, "MS4_ISA=%.40s: no such kernel table here", isa);
    return MS4_OK;
}
int cpu_need(cpu_room *room, size_t bytes) {
    if (bytes <= room->bytes) return MS4_OK;
    memory_give(room->at);
    *room = (cpu_room){ 0 };
    room->at = memory_take(bytes, 1);
    FAIL_IF(!room->at, MS4_ENOMEM, "no memory for the buffers of a step (%zu bytes); use a smaller batch", bytes);
    room->bytes = bytes;
    return MS4_OK;
}
int cpu_scratch(cpu_device *d, size_t floats) {
    if (floats <= d->scratch_floats) return MS4_OK;
    int32_t n = pool_size(d->pool);
    if (!d->scratch) d->scratch = memory_take((size_t)n, sizeof *d->scratch);
    FAIL_IF(!d->scratch, MS4_ENOMEM, "no memory for scratch buffers");
    d->scratch_floats = 0;
    for (int32_t i = 0; i < n; i++) {
        memory_give(d->scratch[i]);
        d->scratch[i] = memory_take(floats, sizeof(float));
        FAIL_IF(!d->scratch[i], MS4_ENOMEM, "no memory for scratch buffers (%zu bytes)", floats * sizeof(float));
    }
    d->scratch_floats = floats;
    return MS4_OK;
}
static int begin(device *base, const buffer_shape shapes[N_BUFFERS], const atomic_int *stop) {
    cpu_device *d = (cpu_device *)base;
    d->stop = stop;
    for (int i = 0; i < N_BUFFERS; i++) {
        cpu_rows *r = &d->rows[i];
        const buffer_shape *s = &shapes[i];
        r->width = s->floats;
        r->blocks = s->blocks ? blocks_of(s->floats) : 0;
        TRY(cpu_need(&r->room_f, (size_t)s->rows * r->width * sizeof *r->f));
        TRY(cpu_need(&r->room_q, (size_t)s->rows * r->blocks * sizeof *r->q));
        r->f = r->room_f.at;
        r->q = s->blocks ? r->room_q.at : NULL;
    }
    return MS4_OK;
}
static int wait(device *d) {
    (void)d;                                   /* every call is done when it returns */
    return MS4_OK;
}
static void close_device(device *base) {
    cpu_device *d = (cpu_device *)base;
    cpu_room *rooms[] = { &d->jobs, &d->hidden_f, &d->hidden_q, &d->spans, &d->row_spans, &d->absorbed, &d->absorbed_d,
                          &d->partial, &d->keys, &d->logits };
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) memory_give(rooms[i]->at);
    for (int i = 0; i < N_BUFFERS; i++) {
        memory_give(d->rows[i].room_f.at);
        memory_give(d->rows[i].room_q.at);
    }
    for (int32_t i = 0; d->scratch && i < pool_size(d->pool); i++) memory_give(d->scratch[i]);
    memory_give(d->scratch);
    memory_give(d);
}
static int write_rows(device *base, buffer b, int32_t n, const float *from) {
    const cpu_device *d = (const cpu_device *)base;
    memcpy(cpu_row(d, b, 0), from, (size_t)n * d->rows[b].width * sizeof *from);
    for (int32_t t = 0; t < n; t++) cpu_quantize_row(d, b, t);
    return MS4_OK;
}
static int read_rows(device *base, buffer b, int32_t n, float *to) {
    const cpu_device *d = (const cpu_device *)base;
    memcpy(to, cpu_row(d, b, 0), (size_t)n * d->rows[b].width * sizeof *to);
    return MS4_OK;
}
static const struct device_ops calls = {
    .name = "cpu", .begin = begin, .wait = wait, .close = close_device, .write = write_rows, .read = read_rows,
    .norm = cpu_norm, .products = cpu_products, .ffn = cpu_ffn, .brought = wait,
    .embed = cpu_embed, .latents = cpu_latents, .queries = cpu_queries, .attend = cpu_attend, .keep = cpu_keep,
    .route = cpu_route, .send = cpu_send, .fetch = cpu_fetch, .sum_pairs = cpu_sum_pairs, .logits = cpu_logits,
    .attend_patches = cpu_attend_patches, .merge_patches = cpu_merge_patches, .bias = cpu_bias,
};
int cpu_device_open(const struct ms4_ops *ops, pool *p, device **out) {
    cpu_device *d = memory_take(1, sizeof *d);
    FAIL_IF(!d, MS4_ENOMEM, "no memory for a device");
    d->base.ops = &calls;
    d->ops = ops;
    d->pool = p;
    *out = &d->base;
    return MS4_OK;
}
