/* race.cpp -- finds barriers that are missing, however threads happened to run: linked to kernels that were compiled
 * with -fsanitize=thread, whose calls at each access of memory come here instead of to that sanitizer's library.
 *
 * Two threads of a block may touch the same byte of shared memory, one of them writing, only with a barrier between
 * that both pass: __syncthreads, or within a warp __syncwarp.  Shuffles, votes, mma and ldmatrix let lanes meet, but
 * CUDA says of none of them that it orders memory.  cp.async writes when it is begun, and when it is waited for.
 */
#include "emulate.h"
#include <vector>

namespace {
struct access { uint64_t thread : 10, block : 18, barriers : 18, warp_barriers : 18; };     /* block: 0 is none */
/* The last write of a byte, and the last reads by two threads. */
struct history { access write, read[2]; };
const uint32_t MOST = 1u << 18;
thread_local std::vector<history> all;
thread_local uint32_t epoch;                    /* what is remembered is of blocks of this one */

access now() {
    const emu::block &b = *emu::at;
    const unsigned i = (unsigned)b.linear;
    if (b.barriers[i] >= MOST || b.warp_barriers[i] >= MOST) emu::die("race.cpp: more barriers than it can count");
    return { i, b.n_run % (MOST - 1) + 1, b.barriers[i], b.warp_barriers[i] };
}
bool is_before(const access &a, const access &b) {
    return a.block != b.block || a.thread == b.thread || a.barriers < b.barriers
        || (a.thread / 32 == b.thread / 32 && a.warp_barriers < b.warp_barriers);
}
void compare(const access &a, const access &b, const char *what, size_t at) {
    char text[200];
    if (is_before(a, b)) return;
    snprintf(text, sizeof text, "no barrier between threads %d and %d, which %s byte %zu of shared memory",
             (int)a.thread, (int)b.thread, what, at);
    emu::die(text);
}
void touch(const void *p, size_t n, bool writes) {
    if (!emu::at || (const char *)p < emu::at->shared || (const char *)p >= emu::at->shared_end) return;
    const access a = now();
    const size_t from = (size_t)((const char *)p - emu::at->shared);
    const size_t room = (size_t)(emu::at->shared_end - emu::at->shared);
    if (all.size() < room || epoch != emu::at->n_run / (MOST - 1)) all.assign(room, {});
    epoch = emu::at->n_run / (MOST - 1);
    for (size_t i = from; i < from + n; i++) {
        history &h = all[i];
        compare(h.write, a, writes ? "both write" : "write and then read", i);
        if (writes) {
            compare(h.read[0], a, "read and then write", i);
            compare(h.read[1], a, "read and then write", i);
            h = { a, {} };
        } else {
            const bool second = h.read[0].block == a.block && h.read[0].thread != a.thread;
            h.read[second] = a;
        }
    }
}
const bool ready = (emu::touched = touch, true);
}

#define SIZES(X) X(1) X(2) X(4) X(8) X(16)
#define ACCESS(n) \
    extern "C" void __tsan_read##n(void *p) { touch(p, n, false); } \
    extern "C" void __tsan_write##n(void *p) { touch(p, n, true); } \
    extern "C" void __tsan_unaligned_read##n(void *p) { touch(p, n, false); } \
    extern "C" void __tsan_unaligned_write##n(void *p) { touch(p, n, true); }
SIZES(ACCESS)
extern "C" void __tsan_read_range(void *p, size_t n) { touch(p, n, false); }
extern "C" void __tsan_write_range(void *p, size_t n) { touch(p, n, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void **, void *) {}
