/* emulate.h -- CUDA's threads on a CPU, as csrc/cuda/dev.cuh wants them: every thread of a block is a fibre.
 *
 * A fibre gives way only where threads meet (barriers, collectives of a warp), so kernels run at about the speed of
 * their arithmetic.  The scheduler (emulate.cpp) lets warps run at different random speeds and lanes in random order,
 * fills shared memory with poison before each block, lets cp.async arrive at its wait and no earlier, and ends the
 * process with one line where a kernel does what CUDA leaves undefined: lanes that name different masks, or read from
 * a lane that has exited; barriers that not all reach; addresses that are not aligned or lie outside.
 *
 * Left out on purpose: __shared__ (dev.cuh has SMEM and SHARED, which are poisoned).
 */
#ifndef MS4_EMULATE_H
#define MS4_EMULATE_H
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#define _Static_assert static_assert
#define __global__
#define __constant__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define DEV static inline __attribute__((always_inline))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };

namespace emu {
struct warp {
    uint32_t shown[2][32][8];       /* what lanes show each other where all of them meet: two buffers, in turn */
    uint32_t shown_part[32][8];     /* where some of them meet */
    uint32_t mask[32];              /* what a waiting lane named */
    uint32_t met[32];               /* the lanes that were there when it went on */
    uint8_t turn[32];
    uint32_t may_run, waits, gone;  /* lanes; those at a barrier of the block are in none of them */
};
struct block {
    dim3 thread, index, size, grid;
    int linear;                     /* the running thread */
    char *shared;                   /* the dynamic part; what SHARED took lies behind it */
    size_t shared_bytes;
    warp *warps;
    const char *shared_end;         /* of all parts */
    uint32_t n_run;                 /* the number of this block among all that were run */
    uint32_t barriers[1024], warp_barriers[1024];       /* that each thread has passed */
};
extern __thread block *at;          /* the block that this thread of the CPU runs */
extern void (*touched)(const void *p, size_t n, bool writes);   /* race.cpp: the running thread does; else NULL */

[[noreturn]] void die(const char *why);
void wait_block();                  /* until all threads of the block that have not exited wait here */
void wait_warp(uint32_t mask);      /* until all lanes in mask that have not exited wait here, with the same mask */
void store_release(void *p, uint32_t value);
extern void (*released)(const void *p);                         /* a check that looks what is there by then; or NULL */
void copy_begin(void *to, const void *from, int n, int of);     /* n bytes of `of`, then zeros */
void copy_close();
void copy_finish(int but_last);
bool in_shared(const void *p, size_t n);
bool in_own(const void *p, size_t n);                           /* the kernel's argument, or the thread's stack */
void *fixed_shared(const void *key, size_t bytes);              /* the same for all threads that bring the same key */

static inline int lane() { return at->linear % 32; }
static inline warp &mine() { return at->warps[at->linear / 32]; }
/* Shows v (at most 32 bytes) to the lanes in mask, and returns what lanes show, by lane. */
template <class T> static inline uint32_t (*show(uint32_t mask, const T &v))[8] {
    static_assert(sizeof(T) <= 32, "a lane shows 32 bytes");
    warp &w = mine();
    int l = lane();
    if (!(mask >> l & 1)) die("a lane takes part that the mask does not name");
    if (mask == 0xffffffffu) {
        uint32_t (*shown)[8] = w.shown[w.turn[l]++ & 1];
        memcpy(shown[l], &v, sizeof v);
        wait_warp(mask);
        return shown;
    }
    wait_warp(mask);                /* those that met before have read */
    memcpy(w.shown_part[l], &v, sizeof v);
    wait_warp(mask);
    return w.shown_part;
}
template <class T> static inline T shown_by(uint32_t (*shown)[8], int l) {
    if (!(mine().met[lane()] >> l & 1)) die("reads from a lane that does not take part");
    T v;
    memcpy(&v, shown[l], sizeof v);
    return v;
}
template <class T> static inline void aligned(const void *p) {
    if ((uintptr_t)p % sizeof(T)) die("an address is not aligned");
}
}
#define threadIdx emu::at->thread
#define blockIdx emu::at->index
#define blockDim emu::at->size
#define gridDim emu::at->grid
#define SMEM(name) char *name = emu::at->shared
#define SHARED(type, name, count) \
    static const char name##_key = 0; \
    type *name = (type *)emu::fixed_shared(&name##_key, sizeof(type) * (count))

/* --- threads meet ----------------------------------------------------------------------------------------------- */
static inline void __syncthreads() { emu::wait_block(); }
/* Other collectives let lanes meet, too, but only this orders what they do with memory. */
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emu::wait_warp(mask);
    if (mask == 0xffffffffu) emu::at->warp_barriers[emu::at->linear]++;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
    int l = emu::lane();
    return emu::shown_by<T>(emu::show(mask, v), (l & ~(width - 1)) | (from & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32) {
    int l = emu::lane(), from = l ^ with;
    return emu::shown_by<T>(emu::show(mask, v), from / width > l / width ? l : from & 31);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32) {
    int l = emu::lane(), from = l % width + by < width ? l + by : l;
    return emu::shown_by<T>(emu::show(mask, v), from);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32) {
    int l = emu::lane(), from = l % width >= by ? l - by : l;
    return emu::shown_by<T>(emu::show(mask, v), from);
}
namespace emu {
template <class T, class F> static inline T reduce(unsigned mask, T v, F f) {
    uint32_t (*shown)[8] = show(mask, v);
    T r = v;
    for (int l = 0; l < 32; l++)
        if (l != lane() && (mine().met[lane()] >> l & 1)) r = f(r, shown_by<T>(shown, l));
    return r;
}
}
#define EMU_REDUCE(name, type, expression) \
    static inline type name(unsigned mask, type v) { \
        return emu::reduce(mask, v, [](type a, type b) { return (type)(expression); }); \
    }
EMU_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
EMU_REDUCE(__reduce_max_sync, int, std::max(a, b))
EMU_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
EMU_REDUCE(__reduce_min_sync, int, std::min(a, b))
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b))
EMU_REDUCE(__reduce_and_sync, unsigned, a & b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
static inline unsigned __ballot_sync(unsigned mask, int v) {
    return emu::reduce(mask, v ? 1u << emu::lane() : 0u, [](unsigned a, unsigned b) { return a | b; });
}
static inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
static inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, !v) == 0; }

/* --- numbers ---------------------------------------------------------------------------------------------------- */
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __int2float_rn(int a) { return (float)a; }
static inline float __uint2float_rn(unsigned a) { return (float)a; }
static inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
static inline float __uint_as_float(unsigned i) { float f; memcpy(&f, &i, 4); return f; }
static inline int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }
static inline unsigned __float_as_uint(float f) { unsigned i; memcpy(&i, &f, 4); return i; }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned s) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (s & 31));
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned s) {
    return (unsigned)(((uint64_t)high << 32 | low) << (s & 31) >> 32);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {     /* prmt: bit 3 repeats the sign */
    uint64_t v = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 15, byte = (unsigned)(v >> 8 * (s & 7)) & 255;
        r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return r;
}
#define EMU_BYTES(name, type, expression) \
    static inline unsigned name(unsigned x, unsigned y) { \
        unsigned r = 0; \
        for (int i = 0; i < 32; i += 8) { \
            type a = (type)(x >> i), b = (type)(y >> i); \
            r |= (unsigned)(uint8_t)(expression) << i; \
        } \
        return r; \
    }
EMU_BYTES(__vadd4, uint8_t, a + b)
EMU_BYTES(__vsub4, uint8_t, a - b)
EMU_BYTES(__vcmpeq4, uint8_t, a == b ? 255 : 0)
EMU_BYTES(__vcmpne4, uint8_t, a != b ? 255 : 0)
EMU_BYTES(__vcmpgeu4, uint8_t, a >= b ? 255 : 0)
EMU_BYTES(__vcmpgtu4, uint8_t, a > b ? 255 : 0)
template <class T> static inline T __ldg(const T *p) { emu::aligned<T>(p); return *p; }

#include "kernels.h"

static inline float half_float(unsigned h) { return half_to_float((uint16_t)h); }
template <class T> static inline T emu_load(const void *p) {
    T v;
    emu::aligned<T>(p);
    memcpy(&v, p, sizeof v);
    return v;
}
static inline unsigned load4(const void *p) { return emu_load<unsigned>(p); }
static inline uint2 load8(const void *p) { return emu_load<uint2>(p); }
static inline uint4 load16(const void *p) { return emu_load<uint4>(p); }
static inline int dp2a_ss(int a, int b, int c) {
    return (int)((unsigned)c + (unsigned)((int16_t)a * (int8_t)b) + (unsigned)((a >> 16) * (int8_t)(b >> 8)));
}
static inline int dp4a_ss(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c = (int)((unsigned)c + (unsigned)((int8_t)(a >> i) * (int8_t)(b >> i)));
    return c;
}
static inline int dp4a_us(unsigned a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c = (int)((unsigned)c + (unsigned)((uint8_t)(a >> i) * (int8_t)(b >> i)));
    return c;
}

static inline void raise_flag(int32_t *flag) { emu::store_release(flag, 1); }

/* --- tensor cores ----------------------------------------------------------------------------------------------- */
/* PTX ISA, fragments of mma.m16n8k32 and k16: lane l holds rows l / 4 and l / 4 + 8 of A and column l / 4 of B, bytes
 * 4 (l % 4).. (and 16 more) along k; of C rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one more. */
struct emu_fragments { unsigned a[4], b[2]; };
template <bool SIGNED> static inline int emu_byte(unsigned word, int i) {
    return SIGNED ? (int)(int8_t)(word >> 8 * i) : (int)(uint8_t)(word >> 8 * i);
}
template <bool A_SIGNED, bool B_SIGNED>
static void emu_mma(int *c, const unsigned *a, const unsigned *b, int halves) {
    emu_fragments own = {};
    memcpy(own.a, a, 8 * (size_t)halves);
    memcpy(own.b, b, 4 * (size_t)halves);
    int l = emu::lane();
    uint32_t (*shown)[8] = emu::show(0xffffffffu, own);
    if (emu::mine().met[l] != 0xffffffffu) emu::die("mma: a lane has exited");
    for (int j = 0; j < 4; j++)
        for (int h = 0; h < halves; h++)
            for (int q = 0; q < 4; q++) {
                unsigned of_a = shown[l / 4 * 4 + q][2 * h + j / 2], of_b = shown[(2 * (l % 4) + j % 2) * 4 + q][4 + h];
                for (int i = 0; i < 4; i++)
                    c[j] = (int)((unsigned)c[j]
                                 + (unsigned)(emu_byte<A_SIGNED>(of_a, i) * emu_byte<B_SIGNED>(of_b, i)));
            }
}
template <bool A_SIGNED, bool B_SIGNED> static inline void mma_k32(int *c, const unsigned *a, const unsigned *b) {
    emu_mma<A_SIGNED, B_SIGNED>(c, a, b, 2);
}
template <bool A_SIGNED, bool B_SIGNED> static inline void mma_k32_first(int *c, const unsigned *a, const unsigned *b) {
    c[0] = c[1] = c[2] = c[3] = 0;
    emu_mma<A_SIGNED, B_SIGNED>(c, a, b, 2);
}
template <bool A_SIGNED, bool B_SIGNED> static inline void mma_k16(int *c, const unsigned *a, unsigned b) {
    emu_mma<A_SIGNED, B_SIGNED>(c, a, &b, 1);
}
template <bool A_SIGNED, bool B_SIGNED> static inline void mma_k16_first(int *c, const unsigned *a, unsigned b) {
    c[0] = c[1] = c[2] = c[3] = 0;
    emu_mma<A_SIGNED, B_SIGNED>(c, a, &b, 1);
}
template <bool TRANSPOSED> static void ldmatrix_x4(unsigned *r, const void *row) {
    if ((uintptr_t)row % 16 || !emu::in_shared(row, 16)) emu::die("ldmatrix: no aligned row in shared memory");
    int l = emu::lane();
    uint32_t (*shown)[8] = emu::show(0xffffffffu, row);
    for (int m = 0; m < 4; m++) {
        uint16_t v[2];
        for (int k = 0; k < 2; k++) {
            int line = TRANSPOSED ? 2 * (l % 4) + k : l / 4, column = TRANSPOSED ? l / 4 : 2 * (l % 4) + k;
            v[k] = emu::shown_by<const uint16_t *>(shown, 8 * m + line)[column];
        }
        r[m] = v[0] | (unsigned)v[1] << 16;
    }
    /* a lane reads rows of others, which these may overwrite after the instruction: on a GPU all have read by then */
    emu::wait_warp(0xffffffffu);
}

/* --- cp.async --------------------------------------------------------------------------------------------------- */
static inline void copy16_async(void *to, const void *from) { emu::copy_begin(to, from, 16, 16); }
static inline void copy16_part(void *to, const void *from, int n) { emu::copy_begin(to, from, n, 16); }
static inline void copy8_async(void *to, const void *from) { emu::copy_begin(to, from, 8, 8); }
static inline void copy4_async(void *to, const void *from) { emu::copy_begin(to, from, 4, 4); }
static inline void copy_commit() { emu::copy_close(); }
template <int N> static inline void copy_wait() { emu::copy_finish(N); }

/* --- kernels, by name ------------------------------------------------------------------------------------------- */
#define KERNEL(name, type, threads) extern "C" void name(const type a)
#define KERNEL_BLOCKS(name, type, threads, blocks) KERNEL(name, type, threads)
#endif
