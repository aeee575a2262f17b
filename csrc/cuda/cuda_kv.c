/* cuda_kv.c -- blocks of the kv cache on the card.  They are read and written by threads that hold no turn, so that
 * goes through a stream and pinned memory of their own.
 *
 * Drivers hand out large memory in pieces of 2 MiB, and a block of the real model takes 2.9 MiB: a quarter would be
 * lost by each.  So large blocks are taken some at a time, as a run. */
#include "cuda/cuda_device.h"
#include "memory.h"
#include <pthread.h>
#include <string.h>

#define PIECE ((size_t)1 << 20)
#define LARGE ((size_t)1 << 20)                               /* smaller allocations share what drivers hand out */
#define RUN 16                                                /* blocks, or fewer where memory is short */

typedef struct run {
    struct run *next;
    uint8_t *memory;
    size_t bytes;                                             /* of a block */
    uint32_t n, used;                                         /* a bit for each block */
} run;
typedef struct {
    kv_memory base;
    gpu *g;
    pthread_mutex_t lock;                                     /* of the next two */
    CUstream stream;
    void *pinned;
    pthread_mutex_t taking;                                   /* of the runs */
    run *runs;
} cuda_kv;

static run *new_run(cuda_kv *kv, size_t bytes) {
    run *r = memory_take(1, sizeof *r);
    void *memory = NULL;
    uint32_t n = RUN;
    while (r && n && gpu_take(kv->g, n * bytes, &memory)) n /= 2;
    if (!memory) {
        memory_give(r);
        return NULL;
    }
    if (n < RUN) gpu_short(kv->g);                            /* nothing is wanted any more */
    *r = (run){ kv->runs, memory, bytes, n, 0 };
    return kv->runs = r;
}
static uint8_t *take_of_run(cuda_kv *kv, size_t bytes) {
    run *r = kv->runs;
    while (r && (r->bytes != bytes || r->used == (1u << r->n) - 1)) r = r->next;
    if (!r) r = new_run(kv, bytes);
    if (!r) return NULL;
    const int at = __builtin_ctz(~r->used);
    r->used |= 1u << at;
    return r->memory + (size_t)at * bytes;
}
static void give_to_run(cuda_kv *kv, const uint8_t *block) {
    run **at = &kv->runs;
    while (block < (*at)->memory || block >= (*at)->memory + (*at)->n * (*at)->bytes) at = &(*at)->next;
    run *r = *at;
    r->used &= ~(1u << (size_t)(block - r->memory) / r->bytes);
    if (r->used) return;
    *at = r->next;
    gpu_give(kv->g, r->memory, r->n * r->bytes);
    memory_give(r);
}
static uint8_t *take(kv_memory *m, size_t bytes) {
    cuda_kv *kv = (cuda_kv *)m;
    void *block = NULL;
    if (gpu_enter(kv->g)) return NULL;
    pthread_mutex_lock(&kv->taking);
    if (bytes >= LARGE) block = take_of_run(kv, bytes);
    else gpu_take(kv->g, bytes, &block);
    pthread_mutex_unlock(&kv->taking);
    return block;
}
static void give(kv_memory *m, uint8_t *block, size_t bytes) {
    cuda_kv *kv = (cuda_kv *)m;
    gpu_enter(kv->g);
    pthread_mutex_lock(&kv->taking);
    if (bytes >= LARGE) give_to_run(kv, block);
    else gpu_give(kv->g, block, bytes);
    pthread_mutex_unlock(&kv->taking);
}
/* Waits for the copy: the block that is copied may be somebody else's, who gives it back. */
static int copy(kv_memory *m, uint8_t *to, const uint8_t *from, size_t bytes) {
    cuda_kv *kv = (cuda_kv *)m;
    TRY(gpu_enter(kv->g));
    TRY(gpu_copy(kv->g, to, from, bytes));
    return gpu_wait(kv->g);
}
static CUdeviceptr address(const void *p) { return (CUdeviceptr)(uintptr_t)p; }
#define KV(kv, name, ...) gpu_check((kv)->g, #name, cuda.name(__VA_ARGS__))
/* One direction or the other, a piece at a time: `host` is read if `card` is to be written. */
static int move(cuda_kv *kv, uint8_t *host, const uint8_t *card, size_t bytes, int up) {
    for (size_t part; bytes; host += part, card += part, bytes -= part) {
        part = bytes < PIECE ? bytes : PIECE;
        if (up) {
            memcpy(kv->pinned, host, part);
            TRY(KV(kv, cuMemcpyHtoDAsync, address(card), kv->pinned, part, kv->stream));
        } else TRY(KV(kv, cuMemcpyDtoHAsync, kv->pinned, address(card), part, kv->stream));
        TRY(gpu_finish(kv->g, kv->stream));
        if (!up) memcpy(host, kv->pinned, part);
    }
    return MS4_OK;
}
static int read_block(kv_memory *m, void *to, const uint8_t *from, size_t bytes) {
    cuda_kv *kv = (cuda_kv *)m;
    TRY(gpu_enter(kv->g));
    pthread_mutex_lock(&kv->lock);
    int status = move(kv, to, from, bytes, 0);
    pthread_mutex_unlock(&kv->lock);
    return status;
}
static int write_block(kv_memory *m, uint8_t *to, const void *from, size_t bytes) {
    cuda_kv *kv = (cuda_kv *)m;
    TRY(gpu_enter(kv->g));
    pthread_mutex_lock(&kv->lock);
    int status = move(kv, (uint8_t *)(uintptr_t)from, to, bytes, 1);
    pthread_mutex_unlock(&kv->lock);
    return status;
}
int cuda_kv_open(gpu *g, kv_memory **out) {
    cuda_kv *kv = memory_take(1, sizeof *kv);
    FAIL_IF(!kv, MS4_ENOMEM, "no memory for the kv cache");
    *kv = (cuda_kv){ .base = { take, give, copy, read_block, write_block }, .g = g };
    pthread_mutex_init(&kv->lock, NULL);
    pthread_mutex_init(&kv->taking, NULL);
    int status = gpu_pin(g, PIECE, &kv->pinned);
    if (!status) status = KV(kv, cuStreamCreate, &kv->stream, CU_STREAM_NON_BLOCKING);
    if (status) {
        cuda_kv_close(&kv->base);
        return status;
    }
    *out = &kv->base;
    return MS4_OK;
}
void cuda_kv_close(kv_memory *m) {
    cuda_kv *kv = (cuda_kv *)m;
    if (!kv) return;
    if (!gpu_enter(kv->g) && kv->stream) cuda.cuStreamDestroy(kv->stream);
    gpu_unpin(kv->g, kv->pinned);
    pthread_mutex_destroy(&kv->lock);
    pthread_mutex_destroy(&kv->taking);
    memory_give(kv);
}
