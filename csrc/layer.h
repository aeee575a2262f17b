/* layer.h -- one decoder layer, for every device. */
#ifndef MS4_LAYER_H
#define MS4_LAYER_H
#include "experts.h"
/* H -> H, on the home device, and the step's latents into the kv caches.  last: only the rows whose logits are wanted
 * come out, and become the step. */
int layer_forward(step *st, device *home, int32_t layer, const layer_weights *w, experts *store, picks *p, int last);
/* Once the step has been waited for: counts the experts of a layer of st->late. */
int layer_recall(const step *st, device *home, int32_t layer, experts *store, picks *p);
#endif
