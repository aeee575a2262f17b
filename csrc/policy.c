/* policy.c -- counts that fade, moves that pay, rates that follow the machine, and the counts' form in a file.
 *
 * To fade all counts of a layer with each token would touch every expert; instead the worth of a new use grows, and a
 * value is a count over that worth.  Before the worth gets too large, both are brought down by a power of two, which
 * is exact.
 */
#include "policy.h"
#include "checksum.h"
#include "error.h"
#include "memory.h"
#include <math.h>

typedef struct { double bytes, row_bytes, ns; } seen;         /* sums, of which the older part counts less */
struct policy {
    double *count;                                            /* by id, in units of the layer's worth */
    double *worth;                                            /* by layer: what a use counts now */
    double half_life, margin, pay_back;
    seen bus, few, many;                                      /* few, many: the CPU with about one row, with many */
    double saved, fixed_bus;                                  /* bytes; bytes per second, 0: as measured */
    int32_t n_layer, n_expert, fixed_from;
};
static const double LARGE = 0x1p60;

int policy_open(int32_t n_layer, int32_t n_expert, const policy_options *options, policy **out) {
    const policy_options o = options ? *options : (policy_options){ 0 };
    FAIL_IF(n_layer < 1 || n_layer > 65536 || n_expert < 1 || n_expert > 65536
                || (int64_t)n_layer * n_expert > 1 << 26, MS4_EARG, "%d layers of %d experts", n_layer, n_expert);
    FAIL_IF(!(o.half_life >= 0 && o.half_life < 1e9) || !(o.margin >= 0 && o.margin < 1e9)
                || !(o.pay_back >= 0 && o.pay_back < 1e9), MS4_EARG,
            "a policy with a half-life of %g, a margin of %g and a pay-back of %g", o.half_life, o.margin, o.pay_back);
    policy *p = memory_take(1, sizeof *p);
    FAIL_IF(!p, MS4_ENOMEM, "no memory for the counts of experts");
    *p = (policy){ .half_life = o.half_life > 0 ? o.half_life : 48, .margin = o.margin > 0 ? o.margin : 1.25,
                   .pay_back = o.pay_back > 0 ? o.pay_back : 1, .n_layer = n_layer, .n_expert = n_expert };
    p->count = memory_take((size_t)n_layer * (size_t)n_expert, sizeof *p->count);
    p->worth = memory_take((size_t)n_layer, sizeof *p->worth);
    if (!p->count || !p->worth) {
        policy_close(p);
        return error_set(MS4_ENOMEM, "no memory for the counts of experts");
    }
    for (int32_t i = 0; i < n_layer; i++) p->worth[i] = 1;
    *out = p;
    return MS4_OK;
}
void policy_close(policy *p) {
    if (!p) return;
    memory_give(p->count);
    memory_give(p->worth);
    memory_give(p);
}
/* --- counting ----------------------------------------------------------------------------- */
/* What is left of a use after n tokens. */
static double faded(const policy *p, double n) { return pow(0.5, n / p->half_life); }

/* n tokens pass: what came before fades against what comes now. */
static void pass(policy *p, int32_t layer, int32_t n) {
    double *count = p->count + (size_t)layer * (size_t)p->n_expert, left = faded(p, n);
    if (left > 1 / LARGE) p->worth[layer] /= left;
    if (left > 1 / LARGE && p->worth[layer] < LARGE) return;
    for (int32_t i = 0; i < p->n_expert; i++) count[i] = left > 1 / LARGE ? count[i] / LARGE : 0;
    p->worth[layer] = left > 1 / LARGE ? p->worth[layer] / LARGE : 1;
}
void policy_count(policy *p, int32_t layer, const int32_t *experts, const int32_t *pairs, int32_t n, int32_t n_tokens) {
    double *count = p->count + (size_t)layer * (size_t)p->n_expert;
    pass(p, layer, n_tokens);
    /* Spread evenly: the mean of what is left of a use after 0, 1, ..., n_tokens - 1 tokens. */
    const double each = n_tokens == 1 ? 1 : (1 - faded(p, n_tokens)) / (1 - faded(p, 1)) / n_tokens;
    for (int32_t i = 0; i < n; i++) count[experts[i]] += p->worth[layer] * each * pairs[i];
}
static double value(const policy *p, int32_t id) { return p->count[id] / p->worth[id / p->n_expert]; }
double policy_value(const policy *p, int32_t layer, int32_t expert) { return value(p, layer * p->n_expert + expert); }

/* --- what follows ------------------------------------------------------------------------- */
int32_t policy_victim(const policy *p, const int32_t *ids, int32_t n) {
    int32_t least = n ? 0 : -1;
    for (int32_t i = 1; i < n; i++)
        if (value(p, ids[i]) < value(p, ids[least])) least = i;
    return least;
}
/* The few highest of what is offered, the highest first; of equals, the first that came. */
typedef struct { double key[POLICY_MOVES]; int32_t item[POLICY_MOVES], n, most; } top;

static void offer(top *t, double key, int32_t item) {
    if (t->n == t->most && (!t->n || key <= t->key[t->n - 1])) return;
    int32_t i = t->n < t->most ? t->n++ : t->n - 1;
    for (; i > 0 && t->key[i - 1] < key; i--) {
        t->key[i] = t->key[i - 1];
        t->item[i] = t->item[i - 1];
    }
    t->key[i] = key;
    t->item[i] = item;
}
/* Who of a pool would come, and who would leave. */
static void candidates(const policy *p, const policy_places *at, int32_t pool, top *in, top *out) {
    for (int32_t layer = 0; layer < p->n_layer; layer++) {
        if ((at->pool ? at->pool[layer] : 0) != pool) continue;
        for (int32_t id = layer * p->n_expert; id < (layer + 1) * p->n_expert; id++) {
            if (at->where[id] & POLICY_BUSY) continue;
            if (at->where[id] & POLICY_VRAM) offer(out, -value(p, id), id);
            else if (at->where[id] & POLICY_RAM && p->count[id] > 0) offer(in, value(p, id), id);
        }
    }
}
typedef struct { policy_move move[POLICY_POOLS * POLICY_MOVES]; uint64_t bytes[POLICY_POOLS * POLICY_MOVES]; } found;

/* The pool's moves that are worth it, appended to those found; best: all found, by what a byte of them earns. */
static int32_t pool_moves(const policy *p, const policy_places *at, int32_t pool, int32_t n, found *f, top *best) {
    top in = { .most = best->most }, out = { .most = best->most };
    candidates(p, at, pool, &in, &out);
    for (int32_t i = 0; i < in.n; i++, n++) {
        const int32_t leaving = i - at->n_free[pool];
        double left = 0;
        f->move[n] = (policy_move){ in.item[i], -1, 0 };
        if (leaving >= 0) {
            if (leaving >= out.n) break;
            left = -out.key[leaving];
            if (!(in.key[i] > p->margin * left && in.key[i] >= left + p->pay_back)) break;
            f->move[n].out = out.item[leaving];
            f->move[n].down = at->exclusive && !(at->where[out.item[leaving]] & POLICY_RAM);
        }
        f->bytes[n] = at->bytes[pool] << f->move[n].down;
        offer(best, (in.key[i] - left) / (double)f->bytes[n], n);
    }
    return n;
}
int32_t policy_moves(const policy *p, const policy_places *at, uint64_t budget, policy_move *moves, int32_t most) {
    found f;
    top best = { .most = most < 0 ? 0 : most < POLICY_MOVES ? most : POLICY_MOVES };
    int32_t n = 0;
    for (int32_t i = 0, n_found = 0; i < at->n_pools; i++) n_found = pool_moves(p, at, i, n_found, &f, &best);
    for (int32_t i = 0; i < best.n; i++) {
        if (f.bytes[best.item[i]] > budget) continue;
        budget -= f.bytes[best.item[i]];
        moves[n++] = f.move[best.item[i]];
    }
    return n;
}
/* --- rates -------------------------------------------------------------------------------- */
#define ONE_ROW 1.5                                           /* rows an expert: at most so many are about one, */
#define MANY_ROWS 4                                           /* at least so many are many */
#define MOST_FROM 4096

static void add(seen *to, double bytes, double row_bytes, double ns) {
    const double left = 1 - 1.0 / POLICY_LASTING;
    if (!(bytes > 0 && ns > 0)) return;
    *to = (seen){ left * to->bytes + bytes, left * to->row_bytes + row_bytes, left * to->ns + ns };
}
void policy_saw_bus(policy *p, double bytes, double ns) { add(&p->bus, bytes, bytes, ns); }
void policy_saw_cpu(policy *p, double bytes, double row_bytes, double ns) {
    if (row_bytes <= ONE_ROW * bytes) add(&p->few, bytes, row_bytes, ns);
    else if (row_bytes >= MANY_ROWS * bytes) add(&p->many, bytes, row_bytes, ns);
}
double policy_bus(const policy *p) {
    return p->fixed_bus > 0 ? p->fixed_bus : p->bus.ns > 0 ? 1e9 * p->bus.bytes / p->bus.ns : 0;
}
int32_t policy_stream_from(const policy *p) {
    const double bus = policy_bus(p);
    if (p->fixed_from) return p->fixed_from;
    if (!(bus > 0) || !(p->many.ns > 0)) return POLICY_STREAM_FROM;
    const double wanted = 1e9 / bus, rows = p->many.row_bytes / p->many.bytes, ns = p->many.ns / p->many.bytes;
    double slope = ns / rows;                                 /* a line from nothing, if there is no other point */
    if (p->few.ns > 0) {
        const double more = ns - p->few.ns / p->few.bytes;
        if (more > 0) slope = more / (rows - p->few.row_bytes / p->few.bytes);
    }
    const double from = ceil(rows + (wanted - ns) / slope);
    return from > MOST_FROM ? MOST_FROM : from < 2 ? 2 : (int32_t)from;
}
void policy_fix(policy *p, double bus, int32_t stream_from) {
    p->fixed_bus = bus;
    p->fixed_from = stream_from;
}
uint64_t policy_allow(policy *p, double ns_step, double ns_cpu, uint64_t under_way, uint64_t largest) {
    const double bus = policy_bus(p), now = ns_step > ns_cpu ? bus * (ns_step - ns_cpu) / 1e9 : 0;
    const double most = now > 2 * (double)largest ? now : 2 * (double)largest;
    if (!(bus > 0)) return under_way ? 0 : largest;
    p->saved = p->saved + now < most ? p->saved + now : most;
    const double left = p->saved - (double)under_way;
    return left >= 0x1p62 ? (uint64_t)1 << 62 : left > 0 ? (uint64_t)left : 0;
}
void policy_spend(policy *p, uint64_t bytes) { p->saved = p->saved > (double)bytes ? p->saved - (double)bytes : 0; }

/* --- files -------------------------------------------------------------------------------- */
#define POLICY_FORMAT 1
typedef struct {
    char magic[8];
    uint32_t format, n_layer, n_expert, reserved;
    uint64_t fingerprint, checksum;                           /* of the model; of all else, values included */
} policy_header;
_Static_assert(sizeof(policy_header) == 40, "no gaps: these bytes are written as they are");

static size_t n_values(const policy *p) { return (size_t)p->n_layer * (size_t)p->n_expert; }
static policy_header header_of(const policy *p, uint64_t fingerprint) {
    return (policy_header){ .magic = { 'm', 's', '4', ' ', 'u', 's', 'e', '\n' }, .format = POLICY_FORMAT,
                            .n_layer = (uint32_t)p->n_layer, .n_expert = (uint32_t)p->n_expert,
                            .fingerprint = fingerprint };
}
static uint64_t checksum_with(policy_header h, const uint8_t *values, size_t n) {
    h.checksum = 0;
    return checksum(checksum(0, (const uint8_t *)&h, sizeof h), values, n * sizeof(float));
}
size_t policy_pack_bytes(const policy *p) { return sizeof(policy_header) + n_values(p) * sizeof(float); }
void policy_pack(const policy *p, uint64_t fingerprint, uint8_t *out) {
    uint8_t *values = out + sizeof(policy_header);
    for (size_t i = 0; i < n_values(p); i++) {
        const float v = (float)value(p, (int32_t)i);
        memcpy(values + i * sizeof v, &v, sizeof v);
    }
    policy_header h = header_of(p, fingerprint);
    h.checksum = checksum_with(h, values, n_values(p));
    memcpy(out, &h, sizeof h);
}
int policy_unpack(policy *p, uint64_t fingerprint, const uint8_t *in, size_t n) {
    const uint8_t *values = in + sizeof(policy_header);
    policy_header h, want = header_of(p, fingerprint);
    FAIL_IF(n < sizeof h, MS4_EMODEL, "these are no counts of experts");
    memcpy(&h, in, sizeof h);
    FAIL_IF(memcmp(h.magic, want.magic, sizeof h.magic), MS4_EMODEL, "these are no counts of experts");
    FAIL_IF(h.format != POLICY_FORMAT, MS4_EMODEL,
            "the counts of experts have format %u; this version reads %d", h.format, POLICY_FORMAT);
    FAIL_IF(h.n_layer != want.n_layer || h.n_expert != want.n_expert || h.fingerprint != fingerprint, MS4_EMODEL,
            "the counts of experts belong to another model");
    FAIL_IF(n != policy_pack_bytes(p) || h.checksum != checksum_with(h, values, n_values(p)), MS4_EMODEL,
            "the counts of experts are damaged");
    for (size_t i = 0; i < n_values(p); i++) {
        float v;
        memcpy(&v, values + i * sizeof v, sizeof v);
        FAIL_IF(!(v >= 0 && v < 1e12f), MS4_EMODEL, "the counts of experts hold numbers that nobody can have counted");
    }
    for (int32_t i = 0; i < p->n_layer; i++) p->worth[i] = 1;
    for (size_t i = 0; i < n_values(p); i++) {
        float v;
        memcpy(&v, values + i * sizeof v, sizeof v);
        p->count[i] = v;
    }
    return MS4_OK;
}
