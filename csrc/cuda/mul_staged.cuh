/* mul_staged.cuh -- quantized weights times a few tokens where rows are 1, 2, 4, 8 or 16 superblocks: the shapes that
 * models have.  Memory is the limit there, so copies to shared memory run ahead of the arithmetic.
 *
 * A block's 32 rows lie side by side in the file; a warp takes chunks of 8 or 16 superblocks of them, and 8 lanes
 * open a superblock, 32 weights each (parts.cuh), for all tokens.  Values of superblocks go to shared memory; at the
 * end each result is the chain over those of its row, run by one thread.
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
    static_assert(sizeof(staged_token) == mul_token_bytes() && 4 * T::GRID == (int)mul_grid_bytes(T::ID),
                  "what the host gives");
    static_assert(mul_shared(T::ID, MUL_TOKENS) <= 99 << 10, "what consumer cards have");
    static constexpr int CHUNK = (int)mul_chunk(T::BYTES, T::FAMILY);
    static constexpr int ROUNDS = CHUNK / 4;                        /* of 4 superblocks of a warp */
    static constexpr int STAGES = (int)mul_stages(CHUNK * T::BYTES), STAGE = CHUNK * T::BYTES + 16;
    static constexpr int SUMS = (int)mul_block_sums(CHUNK, T::FAMILY) / 4, SUM_STRIDE = CHUNK + 1;
    static constexpr int WARP = STAGES * STAGE;
    static constexpr int WIDE = form<T>::WIDTH == 16 ? 16 : 8;      /* 32-blocks, or of 16, in a superblock */
    char *stages;                   /* of this warp */
    float *sums;                    /* of this warp: scales, mins, then by token; rows of superblocks, by block */
    staged_token *tokens;
    tables look;
    int n_tokens, mask, lane, warp; /* mask: superblocks of a row, less 1 */
    int x_at[ROUNDS];               /* of the superblocks of any chunk of this lane: which of their rows they are */
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
    const unsigned *grid = (const unsigned *)(all_sums + MUL_WARPS * (2 + n_tokens) * S::SUMS);
    s.look = tables_of(T::ID, grid, (unsigned)n_cols >> 31);
    /* chunks of a warp are 8 chunks apart, so a multiple of every row's length */
#pragma unroll
    for (int i = 0; i < S::ROUNDS; i++) s.x_at[i] = (s.warp * S::CHUNK + 4 * i + (s.lane >> 3)) & s.mask;
    return s;
}
template <class T> DEV void stage_x(const staged<T> &s, const tile &at) {
    for (int t = 0; t < s.n_tokens; t++) {
        const block_q8 *x = (const block_q8 *)row_of_x(at.job, at.token + t);
        staged_token *to = s.tokens + t;
        for (int i = (int)threadIdx.x; i < (s.mask + 1) * 16; i += MUL_THREADS) {
            const int j = i & 7, h = i >> 3 & 1;
            to->x[i] = parts<T>::x_piece(x[i >> 4].qs, j, h);
            if (h) continue;
            const int16_t *sums = x[i >> 4].sums;
            to->sums[i >> 4 << 3 | j] = (unsigned)(uint16_t)sums[parts<T>::x_at(j, 0) / 16]
                                      | (unsigned)(uint16_t)sums[parts<T>::x_at(j, 1) / 16] << 16;
            if (!j) to->d[i >> 4] = x[i >> 4].d;
        }
    }
    if constexpr (T::GRID > 0)
        for (int i = (int)threadIdx.x; i < T::GRID; i += MUL_THREADS) ((unsigned *)s.look.grid)[i] = T::book()[i];
}
/* The products of a part's halves, or quarters, with its token's; returns the sums of x, of either half in 16 bits. */
template <class T> DEV int dot_part(int *dot, const part &w, const staged_token *x, int superblock, int j) {
    const int both = (int)x->sums[superblock * 8 + j];
    const int sums[2] = { (int16_t)both, both >> 16 };
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 v = x->x[superblock * 16 + h * 8 + j];
        int sum = -parts<T>::BIAS * sums[h];
        sum = dp4a_ss((int)w.q[4 * h], (int)v.x, sum);
        sum = dp4a_ss((int)w.q[4 * h + 1], (int)v.y, sum);
        if (parts<T>::SCALES == 4) dot[2 * h] = sum, sum = 0;
        sum = dp4a_ss((int)w.q[4 * h + 2], (int)v.z, sum);
        dot[parts<T>::SCALES / 2 * (h + 1) - 1] = dp4a_ss((int)w.q[4 * h + 3], (int)v.w, sum);
    }
    return both;
}
/* N numbers of 8 lanes, added up and dealt out: lane j returns the sum of number j * N / 8, rounded down. */
template <int N> DEV int deal_sums(int *v, int j) {
#pragma unroll
    for (int n = N / 2, bit = 4; bit; n /= 2, bit /= 2) {
        if (!n) v[0] += __shfl_xor_sync(ALL, v[0], bit);
#pragma unroll
        for (int k = 0; k < n; k++) {
            const int give = j & bit ? v[k] : v[n + k];
            v[k] = (j & bit ? v[n + k] : v[k]) + __shfl_xor_sync(ALL, give, bit);
        }
    }
    return v[0];
}
/* K and IQ types.  first: number of the chunk's first superblock, of the block's. */
template <class T, bool ONE>
DEV void value_of_chunk(const staged<T> &s, const part *w, const uint8_t *chunk, int first) {
    constexpr int ROUNDS = staged<T>::ROUNDS, N = form<T>::MINS ? 2 * ROUNDS : ROUNDS;
    const int g = s.lane >> 3, j = s.lane & 7;
    const int own = (j * N / 8 % ROUNDS) * 4 + g;               /* the superblock whose sums this lane gets */
    const bool writes = j * N / 8 < ROUNDS && j * N % 8 == 0;
    const float d = T::d(chunk + own * T::BYTES), dmin = form<T>::MINS ? T::dmin(chunk + own * T::BYTES) : 0;
#pragma unroll 1
    for (int t = 0; t < (ONE ? 1 : s.n_tokens); t++) {
        int sums[N];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            int dot[4];
            const int of_x = dot_part<T>(dot, w[i], s.tokens + t, s.x_at[i], j);
            sums[i] = w[i].scale[0] * dot[0] + w[i].scale[1] * dot[1];
            if (parts<T>::SCALES == 4) sums[i] += w[i].scale[2] * dot[2] + w[i].scale[3] * dot[3];
            if constexpr (form<T>::MINS) sums[ROUNDS + i] = dp2a_ss(of_x, (int)w[i].mins, 0);
        }
        const int I = deal_sums<N>(sums, j);
        float v = __fmul_rn(d, __int2float_rn(I));
        if (form<T>::MINS) v = __fmaf_rn(-dmin, __int2float_rn(__shfl_xor_sync(ALL, I, 4)), v);
        if (writes) s.tokens[t].value[value_at(first + own)] = v;
    }
}
/* 32-blocks: the chain of a superblock, for each token; a lane for each of both. */
template <class T, bool ONE> DEV void run_chains(const staged<T> &s, int first) {
    typedef staged<T> S;
    const int i = s.lane % S::CHUNK;
    const unsigned *x_sums = s.tokens->sums + ((first + i) & s.mask) * 8;
#pragma unroll 1
    for (int t = s.lane / S::CHUNK; t < (ONE ? 1 : s.n_tokens); t += 32 / S::CHUNK) {
        const float *sum = s.sums + (2 + t) * S::SUMS + i;
        float v = 0;
#pragma unroll
        for (int b = 0; b < S::WIDE; b++) {
            v = __fmaf_rn(s.sums[S::SUM_STRIDE * b + i], sum[S::SUM_STRIDE * b], v);
            if (form<T>::MINS) {
                const int both = (int)x_sums[t * (int)(sizeof(staged_token) / 4) + b];
                const float of_x = __int2float_rn((int16_t)both + (both >> 16));
                v = __fmaf_rn(s.sums[S::SUMS + S::SUM_STRIDE * b + i], of_x, v);
            }
        }
        s.tokens[t].value[value_at(first + i)] = v;
    }
}
template <class T, bool ONE> DEV void chain_of_chunk(const staged<T> &s, const part *w, int first) {
    typedef staged<T> S;
    const int j = s.lane & 7;
    constexpr int EACH = S::WIDE / 8;
    float *to = s.sums + EACH * j * S::SUM_STRIDE + (s.lane >> 3);
#pragma unroll
    for (int i = 0; i < S::ROUNDS; i++) {
        for (int e = 0; e < EACH; e++) to[4 * i + e * S::SUM_STRIDE] = w[i].d[e];
        if (form<T>::MINS) to[4 * i + S::SUMS] = w[i].m;
    }
#pragma unroll 1
    for (int t = 0; t < (ONE ? 1 : s.n_tokens); t++) {
        float *of_token = to + (2 + t) * S::SUMS;
#pragma unroll
        for (int i = 0; i < S::ROUNDS; i++) {
            int dot[2];
            dot_part<T>(dot, w[i], s.tokens + t, s.x_at[i], j);
            of_token[4 * i] = __int2float_rn(EACH == 1 ? dot[0] + dot[1] : dot[0]);
            if (EACH == 2) of_token[4 * i + S::SUM_STRIDE] = __int2float_rn(dot[1]);
        }
    }
    __syncwarp();
    run_chains<T, ONE>(s, first);
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
/* What a lane copies of its warp's chunks: pieces of 16 bytes, 512 apart. */
struct source { const uint8_t *at; int left; };         /* left: bytes of the block's rows from there on */
template <class T> DEV void ask(const staged<T> &s, source &from, char *stage) {
    typedef staged<T> S;
    constexpr int BYTES = S::CHUNK * T::BYTES;
#pragma unroll
    for (int k = 0; k < BYTES; k += 512)
        if (from.left > k && (k + 512 <= BYTES || 16 * s.lane < BYTES - k)) copy16_async(stage + k, from.at + k);
    copy_commit();
    from.at += MUL_WARPS * BYTES;
    from.left -= MUL_WARPS * BYTES;
}
/* bytes: of the block's rows.  ONE: there is one token, as mostly. */
template <class T, bool ONE> DEV void run_chunks(const staged<T> &s, source from, char *mine, int bytes) {
    typedef staged<T> S;
    int stage = 0;
    /* all warps go round as often: what lies beyond the last row is not stored */
#pragma unroll 1
    for (int first = 0; first * T::BYTES < bytes; first += MUL_WARPS * S::CHUNK) {
        ask(s, from, mine + (stage ? stage - S::STAGE : S::WARP - S::STAGE));
        copy_wait<S::STAGES - 1>();
        __syncwarp();
        const uint8_t *here = (const uint8_t *)s.stages + stage;
        part w[S::ROUNDS];
#pragma unroll
        for (int i = 0; i < S::ROUNDS; i++)
            parts<T>::open(w[i], here + (4 * i + (s.lane >> 3)) * T::BYTES, s.lane & 7, s.look);
        if constexpr (form<T>::BLOCKS) chain_of_chunk<T, ONE>(s, w, first + s.warp * S::CHUNK);
        else value_of_chunk<T, ONE>(s, w, here, first + s.warp * S::CHUNK);
        __syncwarp();
        stage = stage + S::STAGE < S::WARP ? stage + S::STAGE : 0;
    }
}
template <class T> DEV void mul_staged(char *shared, const tile &at) {
    typedef staged<T> S;
    constexpr int BYTES = S::CHUNK * T::BYTES;
    const int left = at.job.n_tokens - at.token, rows = at.job.n_rows - at.row;
    const S s = lay_out<T>(shared, left < MUL_TOKENS ? left : MUL_TOKENS, at.job.n_cols);
    const int bytes = (rows < MUL_ROWS ? rows : MUL_ROWS) * (s.mask + 1) * T::BYTES;
    const int begin = s.warp * BYTES + 16 * s.lane;
    source from = { row_of_w(at.job, at.row) + begin, bytes - begin };
    char *const mine = s.stages + 16 * s.lane;
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; i++) ask(s, from, mine + i * S::STAGE);
    stage_x(s, at);
    __syncthreads();
    if (s.n_tokens == 1) run_chunks<T, true>(s, from, mine, bytes);
    else run_chunks<T, false>(s, from, mine, bytes);
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
