/* card.c -- puts a model on a card: says how its memory is divided, and opens what lives there. */
#include "cuda/card.h"
#include "clock.h"
#include "cuda/divide.h"
#include "memory.h"
#include <unistd.h>

#define MOST_PIXELS 1540                                      /* of a side of an image, as images are scaled */

static int open_parts(card *c, const ms4_options *o, const ms4_shape *s, const text_weights *host,
                      const struct ms4_ops *ops, slots *from_disk, int32_t *n_batch) {
    const gpu_options how = { .code = o->code, .most = o->vram, .safe = o->device == MS4_DEVICE_CUDA_SAFE,
                              .patience = o->patience, .unpinned = o->unpinned };
    FAIL_IF(s->kv_rank > MOST_RANK, MS4_EDEVICE, "the GPU takes latents of %d numbers at most; this model has %d",
            MOST_RANK, s->kv_rank);
    TRY(gpu_open(&how, &c->g));
    TRY(cuda_text_open(c->g, host, s, ops, &c->weights));
    TRY(cuda_kv_open(c->g, &c->kv));
    TRY(cuda_device_open(c->g, ops, &c->device));
    const divide_what what = { .room = gpu_room(c->g), .experts = vram_wanted(s, host->layers),
                               .partial = ((cuda_device *)c->device)->partial_bytes, .n_batch = *n_batch,
                               .may_choose = !o->n_batch };
    divided parts;
    TRY(divide(s, host->layers, &what, &parts));
    c->aside = parts.aside;
    *n_batch = parts.n_batch;
    return s->n_dense_layer < s->n_layer ? vram_open(c->g, s, host->layers, from_disk, parts.slots, &c->slots) : MS4_OK;
}
int card_open(const ms4_options *o, const ms4_shape *s, const text_weights *host, const struct ms4_ops *ops,
              slots *from_disk, int32_t *n_batch, card **out) {
    card *c = memory_take(1, sizeof *c);
    FAIL_IF(!c, MS4_ENOMEM, "no memory for the GPU");
    int status = open_parts(c, o, s, host, ops, from_disk, n_batch);
    if (status) {
        card_close(c);
        return status;
    }
    *out = c;
    return MS4_OK;
}
/* Ranges for so many parts of memory. */
static int room_ranges(size_t n, arena_range **out) {
    *out = memory_take(n, sizeof **out);
    FAIL_IF(!*out, MS4_ENOMEM, "no memory for the table of pinned memory");
    return MS4_OK;
}
static int use_ranges(card *c, arena_range *ranges, size_t n, int read_only, uint64_t most) {
    arena *a;
    int status = arena_open(ranges, n, read_only, most, &a);
    memory_give(ranges);
    if (!status) gpu_use_arena(c->g, a);
    return status;
}
int card_pin(card *c, const ms4_shape *s, const layer_weights *layers, int read_only, uint64_t most) {
    arena_range *ranges;
    size_t n = 0;
    if (!c->slots || vram_has_all(c->slots)) return MS4_OK;
    TRY(room_ranges(3 * (size_t)s->n_layer, &ranges));
    for (int32_t i = 0; i < s->n_layer; i++) {
        const matrix *parts[] = { &layers[i].experts.gate, &layers[i].experts.up, &layers[i].experts.down };
        for (int j = 0; j < 3 && layers[i].has_experts; j++)
            ranges[n++] = (arena_range){ parts[j]->data, (size_t)(s->n_expert - 1) * parts[j]->slice_bytes
                                                             + (size_t)matrix_bytes(parts[j]), 0 };
    }
    return use_ranges(c, ranges, n, read_only, most);
}
/* Pages that are pinned stay with the card when the system takes them back, and it would go on reading there. */
static int leave_slot(void *g, const uint8_t *at, size_t bytes) { return gpu_unpin_there(g, at, bytes); }

int card_pin_slots(card *c, slots *from_disk) {
    arena_range *ranges;
    const uint8_t *at;
    size_t n = 0;
    uint64_t bytes, slot_bytes;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);    /* larger ones are pinned if a slot is whole ones */
    if (!c->slots || vram_has_all(c->slots)) return MS4_OK;
    while (slots_memory(from_disk, (int32_t)n, &bytes, &slot_bytes)) n++;
    TRY(room_ranges(n, &ranges));
    n = 0;
    for (int32_t i = 0; (at = slots_memory(from_disk, i, &bytes, &slot_bytes)); i++)
        if (slot_bytes % page == 0) ranges[n++] = (arena_range){ at, (size_t)bytes, (size_t)slot_bytes };
    TRY(use_ranges(c, ranges, n, 0, UINT64_MAX));
    slots_watch(from_disk, leave_slot, c->g);
    return MS4_OK;
}
/* Bytes of the buffers of an image of n patches, and a little more (vision.c). */
static uint64_t image_bytes(const ms4_vision_shape *s, uint64_t n) {
    const uint64_t d = (uint64_t)s->d_model, ffn = (uint64_t)s->d_ffn, some = n < 2048 ? n : 2048;
    return n * d * 6 * 5 + some * (ffn * 14 + 3 * (uint64_t)(s->patch_size * s->patch_size) * 6) + ((uint64_t)16 << 20);
}
int card_tower(card *c, const tower_weights *host, const ms4_vision_shape *s, cuda_weights *out) {
    const uint64_t side = (uint64_t)(MOST_PIXELS / s->patch_size);
    TRY(gpu_enter(c->g));
    FAIL_IF(gpu_room(c->g) < c->aside + image_bytes(s, side * side), MS4_ENOMEM, "no room on the GPU for images");
    int status = cuda_tower_open(c->g, host, s, out);
    if (!status && gpu_room(c->g) < c->aside + image_bytes(s, side * side))
        status = error_set(MS4_ENOMEM, "no room on the GPU for a vision tower");
    if (status) cuda_weights_close(out);
    return status;
}
/* Best of some rounds of COPIES copies of `bytes` bytes each, and of so many that a card which had nothing to do has
 * raised its clocks, and those of its bus. */
typedef int copying(gpu *, void *, const void *, size_t);
static int time_copies(gpu *g, void *to, const void *from, size_t bytes, copying *copy, double *best) {
    enum { ROUNDS = 5, COPIES = 4, AT_LEAST = 250000000 };    /* ns */
    const int64_t begun = now_ns();
    *best = 0;
    for (int round = 0; round < ROUNDS || now_ns() - begun < AT_LEAST; round++) {
        TRY(gpu_wait(g));
        int64_t start = now_ns();
        for (int i = 0; i < COPIES; i++) TRY(copy(g, to, from, bytes));
        TRY(gpu_wait(g));
        double rate = COPIES * (double)bytes / (1e-9 * (double)(now_ns() - start));
        if (rate > *best) *best = rate;
    }
    return MS4_OK;
}
int card_measure(card *c, double *vram, double *bus) {
    enum { LEAST = 1 << 16, OF_VRAM = 256 << 20, OF_BUS = 64 << 20 };       /* caches of cards are smaller */
    const uint64_t room = gpu_room(c->g) / 4;
    const size_t bytes = room < OF_VRAM ? (size_t)room / 256 * 256 : OF_VRAM, of_bus = bytes < OF_BUS ? bytes : OF_BUS;
    void *memory = NULL, *pinned = NULL;
    *vram = *bus = 0;
    if (bytes < LEAST) return MS4_OK;
    TRY(gpu_enter(c->g));
    int status = gpu_take(c->g, 2 * bytes, &memory);
    if (status == MS4_ENOMEM) {                               /* nobody is to give up anything for this */
        gpu_short(c->g);
        return MS4_OK;
    }
    if (!status) status = gpu_pin(c->g, of_bus, &pinned);
    if (!status) status = time_copies(c->g, (uint8_t *)memory + bytes, memory, bytes, gpu_copy, vram);
    if (!status) status = time_copies(c->g, memory, pinned, of_bus, gpu_show, bus);
    *vram *= 2;
    gpu_unpin(c->g, pinned);
    gpu_give(c->g, memory, 2 * bytes);
    return status;
}
void card_count(card *c, ms4_stats *out) {
    out->vram_bytes = gpu_used(c->g);
    out->bytes_fetched = gpu_fetched(c->g);
    gpu_count_pinned(c->g, &out->pinned_bytes, &out->unpinned_bytes);
    if (c->slots) vram_count(c->slots, out);
}
int card_shrink(card *c) {
    const uint64_t wanted = gpu_short(c->g), more = (uint64_t)16 << 20;
    uint64_t given = 0;
    if (!wanted || !c->slots || gpu_lost(c->g)) return 0;
    return !vram_shrink(c->slots, 2 * wanted + more, &given) && given;      /* the next buffer may want as much */
}
void card_retire(card *c) {
    vram_close(c->slots);
    c->slots = NULL;
    if (c->device) c->device->ops->close(c->device);
    c->device = NULL;
    cuda_kv_close(c->kv);
    c->kv = NULL;
    cuda_weights_close(&c->weights);
    if (c->g) gpu_use_arena(c->g, NULL);
}
void card_close(card *c) {
    if (!c) return;
    card_retire(c);
    gpu_close(c->g);
    memory_give(c);
}
