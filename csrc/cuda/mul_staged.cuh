/* mul_staged.cuh -- quantised weights times a few tokens where rows are 1, 2, 4, 8 or 16 superblocks: the shapes that
 * models have.  Memory is the limit there, so copies to shared memory run ahead of the arithmetic.
 *
 * A block's 32 rows lie side by side in the file; a warp takes chunks of 8 superblocks of them, and 8 lanes open a
 * superblock, 32 weights each (parts.cuh), for all tokens.  Values of superblocks go to shared memory; at the end each
 * result is the chain over those of its row, run by one thread.
 */
#ifndef MS4_MUL_STAGED_CUH
#define MS4_MUL_STAGED_CUH
#include "job.cuh"
#include "parts.cuh"

#define MUL_WARPS (MUL_THREADS / 32)
#define MUL_VALUES (MUL_ROWS * (MUL_SUPERBLOCKS + 1))
/* Where the value of the i-th superblock of a block's rows lies: rows of 16 are 17 banks apart. */
DEV int value_at(int i) { return i + (i >> 4); }

/* A token in shared memory.  x: by superblock, half of a part and lane, 16 bytes; sums: by superblock and lane, two of
 * 16 bits. */
struct staged_token {
    float value[MUL_VALUES], d[MUL_SUPERBLOCKS];
    unsigned sums[MUL_SUPERBLOCKS * 8];
    uint4 x[MUL_SUPERBLOCKS * 16];
};
template <class T> struct staged {
    static constexpr int STAGES = (int)mul_stages(T::BYTES), STAGE = (int)mul_stage_bytes(T::BYTES);
    static constexpr int SUMS = (int)mul_block_sums(T::FAMILY) / 4, WARP = STAGES * STAGE;
    static constexpr int WIDE = form<T>::WIDTH == 16 ? 16 : 8;      /* 32-blocks, or of 16, in a superblock */
    static_assert(sizeof(staged_token) == mul_token_bytes() && 4 * T::GRID == (int)mul_grid_bytes(T::ID),
                  "what the host gives");
    char *stages;                   /* of this warp */
    float *sums;                    /* of this warp: scales, mins, then by token; [block][9], by superblock */
    staged_token *tokens;
    const unsigned *grid;
    int n_tokens, mask, lane, warp; /* mask: superblocks of a row, less 1 */
};
template <class T> DEV staged<T> lay_out(char *shared, int n_tokens, int n_cols) {
    typedef staged<T> S;
    S s;
    s.n_tokens = n_tokens, s.mask = n_cols / SUPERBLOCK - 1;
    s.lane = (int)threadIdx.x & 31, s.warp = (int)threadIdx.x >> 5;
    s.stages = shared + s.warp * S::WARP;
    s.tokens = (staged_token *)(shared + MUL_WARPS * S::WARP);
    float *all_sums = (float *)(s.tokens + n_tokens);
    s.sums = all_sums + s.warp * (2 + n_tokens) * S::SUMS;
    s.grid = (const unsigned *)(all_sums + MUL_WARPS * (2 + n_tokens) * S::SUMS);
    return s;
}
template <class T> DEV void stage_x(const staged<T> &s, const tile &at) {
    for (int t = 0; t < s.n_tokens; t++) {
        const block_q8 *x = (const block_q8 *)row_of_x(at.job, at.token + t);
        staged_token *to = s.tokens + t;
        for (int i = (int)threadIdx.x; i < (s.mask + 1) * 16; i += MUL_THREADS) {
            const int j = i & 7, h = i >> 3 & 1;
            to->x[i] = *(const uint4 *)(x[i >> 4].qs + parts<T>::x_at(j, h));
            if (h) continue;
            const int16_t *sums = x[i >> 4].sums;
            to->sums[i >> 4 << 3 | j] = (unsigned)(uint16_t)sums[parts<T>::x_at(j, 0) / 16]
                                      | (unsigned)(uint16_t)sums[parts<T>::x_at(j, 1) / 16] << 16;
            if (!j) to->d[i >> 4] = x[i >> 4].d;
        }
    }
    if constexpr (T::GRID > 0)
        for (int i = (int)threadIdx.x; i < T::GRID; i += MUL_THREADS) ((unsigned *)s.grid)[i] = T::book()[i];
}
/* The products of a part's halves with its token's; sums: of x, of either half. */
template <class T> DEV void dot_part(int *dot, int *sums, const part &w, const staged_token *x, int superblock, int j) {
    const unsigned both = x->sums[superblock * 8 + j];
    sums[0] = (int)(int16_t)both, sums[1] = (int)both >> 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 v = x->x[superblock * 16 + h * 8 + j];
        int sum = -parts<T>::BIAS * sums[h];
        sum = dp4a_ss((int)w.q[4 * h], (int)v.x, sum);
        sum = dp4a_ss((int)w.q[4 * h + 1], (int)v.y, sum);
        sum = dp4a_ss((int)w.q[4 * h + 2], (int)v.z, sum);
        dot[h] = dp4a_ss((int)w.q[4 * h + 3], (int)v.w, sum);
    }
}
/* K and IQ types.  Lanes 0 to 3 of 8 end with the sum of a, 4 to 7 with that of b. */
DEV int sum_of_8(int a, int b, int j) {
    int v = j & 4 ? b : a;
    v += __shfl_xor_sync(ALL, j & 4 ? a : b, 4);
    v += __shfl_xor_sync(ALL, v, 2);
    return v + __shfl_xor_sync(ALL, v, 1);
}
/* The same of two pairs; lanes j with j & 2 end with the sum of the second pair. */
DEV int sums_of_8(int a, int b, int second_a, int second_b, int j) {
    int v = j & 4 ? b : a, second = j & 4 ? second_b : second_a;
    v += __shfl_xor_sync(ALL, j & 4 ? a : b, 4);
    second += __shfl_xor_sync(ALL, j & 4 ? second_a : second_b, 4);
    const int give = j & 2 ? v : second;
    v = j & 2 ? second : v;
    v += __shfl_xor_sync(ALL, give, 2);
    return v + __shfl_xor_sync(ALL, v, 1);
}
template <class T> DEV void value_of_chunk(const staged<T> &s, const part *w, const uint8_t *chunk, int first) {
    const int g = s.lane >> 3, j = s.lane & 7, own = (j >> 2) * 4 + g;      /* own: the superblock whose sum it gets */
    const float d = T::d(chunk + own * T::BYTES), dmin = form<T>::MINS ? T::dmin(chunk + own * T::BYTES) : 0;
#pragma unroll 1
    for (int t = 0; t < s.n_tokens; t++) {
        int sum[2], mins[2];
#pragma unroll
        for (int it = 0; it < 2; it++) {
            int dot[2], sums[2];
            dot_part<T>(dot, sums, w[it], s.tokens + t, (first + 4 * it + g) & s.mask, j);
            sum[it] = w[it].scale[0] * dot[0] + w[it].scale[1] * dot[1];
            mins[it] = form<T>::MINS ? w[it].min[0] * sums[0] + w[it].min[1] * sums[1] : 0;
        }
        float v;
        if (form<T>::MINS) {
            const int I = sums_of_8(sum[0], sum[1], mins[0], mins[1], j), J = __shfl_xor_sync(ALL, I, 2);
            v = __fmaf_rn(-dmin, __int2float_rn(J), __fmul_rn(d, __int2float_rn(I)));
        } else {
            v = __fmul_rn(d, __int2float_rn(sum_of_8(sum[0], sum[1], j)));
        }
        if (!(j & 3)) s.tokens[t].value[value_at(first + own)] = v;
    }
}
/* 32-blocks: their sums and scales go to shared memory, where a lane for each token and superblock runs the chain. */
template <class T> DEV void chain_of_chunk(const staged<T> &s, const part *w, int first) {
    typedef staged<T> S;
    const int g = s.lane >> 3, j = s.lane & 7;
    constexpr int EACH = S::WIDE / 8;
#pragma unroll
    for (int it = 0; it < 2; it++) {
        const int to = EACH * j * 9 + 4 * it + g;
        for (int i = 0; i < EACH; i++) s.sums[to + 9 * i] = w[it].d[i];
        if (form<T>::MINS) s.sums[S::SUMS + to] = w[it].m;
#pragma unroll 1
        for (int t = 0; t < s.n_tokens; t++) {
            int dot[2], sums[2];
            dot_part<T>(dot, sums, w[it], s.tokens + t, (first + 4 * it + g) & s.mask, j);
            float *of_token = s.sums + (2 + t) * S::SUMS + to;
            of_token[0] = __int2float_rn(EACH == 1 ? dot[0] + dot[1] : dot[0]);
            if (EACH == 2) of_token[9] = __int2float_rn(dot[1]);
        }
    }
    __syncwarp();
    if (g < s.n_tokens) {
        const float *sum = s.sums + (2 + g) * S::SUMS + j;
        const unsigned *x_sums = s.tokens[g].sums + ((first + j) & s.mask) * 8;
        float v = 0;
#pragma unroll
        for (int b = 0; b < S::WIDE; b++) {
            v = __fmaf_rn(s.sums[9 * b + j], sum[9 * b], v);
            if (form<T>::MINS) {
                const unsigned both = x_sums[b];
                v = __fmaf_rn(s.sums[S::SUMS + 9 * b + j], __int2float_rn((int)(int16_t)both + ((int)both >> 16)), v);
            }
        }
        s.tokens[g].value[value_at(first + j)] = v;
    }
}
/* y = the chain over the superblocks of a row: a thread for each row and token. */
template <class T> DEV void store_chains(const staged<T> &s, const tile &at) {
    const int r = (int)threadIdx.x % MUL_ROWS, t = (int)threadIdx.x / MUL_ROWS;
    if (t >= s.n_tokens) return;
    const staged_token *x = s.tokens + t;
    float y = 0;
    for (int i = 0; i <= s.mask; i++) y = __fmaf_rn(x->d[i], x->value[value_at(r * (s.mask + 1) + i)], y);
    store(at.job, at.row + r, at.token + t, y);
}
template <class T> DEV void mul_staged(char *shared, const tile &at) {
    typedef staged<T> S;
    const int left = at.job.n_tokens - at.token, rows = at.job.n_rows - at.row;
    const S s = lay_out<T>(shared, left < MUL_TOKENS ? left : MUL_TOKENS, at.job.n_cols);
    const int bytes = (rows < MUL_ROWS ? rows : MUL_ROWS) * (s.mask + 1) * T::BYTES;
    const int n_chunks = (bytes + MUL_CHUNK * T::BYTES - 1) / (MUL_CHUNK * T::BYTES);
    const uint8_t *w = row_of_w(at.job, at.row);
    auto ask = [&](int chunk, int stage) {
        const int from = chunk * MUL_CHUNK * T::BYTES + 16 * s.lane;
#pragma unroll
        for (int k = 0; k < MUL_CHUNK * T::BYTES; k += 512)
            if (k + 16 * s.lane < MUL_CHUNK * T::BYTES && from + k < bytes)
                copy16_async(s.stages + stage * S::STAGE + 16 * s.lane + k, w + from + k);
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++) ask(s.warp + i * MUL_WARPS, i);
    stage_x(s, at);
    __syncthreads();
    int stage = 0;
#pragma unroll 1
    for (int chunk = s.warp; chunk < n_chunks; chunk += MUL_WARPS) {
        ask(chunk + (S::STAGES - 1) * MUL_WARPS, stage ? stage - 1 : S::STAGES - 1);
        copy_wait<S::STAGES - 1>();
        __syncwarp();
        const uint8_t *here = (const uint8_t *)s.stages + stage * S::STAGE;
        part w_of[2];
#pragma unroll
        for (int it = 0; it < 2; it++)
            parts<T>::open(w_of[it], here + (4 * it + (s.lane >> 3)) * T::BYTES, s.lane & 7, s.grid);
        if constexpr (form<T>::BLOCKS) chain_of_chunk(s, w_of, chunk * MUL_CHUNK);
        else value_of_chunk(s, w_of, here, chunk * MUL_CHUNK);
        __syncwarp();
        stage = stage + 1 < S::STAGES ? stage + 1 : 0;
    }
    copy_wait<0>();
    __syncthreads();
    store_chains(s, at);
}
/* Whether a job is one for mul_staged. */
template <class T> DEV bool can_stage(const mul_job &j) {
    const int n = j.n_cols / SUPERBLOCK;
    return j.n_cols % SUPERBLOCK == 0 && n <= MUL_SUPERBLOCKS && !(n & (n - 1)) && !((uintptr_t)j.w & 15)
        && j.row_bytes == (size_t)n * T::BYTES;
}
#endif
