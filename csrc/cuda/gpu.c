/* gpu.c -- opens the card; its memory, counted and within a limit; what is asked of it, in order. */
#include "cuda/gpu.h"
#include "clock.h"
#include "cuda/module.h"
#include "cuda/tape.h"
#include "memory.h"
#include "ops.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define CHUNK ((size_t)4 << 20)                               /* pinned memory is taken in pieces of at least this */
#define MOST_CHUNKS 16
#define MOST_PIECES 128                                       /* of host memory for copies */
#define SPARE ((size_t)512 << 20)                             /* of the card, for its driver and for others */
#define PAD 256                                               /* bytes behind what is taken: kernels may read there */

typedef struct { uint8_t *at; void *card; size_t bytes, used; } chunk;
/* Two pieces of pinned memory through which other memory goes to the card, one being filled while the other leaves. */
typedef struct { uint8_t *at[2]; CUevent left[2]; CUstream stream; int32_t next, used[2]; } pipe;
typedef struct { void *at; size_t bytes; int pinned; } host_piece;
typedef struct { CUfunction f; size_t granted, bytes; int32_t threads; } loaded;   /* bytes: of its argument */

struct gpu {
    CUdevice id;
    CUcontext context;
    CUmodule module;
    CUstream work, bring;
    pipe up, aside;                                       /* aside: that of `bring` */
    chunk chunks[MOST_CHUNKS];
    tape *tape;
    int32_t n_chunks, safe, unpinned, taping;
    atomic_int lost;
    pthread_mutex_t bringing;                                 /* of `aside` */
    pthread_mutex_t lock;                                     /* of the next four lines */
    char why[256];                                            /* it was lost */
    uint64_t used, most, wanted, refused;                     /* wanted: that there was no room for */
    double timed_bytes, timed_ns;
    host_piece pieces[MOST_PIECES];
    arena *arena;                                             /* or NULL */
    int64_t patience;                                         /* ns */
    uint64_t fetched;                                         /* bytes that came home */
    loaded kernels[N_KERNELS];
};
/* From now on nobody asks the card for anything. */
static void lose(gpu *g) {
    pthread_mutex_lock(&g->lock);
    if (!atomic_load(&g->lost)) snprintf(g->why, sizeof g->why, "%s", ms4_error());
    atomic_store(&g->lost, 1);
    pthread_mutex_unlock(&g->lock);
}
const char *gpu_lost(gpu *g) { return atomic_load(&g->lost) ? g->why : NULL; }
/* A failed call of the driver other than one for want of memory makes the card of no use for good.  Memory is not only
 * wanted where we ask for it: graphs take some, and kernels are loaded when they are first used. */
int gpu_check(gpu *g, const char *call, CUresult result) {
    enum { ABOUT = 4 << 20 };                                 /* the driver does not say */
    int status = cuda_check(call, result);
    if (status == MS4_EDEVICE) lose(g);
    if (status == MS4_ENOMEM) {
        pthread_mutex_lock(&g->lock);
        g->wanted = ABOUT;
        pthread_mutex_unlock(&g->lock);
    }
    return status;
}
#define GPU(g, name, ...) gpu_check(g, #name, cuda.name(__VA_ARGS__))
static CUdeviceptr address(const void *p) { return (CUdeviceptr)(uintptr_t)p; }

/* Between two looks at work that is not over.  A wait of the driver's own would never end where the card has died. */
static int have_patience(gpu *g, int64_t *since) {
    enum { SPIN = 1000000, YIELD = 50000000 };                /* ns */
    FAIL_IF(g->lost, MS4_EDEVICE, "%s", g->why);
    const int64_t now = now_ns(), waited = *since ? now - *since : 0;
    if (!*since) *since = now;
    if (waited > g->patience) {
        error_set(MS4_EDEVICE, "the GPU has not answered for %d s; --device cpu works without it",
                  (int)(g->patience / 1000000000));
        lose(g);
        return MS4_EDEVICE;
    }
    if (waited > YIELD) nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
    else if (waited > SPIN) sched_yield();
    return MS4_OK;
}
/* Until an event, or if that is NULL all that is in a stream, is over.  (Inline, so that each place that waits is a
 * place of its own to a test that lets one of them forget it.) */
static inline __attribute__((always_inline)) int wait_for(gpu *g, CUstream stream, CUevent event) {
    for (int64_t since = 0;;) {
        const CUresult result = event ? cuda.cuEventQuery(event) : cuda.cuStreamQuery(stream);
        if (result != CUDA_ERROR_NOT_READY) return gpu_check(g, event ? "cuEventQuery" : "cuStreamQuery", result);
        TRY(have_patience(g, &since));
    }
}
int gpu_enter(gpu *g) {
    FAIL_IF(g->lost, MS4_EDEVICE, "%s", g->why);
    return GPU(g, cuCtxSetCurrent, g->context);
}
int gpu_wait(gpu *g) {
    FAIL_IF(g->lost, MS4_EDEVICE, "%s", g->why);
    TRY(gpu_go(g));
    TRY(wait_for(g, g->work, NULL));
    for (int32_t i = 0; i < g->n_chunks; i++) g->chunks[i].used = 0;
    return MS4_OK;
}
int gpu_finish(gpu *g, CUstream stream) { return wait_for(g, stream, NULL); }
void gpu_settle(gpu *g) {
    if (!g->lost && g->work) wait_for(g, g->work, NULL);
    if (!g->lost && g->bring && g->bring != g->work) wait_for(g, g->bring, NULL);
}
/* With `safe` every call is waited for, so that a failure is that of the call just made. */
static int settle(gpu *g, CUstream stream) { return g->safe ? wait_for(g, stream, NULL) : MS4_OK; }

/* --- memory of the card ---------------------------------------------------------------------------------------- */
int gpu_take(gpu *g, size_t bytes, void **out) {
    CUdeviceptr p = 0;
    *out = NULL;
    pthread_mutex_lock(&g->lock);
    int fits = bytes <= g->most && g->used <= g->most - bytes;
    if (fits) g->used += bytes;
    else g->wanted = bytes;
    uint64_t left = g->most - g->used;
    pthread_mutex_unlock(&g->lock);
    FAIL_IF(!fits, MS4_ENOMEM, "no memory on the GPU: %zu bytes are needed, %llu of %llu are left; use a larger --vram "
            "or a smaller --ctx", bytes, (unsigned long long)left, (unsigned long long)g->most);
    int status = GPU(g, cuMemAlloc, &p, bytes + PAD);
    if (status) {
        pthread_mutex_lock(&g->lock);
        g->used -= bytes;
        g->wanted = bytes;
        pthread_mutex_unlock(&g->lock);
        return status;
    }
    *out = (void *)(uintptr_t)p;
    return MS4_OK;
}
void gpu_give(gpu *g, void *p, size_t bytes) {
    if (!p) return;
    if (!g->lost) cuda.cuMemFree(address(p));
    pthread_mutex_lock(&g->lock);
    g->used -= bytes;
    pthread_mutex_unlock(&g->lock);
}
uint64_t gpu_room(gpu *g) {
    pthread_mutex_lock(&g->lock);
    uint64_t room = g->most - g->used;
    pthread_mutex_unlock(&g->lock);
    return room;
}
uint64_t gpu_used(gpu *g) {
    pthread_mutex_lock(&g->lock);
    uint64_t used = g->used;
    pthread_mutex_unlock(&g->lock);
    return used;
}
uint64_t gpu_short(gpu *g) {
    pthread_mutex_lock(&g->lock);
    uint64_t wanted = g->wanted;
    g->wanted = 0;
    pthread_mutex_unlock(&g->lock);
    return wanted;
}
int gpu_need(gpu *g, gpu_buffer *room, size_t bytes) {
    if (bytes <= room->bytes) return MS4_OK;
    if (room->at) TRY(gpu_wait(g));                           /* somebody may still be reading it */
    gpu_drop(g, room);
    TRY(gpu_take(g, bytes, &room->at));
    room->bytes = bytes;
    return MS4_OK;
}
void gpu_drop(gpu *g, gpu_buffer *room) {
    gpu_give(g, room->at, room->bytes);
    *room = (gpu_buffer){ 0 };
}
int gpu_copy(gpu *g, void *to, const void *from, size_t bytes) {
    if (!bytes) return MS4_OK;
    TRY(gpu_go(g));
    TRY(GPU(g, cuMemcpyDtoDAsync, address(to), address(from), bytes, g->work));
    return settle(g, g->work);
}
/* --- pinned memory --------------------------------------------------------------------------------------------- */
static host_piece *piece_of(gpu *g, const void *p) {
    for (host_piece *at = g->pieces; at < g->pieces + MOST_PIECES; at++)
        if (at->at == p) return at;
    return NULL;
}
int gpu_pin(gpu *g, size_t bytes, void **out) {
    host_piece got = { .bytes = bytes ? bytes : 1 };
    *out = NULL;
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;               /* of the host's */
    if (!g->unpinned)
        result = cuda.cuMemHostAlloc(&got.at, got.bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    if (result != CUDA_ERROR_OUT_OF_MEMORY) TRY(gpu_check(g, "cuMemHostAlloc", result));
    const int status = result ? MS4_ENOMEM : MS4_OK;
    got.pinned = !status;
    if (status) got.at = memory_take_pages(got.bytes, 0);
    FAIL_IF(!got.at, MS4_ENOMEM, "no memory for copies to the GPU (%zu bytes); use a smaller batch", bytes);
    pthread_mutex_lock(&g->lock);
    host_piece *p = piece_of(g, NULL);
    if (p) *p = got;
    if (p && !got.pinned) g->refused += got.bytes;
    pthread_mutex_unlock(&g->lock);
    if (p) *out = got.at;
    else if (got.pinned) cuda.cuMemFreeHost(got.at);
    else memory_give_pages(got.at, got.bytes);
    FAIL_IF(!p, MS4_ENOMEM, "too many pieces of memory for copies to the GPU; use a smaller batch");
    return MS4_OK;
}
void gpu_unpin(gpu *g, void *p) {
    if (!p) return;
    pthread_mutex_lock(&g->lock);
    host_piece *at = piece_of(g, p), was = at ? *at : (host_piece){ 0 };
    if (at) *at = (host_piece){ 0 };
    pthread_mutex_unlock(&g->lock);
    if (!was.at || g->lost) return;                           /* a lost card may still be at work there */
    if (was.pinned) cuda.cuMemFreeHost(p);
    else memory_give_pages(was.at, was.bytes);
}
int gpu_is_pinned(gpu *g, const void *p) {
    pthread_mutex_lock(&g->lock);
    const host_piece *at = piece_of(g, p);
    const int pinned = at && at->pinned;
    pthread_mutex_unlock(&g->lock);
    return pinned;
}
void gpu_count_pinned(gpu *g, uint64_t *pinned, uint64_t *refused) {
    pthread_mutex_lock(&g->lock);
    *pinned = 0;
    *refused = g->refused;
    for (const host_piece *p = g->pieces; p < g->pieces + MOST_PIECES; p++) *pinned += p->pinned ? p->bytes : 0;
    pthread_mutex_unlock(&g->lock);
    uint64_t there = 0, not_there = 0;
    if (g->arena) arena_count(g->arena, &there, &not_there);
    *pinned += there;
    *refused += not_there;
}
void gpu_use_arena(gpu *g, arena *a) {
    arena_close(g->arena, g->lost);
    g->arena = a;
}
void gpu_pin_there(gpu *g, const void *at, size_t bytes) {
    if (g->arena && !g->safe && !g->unpinned) arena_pin(g->arena, at, bytes);
}
int gpu_unpin_there(gpu *g, const void *at, size_t bytes) {
    if (g->arena && !gpu_enter(g)) arena_unpin(g->arena, at, bytes);
    return !g->lost;
}
int gpu_pinned(gpu *g, gpu_pinned_room *room, size_t bytes) {
    if (bytes <= room->bytes) return MS4_OK;
    TRY(gpu_wait(g));
    gpu_unpin(g, room->at);
    *room = (gpu_pinned_room){ 0 };
    TRY(gpu_pin(g, bytes, &room->at));
    room->bytes = bytes;
    return MS4_OK;
}
/* One chunk more, at least so large. */
static int add_chunk(gpu *g, size_t bytes) {
    chunk *c = &g->chunks[g->n_chunks];
    const size_t usual = CHUNK << g->n_chunks / 2;
    FAIL_IF(g->n_chunks == MOST_CHUNKS, MS4_ENOMEM, "a step needs too many tables; use a smaller batch");
    *c = (chunk){ .bytes = bytes > usual ? bytes : usual };
    TRY(gpu_pin(g, c->bytes, (void **)&c->at));
    int status = gpu_take(g, c->bytes, &c->card);
    if (status) gpu_unpin(g, c->at);
    else g->n_chunks++;
    return status;
}
int gpu_stage(gpu *g, size_t bytes, void **out, void **card) {
    const size_t whole = (bytes + 63) / 64 * 64;
    chunk *c = g->chunks;
    while (c < g->chunks + g->n_chunks && c->bytes - c->used < whole) c++;
    if (c == g->chunks + g->n_chunks) TRY(add_chunk(g, whole));
    *out = memset(c->at + c->used, 0, whole);
    if (card) *card = (uint8_t *)c->card + c->used;
    c->used += whole;
    return MS4_OK;
}
int gpu_show(gpu *g, void *card, const void *staged, size_t bytes) {
    if (!bytes) return MS4_OK;
    TRY(gpu_go(g));
    TRY(GPU(g, cuMemcpyHtoDAsync, address(card), staged, bytes, g->work));
    return settle(g, g->work);
}
int gpu_fetch(gpu *g, void *pinned, const void *card, size_t bytes) {
    if (!bytes) return MS4_OK;
    g->fetched += bytes;
    TRY(gpu_go(g));
    TRY(GPU(g, cuMemcpyDtoHAsync, pinned, address(card), bytes, g->work));
    return settle(g, g->work);
}
uint64_t gpu_fetched(const gpu *g) { return g->fetched; }
/* --- between host and card ------------------------------------------------------------------------------------- */
static int pipe_open(gpu *g, pipe *p, CUstream stream) {
    p->stream = stream;
    for (int i = 0; i < 2; i++) {
        TRY(gpu_pin(g, CHUNK, (void **)&p->at[i]));
        TRY(gpu_event(g, &p->left[i]));
    }
    return MS4_OK;
}
static void pipe_close(gpu *g, pipe *p) {
    for (int i = 0; i < 2; i++) {
        gpu_unpin(g, p->at[i]);
        gpu_event_close(g, p->left[i]);
    }
}
static int pipe_copy(gpu *g, pipe *p, uint8_t *to, const uint8_t *from, size_t bytes) {
    for (size_t part; bytes; to += part, from += part, bytes -= part) {
        const int32_t i = p->next;
        part = bytes < CHUNK ? bytes : CHUNK;
        if (p->used[i]) TRY(wait_for(g, NULL, p->left[i]));
        memcpy(p->at[i], from, part);
        TRY(GPU(g, cuMemcpyHtoDAsync, address(to), p->at[i], part, p->stream));
        TRY(GPU(g, cuEventRecord, p->left[i], p->stream));
        p->used[i] = 1;
        p->next = !i;
    }
    return settle(g, p->stream);
}
/* The reverse, one piece on its way while the one before is copied; all of it is there then. */
static int pipe_fetch(gpu *g, pipe *p, uint8_t *to, const uint8_t *from, size_t bytes) {
    uint8_t *out = NULL;
    for (size_t n = 0, part; bytes || n; to += part, from += part, bytes -= part, n = part) {
        const int32_t i = p->next;
        part = bytes < CHUNK ? bytes : CHUNK;
        if (part) {
            if (p->used[i]) TRY(wait_for(g, NULL, p->left[i]));
            TRY(GPU(g, cuMemcpyDtoHAsync, p->at[i], address(from), part, p->stream));
            TRY(GPU(g, cuEventRecord, p->left[i], p->stream));
            p->used[i] = 1;
            p->next = !i;
        }
        if (n) {
            TRY(wait_for(g, NULL, p->left[!i]));
            memcpy(out, p->at[!i], n);
        }
        out = to;
    }
    return MS4_OK;
}
int gpu_upload(gpu *g, void *to, const void *from, size_t bytes) {
    TRY(gpu_go(g));
    return gpu_upload_first(g, to, from, bytes);
}
int gpu_upload_first(gpu *g, void *to, const void *from, size_t bytes) {
    return pipe_copy(g, &g->up, to, from, bytes);
}
int gpu_download(gpu *g, void *to, const void *from, size_t bytes) {
    uint8_t *out = to;
    const uint8_t *at = from;
    g->fetched += bytes;
    TRY(gpu_go(g));
    for (size_t part; bytes; out += part, at += part, bytes -= part) {
        part = bytes < CHUNK ? bytes : CHUNK;
        for (int i = 0; i < 2; i++)
            if (g->up.used[i]) TRY(wait_for(g, NULL, g->up.left[i]));
        g->up.used[0] = g->up.used[1] = 0;
        TRY(GPU(g, cuMemcpyDtoHAsync, g->up.at[0], address(at), part, g->work));
        TRY(gpu_wait(g));
        memcpy(out, g->up.at[0], part);
    }
    return MS4_OK;
}
/* --- the second stream ----------------------------------------------------------------------------------------- */
/* Straight from where it lies, as far as that is pinned; the rest through the pipe. */
static int bring(gpu *g, uint8_t *to, const uint8_t *from, size_t bytes) {
    for (size_t part; bytes; to += part, from += part, bytes -= part) {
        part = g->arena ? arena_pinned(g->arena, from, bytes) : 0;
        if (!part) return pipe_copy(g, &g->aside, to, from, bytes);
        TRY(GPU(g, cuMemcpyHtoDAsync, address(to), from, part, g->aside.stream));
        TRY(settle(g, g->aside.stream));
    }
    return MS4_OK;
}
int gpu_bring(gpu *g, void *to, const void *from, size_t bytes) {
    pthread_mutex_lock(&g->bringing);
    int status = bring(g, to, from, bytes);
    pthread_mutex_unlock(&g->bringing);
    return status;
}
int gpu_take_back(gpu *g, void *to, const void *from, size_t bytes) {
    pthread_mutex_lock(&g->bringing);
    int status = pipe_fetch(g, &g->aside, to, from, bytes);
    pthread_mutex_unlock(&g->bringing);
    return status;
}
int gpu_event(gpu *g, CUevent *out) { return GPU(g, cuEventCreate, out, CU_EVENT_DISABLE_TIMING); }
int gpu_clock(gpu *g, CUevent *out) { return GPU(g, cuEventCreate, out, CU_EVENT_DEFAULT); }
void gpu_event_close(gpu *g, CUevent event) {
    if (event && !g->lost) cuda.cuEventDestroy(event);
}
int gpu_brought(gpu *g, CUevent event) { return GPU(g, cuEventRecord, event, g->bring); }
int gpu_worked(gpu *g, CUevent event) {
    TRY(gpu_go(g));
    return GPU(g, cuEventRecord, event, g->work);
}
int gpu_await(gpu *g, CUevent event) {
    TRY(gpu_go(g));
    return GPU(g, cuStreamWaitEvent, g->work, event, 0);
}
int gpu_hold(gpu *g, CUevent event) { return GPU(g, cuStreamWaitEvent, g->bring, event, 0); }
int gpu_is_over(gpu *g, CUevent event, int *over) {
    CUresult result = cuda.cuEventQuery(event);
    *over = result == CUDA_SUCCESS;
    return result == CUDA_ERROR_NOT_READY ? MS4_OK : gpu_check(g, "cuEventQuery", result);
}
int gpu_until(gpu *g, CUevent event) { return wait_for(g, NULL, event); }
int gpu_time(gpu *g, CUevent from, CUevent to, size_t bytes) {
    float ms = 0;
    TRY(GPU(g, cuEventElapsedTime, &ms, from, to));
    pthread_mutex_lock(&g->lock);
    g->timed_bytes += (double)bytes;
    g->timed_ns += 1e6 * (double)ms;
    pthread_mutex_unlock(&g->lock);
    return MS4_OK;
}
void gpu_timed(gpu *g, double *bytes, double *ns) {
    pthread_mutex_lock(&g->lock);
    *bytes = g->timed_bytes;
    *ns = g->timed_ns;
    g->timed_bytes = g->timed_ns = 0;
    pthread_mutex_unlock(&g->lock);
}
/* --- work ------------------------------------------------------------------------------------------------------ */
static const struct { const char *name; int32_t threads; size_t bytes; } rows[] = {
#define X(name, type, threads) { #name, threads, sizeof(type) },
    CUDA_ROW_KERNELS(X)
#undef X
};
/* A kernel is looked up when it is first used: a module takes its time for each. */
static int find(gpu *g, int32_t kernel, loaded **out) {
    char text[64];
    loaded *k = &g->kernels[kernel];
    *out = k;
    if (k->f) return MS4_OK;
    if (kernel < KERNEL_mul) {
        snprintf(text, sizeof text, "%s", rows[kernel].name);
        k->threads = rows[kernel].threads;
        k->bytes = rows[kernel].bytes;
    } else {
        const int gemm = kernel >= KERNEL_gemm;
        snprintf(text, sizeof text, "%s_%s", gemm ? "gemm" : "mul",
                 ms4_type_infos[kernel - (gemm ? KERNEL_gemm : KERNEL_mul)].name);
        k->threads = gemm ? GEMM_THREADS : MUL_THREADS;
        k->bytes = sizeof(mul_args);
    }
    CUfunction f = NULL;
    CUresult result = cuda.cuModuleGetFunction(&f, g->module, text);
    FAIL_IF(result == CUDA_ERROR_NOT_FOUND, MS4_EDEVICE,
            "the GPU's code has no kernel %s; build ms4 anew, or use --device cpu", text);
    TRY(gpu_check(g, "cuModuleGetFunction", result));
    k->f = f;
    return MS4_OK;
}
int gpu_launch(gpu *g, int32_t kernel, const void *args, gpu_grid grid, size_t shared) {
    loaded *k;
    if (!grid.x || !grid.y || !grid.z) return MS4_OK;
    TRY(find(g, kernel, &k));
    if (shared > k->granted) {                                /* what is free depends on what a kernel has of itself */
        TRY(GPU(g, cuFuncSetAttribute, k->f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)shared));
        k->granted = shared;
    }
    if (g->taping) {
        const tape_launch how = { .f = k->f, .shared = shared, .grid = grid, .threads = k->threads };
        TRY(tape_put(g->tape, &how, args, k->bytes));
        return tape_is_long(g->tape) ? gpu_go(g) : MS4_OK;
    }
    void *parameters[] = { (void *)args };
    TRY(GPU(g, cuLaunchKernel, k->f, (unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z, (unsigned)k->threads, 1, 1,
            (unsigned)shared, g->work, parameters, NULL));
    return settle(g, g->work);
}
int gpu_tape(gpu *g, int on) {
    const int status = gpu_go(g);
    g->taping = 0;
    TRY(status);
    if (!on || g->safe) return MS4_OK;
    if (!g->tape) TRY(tape_open(g, &g->tape));
    tape_begin(g->tape);
    g->taping = 1;
    return MS4_OK;
}
int gpu_is_taping(const gpu *g) { return g->taping; }
void gpu_stretch(gpu *g, int32_t n) {
    if (g->taping) tape_stretch(g->tape, n);
}
int gpu_go(gpu *g) { return g->taping ? tape_go(g->tape, g->work) : MS4_OK; }
int gpu_poll(gpu *g, atomic_int *flag) {
    enum { LOOKS = 4000 };                                    /* between two questions to the driver */
    TRY(gpu_go(g));
    for (int64_t since = 0;;) {
        for (int i = 0; i < LOOKS; i++)
            if (atomic_load_explicit(flag, memory_order_acquire)) return MS4_OK;
        const CUresult result = cuda.cuStreamQuery(g->work);
        if (result != CUDA_ERROR_NOT_READY) TRY(gpu_check(g, "cuStreamQuery", result));
        TRY(have_patience(g, &since));
    }
}
/* --- products -------------------------------------------------------------------------------------------------- */
/* A copy on the card of what was staged for the launch that comes next: at `card`, or where the tape has it already. */
static int show_jobs(gpu *g, const void *staged, size_t bytes, void **card) {
    int stale;
    if (!g->taping) return gpu_show(g, *card, staged, bytes);
    TRY(tape_keep(g->tape, staged, bytes, card, &stale));
    return stale ? GPU(g, cuMemcpyHtoDAsync, address(*card), staged, bytes, g->work) : MS4_OK;
}
static int is_many(const gpu_product *p) { return p->job.n_tokens >= GEMM_FROM; }
/* The jobs of one kernel, in one launch. */
static int launch_products(gpu *g, const gpu_product *products, int32_t n, int32_t type, int many) {
    mul_job *jobs;
    void *card;
    int32_t n_jobs = 0, blocks = 0, n_tokens = 0;
    for (int32_t i = 0; i < n; i++) n_jobs += products[i].type == type && is_many(&products[i]) == many;
    TRY(gpu_stage(g, (size_t)n_jobs * sizeof *jobs, (void **)&jobs, &card));
    mul_job *job = jobs;
    for (int32_t i = 0; i < n; i++) {
        if (products[i].type != type || is_many(&products[i]) != many) continue;
        *job = products[i].job;
        job->first_block = blocks;
        blocks += many ? gemm_blocks(type, job) : mul_blocks(type, job);
        n_tokens = job->n_tokens > n_tokens ? job->n_tokens : n_tokens;
        job++;
    }
    TRY(show_jobs(g, jobs, (size_t)n_jobs * sizeof *jobs, &card));
    const mul_args args = { .jobs = card, .n_jobs = n_jobs };
    return gpu_launch(g, (many ? KERNEL_gemm : KERNEL_mul) + type, &args, (gpu_grid){ blocks, 1, 1 },
                      many ? gemm_shared(type) : mul_shared(type, n_tokens));
}
int gpu_products(gpu *g, const gpu_product *products, int32_t n) {
    uint8_t wanted[MS4_N_TYPES][2] = { 0 };
    for (int32_t i = 0; i < n; i++)
        if (products[i].job.n_tokens) wanted[products[i].type][is_many(&products[i])] = 1;
    for (int32_t type = 0; type < MS4_N_TYPES; type++)
        for (int many = 0; many < 2; many++)
            if (wanted[type][many]) TRY(launch_products(g, products, n, type, many));
    return MS4_OK;
}
/* --- opening --------------------------------------------------------------------------------------------------- */
/* How much may be taken: what is free now, less what driver and others may want; `most` if that is less. */
static int limit(gpu *g, uint64_t most) {
    size_t free_now = 0, total = 0;
    TRY(GPU(g, cuMemGetInfo, &free_now, &total));
    const size_t spare = free_now / 16 < SPARE ? free_now / 16 : SPARE;
    g->most = most && most < free_now - spare ? most : free_now - spare;
    return MS4_OK;
}
static int open_parts(gpu *g, const gpu_options *o) {
    int unified = 0, major = 0, minor = 0;
    TRY(cuda_driver_open());
    TRY(GPU(g, cuDeviceGet, &g->id, 0));
    TRY(GPU(g, cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, g->id));
    TRY(GPU(g, cuDeviceGetAttribute, &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, g->id));
    FAIL_IF(major < 8, MS4_EDEVICE, "the GPU is too old: it has compute capability %d.%d, and ms4 takes 8.0 or newer",
            major, minor);
    TRY(GPU(g, cuDeviceGetAttribute, &unified, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, g->id));
    FAIL_IF(!unified, MS4_EDEVICE, "the GPU does not see pinned memory at the host's addresses: it is too old");
    TRY(GPU(g, cuDevicePrimaryCtxRetain, &g->context, g->id));
    TRY(gpu_enter(g));
    TRY(limit(g, o->most));
    TRY(module_open(o->code, &g->module));
    TRY(GPU(g, cuStreamCreate, &g->work, CU_STREAM_NON_BLOCKING));
    if (!o->safe) TRY(GPU(g, cuStreamCreate, &g->bring, CU_STREAM_NON_BLOCKING));
    TRY(pipe_open(g, &g->up, g->work));
    return pipe_open(g, &g->aside, o->safe ? g->work : g->bring);
}
int gpu_open(const gpu_options *o, gpu **out) {
    gpu *g = memory_take(1, sizeof *g);
    FAIL_IF(!g, MS4_ENOMEM, "no memory for the GPU");
    pthread_mutex_init(&g->lock, NULL);
    pthread_mutex_init(&g->bringing, NULL);
    g->safe = o->safe;
    g->unpinned = o->unpinned;
    g->patience = (int64_t)(o->patience ? o->patience : GPU_PATIENCE) * 1000000000;
    int status = open_parts(g, o);
    if (status) {
        gpu_close(g);
        return status;
    }
    if (g->safe) g->bring = g->work;
    *out = g;
    return MS4_OK;
}
/* What fails here is not told: why the card is closed is the better reason.  Of a card that is lost nothing can be
 * given back, and a call might never return; the process's end does it. */
void gpu_close(gpu *g) {
    if (!g) return;
    if (g->context && !g->lost && cuda.cuCtxSetCurrent(g->context) == CUDA_SUCCESS) {
        gpu_settle(g);
        tape_close(g->tape);
        g->tape = NULL;
        pipe_close(g, &g->up);
        pipe_close(g, &g->aside);
        for (int32_t i = 0; i < g->n_chunks; i++) {
            gpu_unpin(g, g->chunks[i].at);
            gpu_give(g, g->chunks[i].card, g->chunks[i].bytes);
        }
        if (g->bring && g->bring != g->work) cuda.cuStreamDestroy(g->bring);
        if (g->work) cuda.cuStreamDestroy(g->work);
        if (g->module) cuda.cuModuleUnload(g->module);
    }
    gpu_use_arena(g, NULL);
    tape_close(g->tape);
    for (host_piece *p = g->pieces; p < g->pieces + MOST_PIECES; p++) gpu_unpin(g, p->at);
    if (g->context && !g->lost) cuda.cuDevicePrimaryCtxRelease(g->id);
    pthread_mutex_destroy(&g->bringing);
    pthread_mutex_destroy(&g->lock);
    memory_give(g);
}
/* --- for people ------------------------------------------------------------------------------------------------- */
/* The card's context stays once it was made: that takes tenths of a second, and who asks is about to open the card. */
static int keep_context(CUdevice id, CUcontext *out) {
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    static CUcontext kept;
    pthread_mutex_lock(&making);
    const int status = kept ? MS4_OK : CU(cuDevicePrimaryCtxRetain, &kept, id);
    *out = kept;
    pthread_mutex_unlock(&making);
    return status;
}
int ms4_gpu_probe(ms4_gpu *out) {
    CUdevice id;
    CUcontext context;
    size_t free_now = 0, total = 0;
    *out = (ms4_gpu){ 0 };
    TRY(cuda_driver_open());
    TRY(CU(cuDeviceGet, &id, 0));
    TRY(CU(cuDriverGetVersion, &out->driver));
    TRY(CU(cuDeviceGetName, out->name, (int)sizeof out->name, id));
    TRY(CU(cuDeviceGetAttribute, &out->major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, id));
    TRY(CU(cuDeviceGetAttribute, &out->minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, id));
    TRY(CU(cuDeviceGetAttribute, &out->n_multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, id));
    TRY(CU(cuDeviceGetPCIBusId, out->bus, (int)sizeof out->bus, id));
    TRY(keep_context(id, &context));
    TRY(CU(cuCtxSetCurrent, context));
    TRY(CU(cuMemGetInfo, &free_now, &total));
    out->free = free_now;
    out->total = total;
    return MS4_OK;
}
