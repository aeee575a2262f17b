/* engine.c -- opens a model: files, worker threads, weights, devices, expert store. */
#include "cpu/cpu_device.h"
#include "engine.h"
#include "error.h"
#include "allowance.h"
#include "memory.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_BATCH 2048                                          /* tokens of a step, unless somebody says it */

/* What kernels and buffers take for granted. */
static int check_shape(const ms4_shape *s) {
    const int32_t positive[] = { s->n_layer, s->n_vocab, s->n_ctx_train, s->d_model, s->n_head, s->d_nope, s->d_rope,
                                 s->d_value, s->q_rank, s->kv_rank };
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++)
        FAIL_IF(positive[i] < 1 || positive[i] > 1 << 24, MS4_EMODEL, "shape value %zu is %d", i, positive[i]);
    FAIL_IF(s->n_layer > 4096 || s->n_head > 4096, MS4_EMODEL, "%d layers, %d heads", s->n_layer, s->n_head);
    FAIL_IF(s->d_rope % 8 || s->d_rope > 256 || s->d_nope % 8 || s->d_value % 8 || s->kv_rank % 8, MS4_EMODEL,
            "head widths %d, %d, %d and %d must be multiples of 8", s->d_rope, s->d_nope, s->d_value, s->kv_rank);
    FAIL_IF(s->n_dense_layer < 0 || s->n_dense_layer > s->n_layer, MS4_EMODEL,
            "%d of %d layers dense", s->n_dense_layer, s->n_layer);
    int has_experts = s->n_dense_layer < s->n_layer;
    FAIL_IF(has_experts && (s->n_expert < 1 || s->n_expert > 65536 || s->n_expert_used < 1
                            || s->n_expert_used > s->n_expert || s->n_expert_used > 256
                            || s->d_expert < 1 || s->d_expert > 1 << 24),
            MS4_EMODEL, "%d of %d experts, %d wide", s->n_expert_used, s->n_expert, s->d_expert);
    FAIL_IF(s->d_shared < 0 || s->d_shared > 1 << 24 || s->d_dense < 0 || s->d_dense > 1 << 24,
            MS4_EMODEL, "FFN width");
    FAIL_IF(!isfinite(s->attn_scale) || !isfinite(s->temp_beta) || s->temp_length < 0 || !(s->norm_eps >= 0),
            MS4_EMODEL, "a constant of the shape is not a finite number");
    return MS4_OK;
}
static int open_files(ms4_engine *e, const ms4_tensor *tensors, size_t n_tensors, const char *const *paths,
                      size_t n_paths, const ms4_options *o) {
    files_options how = { .load = o->load, .limited = o->ram > 0, .progress = o->progress, .user = o->user };
    files_range *ranges = NULL;
    budget_open(&e->budget, o->ram);
    how.room = o->ram ? budget_room(&e->budget) : allowance_room();
    how.reserve = e->budget.reserve;
    how.available = allowance_available();
    TRY(budget_ranges(tensors, n_tensors, &ranges, &how.n_ranges));
    how.ranges = ranges;
    int status = files_open(paths, n_paths, &how, e->pool, &e->files);
    memory_give(ranges);
    return status;
}
/* Slots, if there are experts that have stayed on the disk. */
static int open_slots(ms4_engine *e, slots **out) {
    const uint64_t least = slots_least(&e->shape, e->weights.layers), used = memory_resident();
    *out = NULL;
    if (files_load(e->files) != MS4_LOAD_STREAM || !least) return MS4_OK;
    if (!e->budget.most) e->budget.most = used + slots_all(&e->shape, e->weights.layers);
    FAIL_IF(budget_room(&e->budget) < least, MS4_ENOMEM,
            "%.1f GB of memory are not enough: all but the experts take %.1f GB, and experts at least %.1f",
            1e-9 * (double)e->budget.most, 1e-9 * (double)used, 1e-9 * (double)least);
    return slots_open(&e->shape, e->weights.layers, e->files, budget_room(&e->budget), out);
}
static const char UNPINNED[] = "%.1f MB of memory could not be pinned for the GPU, so copies are slower; ulimit -l "
                               "raises the limit";
/* What of the card is not as it might be. */
static void note_card(ms4_engine *e, const ms4_options *o) {
    char part[3][192] = { "" };
    if (e->stats.vram_slots < e->stats.experts)
        snprintf(part[0], sizeof part[0], "%llu of %llu experts fit on the GPU; the CPU computes the others",
                 (unsigned long long)e->stats.vram_slots, (unsigned long long)e->stats.experts);
    if (!o->n_batch && e->n_batch < N_BATCH)
        snprintf(part[1], sizeof part[1], "prompts are read %d tokens at a time, for want of its memory", e->n_batch);
    e->said_unpinned = e->stats.unpinned_bytes > 0;
    if (e->said_unpinned) snprintf(part[2], sizeof part[2], UNPINNED, 1e-6 * (double)e->stats.unpinned_bytes);
    for (int i = 0; i < 3; i++) {
        const size_t said = strlen(e->note);
        if (part[i][0]) snprintf(e->note + said, sizeof e->note - said, "%s%s", said ? "; " : "", part[i]);
    }
}
/* Memory that is ours anyway may all be pinned; the page cache is everybody's, and what is pinned of it nobody gets. */
static int pin(ms4_engine *e, slots *from_disk) {
    if (from_disk) return card_pin_slots(e->card, from_disk);
    const int mapped = files_load(e->files) == MS4_LOAD_MAP;
    return card_pin(e->card, &e->shape, e->weights.layers, mapped, mapped ? allowance_room() / 4 * 3 : UINT64_MAX);
}
/* A card, if one was asked for; with AUTO the CPU where there is none, and with a reason where it cannot do it. */
static int open_home(ms4_engine *e, const ms4_options *o, slots *from_disk) {
    ms4_gpu found;
    int status = o->device == MS4_DEVICE_CPU ? MS4_EDEVICE : MS4_OK;
    e->at_home = &e->weights;
    if (o->device == MS4_DEVICE_AUTO) status = ms4_gpu_probe(&found);
    if (status && o->device == MS4_DEVICE_AUTO && !cuda_is_absent())
        snprintf(e->note, sizeof e->note, "the GPU is not used: %s", ms4_error());
    if (!status) {
        status = card_open(o, &e->shape, &e->weights, e->ops, from_disk, &e->n_batch, &e->card);
        if (status && o->device != MS4_DEVICE_AUTO) return status;
        if (status) snprintf(e->note, sizeof e->note, "the GPU is not used: %s", ms4_error());
    }
    if (status) return cpu_device_open(e->ops, e->pool, &e->home);
    e->home = e->card->device;
    e->at_home = &e->card->weights.text;
    TRY(pin(e, from_disk));
    card_count(e->card, &e->stats);
    note_card(e, o);
    return MS4_OK;
}
static int open_parts(ms4_engine *e, const ms4_tensor *tensors, size_t n_tensors, const char *const *paths,
                      size_t n_paths, const ms4_options *o) {
    slots *from_disk;
    TRY(check_shape(&e->shape));
    FAIL_IF(o->load < MS4_LOAD_AUTO || o->load > MS4_LOAD_STREAM, MS4_EARG, "load mode %d", o->load);
    FAIL_IF(o->ram && (o->load == MS4_LOAD_MAP || o->load == MS4_LOAD_COPY), MS4_EARG,
            "a budget of memory needs load mode auto or stream");
    FAIL_IF(o->device < MS4_DEVICE_CPU || o->device > MS4_DEVICE_CUDA_SAFE, MS4_EARG, "device %d", o->device);
    FAIL_IF(o->n_batch < 0 || o->n_batch > 1 << 16, MS4_EARG, "batch of %d tokens: 1 to 65536", o->n_batch);
    TRY(cpu_ops_here(&e->ops));
    e->n_batch = o->n_batch ? o->n_batch : N_BATCH;
    TRY(pool_open(o->n_threads ? o->n_threads : allowance_threads(), &e->pool));
    TRY(open_files(e, tensors, n_tensors, paths, n_paths, o));
    TRY(text_weights_open(&e->weights, &e->shape, tensors, n_tensors, e->files, e->ops));
    TRY(open_slots(e, &from_disk));
    int status = open_home(e, o, from_disk);
    if (status) {
        slots_close(from_disk);
        return status;
    }
    TRY(experts_open(&e->shape, e->weights.layers, e->home, from_disk, &e->experts));
    TRY(kv_store_open(&e->shape, e->card ? e->card->kv : NULL, &e->kv));
    if (!e->card || !e->card->slots) return MS4_OK;
    TRY(cpu_device_open(e->ops, e->pool, &e->other));
    return experts_on_card(e->experts, e->card->slots, e->other);
}
/* What the slots have counted, for ms4_stats: at opening, and after each step in its turn. */
void engine_count_slots(ms4_engine *e, ms4_stats *c) {
    slots_counts n;
    if (!experts_slots(e->experts)) return;
    slots_count(experts_slots(e->experts), &n);
    c->experts_wanted = n.n_wanted;
    c->experts_there = n.n_hits;
    c->experts_read = n.n_reads;
    c->bytes_disk = n.bytes_read;
    c->ns_disk = n.ns_reading;
    c->ns_waited = n.ns_waited;
    c->slots = n.n_slots;
    c->slot_bytes = n.bytes;
    c->slot_bytes_most = n.most_bytes;
    c->ram = e->budget.most;
    c->direct = files_direct(e->files);
}
int ms4_engine_open(const ms4_shape *shape, const ms4_tensor *tensors, size_t n_tensors, const char *const *paths,
                    size_t n_paths, const ms4_options *options, ms4_engine **out) {
    ms4_engine *e = memory_take(1, sizeof *e);
    FAIL_IF(!e, MS4_ENOMEM, "no memory for the engine");
    e->shape = *shape;
    turn_open(&e->turn);
    pthread_mutex_init(&e->counting, NULL);
    int status = open_parts(e, tensors, n_tensors, paths, n_paths, options);
    if (status) {
        ms4_engine_close(e);
        return status;
    }
    engine_count_slots(e, &e->stats);
    *out = e;
    return MS4_OK;
}
void ms4_engine_close(ms4_engine *e) {
    if (!e) return;
    device *devices[] = { e->card ? NULL : e->home, e->other };
    for (int i = 0; i < 2; i++)
        if (devices[i]) devices[i]->ops->close(devices[i]);
    step_room_close(&e->room);
    experts_close(e->experts);
    kv_store_close(e->kv);
    card_close(e->card);
    card_close(e->left);
    text_weights_close(&e->weights);
    pool_close(e->pool);
    files_close(e->files);
    turn_close(&e->turn);
    pthread_mutex_destroy(&e->counting);
    memory_give(e);
}
void ms4_engine_stats(ms4_engine *e, ms4_stats *out) {
    pthread_mutex_lock(&e->counting);
    *out = e->stats;
    out->note = e->later[0] ? e->later : e->note;
    out->device = e->card ? "cuda" : "cpu";
    pthread_mutex_unlock(&e->counting);
    kv_store_count(e->kv, &out->kv_blocks, &out->kv_bytes);
    if (experts_slots(e->experts)) out->ns_waiting = slots_waiting(experts_slots(e->experts));
    out->bytes_weights = e->weights.bytes;
    out->n_threads = pool_size(e->pool);
    out->n_batch = e->n_batch;
    out->load = files_load(e->files);
    out->isa = e->ops->isa;
}
void engine_say(ms4_engine *e, const char *why, const char *then) {
    pthread_mutex_lock(&e->counting);
    snprintf(e->later, sizeof e->later, "%.*s; %s", (int)strcspn(why, ";"), why, then);       /* not what to type */
    pthread_mutex_unlock(&e->counting);
}
void engine_say_unpinned(ms4_engine *e) {
    pthread_mutex_lock(&e->counting);
    if (e->stats.unpinned_bytes && !e->said_unpinned) {
        snprintf(e->later, sizeof e->later, UNPINNED, 1e-6 * (double)e->stats.unpinned_bytes);
        e->said_unpinned = 1;
    }
    pthread_mutex_unlock(&e->counting);
}
static int leave_gpu(ms4_engine *e, const char *why) {
    device *cpu = e->other;
    FAIL_IF(!e->card, MS4_EARG, "there is no GPU in use");
    TRY(kv_store_come_home(e->kv));
    if (!cpu) TRY(cpu_device_open(e->ops, e->pool, &cpu));
    const char *lost = gpu_lost(e->card->g);
    engine_say(e, lost ? lost : why, "the CPU goes on without it");
    experts_off_card(e->experts, cpu);
    pthread_mutex_lock(&e->counting);
    e->left = e->card;
    e->card = NULL;
    pthread_mutex_unlock(&e->counting);
    e->home = cpu;
    e->other = NULL;
    e->at_home = &e->weights;
    card_retire(e->left);
    return MS4_OK;
}
int ms4_engine_leave_gpu(ms4_engine *e, const char *why) {
    turn_take(&e->turn);
    int status = leave_gpu(e, why);
    turn_give(&e->turn);
    return status;
}
void ms4_engine_watch(ms4_engine *e, void (*routed)(int32_t, int32_t, const int32_t *, void *), void *user) {
    turn_take(&e->turn);
    e->watch = (watch){ routed, user };
    turn_give(&e->turn);
}
int ms4_engine_place(ms4_engine *e, const uint8_t *place) {
    int status = MS4_OK;
    turn_take(&e->turn);
    if (!e->other) status = cpu_device_open(e->ops, e->pool, &e->other);
    if (!status) status = experts_place(e->experts, place, &e->other, 1);
    turn_give(&e->turn);
    return status;
}
int ms4_engine_slots(ms4_engine *e, uint64_t bytes) {
    turn_take(&e->turn);
    slots *s = experts_slots(e->experts);
    if (s) {
        e->budget.fixed = bytes;
        budget_fit(&e->budget, s, 0);
    }
    turn_give(&e->turn);
    FAIL_IF(!s, MS4_EARG, "no expert stays on the disk");
    return MS4_OK;
}
int ms4_engine_rates(ms4_engine *e, double bus, int32_t stream_from) {
    FAIL_IF(!(bus >= 0) || stream_from < 0, MS4_EARG, "a bus of %g bytes per second, experts from %d rows on", bus,
            stream_from);
    turn_take(&e->turn);
    const int on_card = e->card && e->card->slots;
    if (on_card) policy_fix(vram_policy(e->card->slots), bus, stream_from);
    turn_give(&e->turn);
    FAIL_IF(!on_card, MS4_EARG, "no GPU computes experts");
    return MS4_OK;
}
size_t ms4_engine_uses(ms4_engine *e, uint8_t *out, size_t room) {
    turn_take(&e->turn);
    const policy *p = experts_policy(e->experts);
    const size_t n = p ? policy_pack_bytes(p) : 0;
    if (p && n <= room) policy_pack(p, text_weights_fingerprint(&e->weights, &e->shape), out);
    turn_give(&e->turn);
    return n;
}
static int warm(ms4_engine *e, const uint8_t *uses, size_t n) {
    slots *from_disk = experts_slots(e->experts);
    FAIL_IF(!experts_policy(e->experts), MS4_EARG, "no expert moves: all of them lie where they are computed");
    TRY(policy_unpack(experts_policy(e->experts), text_weights_fingerprint(&e->weights, &e->shape), uses, n));
    if (from_disk) {
        budget_fit(&e->budget, from_disk, 0);
        TRY(slots_fill(from_disk));
    } else TRY(vram_warm(e->card->slots));
    pthread_mutex_lock(&e->counting);
    engine_count_slots(e, &e->stats);
    pthread_mutex_unlock(&e->counting);
    return MS4_OK;
}
int ms4_engine_warm(ms4_engine *e, const uint8_t *uses, size_t n) {
    turn_take(&e->turn);
    int status = warm(e, uses, n);
    turn_give(&e->turn);
    return status;
}
