/* gpu.h -- one card in use: its context, its kernels, two streams, its memory, and the pinned memory between host and
 * card.
 *
 * All work goes to one stream, in order, call by call or in graphs (gpu_tape); the other one brings experts.  Whoever
 * calls holds the engine's turn, except for gpu_take and gpu_give, which any thread may call that has called gpu_enter.
 * Pinned and device memory have the same address on both sides.  Errors: MS4_ENOMEM, or MS4_EDEVICE, which lasts: a
 * card that failed once, or that did not answer for too long, is not asked again.
 */
#ifndef MS4_CUDA_GPU_H
#define MS4_CUDA_GPU_H
#include "cuda/arena.h"
#include "cuda/driver.h"
#include "quant.h"
/* Launches are compared byte by byte (tape.h). */
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wpadded"
#include "cuda/kernels.h"
#pragma GCC diagnostic pop
#include <stdatomic.h>

/* Kernels by number: those of CUDA_ROW_KERNELS, then a product of few and one of many tokens for each type. */
typedef enum {
#define X(name, ...) KERNEL_##name,
    CUDA_ROW_KERNELS(X)
#undef X
    KERNEL_mul,
    KERNEL_gemm = KERNEL_mul + MS4_N_TYPES,
    N_KERNELS = KERNEL_gemm + MS4_N_TYPES
} gpu_kernel;

typedef struct gpu gpu;
typedef struct {
    const char *code;                                         /* a file of kernels (cubin, fat binary, PTX); module.c */
    uint64_t most;                                            /* bytes of memory to take at most; 0: all that is free */
    int32_t safe;                                             /* wait after every call, to see which one fails */
    int32_t patience;                                         /* seconds that a wait may take; 0: GPU_PATIENCE */
    int32_t unpinned;                                         /* 1: gpu_pin is refused what it asks for */
} gpu_options;

#define GPU_PATIENCE 120

int gpu_open(const gpu_options *o, gpu **out);
void gpu_close(gpu *g);
int gpu_enter(gpu *g);                                        /* the calling thread works with this card */
int gpu_wait(gpu *g);                                         /* all work is done */
int gpu_finish(gpu *g, CUstream stream);                      /* what is in a stream of the caller's is done */
int gpu_check(gpu *g, const char *call, CUresult result);     /* as cuda_check; a failure is the card's end */
const char *gpu_lost(gpu *g);                                 /* why it is; NULL: it is not */
void gpu_settle(gpu *g);                                      /* before closing: both streams have come to their end */

/* --- memory of the card */
int gpu_take(gpu *g, size_t bytes, void **out);               /* aligned to 256; its content is undefined */
void gpu_give(gpu *g, void *p, size_t bytes);
uint64_t gpu_room(gpu *g);                                    /* bytes that may still be taken */
uint64_t gpu_used(gpu *g);
uint64_t gpu_short(gpu *g);                                   /* bytes that were not to be had, since the last call */
int gpu_copy(gpu *g, void *to, const void *from, size_t bytes);               /* on the card */
int gpu_upload(gpu *g, void *to, const void *from, size_t bytes);             /* `from` may change afterwards */
/* The same, before all that is written down and not under way yet (gpu_tape), which has nothing to do with it. */
int gpu_upload_first(gpu *g, void *to, const void *from, size_t bytes);
int gpu_download(gpu *g, void *to, const void *from, size_t bytes);           /* waits */
typedef struct { void *at; size_t bytes; } gpu_buffer;        /* memory that only grows; its old content is lost then */
int gpu_need(gpu *g, gpu_buffer *room, size_t bytes);         /* at least so many */
void gpu_drop(gpu *g, gpu_buffer *room);

/* --- pinned memory, or where the system gives none any more other memory, which copies take, too, but slower: what
 * they read must not change until they are over, and nobody looks at what they write before. */
int gpu_pin(gpu *g, size_t bytes, void **out);
void gpu_unpin(gpu *g, void *p);
int gpu_is_pinned(gpu *g, const void *p);                     /* it came from gpu_pin, and kernels see it */
void gpu_count_pinned(gpu *g, uint64_t *pinned, uint64_t *refused);           /* bytes; and ever refused */
/* What gpu_bring brings from there goes by itself, where gpu_pin_there has pinned it.  It is the card's from now on. */
void gpu_use_arena(gpu *g, arena *a);
void gpu_pin_there(gpu *g, const void *at, size_t bytes);     /* as far as the system lets us */
/* That memory is to be given back, and nothing is on its way from there.  0: the card is lost, may be at work there,
 * and holds those pages. */
int gpu_unpin_there(gpu *g, const void *at, size_t bytes);
typedef struct { void *at; size_t bytes; } gpu_pinned_room;   /* that only grows; its old content is lost then */
int gpu_pinned(gpu *g, gpu_pinned_room *room, size_t bytes);  /* at least so many; waits where it grows */
/* Pinned, zeroed, aligned to 64; card (or NULL): as much memory of the card, for gpu_show.  Good until the next
 * gpu_wait, on both sides. */
int gpu_stage(gpu *g, size_t bytes, void **out, void **card);
int gpu_show(gpu *g, void *card, const void *staged, size_t bytes);           /* pinned -> card */
int gpu_fetch(gpu *g, void *pinned, const void *card, size_t bytes);          /* card -> pinned; does not wait */
uint64_t gpu_fetched(const gpu *g);                           /* bytes, by gpu_fetch and gpu_download; with the turn */

/* --- work */
typedef struct { int32_t x, y, z; } gpu_grid;
/* args: the struct of the kernel.  A grid with a zero in it is no work. */
int gpu_launch(gpu *g, int32_t kernel, const void *args, gpu_grid grid, size_t shared);
typedef struct { mul_job job; int32_t type; } gpu_product;
/* From now on launches are written down, and go to the card as graphs: where the host waits or copies, and at gpu_go;
 * or, with on == 0 or `safe`, each by itself again.  Between the two the caller keeps the turn, and a step begins with
 * the first. */
int gpu_tape(gpu *g, int on);
int gpu_is_taping(const gpu *g);
void gpu_stretch(gpu *g, int32_t n);                          /* tape_stretch */
int gpu_go(gpu *g);                                           /* what is written down is under way */
/* Until a kernel has raised this flag, in pinned memory: raise_flag.  Work behind that kernel goes on. */
int gpu_poll(gpu *g, atomic_int *flag);
/* These products, none of which reads what another writes; first_block is filled in here. */
int gpu_products(gpu *g, const gpu_product *products, int32_t n);

/* --- the second stream: experts on their way; gpu_bring and gpu_brought may be called beside the work */
int gpu_bring(gpu *g, void *to, const void *from, size_t bytes);              /* `from` stays until that is over */
int gpu_take_back(gpu *g, void *to, const void *from, size_t bytes);          /* likewise, to host memory; waits */
int gpu_event(gpu *g, CUevent *out);
int gpu_clock(gpu *g, CUevent *out);                          /* an event that knows when it was over */
int gpu_brought(gpu *g, CUevent event);                       /* recorded behind all that gpu_bring has begun */
int gpu_await(gpu *g, CUevent event);                         /* work that comes after waits for it, on the card */
int gpu_worked(gpu *g, CUevent event);                        /* recorded behind all work */
int gpu_hold(gpu *g, CUevent event);                          /* what is brought after waits for it */
int gpu_is_over(gpu *g, CUevent event, int *over);
int gpu_until(gpu *g, CUevent event);                         /* it is over */
/* Between two clocks, both over, so many bytes came to the card; *bytes, *ns: of all that since the last call. */
int gpu_time(gpu *g, CUevent from, CUevent to, size_t bytes);
void gpu_timed(gpu *g, double *bytes, double *ns);
void gpu_event_close(gpu *g, CUevent event);
#endif
