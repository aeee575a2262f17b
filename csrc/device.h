/* device.h -- what a device does with the rows of a step.
 *
 * layer.c and vision.c say what is computed; a device says how.  It owns its buffers and the order of its work: a call
 * puts work behind what was asked before and may return at once; only `wait` and `logits` wait.  (The CPU does it at
 * once: its queue is the pool.)  The arithmetic is that of ops.h on every device, to the last bit, so that neither the
 * device nor the place of a weight ever shows in a result.
 *
 * Shapes: a buffer has n rows (step.h); all arrays are row after row.  Errors: MS4_ENOMEM, or MS4_OK; a raised stop
 * flag makes a device leave out work, and what is in its buffers then is of no use: who asked looks at the flag.
 */
#ifndef MS4_DEVICE_H
#define MS4_DEVICE_H
#include "step.h"

typedef struct device device;

/* Rows [y_row, y_row + n) of y = m times rows [x_row, x_row + n) of x; add: added to what is there. */
typedef struct { const matrix *m; buffer x, y; int32_t add, x_row, y_row; } product;

/* One expert, and its pairs first .. first + n - 1.  away: its weights lie in host memory, and the device, which cannot
 * look there, is to bring them; `brought` says when that memory may change. */
typedef struct { ffn_weights w; int32_t first, n, away; } ffn_group;
/* What one device computes of a feed-forward step.  `every` goes through all rows [row, row + n) and is added to H at
 * once.  The groups are in ascending order of their experts.  whole: there are no other shares, so their results, times
 * the pairs' weights, are added to H in that order; else they are left in PAIRS, one row a pair. */
typedef struct {
    device *on;
    const ffn_weights *every;                                  /* NULL: none here */
    ffn_group *groups;
    int32_t row, n, n_groups, whole;
} ffn_share;
/* What a device may begin with once the router has chosen, before the host has heard of it: the experts of a layer that
 * lie on it.  experts: their shapes and types; in a slot gate comes first, up and down so many bytes further.  all: no
 * expert of the layer lies elsewhere, so nobody has to hear of the choice before the step is over. */
typedef struct {
    ffn_weights experts;
    size_t up_at, down_at;
    const uint8_t *const *slots;                               /* by expert, on the device: NULL is elsewhere */
    const ffn_weights *every;                                  /* NULL: none */
    int32_t layer, all;
} ffn_ahead;
static inline int ffn_share_has(const ffn_share *s) { return s->every || s->n_groups; }    /* anything to compute */

/* What is wanted of a row of logits: all of it, or, k > 0, the k highest of the first `among`, and their ids, in the
 * order of the ids; of equal ones the first.  Where a number of the row is not finite, one of these is not. */
typedef struct { float *out; int32_t *ids, k, among; } row_wanted;
/* Rows from the first on that want the same; `width` floats each, in one piece, where they want all. */
static inline int32_t wanted_alike(const row_wanted *w, int32_t n, size_t width) {
    int32_t i = 1;
    while (i < n && w[i].k == w->k && (w->k ? w[i].among == w->among : w[i].out == w->out + (size_t)i * width)) i++;
    return i;
}

/* Patches of an image, columns side by side, rows one below the other; both are multiples of merge. */
typedef struct {
    int32_t columns, rows, merge, n_head;
    const float *rope;         /* by index of a row or column: d_head floats, cos and sin of each pair */
} patch_grid;

struct device_ops {
    const char *name;
    /* Buffers of these shapes (floats 0: none), and the flag that ends work early, until the next begin. */
    int (*begin)(device *d, const buffer_shape shapes[N_BUFFERS], const atomic_int *stop);
    int (*wait)(device *d);
    void (*close)(device *d);

    /* --- both programs */
    int (*write)(device *d, buffer b, int32_t n, const float *from);                   /* n rows of the caller's */
    int (*read)(device *d, buffer b, int32_t n, float *to);                            /* waits */
    int (*norm)(device *d, buffer x, const vector *w, float eps, buffer y, int32_t n); /* y = rms_norm(x) * w */
    int (*products)(device *d, const product *p, int32_t n_products, int32_t n);       /* none reads another's y */
    int (*ffn)(device *d, const ffn_share *share, const picks *p);                     /* X -> H, or PAIRS */
    int (*brought)(device *d);                        /* waits until nothing is on its way from host memory any more */

    /* --- the text model */
    /* Rows of m, or where a token is MS4_ROW the next of the caller's rows, into rows first .. first + n - 1 of H. */
    int (*embed)(device *d, const matrix *m, const int32_t *tokens, const float *rows, int32_t first, int32_t n);
    int (*latents)(device *d, const step *st, int32_t layer, const vector *norm, float eps);   /* KV -> kv cache */
    int (*queries)(device *d, const step *st);                                         /* Q: rope, scale */
    int (*attend)(device *d, const step *st, int32_t layer, const matrix *k_b, const matrix *v_b);   /* Q, cache -> O */
    /* Rows of H and X, ascending, to the front. */
    int (*keep)(device *d, const int32_t *rows, int32_t n);
    /* ROUTER -> picks; waits.  What of `ahead` is begun here, ffn has not to do again; slots NULL: nothing.  Where that
     * has all, it may leave the picks out and not wait: p->late, of `n` and `k` alone. */
    int (*route)(device *d, const ms4_shape *s, const ffn_ahead *ahead, picks *p);
    /* The picks of a layer that route left out in this step, for which wait or logits has waited since. */
    int (*recall)(device *d, const ms4_shape *s, int32_t layer, picks *p);
    /* X, to `other`, as far as it needs it; and from there PAIRS. */
    int (*send)(device *d, device *other, const ffn_share *share, const picks *p);
    int (*fetch)(device *d, device *other, const ffn_share *share);
    /* H += weight * PAIRS, ascending by expert. */
    int (*sum_pairs)(device *d, const picks *p);
    int (*logits)(device *d, const matrix *m, const row_wanted *w, int32_t n);         /* of n rows of X; waits */

    /* --- the tower */
    /* Q, K: 2D rope, Q scaled; every patch to all -> X. */
    int (*attend_patches)(device *d, const patch_grid *g);
    /* Groups [first, first + n) of merge x merge patches, each to a row of MERGED, channel-major (SPEC 3.4). */
    int (*merge_patches)(device *d, const patch_grid *g, buffer from, int32_t first, int32_t n);
    int (*bias)(device *d, buffer b, const vector *bias, int32_t gelu, int32_t n);     /* b + bias, GELU if asked for */
};
struct device { const struct device_ops *ops; };
#define DO(d, call, ...) ((d)->ops->call(d, ##__VA_ARGS__))
#endif
