/* policy.h -- which experts have earned a fast place: counts of what was used that fade, and what follows from them.
 *
 * A pure function of what was used, and of how long it took: no clock, no thread, no file, no allocation after open.
 * Whoever owns slots (in VRAM, or in RAM for experts that lie on disk) counts what the router chose, once for each
 * layer of a step, asks, and moves; the policy owns counts and rates and nothing else, so a recorded trace drives the
 * very same code.  The caller guards it (the engine's turn), and has checked the ids.
 *
 *     policy_count(p, layer, picks->used, pairs, picks->n_used, picks->n);      after routing, each layer
 *     budget = policy_allow(p, ns_of_the_step, ns_of_the_cpu, under_way, largest);
 *     n = policy_moves(p, &places, budget, moves, most);                        once a step, between two tokens
 *     policy_spend(p, bytes_of_these_moves);
 *
 * The value of an expert is the number of its uses, each halved for every half_life tokens since: at a steady rate of r
 * uses a token it tends to r * half_life / ln 2, so values compare across layers, and an expert that is worth 1 more
 * than another will serve about one use more before the counts have faded.  A prompt is a census: of a step of many
 * tokens the uses count as if they were spread evenly over them.  Each layer has its own clock of tokens (the last one
 * sees few of a prompt's).
 *
 * An expert has a number, its id: layer * n_expert + expert.
 */
#ifndef MS4_POLICY_H
#define MS4_POLICY_H
#include <stddef.h>
#include <stdint.h>
/* cffi:begin */
typedef struct policy policy;
typedef struct {               /* 0 stands for the default of each */
    double half_life;          /* tokens after which a use counts half; 48 */
    double margin;             /* who moves in is worth so many times what leaves; 1.25 */
    double pay_back;           /* and so many uses more, so that the move earns the bytes it costs; 1 */
} policy_options;

/* n_layer and n_expert: 1 to 65536, and at most 2^26 together.  options: NULL for the defaults. */
int policy_open(int32_t n_layer, int32_t n_expert, const policy_options *options, policy **out);
void policy_close(policy *p);

/* n_tokens (at least 1) have passed through the layer; pairs[i] of their picks were experts[i], for i < n. */
void policy_count(policy *p, int32_t layer, const int32_t *experts, const int32_t *pairs, int32_t n, int32_t n_tokens);
double policy_value(const policy *p, int32_t layer, int32_t expert);

/* Which of these ids is worth least, and so leaves its slot: an index into ids, the first of equals; -1 if n is 0.  The
 * caller leaves out what is in use or on its way. */
int32_t policy_victim(const policy *p, const int32_t *ids, int32_t n);

/* Where experts are: bits by id. */
#define POLICY_RAM 1           /* in memory, so that it can move up */
#define POLICY_VRAM 2          /* in a slot */
#define POLICY_BUSY 4          /* in use or on its way: it neither moves in nor leaves */
#define POLICY_POOLS 8
#define POLICY_MOVES 64
typedef struct {
    const uint8_t *where;      /* by id */
    const int32_t *pool;       /* by layer: whose slots fit its experts, -1: none; NULL: pool 0 for all */
    const int32_t *n_free;     /* by pool: slots that hold nothing */
    const uint64_t *bytes;     /* by pool: of an expert */
    int32_t n_pools;           /* 1 to POLICY_POOLS */
    int32_t exclusive;         /* what leaves and has no place in RAM goes down into the one that is given up */
} policy_places;
typedef struct {
    int32_t id, out;           /* ids; out -1: into a slot that holds nothing */
    int32_t down;              /* the bytes of `out` have to come down: it takes the place in RAM that `id` gives up */
} policy_move;
/* The moves into slots that are worth it now, the best first: at most `most` (and POLICY_MOVES), and at most `budget`
 * bytes over the bus, those that come down counted, too.  Free slots take whatever was used.  An expert appears in at
 * most one move. */
int32_t policy_moves(const policy *p, const policy_places *at, uint64_t budget, policy_move *moves, int32_t most);

/* --- rates: of what really happened, so that nobody has to say how fast a bus or a processor is.  Of each the latest
 * POLICY_LASTING count.  0: nothing is known yet. */
#define POLICY_LASTING 64
#define POLICY_STREAM_FROM 32  /* rows, until both rates are known: a guess */
void policy_saw_bus(policy *p, double bytes, double ns);      /* it carried so many to the card, and was busy so long */
/* The CPU computed experts of so many bytes together; row_bytes: each one's times its rows. */
void policy_saw_cpu(policy *p, double bytes, double row_bytes, double ns);
double policy_bus(const policy *p);                           /* bytes per second */
/* From how many rows on the bus brings an expert in less time than the CPU needs to compute it: 2 or more.  The CPU's
 * time for a byte is a straight line over the rows, through what it took with one row and with many. */
int32_t policy_stream_from(const policy *p);
/* These instead of what was measured; 0: as measured. */
void policy_fix(policy *p, double bus, int32_t stream_from);
/* Bytes that may be asked for now: what the bus carries while the CPU rests, in a step like the last one, which took
 * ns_step and in it the CPU ns_cpu for experts, less what is still under way.  That bounds what uploads take of the
 * CPU's memory bandwidth, and not when.  What is not spent is saved up to twice `largest`, the bytes of the largest
 * move: a token may be too short for one.  While the bus is not known, one at a time, which measures it. */
uint64_t policy_allow(policy *p, double ns_step, double ns_cpu, uint64_t under_way, uint64_t largest);
void policy_spend(policy *p, uint64_t bytes);

/* The counts as bytes, for a file that warms the next start: format number, fingerprint of the model
 * (text_weights_fingerprint), checksum.  The caller owns name and atomicity. */
size_t policy_pack_bytes(const policy *p);
void policy_pack(const policy *p, uint64_t fingerprint, uint8_t *out);
/* The reverse.  MS4_EMODEL: these bytes are not what pack wrote for this model, and nothing has changed. */
int policy_unpack(policy *p, uint64_t fingerprint, const uint8_t *in, size_t n);
/* cffi:end */
#endif
