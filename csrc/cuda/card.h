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
    uint64_t aside;                                           /* bytes that steps and the kv cache may take */
} card;
/* host: the weights as the files have them; from_disk: NULL, or whence experts come.  n_batch: most tokens of a step,
 * made smaller where memory is short, unless the options say it.  MS4_ENOMEM: the dense parts do not fit;
 * MS4_EDEVICE: there is no card that can be used. */
int card_open(const ms4_options *o, const ms4_shape *s, const text_weights *host, const struct ms4_ops *ops,
              slots *from_disk, int32_t *n_batch, card **out);
void card_close(card *c);
/* The experts' host memory may be pinned where it lies, unless all have slots; read_only: it is a mapped file; most:
 * bytes. */
int card_pin(card *c, const ms4_shape *s, const layer_weights *layers, int read_only, uint64_t most);
/* The same for the memory that slots of experts lie in which stay on the disk: each by itself, as long as it is theirs.
 * The card, in use or retired, outlives them. */
int card_pin_slots(card *c, slots *from_disk);
/* Memory ran out in a step, between whose calls this is: gives up slots, so that there is room for what it asked for.
 * 0: there was no want of memory of the card, or it has no slots to give up. */
int card_shrink(card *c);
/* Nothing more is computed on it: gives back all but what a vision tower has there.  card_close still has to be called,
 * and no block of the kv cache may be in use. */
void card_retire(card *c);
/* A vision tower, if it fits beside all that was set aside; else MS4_ENOMEM, and nothing has changed.  In a turn. */
int card_tower(card *c, const tower_weights *host, const ms4_vision_shape *s, cuda_weights *out);
/* Bytes per second: of copies within the card, counted twice, as they read and write; of pinned memory to the card.  0:
 * there is no memory left to measure with. */
int card_measure(card *c, double *vram, double *bus);
void card_count(card *c, ms4_stats *out);                     /* vram_bytes to bytes_uploaded, within a turn */
#endif
