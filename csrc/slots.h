/* slots.h -- the experts of a file that stays on the disk: places in memory for some of them, and who has one.
 *
 * A slot holds one expert: its rows of gate, up and down, as the file has them.  Slots come in pools, one for each size
 * of expert that the file has, which share a number of bytes in proportion to what they hold of the file; that number
 * is never exceeded.  An expert is read once, however many wait for it, and is there only when all of it has been read.
 *
 * For each layer of a step:
 *     slots_want(s, layer, ids, share, n, stop, &n_there);
 *     do {
 *         while (!slots_next(s, share, ids, &n) && n) ... slots_at(s, layer, ids[i], ...) ...;       of any share
 *     } while (!slots_wait(s, &left) && left);
 *     slots_drop(s);
 * What slots_next gives stays until it is called again for that share, somebody waits, or the wants are dropped.  Who
 * waits holds nothing: so one slot in each pool is enough.
 *
 * One thread at a time (the engine's turn); only the threads of the disk work beside it, and only on what is read.
 */
#ifndef MS4_SLOTS_H
#define MS4_SLOTS_H
#include "files.h"
#include "weights.h"
#include <stdatomic.h>
typedef struct slots slots;

typedef struct {
    uint64_t n_wanted, n_hits, n_reads;                       /* experts: wanted; there, not just read ahead; read */
    uint64_t ns_waited;                                       /* that somebody waited for reads */
    uint64_t bytes_read, ns_reading;                          /* from the disk; while at least one read was under way */
    uint64_t n_slots, bytes, bytes_there, most_bytes;         /* in use now; bytes of these; read; that they may have */
} slots_counts;

/* layers: n_layer, with experts bound to addresses of f, which outlives this.  bytes: for all slots together.
 * MS4_ENOMEM: less than slots_least. */
int slots_open(const ms4_shape *s, const layer_weights *layers, files *f, uint64_t bytes, slots **out);
void slots_close(slots *s);
uint64_t slots_least(const ms4_shape *s, const layer_weights *layers);         /* bytes of one slot in each pool */
uint64_t slots_all(const ms4_shape *s, const layer_weights *layers);           /* bytes of a slot for each expert */
/* Which expert has least reason to stay: that of the lowest value.  NULL: the one that was used longest ago. */
void slots_rate(slots *s, double (*value)(const void *context, int32_t layer, int32_t expert), const void *context);
/* Reads, while nobody waits for it, those of the highest values above 0 into slots that hold nothing. */
int slots_fill(slots *s);
/* Who is asked before memory of slots is given back to the system: where, and how many bytes.  0: it has to stay, and
 * never goes. */
typedef int slots_leaving(void *context, const uint8_t *at, size_t bytes);
void slots_watch(slots *s, slots_leaving *leaves, void *context);
/* Where the slots of a pool lie, side by side, each of slot_bytes, whole blocks of FILES_ALIGN; NULL: there are not so
 * many pools. */
const uint8_t *slots_memory(const slots *s, int32_t pool, uint64_t *bytes, uint64_t *slot_bytes);
/* Other bytes than before, and never less than slots_least; what is too much is given back to the system at once, but
 * for what is being read. */
void slots_fit(slots *s, uint64_t bytes);

/* These n experts (ascending) are to be computed, expert ids[i] as part of share[i] (NULL: 0).  Starts to read what is
 * missing.  n_there: how many of them are there.  stop: NULL, or a flag that ends waiting. */
void slots_want(slots *s, int32_t layer, const int32_t *ids, const uint8_t *share, int32_t n, const atomic_int *stop,
                int32_t *n_there);
/* Those of a share that are there and have not been given, ascending; n 0: none is there now.  MS4_EIO names file,
 * layer and expert that could not be read. */
int slots_next(slots *s, int32_t share, int32_t *ids, int32_t *n);
/* Until slots_next has something for one of the shares.  left: how many have not been given yet; 0: all have been.
 * MS4_ECANCELED: stopped. */
int slots_wait(slots *s, int32_t *left);
void slots_drop(slots *s);
/* These experts of a layer will be wanted next, in this order: read where there is room, until the next call. */
void slots_soon(slots *s, int32_t layer, const int32_t *ids, int32_t n);
/* Where part 0 (gate), 1 (up) or 2 (down) of an expert lies that slots_next gave. */
const uint8_t *slots_at(const slots *s, int32_t layer, int32_t expert, int32_t part);
void slots_point(const slots *s, int32_t layer, int32_t expert, ffn_weights *w);     /* w's three matrices there */

/* --- Between two steps: to and from the slots of a card.  What is held stays where it is, and may be computed. */
int slots_there(const slots *s, int32_t layer, int32_t expert);                /* read */
int slots_hold(slots *s, int32_t layer, int32_t expert);      /* 0: it is not there, or others would have too few */
void slots_release(slots *s, int32_t layer, int32_t expert);
/* Gives the place of a held expert to another one: to `bring` its matrices where w says then, after which slots_landed
 * is called, from any thread.  Until then it counts as being read.  NULL: it has a place already, or another size; the
 * first one is released in any case. */
struct disk_job *slots_trade(slots *s, int32_t layer, int32_t expert, int32_t to_layer, int32_t to_expert,
                             ffn_weights *w);
void slots_landed(slots *s, struct disk_job *job, int good);  /* not good: it is read from the disk after all */

void slots_count(slots *s, slots_counts *out);                /* since it was opened */
uint64_t slots_waiting(slots *s);                             /* for how many ns somebody waits now; from any thread */
#endif
