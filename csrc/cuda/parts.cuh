/* parts.cuh -- opens superblocks by parts of 32 weights, 8 lanes a superblock, for rows that lie in shared memory as
 * they lie in the file: what mul_staged.cuh needs, faster than by the units of unpack.cuh for types that have a way.
 *
 * Part j of a superblock is two times 16 weights: x_at(j, h) says where half h begins, and so which scale it has;
 * x_piece(x, j, h) is the same of the activations x, in the order of the opened words.  With SCALES 4 a part is four
 * times 8 weights, and x_at goes for mins alone.
 * For 32-blocks a part is block j (of NVFP4 two blocks).  BIAS: opened quants are larger by so much than they are.
 */
#ifndef MS4_PARTS_CUH
#define MS4_PARTS_CUH
#include "unpack.cuh"

struct part {
    unsigned q[8];                  /* four words of each half */
    int scale[4];                   /* K and IQ types: of either half, or of 8 weights each */
    unsigned mins;                  /* likewise, in two bytes */
    float d[2], m;                  /* 32-blocks: the scale (of NVFP4 of either half), and the min */
};
/* What types look up: a code book, and a table of nibbles.  The compiler must not know that `zero` is 0: it makes
 * constants anew wherever they are used, and sums it keeps. */
struct tables { const unsigned *grid; nibble_table of_nibbles; };
DEV tables tables_of(int id, const unsigned *grid, unsigned zero) {
    const nibble_table t = id == MS4_TYPE_mxfp4 || id == MS4_TYPE_nvfp4 ? table_e2m1() : table_kv();
    return { grid, { t.a + zero, t.b + zero, t.c + zero, t.d + zero } };
}

#define X_ORDER(at) \
    MEMBER int x_at(int j, int h) { return at; } \
    MEMBER uint4 x_piece(const int8_t *x, int j, int h) { return *(const uint4 *)(x + x_at(j, h)); }
struct natural_order { X_ORDER(32 * j + 16 * h) };

/* Any type: its units 4 j to 4 j + 3. */
template <class T> struct parts : natural_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &look) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 q = T::quants(p, 4 * j + i, look.grid);
            o.q[2 * i] = q.x;
            o.q[2 * i + 1] = q.y;
        }
        if constexpr (form<T>::BLOCKS) {
            constexpr int EACH = 32 / form<T>::WIDTH;
            for (int i = 0; i < EACH; i++) o.d[i] = T::block_d(p, EACH * j + i);
            o.m = T::block_m(p, j);
        } else {
            o.scale[0] = T::scale(p, 2 * j), o.scale[1] = T::scale(p, 2 * j + 1);
            if (form<T>::MINS) o.mins = (unsigned)(T::min(p, 2 * j) | T::min(p, 2 * j + 1) << 8);
        }
    }
};

/* --- words -------------------------------------------------------------------------------------------------------- */
/* N words from anywhere, which may read the word behind them. */
template <int N> DEV void words_at(unsigned *out, const uint8_t *p) {
    const unsigned shift = (unsigned)((uintptr_t)p & 3) * 8, *w = (const unsigned *)(p - ((uintptr_t)p & 3));
    unsigned word = w[0];
#pragma unroll
    for (int k = 0; k < N; k++) {
        const unsigned next = w[k + 1];
        out[k] = __funnelshift_r(word, next, shift);
        word = next;
    }
}
/* Nibbles of 16 bytes: the low ones first. */
DEV void split_nibbles(unsigned *q, const unsigned *w) {
#pragma unroll
    for (int k = 0; k < 4; k++) q[k] = w[k] & 0x0f0f0f0fu, q[4 + k] = w[k] >> 4 & 0x0f0f0f0fu;
}
/* Eight nibbles looked up, as they lie: low, high of each byte. */
DEV void look_up_8(unsigned *q, unsigned w, nibble_table t) {
    const unsigned index = w & 0x77777777u, half = (w >> 1 & 0x44444444u) | 0x32103210u;    /* half: of the table */
    q[0] = __byte_perm(__byte_perm(t.a, t.b, index), __byte_perm(t.c, t.d, index), half);
    const unsigned next = index >> 16, next_half = half >> 16;
    q[1] = __byte_perm(__byte_perm(t.a, t.b, next), __byte_perm(t.c, t.d, next), next_half);
}
DEV void look_up_32(unsigned *q, const unsigned *w, nibble_table t) {
#pragma unroll
    for (int k = 0; k < 4; k++) look_up_8(q + 2 * k, w[k], t);
}
/* So nibbles of 16 bytes mix weights 0 to 15 with 16 to 31, which have the same scale (of 8 bytes 0 to 7, 8 to 15). */
DEV uint4 mixed(unsigned a, unsigned b, unsigned other_a, unsigned other_b) {
    return uint4{ __byte_perm(a, other_a, 0x5140), __byte_perm(a, other_a, 0x7362), __byte_perm(b, other_b, 0x5140),
                  __byte_perm(b, other_b, 0x7362) };
}
struct mixed_order {
    MEMBER int x_at(int j, int h) { return 32 * j + 16 * h; }
    MEMBER uint4 x_piece(const int8_t *x, int j, int h) {
        const uint2 v = *(const uint2 *)(x + 32 * j + 8 * h), other = *(const uint2 *)(x + 32 * j + 16 + 8 * h);
        return mixed(v.x, v.y, other.x, other.y);
    }
};

/* --- K types: 16 bytes have the nibbles of 16 weights of a block and of as many of the next ----------------------- */
struct nibble_order { X_ORDER((j >> 1) * 64 + (j & 1) * 16 + 32 * h) };
/* head: d, dmin and the 12 bytes of scales and mins; of blocks j / 2 * 2 and the next. */
DEV void scales_mins(part &o, uint4 head, int j) {
    const bool late = j >= 4;       /* blocks 4 to 7: theirs are in two pieces */
    const unsigned mask = late ? 0x0f0f0f0fu : 0x3f3f3f3fu, top = late ? 0x30303030u : 0u, at = (unsigned)(j & 2);
    const unsigned scales = ((late ? head.w : head.y) & mask) | (head.y >> 2 & top);
    const unsigned mins = ((late ? head.w >> 4 : head.z) & mask) | (head.z >> 2 & top);
    o.scale[0] = (int)__byte_perm(scales, 0, 0x4440u + at);
    o.scale[1] = (int)__byte_perm(scales, 0, 0x4441u + at);
    o.mins = mins >> 8 * at;
}
template <> struct parts<type_q4_k> : nibble_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        const uint4 q = *(const uint4 *)(p + 16 + 16 * j);
        const unsigned w[4] = { q.x, q.y, q.z, q.w };
        scales_mins(o, *(const uint4 *)p, j);
        split_nibbles(o.q, w);
    }
};
template <> struct parts<type_q5_k> : nibble_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        const uint4 q = *(const uint4 *)(p + 48 + 16 * j), h = *(const uint4 *)(p + 16 + 16 * (j & 1));
        const unsigned w[4] = { q.x, q.y, q.z, q.w }, fifth[4] = { h.x, h.y, h.z, h.w };
        scales_mins(o, *(const uint4 *)p, j);
        split_nibbles(o.q, w);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const unsigned up = (unsigned)(4 - (j & 6)) & 31;   /* to bit 4, round the word */
            o.q[k] |= __funnelshift_l(fifth[k], fifth[k], up) & 0x10101010u;
            o.q[4 + k] |= __funnelshift_l(fifth[k], fifth[k], (up - 1) & 31) & 0x10101010u;
        }
    }
};
template <> struct parts<type_q6_k> {
    static constexpr int BIAS = 32, SCALES = 2;
    X_ORDER((j >> 2) * 128 + (j >> 1 & 1) * 32 + (j & 1) * 16 + 64 * h)
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        unsigned low[4], high[4];
        words_at<4>(low, p + 16 * j);
        words_at<4>(high, p + 128 + (j >> 2) * 32 + (j & 1) * 16);
        split_nibbles(o.q, low);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const unsigned bits = high[k] >> (j & 2);           /* for the low nibble bits 0 and 1, else 4 and 5 */
            o.q[k] |= bits << 4 & 0x30303030u;
            o.q[4 + k] |= bits & 0x30303030u;
        }
        const uint8_t *scales = p + 192 + (j >> 2) * 8 + (j & 3);
        o.scale[0] = (int8_t)scales[0], o.scale[1] = (int8_t)scales[4];
    }
};

/* --- Q2_K, Q3_K: 8 bytes have 2 bits of four times 8 weights, 32 weights apart ------------------------------------ */
struct crumb_order {
    static constexpr int BIAS = 0, SCALES = 4;
    MEMBER int x_at(int j, int h) { return 32 * j + 16 * h; }
    MEMBER uint4 x_piece(const int8_t *x, int j, int h) {
        const int8_t *at = x + (j >> 2) * 128 + h * 64 + (j & 3) * 8;
        const uint2 a = *(const uint2 *)at, b = *(const uint2 *)(at + 32);
        return uint4{ a.x, a.y, b.x, b.y };
    }
};
template <> struct parts<type_q2_k> : crumb_order {
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        const unsigned *w = (const unsigned *)(p + 16 + 8 * j), *scales = (const unsigned *)(p + (j >> 2) * 8);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            o.q[2 * s] = w[0] >> 2 * s & 0x03030303u;
            o.q[2 * s + 1] = w[1] >> 2 * s & 0x03030303u;
            o.scale[s] = (int)(scales[s / 2] >> (s % 2 * 16 + (j & 2) * 4) & 15);
        }
        o.mins = half_at(p + 2 * j) >> 4 & 0x0f0f;
    }
};
template <> struct parts<type_q3_k> : crumb_order {
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        const int upper = (j >> 2) * 4;                         /* bits of the upper half of the superblock */
        unsigned w[2], high[2], scales[3];
        words_at<2>(w, p + 32 + 8 * j);
        words_at<2>(high, p + 8 * (j & 3));
        words_at<3>(scales, p + 96);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const unsigned bits = scales[2] >> (upper + s / 2 * 2) & 0x03030303u;
            const unsigned six = (scales[s / 2] >> upper & 0x0f0f0f0fu) | bits << 4;
            o.scale[s] = (int)(six >> (s % 2 * 16 + (j & 2) * 4) & 63) - 32;
#pragma unroll
            for (int k = 0; k < 2; k++) {       /* without the high bit less 4: with all bits above the two */
                const unsigned none = ~(high[k] >> (upper + s)) & 0x01010101u;
                o.q[2 * s + k] = (w[k] >> 2 * s & 0x03030303u) | none * 0xfc;
            }
        }
    }
};

/* --- blocks of 32 ------------------------------------------------------------------------------------------------- */
template <> struct parts<type_iq4_xs> : mixed_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &look) {
        const uint2 a = *(const uint2 *)(p + 8 + 16 * j), b = *(const uint2 *)(p + 16 + 16 * j);
        const unsigned w[4] = { a.x, a.y, b.x, b.y };
        look_up_32(o.q, w, look.of_nibbles);
        const uint2 head = *(const uint2 *)p;
        const unsigned low = head.y >> 4 * j & 15, high = head.x >> (16 + 2 * j) & 3;
        o.scale[0] = o.scale[1] = (int)(low | high << 4) - 32;
    }
};
template <> struct parts<type_q8_0> : natural_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        words_at<8>(o.q, p + 34 * j + 2);
        o.d[0] = type_q8_0::block_d(p, j);
    }
};
template <> struct parts<type_q4_0> : natural_order {
    static constexpr int BIAS = 8, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        unsigned w[4];
        words_at<4>(w, p + 18 * j + 2);
        split_nibbles(o.q, w);
        o.d[0] = type_q4_0::block_d(p, j);
    }
};
template <> struct parts<type_q4_1> : natural_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &) {
        split_nibbles(o.q, (const unsigned *)(p + 20 * j + 4));
        o.d[0] = type_q4_1::block_d(p, j);
        o.m = type_q4_1::block_m(p, j);
    }
};
template <> struct parts<type_iq4_nl> : mixed_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &look) {
        unsigned w[4];
        words_at<4>(w, p + 18 * j + 2);
        look_up_32(o.q, w, look.of_nibbles);
        o.d[0] = type_iq4_nl::block_d(p, j);
    }
};
template <> struct parts<type_mxfp4> : mixed_order {
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &look) {
        unsigned w[4];
        words_at<4>(w, p + 17 * j + 1);
        look_up_32(o.q, w, look.of_nibbles);
        o.d[0] = type_mxfp4::block_d(p, j);
    }
};
template <> struct parts<type_nvfp4> {
    MEMBER int x_at(int j, int h) { return 32 * j + 16 * h; }
    MEMBER uint4 x_piece(const int8_t *x, int j, int h) {
        const uint4 v = *(const uint4 *)(x + x_at(j, h));
        return mixed(v.x, v.y, v.z, v.w);
    }
    static constexpr int BIAS = 0, SCALES = 2;
    MEMBER void open(part &o, const uint8_t *p, int j, const tables &look) {
        const unsigned *w = (const unsigned *)(p + j / 2 * 36 + 4 + j % 2 * 16);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            for (int k = 0; k < 2; k++) look_up_8(o.q + 4 * h + 2 * k, w[2 * h + k], look.of_nibbles);
            o.d[h] = type_nvfp4::block_d(p, 2 * j + h);
        }
    }
};
#endif
