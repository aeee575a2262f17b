/* weights.h -- the tensors of a model, bound to their places and checked, once, when it is opened.
 *
 * A matrix says where weights lie and how they are laid out, in the words of the file.  Its address is one of the
 * device that holds it; only that device may look there.  Here, at opening, everything lies in host memory.
 */
#ifndef MS4_WEIGHTS_H
#define MS4_WEIGHTS_H
#include "files.h"
#include "ms4.h"
#include "ops.h"

/* n_slices (experts, heads; else 1) of n_rows rows of n_cols columns, as blocks of the file. */
typedef struct {
    const uint8_t *data;                                      /* NULL: there is no such tensor */
    size_t row_bytes, slice_bytes;
    const float *scales;                                      /* per slice, or NULL: multiplies the results (NVFP4) */
    int32_t type, n_rows, n_cols, n_slices;
    int32_t transposed;                                       /* k_b out of attn_kv_b: its rows are columns elsewhere */
} matrix;
typedef struct { const float *data; int32_t n; } vector;      /* norms and biases, as floats; data NULL: none */

/* A feed-forward network, y = down (act(gate x) * (up x)); one slice, or one for each expert. */
typedef struct { matrix gate, up, down; int32_t gelu; } ffn_weights;           /* act: 0 SiLU, 1 GELU */

typedef struct {
    vector attn_norm, q_a_norm, kv_a_norm, ffn_norm;
    matrix q_a, q_b, kv_a, k_b, v_b, output, router;          /* k_b and v_b: one slice per head */
    ffn_weights every, experts;                               /* every: shared expert or dense FFN, of one slice */
    int32_t has_experts, has_every;
    uint64_t bytes_per_step, bytes_per_expert;                /* what every step reads; what one expert has */
} layer_weights;

typedef struct owned_list { void **item; size_t n, room; } owned_list;         /* copies of small tensors, to free */

typedef struct {
    layer_weights *layers;                                    /* n_layer */
    vector output_norm;
    matrix token_embd, output;
    int32_t quantized;                                        /* some matrix takes activations as block_q8 */
    uint64_t bytes;                                           /* of the tensors in the table */
    owned_list owned;
} text_weights;

typedef struct { vector ln1, ln2; matrix q, k, v, out; ffn_weights ffn; } tower_layer;
typedef struct {
    tower_layer *layers;                                      /* n_layer */
    vector pre_ln, input_norm, bias_1, bias_2;                /* the last three are optional */
    matrix patch_embd, patch_merger, mm_1, mm_2;
    int32_t quantized;
    owned_list owned;
} tower_weights;

static inline size_t blocks_of(size_t n) { return (n + SUPERBLOCK - 1) / SUPERBLOCK; }
static inline int matrix_quantized(const matrix *m) { return ms4_type_infos[m->type].quantized; }
/* Bytes of one slice; 0 if there is no such matrix.  (slice_bytes is larger where gate and up lie in one tensor.) */
static inline uint64_t matrix_bytes(const matrix *m) { return m->data ? (uint64_t)m->n_rows * m->row_bytes : 0; }
/* Rows [first, first + n) of slice s as a matrix of its own. */
static inline matrix matrix_rows(const matrix *m, int32_t s, int32_t first, int32_t n) {
    matrix part = *m;
    part.data += (size_t)s * m->slice_bytes + (size_t)first * m->row_bytes;
    part.n_rows = n;
    part.n_slices = 1;
    part.scales = m->scales ? m->scales + s : NULL;
    return part;
}

/* One expert of all: its slices of the three matrices. */
static inline ffn_weights ffn_expert(const ffn_weights *all, int32_t expert) {
    return (ffn_weights){ matrix_rows(&all->gate, expert, 0, all->gate.n_rows),
                          matrix_rows(&all->up, expert, 0, all->up.n_rows),
                          matrix_rows(&all->down, expert, 0, all->down.n_rows), all->gelu };
}

/* Binds and checks every tensor of the table against the shape; MS4_EMODEL names what does not fit.  ops: opens norms.
 * What was bound before a failure is freed by _close, which is to be called in any case. */
int text_weights_open(text_weights *w, const ms4_shape *s, const ms4_tensor *tensors, size_t n, const files *f,
                      const struct ms4_ops *ops);
void text_weights_close(text_weights *w);
/* A number that tells models apart: from the shape, the norms, and a few bytes of both ends of every matrix. */
uint64_t text_weights_fingerprint(const text_weights *w, const ms4_shape *s);
int tower_weights_open(tower_weights *w, const ms4_vision_shape *s, const ms4_tensor *tensors, size_t n, const files *f,
                       const struct ms4_ops *ops);
void tower_weights_close(tower_weights *w);
#endif
