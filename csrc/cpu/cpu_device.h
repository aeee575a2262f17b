/* cpu_device.h -- the CPU as a device: kernels of an ISA, worker threads, and buffers in host memory.
 *
 * Private to csrc/cpu, but for what opens it.  A call runs over the pool and is done when it returns: its queue is the
 * pool.  Work is cut into items; an output element is computed whole by one item, so how the work was cut, and by how
 * many threads, never shows in a result.
 */
#ifndef MS4_CPU_DEVICE_H
#define MS4_CPU_DEVICE_H
#include "device.h"
#include "numbers.h"
#include "pool.h"

int cpu_ops_here(const struct ms4_ops **out);                 /* the kernels of MS4_ISA, or the best that run here */
/* Several may share a pool, one at a time. */
int cpu_device_open(const struct ms4_ops *ops, pool *p, device **out);

#define TOKEN_TILE 128         /* tokens that one item of work takes at most: their activations stay in the L2 cache */

typedef struct { void *at; size_t bytes; } cpu_room;          /* memory that only grows; its old content is lost then */
typedef struct { float *f; block_q8 *q; size_t width, blocks; cpu_room room_f, room_q; } cpu_rows;
typedef struct {
    device base;
    const struct ms4_ops *ops;
    pool *pool;
    const atomic_int *stop;
    cpu_rows rows[N_BUFFERS];
    cpu_room jobs, hidden_f, hidden_q;                        /* run_ffn.c */
    cpu_room spans, row_spans, absorbed, absorbed_d, partial; /* run_attend.c */
    cpu_room keys;                                            /* run_patches.c */
    cpu_room logits;                                          /* of rows whose logits are not wanted where they lie */
    float **scratch;                                          /* by thread */
    size_t scratch_floats;
} cpu_device;

int cpu_need(cpu_room *room, size_t bytes);                   /* cpu_device.c: at least so many */
int cpu_scratch(cpu_device *d, size_t floats);                /* at least so many for each thread */

/* Activations: rows as floats, as block_q8, or both; strides in floats, in blocks. */
typedef struct { const float *f; const block_q8 *q; size_t f_stride, q_stride; } activations;
static inline activations cpu_x(const cpu_device *d, buffer b, int32_t row) {
    const cpu_rows *r = &d->rows[b];
    const block_q8 *q = r->q ? r->q + (size_t)row * r->blocks : NULL;
    return (activations){ r->f + (size_t)row * r->width, q, r->width, r->blocks };
}
static inline float *cpu_row(const cpu_device *d, buffer b, int32_t row) {
    return d->rows[b].f + (size_t)row * d->rows[b].width;
}
/* The blocks of a row anew, if this buffer has blocks. */
static inline void cpu_quantize_row(const cpu_device *d, buffer b, int32_t row) {
    const cpu_rows *r = &d->rows[b];
    if (r->q) d->ops->quantize(r->q + (size_t)row * r->blocks, r->f + (size_t)row * r->width, r->width);
}
int cpu_quantize_rows(cpu_device *d, buffer b, int32_t n);    /* run_tokens.c: of the first n rows, by all threads */
/* y[t * y_stride + r] = rows of m (slice 0) times row x_rows[t] (NULL: t) of x, in the calling thread.
 * next: weights that the thread will read afterwards, or NULL: a hint for prefetching. */
void cpu_mul(const struct ms4_ops *ops, const matrix *m, const activations *x, const int32_t *x_rows, int32_t n_tokens,
             float *y, size_t y_stride, const uint8_t *next);
int32_t cpu_rows_per_item(const pool *p, int32_t n_rows, int32_t n_tokens);    /* so that threads get some items each */

/* The calls of device.h. */
int cpu_embed(device *, const matrix *, const int32_t *, const float *, int32_t, int32_t);     /* run_tokens.c */
int cpu_norm(device *, buffer, const vector *, float, buffer, int32_t);
int cpu_latents(device *, const step *, int32_t, const vector *, float);
int cpu_queries(device *, const step *);
int cpu_keep(device *, const int32_t *, int32_t);
int cpu_products(device *, const product *, int32_t, int32_t);                                 /* run_products.c */
int cpu_logits(device *, const matrix *, const row_wanted *, int32_t);
int cpu_attend(device *, const step *, int32_t, const matrix *, const matrix *);               /* run_attend.c */
int cpu_route(device *, const ms4_shape *, const ffn_ahead *, picks *);                        /* run_ffn.c */
int cpu_ffn(device *, const ffn_share *, const picks *);
int cpu_send(device *, device *, const ffn_share *, const picks *);
int cpu_fetch(device *, device *, const ffn_share *);
int cpu_sum_pairs(device *, const picks *);
int cpu_attend_patches(device *, const patch_grid *);                                          /* run_patches.c */
int cpu_merge_patches(device *, const patch_grid *, buffer, int32_t, int32_t);
int cpu_bias(device *, buffer, const vector *, int32_t, int32_t);
#endif
