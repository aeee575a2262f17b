/* route.cuh -- which experts a token goes to, and with what weights (ops.h, choose).
 *
 * A warp has a token; lane l has the logits l, l + 32, ...  First comes the key of the last one that is chosen, and how
 * many of those with the same key are: by taking the largest k times where few of few logits are wanted, else bit by
 * bit.  Then the chosen come out in ascending order.  tell_choice brings them to the host, which waits for them.
 */
#ifndef MS4_ROUTE_CUH
#define MS4_ROUTE_CUH
#include "floats.cuh"

#define FEW_LOGITS 128
#define FEW_CHOSEN 16

/* Whole numbers above 0 in the order of the logits: NaN is as -infinity, and -0 as 0. */
DEV unsigned order_key(float x) {
    const unsigned u = __float_as_uint(x != x ? MINUS_INFINITY : x == 0 ? 0.0f : x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
DEV float key_value(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/* All with a larger key than `last` are chosen, and the first `equal` that have it. */
struct choice { unsigned last; int equal; };

DEV choice choose_few(const float *logits, int n, int k) {
    const int lane = (int)threadIdx.x & 31;
    unsigned key[FEW_LOGITS / 32];
    choice c = { 0, 0 };
    for (int i = 0; i < FEW_LOGITS / 32; i++) key[i] = 32 * i + lane < n ? order_key(logits[32 * i + lane]) : 0;
    for (int j = 0; j < k; j++) {
        unsigned own = key[0];
        for (int i = 1; i < FEW_LOGITS / 32; i++) own = larger(own, key[i]);
        const unsigned top = __reduce_max_sync(ALL, own);
        const bool mine = lane == __ffs((int)__ballot_sync(ALL, own == top)) - 1;
        c.equal = top == c.last ? c.equal + 1 : 1;
        c.last = top;
        bool taken = false;                     /* one of them */
        for (int i = 0; i < FEW_LOGITS / 32; i++) {
            const bool take = mine && !taken && key[i] == top;
            taken |= take;
            key[i] = take ? 0 : key[i];
        }
    }
    return c;
}
DEV int count_keys(const float *logits, int n, unsigned least) {
    int count = 0;
#pragma unroll 4
    for (int i = (int)threadIdx.x & 31; i < n; i += 32) count += order_key(logits[i]) >= least;
    return __reduce_add_sync(ALL, count);
}
DEV choice choose_many(const float *logits, int n, int k) {
    unsigned last = 0;
    for (int bit = 31; bit >= 0; bit--)
        if (count_keys(logits, n, last | 1u << bit) >= k) last |= 1u << bit;
    return { last, last == 0xffffffffu ? k : k - count_keys(logits, n, last + 1) };
}
/* Goes through the logits 32 at a time; use(index, value, whether the lane's is chosen, the lanes whose are). */
template <class F> DEV void each_chosen(const float *logits, int n, choice c, F use) {
    const int lane = (int)threadIdx.x & 31;
    const unsigned before = (1u << lane) - 1;
    for (int first = 0; first < n; first += 32) {
        const int i = first + lane;
        const float x = i < n ? logits[i] : 0;
        const unsigned key = i < n ? order_key(x) : 0, equal = __ballot_sync(ALL, key == c.last);
        const bool chosen = key > c.last || (key == c.last && __popc(equal & before) < c.equal);
        c.equal -= __popc(equal);
        use(i, x, chosen, __ballot_sync(ALL, chosen));
    }
}
/* max: the largest logit, NaN if one of them is; and the sum of 64 of all e. */
DEV float largest_logit(const float *logits, int n) {
    unsigned top = 0, nan = 0;
    for (int i = (int)threadIdx.x & 31; i < n; i += 32) {
        const float x = logits[i];
        top = larger(top, order_key(x));
        nan |= x != x;
    }
    top = __reduce_max_sync(ALL, top);
    return __ballot_sync(ALL, nan != 0) ? NOT_A_NUMBER : key_value(top);
}
DEV float sum_exp(const float *logits, int n, float max) {
    float low = 0, high = 0;
    for (int i = (int)threadIdx.x & 31; i < n; i += 64) {
        low = __fadd_rn(low, exp_dev(__fsub_rn(logits[i], max)));
        if (i + 32 < n) high = __fadd_rn(high, exp_dev(__fsub_rn(logits[i + 32], max)));
    }
    return tree_32(__fadd_rn(low, high));
}
KERNEL(choose_experts, choose_args, 32) {
    const int n = a.n_expert;
    const float *logits = a.logits + (size_t)blockIdx.x * a.stride;
    const choice c = n <= FEW_LOGITS && a.k <= FEW_CHOSEN ? choose_few(logits, n, a.k) : choose_many(logits, n, a.k);
    const float max = largest_logit(logits, n);
    float total = 0;
    if (a.norm)
        each_chosen(logits, n, c, [&](int, float x, bool, unsigned lanes) {
            const float e = exp_dev(__fsub_rn(x, max));
            for (; lanes; lanes &= lanes - 1) total = __fadd_rn(total, __shfl_sync(ALL, e, __ffs((int)lanes) - 1));
        });
    else total = sum_exp(logits, n, max);
    int32_t *ids = a.ids + (size_t)blockIdx.x * (size_t)a.k;
    float *weights = a.weights + (size_t)blockIdx.x * (size_t)a.k;
    int at = 0;
    each_chosen(logits, n, c, [&](int i, float x, bool chosen, unsigned lanes) {
        const int own = at + __popc(lanes & ((1u << ((int)threadIdx.x & 31)) - 1));
        if (chosen) {
            ids[own] = i;
            weights[own] = __fdiv_rn(__fmul_rn(a.scale, exp_dev(__fsub_rn(x, max))), total);
        }
        at += __popc(lanes);
    });
}
KERNEL(tell_choice, tell_args, 256) {
    const int tid = (int)threadIdx.x, threads = (int)blockDim.x;
    for (int i = tid; i < a.k; i += threads) {
        a.told_ids[i] = a.ids[i];
        a.told_weights[i] = a.weights[i];
    }
    for (int i = tid; i < a.words; i += threads) ((uint4 *)a.told_x)[i] = ((const uint4 *)a.x)[i];
    __syncthreads();
    if (!tid) raise_flag(a.flag);
}
#endif
