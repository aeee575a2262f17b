/* ptx.h -- what the C++ that ptx2cpp.py makes of PTX is written in: registers are plain variables, one function an
 * instruction.  Shared memory has 32-bit addresses from SHARED_BEGIN on; all other addresses are those of the host. */
#ifndef MS4_PTX_H
#define MS4_PTX_H
#include "launch.h"
#include <type_traits>

namespace ptx {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
const u32 SHARED_BEGIN = 0x1000;

/* The lowest bits of r as a T. */
template <class T, class R> static inline T as(R r) {
    if constexpr (sizeof(T) == sizeof(R)) {
        T t;
        memcpy(&t, &r, sizeof t);
        return t;
    } else return (T)r;
}
/* v into a register that may be wider: by its sign. */
template <class R, class T> static inline void set(R &r, T v) {
    if constexpr (sizeof(T) == sizeof(R)) r = as<R>(v);
    else if constexpr (std::is_signed_v<T>) r = (R)(s64)v;
    else r = (R)v;
}
template <class T> using bits_of = std::make_unsigned_t<T>;

/* --- addresses -------------------------------------------------------------------------------------------------- */
static inline char *at_shared(u32 a) { return emu::at->shared + (s32)(a - SHARED_BEGIN); }
static inline u32 shared_address(const void *p) { return (u32)((const char *)p - emu::at->shared) + SHARED_BEGIN; }
bool own_data(const void *p, size_t n);             /* arrays of the module */
template <class T> static inline void check_global(u64 a, size_t n = sizeof(T)) {
    const void *p = (const void *)a;
    if (a % n) emu::die("an address is not aligned");
    if (emu::accessible && !emu::accessible(p, n) && !emu::in_shared(p, n) && !own_data(p, n) && !emu::in_own(p, n))
        emu::die("touches what is neither memory of the device nor pinned");
}
template <class T> static inline T load_shared(u32 a) {
    T t;
    if (a % sizeof(T) || !emu::in_shared(at_shared(a), sizeof(T))) emu::die("an address beyond shared memory");
    memcpy(&t, at_shared(a), sizeof t);
    return t;
}
template <class T> static inline void store_shared(u32 a, T t) {
    if (a % sizeof(T) || !emu::in_shared(at_shared(a), sizeof(T))) emu::die("an address beyond shared memory");
    memcpy(at_shared(a), &t, sizeof t);
}
template <class T> static inline T load_global(u64 a) {
    T t;
    check_global<T>(a);
    memcpy(&t, (const void *)a, sizeof t);
    return t;
}
template <class T> static inline void store_global(u64 a, T t) {
    check_global<T>(a);
    memcpy((void *)a, &t, sizeof t);
}
template <class T> static inline T load_parameter(const void *p) {
    T t;
    memcpy(&t, p, sizeof t);
    return t;
}

/* --- integers --------------------------------------------------------------------------------------------------- */
template <class T> static inline T add(T a, T b) { return (T)((u64)a + (u64)b); }
template <class T> static inline T sub(T a, T b) { return (T)((u64)a - (u64)b); }
template <class T> static inline T mul_lo(T a, T b) { return (T)((u64)a * (u64)b); }
template <class T> static inline T mul_hi(T a, T b) {
    using wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return (T)((wide)a * (wide)b >> (8 * sizeof(T)));
}
template <class W, class T> static inline W mul_wide(T a, T b) { return (W)((W)a * (W)b); }
template <class T> static inline T shift_left(T a, u32 n) { return n >= 8 * sizeof(T) ? (T)0 : (T)(a << n); }
template <class T> static inline T shift_right(T a, u32 n) {
    return (T)(a >> (n < 8 * sizeof(T) ? n : std::is_signed_v<T> ? 8 * sizeof(T) - 1 : 0)) *
           (T)(n < 8 * sizeof(T) || std::is_signed_v<T>);
}
static inline u32 funnel(bool left, bool wrap, u32 low, u32 high, u32 n) {
    u64 both = (u64)high << 32 | low;
    n = wrap ? n & 31 : n < 32 ? n : 32;
    return left ? (u32)(both << n >> 32) : (u32)(both >> n);
}
template <class T> static inline T extract(T a, u32 from, u32 n) {         /* bfe */
    const u32 width = 8 * sizeof(T);
    T r = 0, sign = 0;
    from &= 255, n &= 255;
    if (std::is_signed_v<T> && n) sign = (T)(a >> std::min(from + n - 1, width - 1) & 1);
    for (u32 i = 0; i < width; i++)
        r |= (T)((bits_of<T>)(i < n && from + i < width ? a >> (from + i) & 1 : sign) << i);
    return r;
}
template <class T> static inline T insert(T a, T b, u32 from, u32 n) {     /* bfi: the lowest n of a into b */
    for (u32 i = 0; i < (n & 255) && (from & 255) + i < 8 * sizeof(T); i++) {
        T bit = (T)((T)1 << ((from & 255) + i));
        b = (T)((b & ~bit) | (a >> i & 1 ? bit : 0));
    }
    return b;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}

/* The highest bit that is set, or by how much to shift it to bit 31. */
static inline u32 find_bit(u32 a, bool shift) {
    return !a ? 0xffffffffu : (u32)(shift ? __clz((s32)a) : 31 - __clz((s32)a));
}

/* c and two products: 16-bit halves of a by the low or the high bytes of b; A, B: s32 or u32, signed or not. */
template <class A, class B, bool HIGH> static inline u32 dp2a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 2; i++) {
        s32 of_a = std::is_signed_v<A> ? (s32)(s16)(a >> 16 * i) : (s32)(u16)(a >> 16 * i);
        u32 byte = b >> 8 * (i + (HIGH ? 2 : 0)) & 255;
        c += (u32)(of_a * (std::is_signed_v<B> ? (s32)(s8)byte : (s32)byte));
    }
    return c;
}

/* --- floats ----------------------------------------------------------------------------------------------------- */
static inline f32 least(f32 a, f32 b) { return fminf(a, b); }
static inline f32 largest(f32 a, f32 b) { return fmaxf(a, b); }
template <class T> static inline T least(T a, T b) { return a < b ? a : b; }
template <class T> static inline T largest(T a, T b) { return a > b ? a : b; }
static inline f32 least_or_nan(f32 a, f32 b) { return a != a ? a : b != b ? b : fminf(a, b); }
static inline f32 largest_or_nan(f32 a, f32 b) { return a != a ? a : b != b ? b : fmaxf(a, b); }
template <class T> static inline T to_int(f32 a) {                         /* a is whole; saturates, NaN gives 0 */
    if (a != a) return 0;
    const double low = (double)std::numeric_limits<T>::min(), high = (double)std::numeric_limits<T>::max();
    return (double)a <= low ? std::numeric_limits<T>::min() : (double)a >= high ? std::numeric_limits<T>::max() : (T)a;
}

/* --- a warp ----------------------------------------------------------------------------------------------------- */
enum shuffle_by { IDX, BFLY, UP, DOWN };
/* PTX ISA, shfl.sync: c has the clamp in its bits 0 to 4, the mask of the segment in 8 to 12. */
static inline u32 shuffle(shuffle_by how, u32 v, u32 b, u32 c, u32 mask, bool *inside) {
    int lane = emu::lane(), segment = (int)(c >> 8 & 31), clamp = (int)(c & 31), by = (int)(b & 31);
    int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment, from = lane;
    if (how == UP) from = lane - by, *inside = from >= highest;
    else if (how == DOWN) from = lane + by, *inside = from <= highest;
    else if (how == BFLY) from = lane ^ by, *inside = from <= highest;
    else from = lowest | (by & ~segment), *inside = from <= highest;
    if (!*inside) from = lane;
    return emu::shown_by<u32>(emu::show(mask, v), from);
}
template <bool TRANSPOSED, int N> static inline void ldmatrix(u32 *r, u32 address) {
    u32 all[4];
    ldmatrix_x4<TRANSPOSED>(all, at_shared(address));       /* lanes of matrices beyond N bring addresses, too */
    for (int i = 0; i < N; i++) r[i] = all[i];
}
}
#endif
