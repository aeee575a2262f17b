/* divide.h -- how the memory of a card is divided between steps, the kv cache and slots for experts.  Pure. */
#ifndef MS4_CUDA_DIVIDE_H
#define MS4_CUDA_DIVIDE_H
#include "weights.h"

/* Bytes.  room: beside the dense parts; experts: of all of them; partial: that attention's parts may take.  n_batch:
 * tokens of a step; may_choose: nobody has said so many, and fewer or more will do. */
typedef struct { uint64_t room, experts, partial; int32_t n_batch, may_choose; } divide_what;
/* aside: bytes of steps and the kv cache; slots: what is left. */
typedef struct { uint64_t aside, slots; int32_t n_batch; } divided;

/* The kv cache gets at most a quarter of the room, and so do steps.  MS4_ENOMEM: they do not fit. */
int divide(const ms4_shape *s, const layer_weights *layers, const divide_what *what, divided *out);
#endif
