/* unpack.cuh -- opens weights of every type; of quantized ones the integer form that cpu/plain/unpack.h has, too.
 *
 * A superblock is opened by units of 8 weights, one for each lane of a warp: unit u has the weights 8 u to 8 u + 7, as
 * two words of four int8_t.  Of each type there is
 *     ID, FAMILY, BYTES  of the list of types; how sums become floats; of a superblock
 *     GRID, book()       words of its code book, or 0, and where it lies in global memory
 *     quants(p, u, grid) unit u of the superblock at p; grid: the code book, in global or shared memory
 *     K and IQ types:    scale(p, g), min(p, g) of the 16 weights g;  d(p), dmin(p)
 *     32-blocks:         block_d(p, b), block_m(p, b) of block b (of NVFP4: of the 16 weights b)
 * p is as aligned as the file has it: to 2 bytes, of MXFP4 to 1.  Nothing is read of 32-blocks that are not asked for.
 */
#ifndef MS4_UNPACK_CUH
#define MS4_UNPACK_CUH
#include "dev.cuh"
#include "grids.cuh"
#ifdef __CUDACC__
#define MEMBER static DEV
#else
#define MEMBER DEV            /* static already */
#endif

/* --- floats: at(row, k) ------------------------------------------------------------------------------------------- */
struct type_f32 { MEMBER float at(const uint8_t *w, int k) { return ((const float *)w)[k]; } };
struct type_f16 { MEMBER float at(const uint8_t *w, int k) { return half_float(((const uint16_t *)w)[k]); } };
struct type_bf16 {
    MEMBER float at(const uint8_t *w, int k) { return __uint_as_float((unsigned)((const uint16_t *)w)[k] << 16); }
};

/* --- bytes from anywhere: by aligned words, none of which lies wholly outside of what was asked for ------------- */
DEV unsigned bytes_4(const uint8_t *p) {
    const uintptr_t at = (uintptr_t)p;
    const unsigned low = *(const unsigned *)(at & ~(uintptr_t)3), high = *(const unsigned *)((at + 3) & ~(uintptr_t)3);
    return __funnelshift_r(low, high, (unsigned)(at & 3) * 8);
}
DEV uint2 bytes_8(const uint8_t *p) {
    const uintptr_t at = (uintptr_t)p;
    const unsigned *w = (const unsigned *)(at & ~(uintptr_t)3);
    const unsigned middle = w[1], last = *(const unsigned *)((at + 7) & ~(uintptr_t)3), shift = (unsigned)(at & 3) * 8;
    return uint2{ __funnelshift_r(w[0], middle, shift), __funnelshift_r(middle, last, shift) };
}
DEV unsigned half_at(const uint8_t *p) { return *(const uint16_t *)p; }
DEV float float_half_at(const uint8_t *p) { return half_float(half_at(p)); }

/* --- four bytes in a word --------------------------------------------------------------------------------------- */
DEV uint2 shifted(uint2 v, int right, unsigned mask) { return uint2{ v.x >> right & mask, v.y >> right & mask }; }
/* Bits 0 to 3 of v, as the lowest bits of four bytes. */
DEV unsigned spread(unsigned v) { return (v & 15) * 0x00204081u & 0x01010101u; }
DEV uint2 spread_8(unsigned v) { return uint2{ spread(v), spread(v >> 4) }; }
/* Bytes of at most 127, each less the byte of `bias`: no borrow reaches the next. */
DEV unsigned less(unsigned v, unsigned bias) { return ((v | 0x80808080u) - bias) ^ 0x80808080u; }
DEV uint2 less_8(uint2 v, unsigned bias) { return uint2{ less(v.x, bias), less(v.y, bias) }; }
/* Bytes of 1 to 127, negated where the bit of `negative` is set. */
DEV unsigned signed_bytes(unsigned v, unsigned negative) {
    const unsigned one = spread(negative);
    return (v ^ one * 255u) + one;
}
/* Seven sign bits; the eighth makes their number even. */
DEV unsigned sign_7(unsigned v) { return v | ((unsigned)__popc(v) & 1) << 7; }
/* table[n] for the nibbles n in the low halves of four bytes; the table's 16 bytes are four words. */
struct nibble_table { unsigned a, b, c, d; };
DEV unsigned look_up(nibble_table t, unsigned nibbles) {
    unsigned index = nibbles | nibbles >> 4;
    index = (index & 0xff) | (index >> 8 & 0xff00);
    const unsigned low = __byte_perm(t.a, t.b, index & 0x7777u), high = __byte_perm(t.c, t.d, index & 0x7777u);
    return __byte_perm(low, high, (index >> 1 & 0x4444u) | 0x3210u);
}
DEV nibble_table table_kv() { return { 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u }; }
DEV nibble_table table_e2m1() { return { 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu }; }
DEV uint2 look_up_8(nibble_table t, uint2 nibbles) { return uint2{ look_up(t, nibbles.x), look_up(t, nibbles.y) }; }

/* Scales are in the lowest 4 or 6 bits of a word that was put together by shifts. */
DEV int twice_plus_1(unsigned v) { return (int)(2 * v + 1); }

/* --- 32-blocks: unit u is part u % 4 of block u / 4 ------------------------------------------------------------- */
/* The nibbles of 32 weights in 16 bytes: low ones first. */
DEV uint2 nibbles_of_32(const uint8_t *qs, int part) {
    return shifted(bytes_8(qs + (part & 1) * 8), (part & 2) * 2, 0x0f0f0f0fu);
}
DEV uint2 with_fifth_bit(uint2 v, unsigned bits) {
    const uint2 high = spread_8(bits);
    return uint2{ v.x | high.x << 4, v.y | high.y << 4 };
}
#define BLOCK_TYPE(type) \
    static constexpr int ID = MS4_TYPE_##type; \
    static constexpr enum ms4_family FAMILY = (enum ms4_family)MS4_FAMILY_##type; \
    static constexpr int BYTES = (int)sizeof(block_##type) * SUPERBLOCK / 32, GRID = 0; \
    MEMBER const unsigned *book() { return nullptr; } \
    MEMBER const uint8_t *block(const uint8_t *p, int b) { return p + b * (int)sizeof(block_##type); }
#define HALF_SCALE MEMBER float block_d(const uint8_t *p, int b) { return float_half_at(block(p, b)); }
#define NO_MIN MEMBER float block_m(const uint8_t *, int) { return 0; }
#define HALF_MIN MEMBER float block_m(const uint8_t *p, int b) { return float_half_at(block(p, b) + 2); }
#define QUANTS MEMBER uint2 quants(const uint8_t *p, int u, const unsigned *grid)

struct type_q4_0 {
    BLOCK_TYPE(q4_0) HALF_SCALE NO_MIN
    QUANTS { (void)grid; return less_8(nibbles_of_32(block(p, u / 4) + 2, u % 4), 0x08080808u); }
};
struct type_q4_1 {
    BLOCK_TYPE(q4_1) HALF_SCALE HALF_MIN
    QUANTS { (void)grid; return nibbles_of_32(block(p, u / 4) + 4, u % 4); }
};
struct type_q5_0 {
    BLOCK_TYPE(q5_0) HALF_SCALE NO_MIN
    QUANTS {
        const uint8_t *w = block(p, u / 4);
        (void)grid;
        return less_8(with_fifth_bit(nibbles_of_32(w + 6, u % 4), w[2 + u % 4]), 0x10101010u);
    }
};
struct type_q5_1 {
    BLOCK_TYPE(q5_1) HALF_SCALE HALF_MIN
    QUANTS {
        const uint8_t *w = block(p, u / 4);
        (void)grid;
        return with_fifth_bit(nibbles_of_32(w + 8, u % 4), w[4 + u % 4]);
    }
};
struct type_q8_0 {
    BLOCK_TYPE(q8_0) HALF_SCALE NO_MIN
    QUANTS { (void)grid; return bytes_8(block(p, u / 4) + 2 + u % 4 * 8); }
};
struct type_iq4_nl {
    BLOCK_TYPE(iq4_nl) HALF_SCALE NO_MIN
    QUANTS { (void)grid; return look_up_8(table_kv(), nibbles_of_32(block(p, u / 4) + 2, u % 4)); }
};
struct type_mxfp4 {
    BLOCK_TYPE(mxfp4) NO_MIN
    MEMBER float block_d(const uint8_t *p, int b) {         /* 2^(e - 128): half, as the quants are doubled */
        const unsigned e = *block(p, b);
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    QUANTS { (void)grid; return look_up_8(table_e2m1(), nibbles_of_32(block(p, u / 4) + 1, u % 4)); }
};
struct type_nvfp4 {                                             /* 64 weights a block, a scale for each 16 */
    static constexpr int ID = MS4_TYPE_nvfp4;
    static constexpr enum ms4_family FAMILY = (enum ms4_family)MS4_FAMILY_nvfp4;
    static constexpr int BYTES = (int)sizeof(block_nvfp4) * 4, GRID = 0;
    MEMBER const unsigned *book() { return nullptr; }
    NO_MIN
    MEMBER float block_d(const uint8_t *p, int b) {         /* half of an unsigned E4M3; 0x7f stands for 0 */
        const unsigned s = p[b / 4 * (int)sizeof(block_nvfp4) + b % 4], e = s >> 3 & 15, m = s & 7;
        if (s == 0x7f) return 0;
        return e ? __uint_as_float((e + 119) << 23 | m << 20) : __fmul_rn(__int2float_rn((int)m), 0x1p-10f);
    }
    QUANTS {
        const uint8_t *w = p + u / 8 * (int)sizeof(block_nvfp4) + 4 + u / 2 % 4 * 8;
        (void)grid;
        return look_up_8(table_e2m1(), shifted(bytes_8(w), u % 2 * 4, 0x0f0f0f0fu));
    }
};

/* --- superblocks ------------------------------------------------------------------------------------------------ */
#define SUPER_TYPE(type) TYPE_WITH_GRID(type, 0, nullptr)
#define GRID_TYPE(type, name) TYPE_WITH_GRID(type, (int)(sizeof device_grid_##name / 4), device_grid_##name)
#define TYPE_WITH_GRID(type, grid_words, grid_at) \
    static constexpr int ID = MS4_TYPE_##type; \
    static constexpr enum ms4_family FAMILY = (enum ms4_family)MS4_FAMILY_##type; \
    static constexpr int BYTES = (int)sizeof(block_##type), GRID = grid_words; \
    MEMBER const unsigned *book() { return grid_at; } \
    typedef block_##type layout;
#define AT(field) (p + offsetof(layout, field))
#define SCALE_D(factor) MEMBER float d(const uint8_t *p) { return __fmul_rn(float_half_at(AT(d)), factor); }
#define PLAIN_D MEMBER float d(const uint8_t *p) { return float_half_at(AT(d)); }
#define PLAIN_DMIN MEMBER float dmin(const uint8_t *p) { return float_half_at(AT(dmin)); }
#define NO_MINS \
    MEMBER float dmin(const uint8_t *) { return 0; } \
    MEMBER int min(const uint8_t *, int) { return 0; }
#define SCALE MEMBER int scale(const uint8_t *p, int g)
#define MIN MEMBER int min(const uint8_t *p, int g)

struct type_q2_k {
    SUPER_TYPE(q2_k) PLAIN_D PLAIN_DMIN
    SCALE { return *(AT(scales) + g) & 15; }
    MIN { return *(AT(scales) + g) >> 4; }
    QUANTS {
        (void)grid;
        return shifted(bytes_8(AT(qs) + u / 16 * 32 + u % 4 * 8), u / 4 % 4 * 2, 0x03030303u);
    }
};
struct type_q3_k {
    SUPER_TYPE(q3_k) PLAIN_D NO_MINS
    SCALE {
        const uint8_t *s = AT(scales);
        const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
        return (low | high << 4) - 32;
    }
    QUANTS {
        const uint2 low = shifted(bytes_8(AT(qs) + u / 16 * 32 + u % 4 * 8), u / 4 % 4 * 2, 0x03030303u);
        const uint2 high = shifted(bytes_8(AT(hmask) + u % 4 * 8), u / 4, 0x01010101u);
        (void)grid;
        return less_8(uint2{ low.x | high.x << 2, low.y | high.y << 2 }, 0x04040404u);
    }
};
/* 6-bit scales and mins of Q4_K and Q5_K: q4_k_scale_min() without branches. */
DEV int scale_of_12(const uint8_t *s, int b) {
    const int high = b / 4;
    return high ? (s[b + 4] & 15) | s[b - 4] >> 6 << 4 : s[b] & 63;
}
DEV int min_of_12(const uint8_t *s, int b) {
    const int high = b / 4;
    return high ? s[b + 4] >> 4 | s[b] >> 6 << 4 : s[b + 4] & 63;
}
struct type_q4_k {
    SUPER_TYPE(q4_k) PLAIN_D PLAIN_DMIN
    SCALE { return scale_of_12(AT(scales), g / 2); }
    MIN { return min_of_12(AT(scales), g / 2); }
    QUANTS { (void)grid; return shifted(bytes_8(AT(qs) + u / 8 * 32 + u % 4 * 8), u / 4 % 2 * 4, 0x0f0f0f0fu); }
};
struct type_q5_k {
    SUPER_TYPE(q5_k) PLAIN_D PLAIN_DMIN
    SCALE { return scale_of_12(AT(scales), g / 2); }
    MIN { return min_of_12(AT(scales), g / 2); }
    QUANTS {
        const uint2 low = shifted(bytes_8(AT(qs) + u / 8 * 32 + u % 4 * 8), u / 4 % 2 * 4, 0x0f0f0f0fu);
        const uint2 high = shifted(bytes_8(AT(qh) + u % 4 * 8), u / 4, 0x01010101u);
        (void)grid;
        return uint2{ low.x | high.x << 4, low.y | high.y << 4 };
    }
};
struct type_q6_k {
    SUPER_TYPE(q6_k) PLAIN_D NO_MINS
    SCALE { return (int8_t)*(AT(scales) + g); }
    QUANTS {
        const int j = u / 4 % 4;
        const uint2 low = shifted(bytes_8(AT(ql) + u / 16 * 64 + j % 2 * 32 + u % 4 * 8), j / 2 * 4, 0x0f0f0f0fu);
        const uint2 high = shifted(bytes_8(AT(qh) + u / 16 * 32 + u % 4 * 8), j * 2, 0x03030303u);
        (void)grid;
        return less_8(uint2{ low.x | high.x << 4, low.y | high.y << 4 }, 0x20202020u);
    }
};
struct type_iq4_xs {
    SUPER_TYPE(iq4_xs) PLAIN_D NO_MINS
    SCALE {
        const int b = g / 2, low = *(AT(scales_l) + b / 2) >> (b % 2 * 4) & 15;
        return (low | (int)(half_at(AT(scales_h)) >> (b * 2) & 3) << 4) - 32;
    }
    QUANTS { (void)grid; return look_up_8(table_kv(), nibbles_of_32(AT(qs) + u / 4 * 16, u % 4)); }
};

/* --- code books: rows of 8 or 4 magnitudes ---------------------------------------------------------------------- */
DEV uint2 grid_row_8(const unsigned *grid, unsigned index, unsigned negative) {
    const uint2 v = *(const uint2 *)(grid + 2 * index);
    return uint2{ signed_bytes(v.x, negative), signed_bytes(v.y, negative >> 4) };
}
DEV uint2 grid_rows_4(const unsigned *grid, unsigned first, unsigned second, unsigned negative) {
    return uint2{ signed_bytes(grid[first], negative), signed_bytes(grid[second], negative >> 4) };
}
#define NIBBLE_SCALES SCALE { return twice_plus_1(*(AT(scales) + g / 2) >> (g % 2 * 4) & 15u); }
struct type_iq2_xxs {
    GRID_TYPE(iq2_xxs, iq2xxs) SCALE_D(0.125f) NO_MINS
    MEMBER unsigned bits(const uint8_t *p, int k) { return bytes_4(AT(qs) + k * 8 + 4); }
    SCALE { return twice_plus_1(bits(p, g / 2) >> 28); }
    QUANTS {
        return grid_row_8(grid, *(AT(qs) + u / 4 * 8 + u % 4), sign_7(bits(p, u / 4) >> (7 * (u % 4)) & 127));
    }
};
struct type_iq2_xs {
    GRID_TYPE(iq2_xs, iq2xs) SCALE_D(0.125f) NO_MINS NIBBLE_SCALES
    QUANTS {
        const unsigned v = half_at(AT(qs) + u * 2);
        return grid_row_8(grid, v & 511, sign_7(v >> 9));
    }
};
struct type_iq2_s {
    GRID_TYPE(iq2_s, iq2s) SCALE_D(0.125f) NO_MINS NIBBLE_SCALES
    QUANTS {
        const unsigned index = *(AT(qs) + u) | (*(AT(qh) + u / 4) >> (u % 4 * 2) & 3u) << 8;
        return grid_row_8(grid, index, *(AT(signs) + u));
    }
};
struct type_iq3_xxs {
    GRID_TYPE(iq3_xxs, iq3xxs) SCALE_D(0.25f) NO_MINS
    MEMBER unsigned bits(const uint8_t *p, int k) { return bytes_4(AT(w) + k * 4); }
    SCALE { return twice_plus_1(bits(p, g / 2) >> 28); }
    QUANTS {
        const uint8_t *index = AT(qs) + u * 2;
        return grid_rows_4(grid, index[0], index[1], sign_7(bits(p, u / 4) >> (7 * (u % 4)) & 127));
    }
};
struct type_iq3_s {
    GRID_TYPE(iq3_s, iq3s) PLAIN_D NO_MINS
    SCALE { return twice_plus_1(*(AT(scales) + g / 4) >> (g / 2 % 2 * 4) & 15u); }
    QUANTS {
        const uint8_t *index = AT(qs) + u * 2;
        const unsigned high = (unsigned)*(AT(qh) + u / 4) << 8 >> (u % 4 * 2);         /* bits 8 and 9 */
        return grid_rows_4(grid, index[0] | (high & 256), index[1] | (high >> 1 & 256), *(AT(signs) + u));
    }
};
/* IQ1: q = 8 * (-1, 0 or 1) + delta, delta 1 or -1.  The code book has 2 bits for each of a row's 8 weights: 1 more
 * than it is; two rows a word. */
DEV unsigned two_bits(unsigned v) {                             /* of 8 bits, to four bytes */
    v = (v | v << 12) & 0x000f000fu;
    return (v | v << 6) & 0x03030303u;
}
DEV uint2 grid_row_iq1(const unsigned *grid, unsigned index, bool minus) {
    const unsigned row = grid[index / 2] >> (index % 2 * 16), delta = minus ? 0x09090909u : 0x07070707u;
    return uint2{ less(two_bits(row & 255) * 8, delta), less(two_bits(row >> 8 & 255) * 8, delta) };
}
struct type_iq1_s {
    GRID_TYPE(iq1_s, iq1) SCALE_D(0.125f) NO_MINS
    SCALE { return twice_plus_1(half_at(AT(qh) + g / 2 * 2) >> 12 & 7); }
    QUANTS {
        const unsigned h = half_at(AT(qh) + u / 4 * 2);
        return grid_row_iq1(grid, *(AT(qs) + u) | (h >> (3 * (u % 4)) & 7) << 8, h >> 15);
    }
};
struct type_iq1_m {
    GRID_TYPE(iq1_m, iq1) NO_MINS
    MEMBER float d(const uint8_t *p) {                      /* the highest nibbles of four halves */
        const uint8_t *s = AT(scales);
        const unsigned h = s[1] >> 4 | (s[3] & 0xf0u) | (s[5] & 0xf0u) << 4 | (s[7] & 0xf0u) << 8;
        return __fmul_rn(half_float(h), 0.125f);
    }
    SCALE { return twice_plus_1(half_at(AT(scales) + g / 4 * 2) >> (g % 4 * 3) & 7); }
    QUANTS {
        const unsigned bits = *(AT(qh) + u / 2) >> (u % 2 * 4) & 15u;
        return grid_row_iq1(grid, *(AT(qs) + u) | (bits & 7) << 8, bits & 8);
    }
};
#undef AT

/* How the sums of a type become a float: is_blocks, has_min and scale_width (quant.h), as constants. */
template <class T> struct form {
    static constexpr bool BLOCKS = T::FAMILY >= FAMILY_blocks;
    static constexpr bool MINS =
        T::FAMILY == FAMILY_mins_16 || T::FAMILY == FAMILY_mins_32 || T::FAMILY == FAMILY_blocks_min;
    static constexpr int WIDTH =
        T::FAMILY == FAMILY_scales_16 || T::FAMILY == FAMILY_mins_16 || T::FAMILY == FAMILY_blocks_16 ? 16 : 32;
};
#endif
