/* vram.h -- slots: places in the card's memory where experts lie, the file's bytes as they are.
 *
 * Slots of one byte size are a pool; layers whose experts have that size share it.  An expert is in a slot or on its
 * way there; only what has arrived is found.  Which experts have earned a slot is policy.h's matter; they are brought
 * one after the other by a thread of their own beside the work, so that no token waits for one.  The engine's turn
 * guards all calls.
 *
 * Where experts stay on the disk, memory is short, and no expert is to take a place in both: who moves up gives its
 * place in RAM (slots.h) to who leaves.  It comes to an empty slot first, of which each pool keeps some; then the other
 * one comes down, and its slot is the empty one.
 */
#ifndef MS4_CUDA_VRAM_H
#define MS4_CUDA_VRAM_H
#include "cuda/gpu.h"
#include "device.h"
#include "slots.h"
#include "step.h"
typedef struct vram vram;
struct policy;

/* layers: n_layer, with experts in host memory, which stays where it is.  from_disk: NULL, or where their weights come
 * from instead (slots.h); then nothing moves before vram_trade.  bytes: what slots may take at most; as many are made
 * as fit, for all sizes alike, or fewer if the card has less than that, and filled, all layers in turn. */
int vram_open(gpu *g, const ms4_shape *s, const layer_weights *layers, slots *from_disk, uint64_t bytes, vram **out);
void vram_close(vram *v);
void vram_stop(vram *v);                                      /* nothing moves any more; from_disk may be closed */
/* With from_disk: from now on experts change places with those in RAM, by the counts of whoever decides there, who
 * closes them after vram_stop. */
int vram_trade(vram *v, struct policy *counts);
uint64_t vram_wanted(const ms4_shape *s, const layer_weights *layers);        /* bytes that all experts would take */

/* The expert as it lies on the card; 0: it is not there.  It stays there until the next vram_turn. */
int vram_find(const vram *v, int32_t layer, int32_t expert, ffn_weights *out);
/* The same for kernels, by the table that vram_show brings to the card between two steps, if it has changed; out->slots
 * stays NULL where the experts of a layer are not alike, each having a scale of its own. */
int vram_show(vram *v);
void vram_ahead(const vram *v, int32_t layer, ffn_ahead *out);
int vram_has_all(const vram *v);                              /* every expert has a slot */
void vram_used(vram *v, int32_t layer, const picks *p);       /* what the router chose */
struct policy *vram_policy(vram *v);                          /* what was used */
int vram_warm(vram *v);                                       /* at once: those into slots that have earned one */
/* Between two steps, while no work is under way: what has arrived can be found, and what has earned a slot by now is
 * sent for, as much as policy_allow allows after a step that took ns_step, in which the CPU took ns_cpu for experts. */
int vram_turn(vram *v, double ns_step, double ns_cpu);
int32_t vram_stream_from(vram *v);                            /* policy_stream_from, by what was seen so far */
/* Between two steps: gives up slots for at least so many bytes, if there are as many, those first that are worth least;
 * *given: how many bytes that were.  Then a new slot is never made. */
int vram_shrink(vram *v, uint64_t bytes, uint64_t *given);
/* What ms4_stats has of slots, of what was brought and of rates; experts brought since opening are uploads. */
void vram_count(const vram *v, ms4_stats *out);
#endif
