/* experts.h -- which expert lies where, and the one door to their weights.
 *
 * A layer asks who computes what, has it computed part by part, and gives the experts back:
 *     experts_take(store, layer, p, shares, &n);
 *     while (experts_ready(store, shares, n, &part), ffn_share_has(&part)) ... part ...;
 *     experts_give(store, layer, p);
 * A share is what one device computes; a part is what of it can be computed now.  An expert belongs to the home device
 * unless experts_place says otherwise, and lies in host memory: with the rest of its file, or, if the file stays on the
 * disk, in one of the slots.  A card computes those that lie in its own slots and those that many rows of a step want,
 * which it brings for that layer alone, the CPU the others.  The layer does not notice: results are the same to the
 * last bit.
 */
#ifndef MS4_EXPERTS_H
#define MS4_EXPERTS_H
#include "cuda/vram.h"
#include "device.h"
#include "policy.h"
#include "slots.h"
typedef struct experts experts;
#define MAX_SHARES 4

/* layers: n_layer, they outlive the store.  home: the device that holds everything else.  slots: where experts are that
 * stay on the disk, the store's from now on, even if it fails; NULL: all of them lie in memory. */
int experts_open(const ms4_shape *s, const layer_weights *layers, device *home, slots *from_disk, experts **out);
void experts_close(experts *store);
void experts_begin(experts *store, const atomic_int *stop);            /* a step: the flag that ends its waiting */

/* What the home device has in its slots; the caller adds `every`. */
void experts_ahead(const experts *store, int32_t layer, ffn_ahead *out);
/* Says who computes the experts of these picks: the home device first, then others.  Never waits.  n_shares is at least
 * 1; shares[0].whole: there is one, and it comes in one part. */
int experts_take(experts *store, int32_t layer, const picks *p, ffn_share shares[MAX_SHARES], int32_t *n_shares);
/* The next part of one of the shares, in turn, home first: what is there already, and then, waiting for it, what comes.
 * `every` goes with the first part of its share.  n_groups 0 and no `every`: nothing is left.  The weights of a part
 * stay where it says until its device has computed with them, or has brought them (device.h). */
int experts_ready(experts *store, ffn_share *shares, int32_t n, ffn_share *part);
void experts_give(experts *store, int32_t layer, const picks *p);      /* the store may move them now */

/* Puts experts on devices: place has n_layer x n_expert numbers, 0 home, i > 0 others[i - 1].  NULL: all home. */
int experts_place(experts *store, const uint8_t *place, device *const *others, int32_t n_others);
int experts_in_parts(const experts *store);                            /* 0: always one share, in one part */
slots *experts_slots(experts *store);                                  /* NULL: everything is in memory */
policy *experts_policy(experts *store);                                /* what was used; NULL if nothing moves */
/* The home device is a card with these slots: it computes what it has, and of what it has not that with many rows;
 * `other` (the CPU) does the rest. */
int experts_on_card(experts *store, vram *on_card, device *other);
void experts_off_card(experts *store, device *home);                   /* there is no card any more */
int experts_turn(experts *store);                                      /* between two steps: experts may move now */
/* For the policy: how long a device took for a part, and, once it has ended well, a step. */
void experts_took(experts *store, const ffn_share *part, int64_t ns);
void experts_end(experts *store, int64_t ns);
/* Since the last call: (token, expert) pairs computed, and those of them on the card; bytes of the experts that were
 * needed, each once a step, those of them that lay on the card, and those brought there for one layer. */
typedef struct { uint64_t pairs, on_card, bytes, bytes_on_card, bytes_streamed; } experts_counts;
experts_counts experts_count(experts *store);
#endif
