/* tape.h -- launches that are written down, and go to the driver together, as a graph: one call for all of them.
 *
 * The launches of a step are parts, each ended by tape_go.  A part of the next step mostly has the same launches, so
 * its graph is made once; arguments that differ are set in it, and where there are other kernels, it is made anew.  A
 * graph is a chain: each kernel comes after the one before, as in a stream.  Whoever calls holds the engine's turn, and
 * a step begins when all work of the one before is done.
 *
 * A part that nobody ends may be a whole step.  The card would wait for all of it to be written down, so a few shorter
 * ones go before it (tape_is_long).
 */
#ifndef MS4_CUDA_TAPE_H
#define MS4_CUDA_TAPE_H
#include "cuda/gpu.h"

typedef struct tape tape;
#define TAPE_ARGS 128                                         /* bytes of a kernel's argument, at most */
typedef struct { CUfunction f; size_t shared; gpu_grid grid; int32_t threads; } tape_launch;

int tape_open(gpu *g, tape **out);
void tape_close(tape *t);                                     /* all work is done, or the card is lost */
void tape_begin(tape *t);                                     /* the first part of a step */
/* The parts that follow are those of stretch n > 0 of the step, in which n ascends: so they are found again, however
 * many came before. */
void tape_stretch(tape *t, int32_t n);
int tape_is_long(const tape *t);                              /* time to end this part */
int tape_put(tape *t, const tape_launch *how, const void *args, size_t bytes);
/* Memory of the card for what the next launch reads; stale: the caller fills it with `from`, before tape_go. */
int tape_keep(tape *t, const void *from, size_t bytes, void **card, int *stale);
/* Ends a part: what is in it is done behind all that is in the stream.  MS4_ENOMEM: there is no room for its graph. */
int tape_go(tape *t, CUstream stream);
#endif
