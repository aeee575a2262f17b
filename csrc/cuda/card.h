/* card.h -- a model on a card: what of it lies there, and the devices that compute with it.
 *
 * Dense parts, shared experts and the kv cache are there in any case; experts as many as there is room for.  What step
 * buffers and the kv cache will take is set aside before slots are made, so that the card is never asked for more than
 * was agreed.
 */
#ifndef MS4_CUDA_CARD_H
#define MS4_CUDA_CARD_H
#include "cuda/cuda_device.h"
#include "cuda/cuda_weights.h"
#include "cuda/vram.h"
typedef struct {
    gpu *g;
    cuda_weights weights;
    kv_memory *kv;
    vram *slots;
    device *device;
} card;
/* host: the weights as the files have them.  n_batch: most tokens of a step; it is made smaller, if `may_shrink`, where
 * memory is short.  MS4_ENOMEM: the dense parts do not fit; MS4_EDEVICE: there is no card that can be used. */
int card_open(const ms4_options *o, const ms4_shape *s, const text_weights *host, const struct ms4_ops *ops,
              int32_t *n_batch, int may_shrink, card **out);
void card_close(card *c);
void card_count(card *c, ms4_stats *out);                     /* vram_bytes to bytes_uploaded, within a turn */
#endif
