/* engine.h -- what an engine and a session are made of; for the files behind the public API. */
#ifndef MS4_ENGINE_H
#define MS4_ENGINE_H
#include "budget.h"
#include "cpu/pool.h"
#include "cuda/card.h"
#include "experts.h"
#include "numbers.h"
#include "turn.h"

/* Host arrays of a step, and what the router chose in a layer; they grow to the largest step seen. */
typedef struct {
    float *rope, *scale;
    int32_t *keep, *late;
    row_wanted *wanted;
    picks picks;
    int32_t n_tokens;                                         /* room for so many */
} step_room;

struct ms4_engine {
    ms4_shape shape;
    const struct ms4_ops *ops;
    pool *pool;
    files *files;
    text_weights weights;                                     /* in host memory */
    card *card, *left;                                        /* NULL: the CPU does it all; a card that it was on */
    const text_weights *at_home;                              /* the weights where the home device has them */
    device *home, *other;                                     /* other: the CPU beside a card, or a second one */
    char note[512], later[512];                               /* for people, ms4_stats: at opening; since then */
    int32_t said_unpinned;                                    /* in one of them */
    experts *experts;
    kv_store *kv;
    budget budget;                                            /* of memory, where experts stay on the disk */
    int32_t n_batch, most_rows;                               /* of a step; of those that there were */
    turn turn;                                                /* steps, one at a time: guards devices, experts, room, */
    watch watch;                                              /* and who is told what the router chose */
    step_room room;
    ms4_stats stats;                                          /* guarded by `counting` */
    pthread_mutex_t counting;
};
struct ms4_session {
    ms4_engine *engine;
    kv_cache kv;
    int32_t n_ctx;
    atomic_int length;
    _Atomic uint64_t done, total;                             /* layer-tokens of the running step */
};
void step_room_close(step_room *room);                        /* step.c */
void engine_say(ms4_engine *e, const char *why, const char *then);            /* engine.c: the note of ms4_stats now */
void engine_say_unpinned(ms4_engine *e);                      /* the same, if there is such memory and nobody said so */
void engine_count_slots(ms4_engine *e, ms4_stats *c);         /* engine.c: with `counting` locked */
#endif
