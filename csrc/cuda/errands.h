/* errands.h -- the thread that carries experts between host memory and slots, beside the work of the card.
 *
 * Whoever owns the slots puts an errand, which is what is carried and where, and looks later what became of it; all of
 * it in one thread (the engine's turn).  The thread of the errands works on what has been put, in order, and owns no
 * table.
 */
#ifndef MS4_CUDA_ERRANDS_H
#define MS4_CUDA_ERRANDS_H
#include "cuda/gpu.h"
#include "slots.h"
typedef struct errands errands;

#define MOST_ERRANDS 32                                       /* under way at a time */
typedef struct {
    ffn_weights from, to;                                     /* host memory and a slot; or the reverse, with landing */
    struct disk_job *landing;                                 /* NULL, or of slots_trade: told when it is there */
    int32_t id, out, slot;                                    /* the owner's */
} errand;

/* ram: NULL, or whose jobs land. */
int errands_open(gpu *g, slots *ram, errands **out);
/* The thread ends behind the errand that it is at, and what is under way is over then; with `left` in between, what
 * had not been seen to end is handed out.  What was to land is read from the disk. */
void errands_end(errands *e);
int errands_left(errands *e, errand *out);                    /* 0: no more */
void errands_close(errands *e);
int32_t errands_idle(const errands *e);                       /* how many more may be put */
uint64_t errands_bytes(const errands *e);                     /* of what is under way */
void errands_put(errands *e, const errand *what);             /* one is idle */
/* The next errand that has ended, whose place in the ring is idle then; *ended 0: none has.  *good: it has arrived. */
int errands_next(errands *e, errand *out, int *ended, int *good);
static inline uint64_t errand_bytes(const errand *e) {
    return matrix_bytes(&e->from.gate) + matrix_bytes(&e->from.up) + matrix_bytes(&e->from.down);
}
#endif
