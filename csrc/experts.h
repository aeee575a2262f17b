/* experts.h -- the one door to the weights of routed experts.
 *
 * Layer code asks for the experts that a step needs, uses them, and gives them back:
 *     experts_pin(store, layer, ids, n, views);  ... kernels read the views ...;  experts_unpin(store, layer, ids, n);
 * Between pin and unpin the views stay valid.  Today every expert lies in host memory with the rest of the file;
 * tiers on disk, in RAM slots and in VRAM come behind this interface, and layer code does not notice.
 */
#ifndef MS4_EXPERTS_H
#define MS4_EXPERTS_H
#include "matmul.h"
typedef struct experts experts;
typedef struct { matrix gate, up, down; } expert_view;        /* one expert's three matrices */

/* gate, up, down: per layer, n_expert slices each; layers without experts have data == NULL.  The arrays are copied. */
int experts_open(int32_t n_layer, const expert_view *layers, experts **out);
void experts_close(experts *store);
int experts_pin(experts *store, int32_t layer, const int32_t *ids, int32_t n, expert_view *views);
void experts_unpin(experts *store, int32_t layer, const int32_t *ids, int32_t n);
#endif
