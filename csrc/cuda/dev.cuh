/* dev.cuh -- what differs between nvcc and the emulation (tests/cuda/emulate.h), and small functions for all kernels.
 *
 * Every float operation of a kernel is spelled as an intrinsic that rounds once (__fmaf_rn, __fmul_rn, __fadd_rn,
 * __fsub_rn, __fdiv_rn, __fsqrt_rn), in the order of ops.h: compilers contract what is written with operators.  No CUDA
 * header is included, so that NVRTC needs none.
 *
 * KERNEL(name, type of its argument, most threads of a block): the head of a kernel; its argument is `a`.
 * KERNEL_BLOCKS: likewise, and so many blocks are to fit one multiprocessor (fewer registers).
 * SMEM(name): the dynamic shared memory of the launch, as bytes, 128-byte aligned; the host says how much.
 * SHARED(type, name, count): an array in shared memory, of a fixed size; not inside loops or branches.
 */
#ifndef MS4_DEV_CUH
#define MS4_DEV_CUH
#ifdef __CUDACC__
#define _Static_assert static_assert
#define DEV __device__ __forceinline__
#define KERNEL(name, type, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ type a)
#define KERNEL_BLOCKS(name, type, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ type a)
extern __shared__ __align__(128) char dynamic_shared[];
#define SMEM(name) char *const name = dynamic_shared
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#include "kernels.h"

DEV float half_float(unsigned h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)h));
    return f;
}
/* Weights: read once, by way of the read-only path, and not kept in L1. */
DEV unsigned load4(const void *p) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEV uint2 load8(const void *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEV uint4 load16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
/* Products of four bytes; dp2a: of two halves with the two low bytes of b. */
DEV int dp2a_ss(int a, int b, int c) { return __dp2a_lo(a, b, c); }
DEV int dp4a_ss(int a, int b, int c) { return __dp4a(a, b, c); }
DEV int dp4a_us(unsigned a, int b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
/* c (16 x 8) += a (16 x 32 bytes) b (32 x 8 bytes); signed or not.  Fragments: PTX ISA, "mma.m16n8k32". */
template <bool A_SIGNED, bool B_SIGNED> DEV void mma_k32(int *c, const unsigned *a, const unsigned *b) {
#define MMA(of_a, of_b) \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." of_a "." of_b ".s32 " \
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (A_SIGNED && B_SIGNED) MMA("s8", "s8");
    else if (A_SIGNED) MMA("s8", "u8");
    else if (B_SIGNED) MMA("u8", "s8");
    else MMA("u8", "u8");
#undef MMA
}
/* c = a b: the addend is the zero register */
template <bool A_SIGNED, bool B_SIGNED> DEV void mma_k32_first(int *c, const unsigned *a, const unsigned *b) {
#define MMA(of_a, of_b) \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." of_a "." of_b ".s32 " \
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};" \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0))
    if (A_SIGNED && B_SIGNED) MMA("s8", "s8");
    else if (A_SIGNED) MMA("s8", "u8");
    else if (B_SIGNED) MMA("u8", "s8");
    else MMA("u8", "u8");
#undef MMA
}
/* The same with 16 columns of a: two words of a, one of b. */
template <bool A_SIGNED, bool B_SIGNED> DEV void mma_k16(int *c, const unsigned *a, unsigned b) {
#define MMA(of_a, of_b) \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." of_a "." of_b ".s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b))
    if (A_SIGNED && B_SIGNED) MMA("s8", "s8");
    else if (A_SIGNED) MMA("s8", "u8");
    else if (B_SIGNED) MMA("u8", "s8");
    else MMA("u8", "u8");
#undef MMA
}
template <bool A_SIGNED, bool B_SIGNED> DEV void mma_k16_first(int *c, const unsigned *a, unsigned b) {
#define MMA(of_a, of_b) \
    asm("mma.sync.aligned.m16n8k16.row.col.s32." of_a "." of_b ".s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};" \
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0))
    if (A_SIGNED && B_SIGNED) MMA("s8", "s8");
    else if (A_SIGNED) MMA("s8", "u8");
    else if (B_SIGNED) MMA("u8", "s8");
    else MMA("u8", "u8");
#undef MMA
}
/* Four 8 x 8 matrices of 16-bit numbers from shared memory; row: where row lane % 8 of matrix lane / 8 begins. */
template <bool TRANSPOSED> DEV void ldmatrix_x4(unsigned *r, const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
/* Copies from device to shared memory that end at copy_wait: what has been begun since the last copy_commit is a group;
 * copy_wait<N> waits for all groups of this thread but the last N.  copy16_part: only the first n bytes, then zeros. */
DEV void copy16_async(void *to, const void *from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}
DEV void copy16_part(void *to, const void *from, int n) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(n) : "memory");
}
DEV void copy8_async(void *to, const void *from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(at), "l"(from) : "memory");
}
DEV void copy4_async(void *to, const void *from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at), "l"(from) : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
/* 1, for the host to see, and before it all that this thread has written or seen written: after a barrier that is what
 * the block has. */
DEV void raise_flag(int32_t *flag) {
    asm volatile("st.release.sys.global.u32 [%0], 1;" :: "l"(flag) : "memory");
}
#else
#include "emulate.h"
#endif

#define ALL 0xffffffffu               /* the lanes of a warp */
#define ROUND_MAGIC 12582912.0f       /* 1.5 * 2^23: adding it rounds a float below 2^22 to the nearest even integer */

/* exp_plain, erf_plain and their users (cpu/plain/plain.h), operation by operation. */
DEV float exp_dev(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    float k = __fmaf_rn(x, 0x1.715476p+0f, ROUND_MAGIC), whole = __fsub_rn(k, ROUND_MAGIC);
    float r = __fmaf_rn(whole, -0x1.62e43p-1f, x);
    r = __fmaf_rn(whole, 0x1.05c61p-29f, r);
    float p = __fmaf_rn(0x1.6a2432p-10f, r, 0x1.1239e4p-7f);
    p = __fmaf_rn(p, r, 0x1.5558f2p-5f);
    p = __fmaf_rn(p, r, 0x1.555492p-3f);
    p = __fmaf_rn(p, r, 0x1.fffffcp-2f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    int n = __float_as_int(k) - 0x4b400000, half = n >> 1;
    float first = __int_as_float((int)((unsigned)(half + 127) << 23));
    float second = __int_as_float((int)((unsigned)(n - half + 127) << 23));
    return __fmul_rn(__fmul_rn(p, first), second);
}
DEV float erf_dev(float x) {
    float t = __int_as_float(__float_as_int(x) & 0x7fffffff), s = __fmul_rn(t, t);
    float p = __fmaf_rn(0x1.4e1556p-14f, s, -0x1.a5b0f8p-11f);
    p = __fmaf_rn(p, s, 0x1.5441d4p-8f);
    p = __fmaf_rn(p, s, -0x1.b8007ap-6f);
    p = __fmaf_rn(p, s, 0x1.ce2d6p-4f);
    p = __fmaf_rn(p, s, -0x1.812740p-2f);
    p = __fmaf_rn(p, s, 0x1.06eba8p-3f);
    float q = __fmaf_rn(0x1.6370b8p-16f, t, -0x1.c8a54p-12f);
    q = __fmaf_rn(q, t, 0x1.11acbap-8f);
    q = __fmaf_rn(q, t, -0x1.9bc356p-6f);
    q = __fmaf_rn(q, t, 0x1.bb97e8p-4f);
    q = __fmaf_rn(q, t, 0x1.4443d2p-1f);
    q = __fmaf_rn(q, t, 0x1.21286ep+0f);
    q = __fmaf_rn(q, t, -0x1.71dae4p-13f);
    float near = __fmaf_rn(p, t, t), far = __fsub_rn(1.0f, exp_dev(-q)), size = t < 0.921875f ? near : far;
    return __int_as_float((__float_as_int(size) & 0x7fffffff) | (__float_as_int(x) & (int)0x80000000));
}
DEV float gelu_dev(float x) {
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, erf_dev(__fmul_rn(x, 0.70710678f))));
}
DEV float silu_mul_dev(float gate, float up) {
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exp_dev(-gate))), up);
}
DEV float gelu_mul_dev(float gate, float up) { return __fmul_rn(gelu_dev(gate), up); }
#endif
