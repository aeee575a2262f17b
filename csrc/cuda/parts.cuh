/* parts.cuh -- opens superblocks by parts of 32 weights, 8 lanes a superblock, for rows that lie in shared memory as
 * they lie in the file: what mul_staged.cuh needs, faster than by the units of unpack.cuh for types that have a way.
 *
 * Part j of a superblock is two times 16 weights: x_at(j, h) says where half h begins, and so which scale it has.
 * For 32-blocks a part is block j (of NVFP4 two blocks).  BIAS: opened quants are larger by so much than they are.
 */
#ifndef MS4_PARTS_CUH
#define MS4_PARTS_CUH
#include "unpack.cuh"

struct part {
    unsigned q[8];                  /* four words of each half */
    int scale[2];                   /* K and IQ types: of either half */
    unsigned mins;                  /* likewise, in two bytes */
    float d[2], m;                  /* 32-blocks: the scale (of NVFP4 of either half), and the min */
};
/* Any type: its units 4 j to 4 j + 3. */
template <class T> struct parts {
    static constexpr int BIAS = 0;
    MEMBER int x_at(int j, int h) { return 32 * j + 16 * h; }
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *grid) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 q = T::quants(p, 4 * j + i, grid);
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
struct natural_order { MEMBER int x_at(int j, int h) { return 32 * j + 16 * h; } };

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
/* Four nibbles side by side, looked up. */
DEV unsigned look_up_4(nibble_table t, unsigned nibbles) {
    const unsigned low = __byte_perm(t.a, t.b, nibbles & 0x7777u), high = __byte_perm(t.c, t.d, nibbles & 0x7777u);
    return __byte_perm(low, high, (nibbles >> 1 & 0x4444u) | 0x3210u);
}
/* The same as split_nibbles, looked up. */
DEV void split_look_up(unsigned *low, unsigned *high, unsigned w, nibble_table t) {
    const unsigned first = look_up_4(t, w & 0xffff), second = look_up_4(t, w >> 16);
    *low = __byte_perm(first, second, 0x6420);
    *high = __byte_perm(first, second, 0x7531);
}
DEV void split_table(unsigned *q, const unsigned *w, nibble_table t) {
#pragma unroll
    for (int k = 0; k < 4; k++) split_look_up(q + k, q + 4 + k, w[k], t);
}

/* --- K types: 16 bytes have the nibbles of 16 weights of a block and of as many of the next ----------------------- */
struct nibble_order { MEMBER int x_at(int j, int h) { return (j >> 1) * 64 + (j & 1) * 16 + 32 * h; } };
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
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        const uint4 q = *(const uint4 *)(p + 16 + 16 * j);
        const unsigned w[4] = { q.x, q.y, q.z, q.w };
        scales_mins(o, *(const uint4 *)p, j);
        split_nibbles(o.q, w);
    }
};
template <> struct parts<type_q5_k> : nibble_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        const uint4 q = *(const uint4 *)(p + 48 + 16 * j), h = *(const uint4 *)(p + 16 + 16 * (j & 1));
        const unsigned w[4] = { q.x, q.y, q.z, q.w }, fifth[4] = { h.x, h.y, h.z, h.w };
        scales_mins(o, *(const uint4 *)p, j);
        split_nibbles(o.q, w);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const unsigned bits = fifth[k] >> (j & 6);          /* of this block and the next: bits 0 and 1 */
            o.q[k] |= bits << 4 & 0x10101010u;
            o.q[4 + k] |= bits << 3 & 0x10101010u;
        }
    }
};
template <> struct parts<type_q6_k> {
    static constexpr int BIAS = 32;
    MEMBER int x_at(int j, int h) { return (j >> 2) * 128 + (j >> 1 & 1) * 32 + (j & 1) * 16 + 64 * h; }
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
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

/* --- blocks of 32 ------------------------------------------------------------------------------------------------- */
template <> struct parts<type_iq4_xs> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        const uint2 a = *(const uint2 *)(p + 8 + 16 * j), b = *(const uint2 *)(p + 16 + 16 * j);
        const unsigned w[4] = { a.x, a.y, b.x, b.y };
        split_table(o.q, w, table_kv());
        o.scale[0] = o.scale[1] = type_iq4_xs::scale(p, 2 * j);
    }
};
template <> struct parts<type_q8_0> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        words_at<8>(o.q, p + 34 * j + 2);
        o.d[0] = type_q8_0::block_d(p, j);
    }
};
template <> struct parts<type_q4_0> : natural_order {
    static constexpr int BIAS = 8;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        unsigned w[4];
        words_at<4>(w, p + 18 * j + 2);
        split_nibbles(o.q, w);
        o.d[0] = type_q4_0::block_d(p, j);
    }
};
template <> struct parts<type_q4_1> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        split_nibbles(o.q, (const unsigned *)(p + 20 * j + 4));
        o.d[0] = type_q4_1::block_d(p, j);
        o.m = type_q4_1::block_m(p, j);
    }
};
template <> struct parts<type_iq4_nl> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        unsigned w[4];
        words_at<4>(w, p + 18 * j + 2);
        split_table(o.q, w, table_kv());
        o.d[0] = type_iq4_nl::block_d(p, j);
    }
};
template <> struct parts<type_mxfp4> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        unsigned w[4];
        words_at<4>(w, p + 17 * j + 1);
        split_table(o.q, w, table_e2m1());
        o.d[0] = type_mxfp4::block_d(p, j);
    }
};
template <> struct parts<type_nvfp4> : natural_order {
    static constexpr int BIAS = 0;
    MEMBER void open(part &o, const uint8_t *p, int j, const unsigned *) {
        const unsigned *w = (const unsigned *)(p + j / 2 * 36 + 4 + j % 2 * 16);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            for (int k = 0; k < 2; k++) split_look_up(o.q + 4 * h + k, o.q + 4 * h + 2 + k, w[2 * h + k], table_e2m1());
            o.d[h] = type_nvfp4::block_d(p, 2 * j + h);
        }
    }
};
#endif
