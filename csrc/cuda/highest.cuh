/* highest.cuh -- sampling's top-k: the k highest logits of a row, so that the others need not leave the card.
 *
 * A block has a part of a row and keeps the k highest of it, as they lie; what all parts of a row have kept is a row of
 * its own, from which the next launch takes the highest, until there is one part.  Equal ones: those that come first.
 * As parts lie in the order of ids and what is kept lies as it lay, that is the lower id, and the last launch leaves
 * the k highest in the order of their ids, as sample.c takes them.  Nothing is computed, only compared: as keys, whole
 * numbers in the order of the logits.
 */
#ifndef MS4_HIGHEST_CUH
#define MS4_HIGHEST_CUH
#include "route.cuh"

#define HIGHEST_KEYS (HIGHEST_MOST / HIGHEST_THREADS)
#define EVERYTHING 0xffffffffu        /* the key of what is not finite: it shows, whatever else there is */
#define NOT_AMONG 1u                  /* the key of what may not be chosen; 0: there is no logit */

DEV unsigned highest_key(float x, bool among) {
    return magnitude_bits(x) >= INFINITY_BITS ? EVERYTHING : among ? order_key(x) : NOT_AMONG;
}
/* use(i) for the keys that a lane of this part has. */
template <class F> DEV void each_key(int n_keys, F use) {
#pragma unroll
    for (int i = 0; i < HIGHEST_KEYS; i++)
        if (i < n_keys) use(i);
}
/* Adds up what all threads have; room: a word for each warp, in which nobody is still looking. */
DEV unsigned sum_of_block(unsigned own, unsigned *room) {
    const int lane = (int)threadIdx.x & 31, warps = (int)blockDim.x / 32;
    own = __reduce_add_sync(ALL, own);
    if (!lane) room[threadIdx.x / 32] = own;
    __syncthreads();
    return __reduce_add_sync(ALL, lane < warps ? room[lane] : 0u);
}
/* A warp has neighbouring logits, of which lane l has each 32nd.  (Two blocks: 64 registers, and no spills.) */
KERNEL_BLOCKS(highest_rows, highest_args, HIGHEST_THREADS, 2) {
    SHARED(unsigned, rooms, 3 * 32);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x / 32;
    const int64_t part = blockIdx.x, parts = gridDim.x;
    const int begin = (int)(a.n * part / parts), end = (int)(a.n * (part + 1) / parts);
    const int n_keys = (end - begin + (int)blockDim.x - 1) / (int)blockDim.x, own = begin + warp * 32 * n_keys + lane;
    const float *logits = a.logits + blockIdx.y * a.stride;
    const int32_t *ids = a.ids ? a.ids + blockIdx.y * a.stride : nullptr;
    unsigned key[HIGHEST_KEYS];
    each_key(HIGHEST_KEYS, [&](int i) {
        const int at = own + 32 * i;
        const bool there = i < n_keys && at < end;
        key[i] = there ? highest_key(logits[at], (ids ? ids[at] : at) < a.among) : 0;
    });
    /* The largest key that at least k have, bit by bit, or one that exactly k have. */
    unsigned last = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned least = last | 1u << bit;
        unsigned count = 0;
        each_key(n_keys, [&](int i) { count += key[i] >= least; });
        count = sum_of_block(count, rooms + 32 * (bit & 1));
        if ((int)count >= a.k) last = least;
        if ((int)count == a.k) break;
    }
    /* All above it are kept, and of those that have it the first: how many of both are there in the warps before? */
    unsigned both = 0;
    each_key(n_keys, [&](int i) { both += key[i] > last ? 0x10000u : key[i] == last; });
    both = __reduce_add_sync(ALL, both);
    if (!lane) rooms[64 + warp] = both;
    __syncthreads();
    const unsigned of_warp = lane < (int)blockDim.x / 32 ? rooms[64 + lane] : 0;
    const unsigned before = __reduce_add_sync(ALL, lane < warp ? of_warp : 0u);
    const int equal = a.k - (int)(__reduce_add_sync(ALL, of_warp) >> 16), equal_before = (int)(before & 0xffff);
    int left = equal - equal_before;
    size_t to = (size_t)(blockIdx.y * parts + part) * (size_t)a.k + (before >> 16) + (unsigned)min(equal, equal_before);
    each_key(n_keys, [&](int i) {
        const unsigned below = (1u << lane) - 1, same = __ballot_sync(ALL, key[i] == last);
        const bool kept = key[i] > last || (key[i] == last && __popc(same & below) < left);
        const unsigned lanes = __ballot_sync(ALL, kept);
        if (kept) {
            const size_t at = to + (unsigned)__popc(lanes & below);
            a.to[at] = logits[own + 32 * i];
            a.to_ids[at] = ids ? ids[own + 32 * i] : own + 32 * i;
        }
        left -= __popc(same);
        to += (unsigned)__popc(lanes);
    });
}
#endif
