/* job.cuh -- what kernels for products share: which job a block belongs to, where operands lie, how results go out. */
#ifndef MS4_JOB_CUH
#define MS4_JOB_CUH
#include "dev.cuh"

/* A block's share of a job: rows from `row`, tokens from `token` on. */
struct tile { mul_job job; int row, token; };

template <int ROWS, int TOKENS> DEV tile tile_of_block(const mul_args &a) {
    const int block = (int)blockIdx.x, lane = (int)threadIdx.x & 31;
    int begun = 0;
    for (int i = lane; i < a.n_jobs; i += 32) begun += a.jobs[i].first_block <= block;
    tile t;
    t.job = a.jobs[__reduce_add_sync(ALL, begun) - 1];
    const int in = block - t.job.first_block, row_tiles = (t.job.n_rows + ROWS - 1) / ROWS;
    t.row = in % row_tiles * ROWS;
    t.token = in / row_tiles * TOKENS;
    return t;
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
