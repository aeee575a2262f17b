/* sample.c -- logits to tokens: temperature, then top-k, top-p and min-p, each on what the one before left.
 *
 * The reference is choose() in models/sampling.py: there the same random number gives the same token.  The number is
 * laid along the weights of the candidates.  The likely ones come first, in the order of their ids, then the others;
 * with top-p, those in a higher class of likelihood than the last one kept, in the order of their ids, then the rest
 * of the kept, highest first.  "Highest" is by logit and then, of equal ones, by id: the first.
 *
 * The vocabulary is looked at in blocks.  A block's highest logit tells whether it has anything to give, and sums of
 * blocks say in which one the number points; the weights of that one are then computed once more.  So nothing as long
 * as the vocabulary is written down, unless so many are in the class at the edge of top-p.  Nothing here depends on the
 * kernel table.
 */
#include "error.h"
#include "memory.h"
#include "sample.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NO_MEMORY "no memory to choose a token"
#define LIKELY 1e-3              /* relative to the best */
#define CLASSES_PER_NAT 64.0     /* of likelihood; the last one has all that is less likely than e^-64 */
#define LAST_CLASS 4095.0
#define FAINT (-64.0)            /* less is nothing beside the best, 2^-92 a token: such blocks are passed over */

typedef struct {                 /* the logits that one token is chosen from */
    const struct ms4_ops *ops;
    const float *logits;
    size_t n, n_blocks;
    struct ms4_weighing how;
    double (*sums)[2];           /* of each block: weight of the likely ones, of the others */
    float *tops;                 /* the highest of each block */
} row;
typedef struct {
    uint64_t key;                /* ascending: by logit, highest first, then by id */
    double weight;
} candidate;

/* --- rows --------------------------------------------------------------------------------- */
static size_t block_length(const row *r, size_t b) {
    return b + 1 < r->n_blocks ? WEIGH_BLOCK : r->n - b * WEIGH_BLOCK;
}
static int row_open(row *r, const struct ms4_ops *ops, size_t n) {
    *r = (row){ .ops = ops, .n = n, .n_blocks = (n + WEIGH_BLOCK - 1) / WEIGH_BLOCK };
    r->sums = memory_take(r->n_blocks, sizeof *r->sums + sizeof *r->tops);
    FAIL_IF(!r->sums, MS4_ENOMEM, NO_MEMORY);
    r->tops = (float *)(r->sums + r->n_blocks);
    return MS4_OK;
}
static void row_close(row *r) { memory_give(r->sums); }
/* Turns to other logits.  Returns whether all of them are finite. */
static int row_look(row *r, const float *logits) {
    int finite = r->ops->block_tops(r->tops, logits, r->n);
    float highest = r->tops[0];
    for (size_t b = 1; b < r->n_blocks; b++) highest = r->tops[b] > highest ? r->tops[b] : highest;
    r->logits = logits;
    r->how.highest = highest;
    return finite;
}
static int32_t row_best(const row *r) {
    size_t b = 0, i = 0;
    while (r->tops[b] != r->how.highest) b++;
    const float *x = r->logits + b * WEIGH_BLOCK;
    while (x[i] != r->how.highest) i++;
    return (int32_t)(b * WEIGH_BLOCK + i);
}
/* Weighs all blocks; total: of the likely ones, of the others. */
static void row_weigh(row *r, double temperature, double least, double *total) {
    double w[WEIGH_BLOCK];
    r->how.temperature = temperature;
    r->how.least = least;
    total[0] = total[1] = 0;
    for (size_t b = 0; b < r->n_blocks; b++) {
        r->sums[b][0] = r->sums[b][1] = 0;
        if ((r->tops[b] - r->how.highest) / temperature < FAINT) continue;
        r->ops->weigh(w, r->logits + b * WEIGH_BLOCK, block_length(r, b), &r->how, r->sums[b]);
        total[0] += r->sums[b][0];
        total[1] += r->sums[b][1];
    }
}
/* Walks along the likely (part 0) or the others (part 1), from `sum`: the token with which the sum exceeds the goal, or
 * the last one. */
static int32_t row_walk(const row *r, int part, double sum, double goal) {
    double w[WEIGH_BLOCK], ignored[2];
    size_t at = 0, id = 0;
    int found = 0;
    for (size_t b = 0; b < r->n_blocks && !found; b++) {
        double more = r->sums[b][part];
        if (more == 0) continue;
        at = b;
        found = sum + more > goal;
        if (!found) sum += more;
    }
    r->ops->weigh(w, r->logits + at * WEIGH_BLOCK, block_length(r, at), &r->how, ignored);
    for (size_t i = 0; i < block_length(r, at); i++) {
        if ((w[i] < r->how.least) != part) continue;
        id = at * WEIGH_BLOCK + i;
        if (found && (sum += w[i]) > goal) break;
    }
    return (int32_t)id;
}

/* --- candidates --------------------------------------------------------------------------- */
typedef union { float f; uint32_t u; } float_bits;
static uint64_t key_of(float logit, size_t id) {
    float_bits v = { .f = logit + 0.0f };        /* -0 is 0 */
    uint32_t ascending = v.u >> 31 ? ~v.u : v.u | 0x80000000u;
    return (uint64_t)~ascending << 32 | id;
}
static float logit_of(uint64_t key) {
    uint32_t ascending = ~(uint32_t)(key >> 32);
    float_bits v = { .u = ascending >> 31 ? ascending & 0x7fffffffu : ~ascending };
    return v.f;
}
static int32_t id_of(uint64_t key) { return (int32_t)(key & 0xffffffffu); }
static int by_key(const void *a, const void *b) {
    uint64_t x = ((const candidate *)a)->key, y = ((const candidate *)b)->key;
    return x < y ? -1 : x > y;
}
/* Moves those whose keys are not above the median of three to the front.  Returns how many: not all, as keys differ. */
static size_t split(candidate *c, size_t n, uint32_t *random) {
    uint64_t k[3], pivot;
    for (size_t i = 0; i < 3; i++) {
        *random = *random * 1664525u + 1013904223u;
        k[i] = c[i * (n / 3) + (*random >> 8) % (n / 3)].key;
    }
    pivot = k[0] < k[1] ? (k[1] < k[2] ? k[1] : k[0] < k[2] ? k[2] : k[0])
                        : (k[0] < k[2] ? k[0] : k[1] < k[2] ? k[2] : k[1]);
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {             /* without a branch, as no one could foresee it */
        candidate moved = c[i];
        c[i] = c[m];
        c[m] = moved;
        m += moved.key <= pivot;
    }
    return m;
}
/* The weights are added to `sum` in the order of keys: which candidate brings it to the goal (beyond == 0), or beyond?
 * The last one if none does.  Those before it in that order are then before it in memory too, but in any order.  It
 * takes a time that is linear in n, however the candidates lie. */
static candidate *rank(candidate *c, size_t n, double sum, double goal, int beyond) {
    uint32_t random = 1;
    while (n > 16) {
        size_t m = split(c, n, &random);
        double more = 0;
        for (size_t i = 0; i < m; i++) more += c[i].weight;
        if (beyond ? sum + more > goal : sum + more >= goal) {
            n = m;
        } else {
            sum += more;
            c += m;
            n -= m;
        }
    }
    qsort(c, n, sizeof *c, by_key);
    for (; n > 1; c++, n--) {
        sum += c->weight;
        if (beyond ? sum > goal : sum >= goal) break;
    }
    return c;
}
/* The logits above a limit, or equal to it, in the order of ids: the first `most` of them into `out`.  Returns how many
 * there are. */
static size_t gather(const row *r, float limit, int equal, candidate *out, size_t most) {
    size_t n = 0;
    for (size_t b = 0; b < r->n_blocks; b++) {
        if (r->tops[b] < limit) continue;
        for (size_t i = b * WEIGH_BLOCK, end = i + block_length(r, b); i < end; i++) {
            if (equal ? r->logits[i] != limit : !(r->logits[i] > limit)) continue;
            if (n < most) out[n] = (candidate){ key_of(r->logits[i], i), 1 };
            n++;
        }
    }
    return n;
}
/* The k highest logits of a row that has been looked at, first in `out` and in no order; 0 < k <= n. */
static int take_highest(const row *r, size_t k, candidate **out) {
    float limit = -FLT_MAX;
    candidate *c = memory_take(r->n_blocks, sizeof *c);
    FAIL_IF(!c, MS4_ENOMEM, NO_MEMORY);
    /* k blocks have a logit that is not below the top of the k-th of them, so the k-th highest logit is not either */
    for (size_t b = 0; b < r->n_blocks; b++) c[b] = (candidate){ key_of(r->tops[b], b), 1 };
    if (k <= r->n_blocks) limit = logit_of(rank(c, r->n_blocks, 0, (double)k, 0)->key);
    memory_give(c);
    size_t above = gather(r, limit, 0, NULL, 0);
    *out = c = memory_take(above > k ? above : k, sizeof *c);
    FAIL_IF(!c, MS4_ENOMEM, NO_MEMORY);
    gather(r, limit, 0, c, above);
    if (above < k) gather(r, limit, 1, c + above, k - above);   /* it is the k-th highest itself */
    else rank(c, above, 0, (double)k, 0);
    return MS4_OK;
}

/* --- drawing ------------------------------------------------------------------------------ */
/* Weighs a block once more; classes: of likelihood, 0 the highest; -1 for what is not likely. */
static void classify(const row *r, size_t b, double *w, int32_t *classes) {
    const float *x = r->logits + b * WEIGH_BLOCK;
    const struct ms4_weighing how = r->how;
    const size_t n = block_length(r, b);
    double ignored[2];
    r->ops->weigh(w, x, n, &how, ignored);
    for (size_t i = 0; i < n; i++) {
        double class = (x[i] - how.highest) / how.temperature * -CLASSES_PER_NAT;
        classes[i] = (int32_t)(class < LAST_CLASS ? class : LAST_CLASS);
    }
    for (size_t i = 0; i < n; i++) classes[i] = w[i] < how.least ? -1 : classes[i];
}
typedef struct { double weight; size_t n; } class_sum;
/* Sums up the classes of a row that has been weighed.  Returns the one in which the sum reaches `wanted`, or the last
 * one that has anything, and the sum before it. */
static int32_t find_edge(const row *r, class_sum *classes, double wanted, double *before) {
    double w[WEIGH_BLOCK];
    int32_t of[WEIGH_BLOCK], last = 0, edge = 0;
    for (size_t b = 0; b < r->n_blocks; b++) {
        if (r->sums[b][0] == 0) continue;
        classify(r, b, w, of);
        for (size_t i = 0; i < block_length(r, b); i++) {
            if (of[i] < 0) continue;
            classes[of[i]].weight += w[i];
            classes[of[i]].n++;
            last = of[i] > last ? of[i] : last;
        }
    }
    for (*before = 0; edge < last && *before + classes[edge].weight < wanted; edge++) *before += classes[edge].weight;
    return edge;
}
/* The likely ones of one class, in the order of ids. */
static void gather_class(const row *r, int32_t class, candidate *out) {
    double w[WEIGH_BLOCK];
    int32_t of[WEIGH_BLOCK];
    for (size_t b = 0; b < r->n_blocks; b++) {
        if (r->sums[b][0] == 0) continue;
        classify(r, b, w, of);
        for (size_t i = 0, id = b * WEIGH_BLOCK; i < block_length(r, b); i++, id++)
            if (of[i] == class) *out++ = (candidate){ key_of(r->logits[id], id), w[i] };
    }
}
/* Walks along the likely of the classes before the edge: the one with which the sum exceeds the goal, or the last. */
static int32_t walk_classes(const row *r, int32_t edge, double goal) {
    double w[WEIGH_BLOCK], sum = 0;
    int32_t of[WEIGH_BLOCK];
    size_t id = 0;
    for (size_t b = 0; b < r->n_blocks && sum <= goal; b++) {
        if (r->sums[b][0] == 0) continue;
        classify(r, b, w, of);
        for (size_t i = 0; i < block_length(r, b) && sum <= goal; i++) {
            if (of[i] < 0 || of[i] >= edge) continue;
            id = b * WEIGH_BLOCK + i;
            sum += w[i];
        }
    }
    return (int32_t)id;
}
/* Draws from the smallest set of the highest among the likely that weighs `wanted`. */
static int draw_nucleus(const row *r, double wanted, double uniform, int32_t *id) {
    double before, at_edge = 0;
    class_sum *classes = memory_take((size_t)LAST_CLASS + 1, sizeof *classes);
    FAIL_IF(!classes, MS4_ENOMEM, NO_MEMORY);
    const int32_t edge = find_edge(r, classes, wanted, &before);
    const size_t n = classes[edge].n;
    memory_give(classes);
    candidate *c = memory_take(n, sizeof *c);
    FAIL_IF(!c, MS4_ENOMEM, NO_MEMORY);
    gather_class(r, edge, c);
    const size_t n_kept = (size_t)(rank(c, n, before, wanted, 0) - c) + 1;
    for (size_t i = 0; i < n_kept; i++) at_edge += c[i].weight;
    const double goal = uniform * (before + at_edge);
    if (goal < before) *id = walk_classes(r, edge, goal);
    else *id = id_of(rank(c, n_kept, before, goal, 1)->key);
    memory_give(c);
    return MS4_OK;
}
/* Draws from all of a row that has been looked at, with top-p and min-p. */
static int draw(row *r, const ms4_sampling *how, double uniform, int32_t *id) {
    const int cut = how->min_p > 0;
    double total[2];
    row_weigh(r, how->temperature, cut ? how->min_p : LIKELY, total);
    if (how->top_p == 1) {
        double goal = uniform * (total[0] + (cut ? 0 : total[1]));
        int others = !cut && goal >= total[0] && total[1] > 0;
        *id = row_walk(r, others, others ? total[0] : 0, goal);
        return MS4_OK;
    }
    double wanted = how->top_p * (total[0] + total[1]);
    if (!cut && total[0] < wanted) row_weigh(r, how->temperature, 0, total);
    return draw_nucleus(r, wanted, uniform, id);
}
/* The k highest of a row that has been looked at, in the order of ids; 0 < k <= n. */
static int copy_highest(const row *r, size_t k, float *logits, int32_t *ids) {
    candidate *c;
    TRY(take_highest(r, k, &c));
    const uint64_t last = c[k - 1].key;
    memory_give(c);
    for (size_t b = 0, n = 0; b < r->n_blocks; b++) {
        if (r->tops[b] < logit_of(last)) continue;
        for (size_t i = b * WEIGH_BLOCK, end = i + block_length(r, b); i < end; i++) {
            if (key_of(r->logits[i], i) > last) continue;
            logits[n] = r->logits[i];
            ids[n++] = (int32_t)i;
        }
    }
    return MS4_OK;
}
/* The same with what top-k leaves: a row of its own. */
static int draw_from(const row *r, size_t k, const ms4_sampling *how, double uniform, int32_t *id) {
    row few = { 0 };
    float *logits = memory_take(k, sizeof *logits + sizeof(int32_t));
    FAIL_IF(!logits, MS4_ENOMEM, NO_MEMORY);
    int32_t *ids = (int32_t *)(logits + k);
    int status = copy_highest(r, k, logits, ids);
    if (!status) status = row_open(&few, r->ops, k);
    if (!status) {
        row_look(&few, logits);
        status = draw(&few, how, uniform, id);
        if (!status) *id = ids[*id];
    }
    row_close(&few);
    memory_give(logits);
    return status;
}
static int choose(row *r, const ms4_sampling *how, double uniform, int32_t *id) {
    size_t k = (size_t)how->top_k;
    if (how->temperature == 0) {
        *id = row_best(r);
        return MS4_OK;
    }
    return k == 0 || k >= r->n ? draw(r, how, uniform, id) : draw_from(r, k, how, uniform, id);
}
/* Greedy ones want one. */
static int highest_of(row *r, const float *logits, size_t among, size_t k, float *out, int32_t *ids) {
    int finite = row_look(r, logits);
    if (among < r->n) {
        r->n = among;
        r->n_blocks = (among + WEIGH_BLOCK - 1) / WEIGH_BLOCK;
        row_look(r, logits);
    }
    for (size_t i = 0; i < k && !finite; i++) {
        out[i] = NAN;
        ids[i] = (int32_t)i;
    }
    if (!finite) return MS4_OK;
    if (k > 1) return copy_highest(r, k, out, ids);
    ids[0] = row_best(r);
    out[0] = logits[ids[0]];
    return MS4_OK;
}
int sample_highest(const struct ms4_ops *ops, const float *logits, size_t n, size_t among, size_t k, float *out,
                   int32_t *ids) {
    row r;
    int status = row_open(&r, ops, n);
    if (!status) status = highest_of(&r, logits, among, k, out, ids);
    row_close(&r);
    return status;
}

/* --- log-probabilities -------------------------------------------------------------------- */
/* ln x for x >= 1: x = 2^k m, and the series of the inverse hyperbolic tangent for ln m, |ln m| <= ln 2 / 2. */
static double log_of(double x) {
    int k = 0;
    for (; x > 0x1.6a09e667f3bcdp+0; x /= 2) k++;
    double s = (x - 1) / (x + 1), sum = 0;
    for (int i = 23; i >= 1; i -= 2) sum = sum * (s * s) + 1.0 / i;
    return k * 0x1.62e42fefa39efp-1 + 2 * s * sum;
}
/* Those of the model itself: of `id`, then of the n_top highest, highest first. */
static int log_probabilities(row *r, int32_t id, size_t n_top, int32_t *top_ids, double *logprobs) {
    double total[2];
    candidate *c;
    row_weigh(r, 1, LIKELY, total);
    const double log_total = log_of(total[0] + total[1]) + r->how.highest;
    logprobs[0] = r->logits[id] - log_total;
    if (!n_top) return MS4_OK;
    TRY(take_highest(r, n_top, &c));
    qsort(c, n_top, sizeof *c, by_key);
    for (size_t i = 0; i < n_top; i++) {
        top_ids[i] = id_of(c[i].key);
        logprobs[i + 1] = r->logits[top_ids[i]] - log_total;
    }
    memory_give(c);
    return MS4_OK;
}

/* --- the call ----------------------------------------------------------------------------- */
static int check(size_t n_rows, int32_t n_vocab, const ms4_sampling *how, const double *uniforms, int32_t n_top) {
    FAIL_IF(n_vocab < 1 || n_top < 0 || n_top > n_vocab, MS4_EARG, "the %d highest of %d logits", n_top, n_vocab);
    FAIL_IF(!(how->temperature >= 0 && how->temperature <= DBL_MAX), MS4_EARG, "temperature %g", how->temperature);
    FAIL_IF(how->top_k < 0, MS4_EARG, "top-k %d", how->top_k);
    FAIL_IF(!(how->top_p > 0 && how->top_p <= 1), MS4_EARG, "top-p %g", how->top_p);
    FAIL_IF(!(how->min_p >= 0 && how->min_p <= 1), MS4_EARG, "min-p %g", how->min_p);
    if (how->temperature == 0) return MS4_OK;
    for (size_t i = 0; i < n_rows; i++)
        FAIL_IF(!(uniforms[i] >= 0 && uniforms[i] < 1), MS4_EARG, "a random number of %g", uniforms[i]);
    return MS4_OK;
}
static int sample_row(row *r, const float *logits, const ms4_sampling *how, double uniform, int32_t *id) {
    FAIL_IF(!row_look(r, logits), MS4_ENUMBER, LOGITS_NOT_FINITE);
    return choose(r, how, uniform, id);
}
int ms4_sample(const float *logits, size_t n_rows, int32_t n_vocab, const ms4_sampling *how, const double *uniforms,
               int32_t *ids, int32_t n_top, int32_t *top_ids, double *logprobs) {
    TRY(check(n_rows, n_vocab, how, uniforms, n_top));
    row r;
    const size_t n = (size_t)n_vocab, top = (size_t)n_top;
    int status = row_open(&r, ms4_ops_for(NULL), n);
    for (size_t i = 0; !status && i < n_rows; i++) {
        status = sample_row(&r, logits + i * n, how, how->temperature > 0 ? uniforms[i] : 0, &ids[i]);
        if (status || !logprobs) continue;
        status = log_probabilities(&r, ids[i], top, top_ids + i * top, logprobs + i * (top + 1));
    }
    row_close(&r);
    return status;
}
