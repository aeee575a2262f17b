/* checkdivide.c -- how the memory of a card would be divided, for a model of the real shape.
 *
 *     checkdivide ROOM EXPERTS N_BATCH MAY_CHOOSE       bytes; prints n_batch, aside and slots, or "no room"
 */
#include <cuda/divide.h>                                      /* there is a tests/cuda, too */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    static layer_weights layers[36];
    const ms4_shape shape = { .n_layer = 36, .n_vocab = 131072, .n_ctx_train = 262144, .d_model = 4096,
                              .d_dense = 12288, .d_expert = 2048, .d_shared = 2048, .n_head = 32, .d_nope = 64,
                              .d_rope = 64, .d_value = 128, .q_rank = 1024, .kv_rank = 256, .n_expert = 128,
                              .n_expert_used = 4 };
    if (argc != 5) return 2;
    for (int i = 0; i < 36; i++) {
        layers[i].has_experts = layers[i].has_every = 1;
        layers[i].experts.down.type = MS4_TYPE_q4_k;
    }
    const divide_what what = { .room = strtoull(argv[1], NULL, 10), .experts = strtoull(argv[2], NULL, 10),
                               .partial = (uint64_t)64 << 20, .n_batch = atoi(argv[3]),
                               .may_choose = atoi(argv[4]) };
    divided d;
    if (divide(&shape, layers, &what, &d)) puts("no room");
    else printf("%d %llu %llu\n", d.n_batch, (unsigned long long)d.aside, (unsigned long long)d.slots);
    return 0;
}
