/* cuda_weights.h -- dense weights on the card: matrices as the file has them, norms and biases as floats.
 *
 * A copy of the host's tables whose matrices and vectors lie on the card, all in one piece of its memory.  Experts and
 * embeddings still have their host addresses.  k_b and v_b become matrices of floats, a slice a head, k_b's rows being
 * those of the latent (never transposed): attention then takes them as it takes any other matrix.
 */
#ifndef MS4_CUDA_WEIGHTS_H
#define MS4_CUDA_WEIGHTS_H
#include "cuda/gpu.h"
#include "weights.h"
typedef struct {
    text_weights text;
    tower_weights tower;
    gpu *g;
    void *memory;
    size_t bytes;
} cuda_weights;
int cuda_text_open(gpu *g, const text_weights *host, const ms4_shape *s, const struct ms4_ops *ops, cuda_weights *out);
int cuda_tower_open(gpu *g, const tower_weights *host, const ms4_vision_shape *s, cuda_weights *out);
void cuda_weights_close(cuda_weights *w);                     /* in any case; does nothing to one that is all zero */
#endif
