/* step.h -- the tokens that are computed together: spans of one or more sessions, and the buffers that hold their
 * rows. */
#ifndef MS4_STEP_H
#define MS4_STEP_H
#include "kv_cache.h"
#include "weights.h"
#include <stdatomic.h>

/* n tokens of one session from position pos on: rows first .. first + n - 1 of every buffer.  The logits of the last
 * n_out are wanted: one for decode, none inside a prompt, several to verify a draft. */
typedef struct { const kv_cache *kv; int32_t first, n, pos, n_out; } span;
/* Who is told what the router chose (ms4_engine_watch); call NULL: nobody. */
typedef struct { void (*call)(int32_t layer, int32_t n_tokens, const int32_t *experts, void *user); void *user; } watch;
typedef struct {
    const ms4_shape *shape;
    const watch *watch;
    span *spans;
    float *rope;               /* n x d_rope: cos, sin of each pair at the row's position, from doubles of the host */
    float *scale;              /* n: attn_scale times the query temperature at the row's position */
    int32_t *keep;             /* n: scratch, for the rows that go on */
    int32_t *late;             /* n_late of n_layer: the layers whose picks are still to be heard */
    int32_t n_spans, n, n_out, n_late;
} step;

/* The buffers of a device, by name; a program (step.c, vision.c) says how wide a row of each is.  "Blocks" are the same
 * row as block_q8: where a program asks for them, a call that writes the floats writes them, too. */
typedef enum {
    BUF_H,                     /* the residual stream */
    BUF_X,                     /* normalised: what products read */
    BUF_KV,                    /* latent and rope key, before they go into the kv cache */
    BUF_Q_A,                   /* the query's low-rank form */
    BUF_Q,                     /* queries, head after head */
    BUF_O,                     /* what attention collected, head after head */
    BUF_ROUTER,                /* the router's logits */
    BUF_PAIRS,                 /* results of routed experts by pair, where shares of several devices are to be added */
    BUF_K, BUF_V,              /* the tower's keys and values */
    BUF_PATCH,                 /* the tower's pixels, patch by patch */
    BUF_MERGED,                /* merge x merge patches side by side */
    BUF_HIDDEN, BUF_FEATURES,  /* the projector's middle, and what it gives */
    N_BUFFERS
} buffer;
typedef struct { size_t floats; int32_t rows, blocks; } buffer_shape;           /* floats 0: not used by this program */

/* What the router chose, in host memory that devices see.  A pair is a token and an expert that it chose. */
typedef struct {
    int32_t *expert;           /* by token, then ascending: n_expert_used ids each */
    float *weight;             /* likewise */
    int32_t *row;              /* likewise: which pair this is, counted expert by expert */
    int32_t *token;            /* by pair */
    float *pair_weight;        /* by pair */
    int32_t *first;            /* by expert: its first pair; one more at the end */
    int32_t *used;             /* the experts that have pairs, ascending */
    int32_t n, k, n_used;      /* tokens; experts of each; experts in use */
    int32_t late;              /* all but n and k is still to come (device.h, recall) */
} picks;
/* From n, k, expert and weight, which a device has filled in, all the rest. */
void picks_group(picks *p, int32_t n_expert);
#endif
