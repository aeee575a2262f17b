/* fragments.cuh -- 16-bit integers on int8 tensor cores, for attention with 256 latents and a rope key of 64.
 *
 * A 16-bit integer is 256 times a signed byte and an unsigned one, so a product of matrices of them is four of bytes,
 * in three sums: high x high, both mixed, low x low.  All is exact modulo 2^32, and what comes out is below 2^31
 * (ops.h, LENGTH_16).
 *
 * Rows lie in shared memory, as chunks of 8 integers, 16 bytes; chunk c of row r at place c ^ r % 8, so that the eight
 * rows that an ldmatrix reads of one chunk are in different banks.  A step along k is 32 integers, 4 chunks.  Within
 * one, ldmatrix and the cutting into bytes order them otherwise, but in the same way for both factors.
 */
#ifndef MS4_FRAGMENTS_CUH
#define MS4_FRAGMENTS_CUH
#include "segment.cuh"

#define KEY_BYTES 640          /* of a row of keys or queries: 40 chunks */
#define WEIGHT_BYTES (KV_ROWS * 2)
_Static_assert(KEY_BYTES == (TENSOR_RANK + TENSOR_ROPE) * 2, "latents and rope key");
_Static_assert(KEY_BYTES % 128 == 0 && WEIGHT_BYTES % 128 == 0, "the place of a chunk is in bits 4 to 6 of an address");

DEV int chunk_at(int row, int row_bytes, int chunk) { return row * row_bytes + ((chunk ^ (row & 7)) << 4); }
/* Where this lane's row begins for ldmatrix: the 4 chunks of a step of 8 rows from `first` on. */
DEV int lane_rows(int first, int row_bytes) {
    const int lane = (int)threadIdx.x & 31;
    return chunk_at(first + (lane & 7), row_bytes, lane >> 3);
}
/* And step k of it: chunks 4 k .. 4 k + 3. */
DEV int step_of(int lane_row, int k) { return (lane_row ^ (k & 1) << 6) + (k >> 1) * 128; }

/* What ldmatrix gave, as high and low bytes. */
DEV void split_bytes(const unsigned *r, unsigned *high, unsigned *low) {
    high[0] = __byte_perm(r[0], r[1], 0x7531);
    low[0] = __byte_perm(r[0], r[1], 0x6420);
    high[1] = __byte_perm(r[2], r[3], 0x7531);
    low[1] = __byte_perm(r[2], r[3], 0x6420);
}
struct fragment_a { unsigned high[4], low[4]; };               /* 16 rows, 32 integers along k */
struct fragment_b { unsigned high[2], low[2]; };               /* 32 integers along k, 8 columns */
DEV void take_a(fragment_a &f, const unsigned *upper, const unsigned *lower) {       /* rows 0 to 7, and 8 to 15 */
    unsigned h[2], l[2];
    split_bytes(upper, h, l);
    f.high[0] = h[0], f.high[2] = h[1], f.low[0] = l[0], f.low[2] = l[1];
    split_bytes(lower, h, l);
    f.high[1] = h[0], f.high[3] = h[1], f.low[1] = l[0], f.low[3] = l[1];
}
/* 16 rows in shared memory; lane_row: of the first. */
DEV void load_a(fragment_a &f, const char *rows, int lane_row, int row_bytes, int k) {
    unsigned upper[4], lower[4];
    ldmatrix_x4<false>(upper, rows + step_of(lane_row, k));
    ldmatrix_x4<false>(lower, rows + step_of(lane_row, k) + 8 * row_bytes);
    take_a(f, upper, lower);
}
/* 8 rows in shared memory, each being a column of b. */
DEV void load_b(fragment_b &f, const char *rows, int lane_row, int k) {
    unsigned r[4];
    ldmatrix_x4<false>(r, rows + step_of(lane_row, k));
    split_bytes(r, f.high, f.low);
}
/* 32 rows of keys from 32 k on, along k; chunk: 8 latents, the columns of b; lane: of this thread. */
DEV void load_values(fragment_b &f, const char *keys, int lane, int chunk, int k) {
    unsigned r[4];
    ldmatrix_x4<true>(r, keys + chunk_at(lane, KEY_BYTES, chunk) + k * 32 * KEY_BYTES);
    split_bytes(r, f.high, f.low);
}
struct products { int high[4], mixed[4], low[4]; };
/* p = a b, and p += a b */
DEV void multiply_first(products &p, const fragment_a &a, const fragment_b &b) {
    mma_k32_first<true, true>(p.high, a.high, b.high);
    mma_k32_first<true, false>(p.mixed, a.high, b.low);
    mma_k32_first<false, false>(p.low, a.low, b.low);
    mma_k32<false, true>(p.mixed, a.low, b.high);
}
DEV void multiply(products &p, const fragment_a &a, const fragment_b &b) {
    mma_k32<true, true>(p.high, a.high, b.high);
    mma_k32<true, false>(p.mixed, a.high, b.low);
    mma_k32<false, false>(p.low, a.low, b.low);
    mma_k32<false, true>(p.mixed, a.low, b.high);              /* not right behind the other mixed one: it would wait */
}
DEV int whole(const products &p, int i) {
    return (int)(((unsigned)p.high[i] << 16) + ((unsigned)p.mixed[i] << 8) + (unsigned)p.low[i]);
}
/* Copies the first n rows of keys or queries, 640 bytes each, with `threads` threads, of which this one is number
 * `thread`: eight a row, every eighth chunk each. */
DEV void copy_rows(char *to, const int16_t *from, int n, int thread, int threads) {
    const int chunk = thread % 8;
#pragma unroll 1
    for (int row = thread / 8; row < n; row += threads / 8) {
        char *place = to + chunk_at(row, KEY_BYTES, chunk);
        const int16_t *own = from + row * (KEY_BYTES / 2) + chunk * 8;
#pragma unroll
        for (int i = 0; i < KEY_BYTES / 128; i++) copy16_async(place + i * 128, own + i * 64);
    }
}
DEV void copy_scales(float *to, const float *from, int n, int thread, int threads) {    /* three floats a key */
    for (int i = thread; i < (3 * n + 3) / 4; i += threads) copy16_async(to + 4 * i, from + 4 * i);
}
#endif
