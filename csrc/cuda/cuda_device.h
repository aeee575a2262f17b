/* cuda_device.h -- a card as a device: its buffers, and what a step needs beside them.
 *
 * Private to csrc/cuda, but for what opens it.  Every call puts kernels behind what was asked before; the host waits
 * only where device.h says so.  Addresses in these structs are the card's, unless "pinned" stands beside them.
 */
#ifndef MS4_CUDA_DEVICE_H
#define MS4_CUDA_DEVICE_H
#include "cuda/gpu.h"
#include "device.h"
#include "numbers.h"

/* ops: dequantizes embeddings on the host.  Several may share a card, one at a time. */
int cuda_device_open(gpu *g, const struct ms4_ops *ops, device **out);
/* Blocks of the kv cache on the card. */
int cuda_kv_open(gpu *g, kv_memory **out);
void cuda_kv_close(kv_memory *m);

typedef struct { float *f; block_q8 *q; size_t width, blocks; gpu_buffer room_f, room_q; } cuda_rows;
/* What a step's rows need: one piece of memory, uploaded once a step, and once more where rows are left out. */
typedef struct {
    gpu_buffer room;
    const float *rope, *scale;
    const kv_place *places;
    const kv_span *spans;
    const int32_t *row_span;
    const attend_tile *tiles;
    int32_t n_tiles, ready;
} cuda_tables;
/* Neighbouring spans of few rows: rows [first, first + n) of the step, none of which sees more than `most` segments. */
typedef struct { int32_t first, n, most; } cuda_short;
/* Of the pairs: weights and rows by token, tokens by pair (step.h, picks). */
typedef struct { float *weight; int32_t *row, *token; } cuda_pairs;
typedef struct {
    device base;
    gpu *g;
    const struct ms4_ops *ops;
    const atomic_int *stop;
    cuda_rows rows[N_BUFFERS];
    cuda_tables tables;
    cuda_short *shorts;                                       /* the host's; room for room_shorts */
    int32_t n_shorts, room_shorts;
    size_t partial_bytes;                                     /* that results by segment may take together */
    gpu_buffer queries, queries_d, latent, partial;           /* attention: 16-bit, its scales; floats; by segment */
    gpu_buffer gate, up, hidden, pairs;                       /* feed-forward: by job; results by pair */
    gpu_buffer ranked;                                        /* the highest logits and their ids, of two launches */
    gpu_pinned_room few;                                      /* the last of them */
    gpu_buffer logits, kept, rope;                            /* rope: the tower's */
    gpu_buffer streamed;                                      /* two experts that do not stay */
    CUevent begun[2], arrived[2], used[2];                    /* of each: on its way; there; it may be overwritten */
    size_t streamed_bytes[2];                                 /* of each, whose time has not been taken yet; 0: none */
    int32_t next_place, was_used[2];                          /* in turn; `used` of each has been recorded */
    int32_t bringing;                                         /* not all that was asked for is known to be here */
    CUevent asked;                                            /* behind all that was */
    const float *rope_of;                                     /* the host's table that `rope` is a copy of */
    gpu_buffer routing;                                       /* a copy of pairs_here, for many pairs */
    gpu_pinned_room chosen;                                   /* the ids that the router chose, then pairs_here */
    int32_t *ids, sees_pairs;                                 /* kernels see `chosen` */
    cuda_pairs pairs_here, pairs_seen;                        /* pinned; what kernels read, one or the other */
    gpu_buffer choice;                                        /* of a single row, by layer: ids, then weights */
    gpu_pinned_room choices;                                  /* the host's copy of `choice`, for recall */
    int32_t late;                                             /* it is still to be made */
    gpu_pinned_room told, brought;                            /* what the card tells the host of one; rows of the CPU */
    float *ahead;                                             /* results of experts that ffn has not to begin; NULL */
    gpu_pinned_room x_pinned;
    const block_q8 *x_here;                                   /* pinned: X of this layer's choice, or NULL */
    gpu_product *products;                                    /* the host's; room for room_products */
    int32_t room_products;
} cuda_device;

/* What is on a tape is done whole: it is one token. */
static inline int cuda_stopped(const cuda_device *d) {
    return d->stop && !gpu_is_taping(d->g) && atomic_load(d->stop);
}
static inline float *cuda_row(const cuda_device *d, buffer b, int32_t row) {
    return d->rows[b].f + (size_t)row * d->rows[b].width;
}
static inline block_q8 *cuda_blocks(const cuda_device *d, buffer b, int32_t row) {
    return d->rows[b].q ? d->rows[b].q + (size_t)row * d->rows[b].blocks : NULL;
}
/* The product of a matrix (slice 0) and n rows: x and its stride as it reads them, y and its stride in floats. */
gpu_product cuda_product(const matrix *m, const void *x, size_t x_stride, float *y, size_t y_stride, int32_t n);
int cuda_room_products(cuda_device *d, int32_t n);            /* d->products has room for so many */
int cuda_quantize(cuda_device *d, buffer b, int32_t first, int32_t n);        /* blocks anew, where a buffer has them */

/* The calls of device.h. */
int cuda_write(device *, buffer, int32_t, const float *);                                      /* cuda_tokens.c */
int cuda_read(device *, buffer, int32_t, float *);
int cuda_norm(device *, buffer, const vector *, float, buffer, int32_t);
int cuda_products(device *, const product *, int32_t, int32_t);
int cuda_logits(device *, const matrix *, const row_wanted *, int32_t);
int cuda_embed(device *, const matrix *, const int32_t *, const float *, int32_t, int32_t);
int cuda_keep(device *, const int32_t *, int32_t);
int cuda_latents(device *, const step *, int32_t, const vector *, float);                      /* cuda_attend.c */
int cuda_queries(device *, const step *);
int cuda_attend(device *, const step *, int32_t, const matrix *, const matrix *);
int cuda_route(device *, const ms4_shape *, const ffn_ahead *, picks *);                       /* cuda_ffn.c */
int cuda_recall(device *, const ms4_shape *, int32_t, picks *);
int cuda_bring_choices(cuda_device *d);                       /* before the host waits for the end of a step */
int cuda_ffn(device *, const ffn_share *, const picks *);
int cuda_brought(device *);
int cuda_send(device *, device *, const ffn_share *, const picks *);
int cuda_fetch(device *, device *, const ffn_share *);
int cuda_sum_pairs(device *, const picks *);
int cuda_attend_patches(device *, const patch_grid *);                                         /* cuda_patches.c */
int cuda_merge_patches(device *, const patch_grid *, buffer, int32_t, int32_t);
int cuda_bias(device *, buffer, const vector *, int32_t, int32_t);
#endif
