/* job.cuh -- what kernels for products share: which job a block belongs to, where operands lie, how results go out. */
#ifndef MS4_JOB_CUH
#define MS4_JOB_CUH
#include "dev.cuh"

/* A block's share of a job: rows from `row`, tokens from `token` on. */
struct tile { mul_job job; int row, token; };

/* It lies in shared memory, where it takes no registers.  w NULL: an expert that is not here: nothing to do. */
template <int ROWS, int TOKENS> DEV const tile &tile_of_block(const mul_args &a) {
    SHARED(tile, t, 1);
    const int block = (int)blockIdx.x, tid = (int)threadIdx.x;
    int begun = 0;
    for (int i = tid & 31; i < a.n_jobs; i += 32) begun += a.jobs[i].first_block <= block;
    const unsigned *from = (const unsigned *)(a.jobs + __reduce_add_sync(ALL, begun) - 1);
    if (tid < (int)(sizeof(mul_job) / 4)) ((unsigned *)&t->job)[tid] = from[tid];
    __syncthreads();
    if (!tid) {
        const int in = block - t->job.first_block, row_tiles = (t->job.n_rows + ROWS - 1) / ROWS;
        t->row = in % row_tiles * ROWS;
        t->token = in / row_tiles * TOKENS;
        if (t->job.slots) {
            const uint8_t *slot = t->job.slots[*t->job.expert];
            t->job.w = slot ? slot + t->job.in_slot : nullptr;
        }
    }
    __syncthreads();
    return *t;
}
/* Rows and tokens beyond the last stand for the last: computed as well, so that no lane is missing, and not stored. */
DEV const uint8_t *row_of_w(const mul_job &j, int row) {
    return j.w + (size_t)(row < j.n_rows ? row : j.n_rows - 1) * j.row_bytes;
}
DEV const void *row_of_x(const mul_job &j, int token) {
    if (token >= j.n_tokens) token = j.n_tokens - 1;
    return (const uint8_t *)j.x + (size_t)(j.x_rows ? j.x_rows[token] : token) * j.x_stride;
}
DEV void store(const mul_job &j, int row, int token, float v) {
    if (row >= j.n_rows || token >= j.n_tokens) return;
    float *y = j.y + (size_t)token * j.y_stride + row;
    if (j.scaled) v = __fmul_rn(v, j.scale);
    *y = j.add ? __fadd_rn(*y, v) : v;
}
#endif
