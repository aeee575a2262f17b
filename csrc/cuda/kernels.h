/* kernels.h -- what host and device say to each other: every kernel, its arguments, its grid.
 *
 * Included by the host's C (cuda_*.c), by device code (*.cu, as nvcc or g++ compile it) and by the emulated driver of
 * the tests.  Every kernel takes one struct by value.  Pointers are addresses of the device, or of pinned memory that
 * the device sees at the same address (job lists, what the router chose).  The arithmetic is that of ops.h; shapes are
 * those of device.h: rows of floats, and of block_q8 (64-byte aligned) where a buffer has blocks (q NULL: it has none).
 * No struct has bytes between or behind its members, so that they can be compared: hence `pad`, which is 0.
 */
#ifndef MS4_CUDA_KERNELS_H
#define MS4_CUDA_KERNELS_H
#include "quant.h"

/* --- products: y = w x for one or more matrices of one type; kernels mul_<type> and gemm_<type> ----------------- */
/* y[t * y_stride + r] = (add ? y + : ) (row r of w) . (row x_rows ? x_rows[t] : t of x), times scale where scaled.
 * w: the file's bytes, at an address aligned as in the file (32 bytes a tensor; rows follow without gaps), so a row of
 * a 2-byte or 1-byte aligned type begins anywhere; memory behind the last row may be read up to the next multiple of 16
 * bytes.  x: block_q8 for quantized types, floats for f32, f16, bf16; x_stride in bytes.  n_cols: as the file has it,
 * a multiple of 32 or 256 for quantized types, any number for the others.
 * slots, expert (mul alone): NULL, or the device chose the expert whose matrix it is, `*expert`; that begins in_slot
 * bytes behind slots[*expert], and where this is NULL, the job is left out. */
typedef struct {
    const uint8_t *w;
    size_t row_bytes;
    const void *x;
    size_t x_stride;
    const int32_t *x_rows;
    float *y;
    size_t y_stride;
    const uint8_t *const *slots;
    const int32_t *expert;
    size_t in_slot;
    float scale;
    int32_t scaled, add, n_rows, n_cols, n_tokens;
    int32_t first_block;                                      /* of the grid; ascending by job */
    int32_t pad;
} mul_job;
typedef struct { const mul_job *jobs; int32_t n_jobs, pad; } mul_args;
/* A block's share of a job: rows times tokens; rows that do not fill it, and tokens, are left out.  Types of floats
 * take fewer rows, because their sums are chains that only more blocks make faster. */
#define MUL_THREADS 256        /* mul: few tokens */
#define MUL_TOKENS 4
#define MUL_ROWS 32
#define MUL_FLOAT_ROWS 8
#define GEMM_THREADS 256       /* gemm: many tokens, on tensor cores where the type is quantized */
#define GEMM_ROWS 128
#define GEMM_TOKENS 64
#define GEMM_FLOAT_ROWS 32
#define GEMM_FLOAT_TOKENS 32
#define GEMM_FROM 8            /* tokens of a job from which gemm is the faster one */
static inline int is_float_type(int type) { return type <= MS4_TYPE_bf16; }
static inline int32_t mul_rows(int type) { return is_float_type(type) ? MUL_FLOAT_ROWS : MUL_ROWS; }
static inline int32_t gemm_rows(int type) { return is_float_type(type) ? GEMM_FLOAT_ROWS : GEMM_ROWS; }
static inline int32_t gemm_tokens(int type) {
    return is_float_type(type) ? GEMM_FLOAT_TOKENS : GEMM_TOKENS;
}
static inline int32_t mul_blocks(int type, const mul_job *j) {
    int32_t rows = mul_rows(type);
    return (j->n_rows + rows - 1) / rows * ((j->n_tokens + MUL_TOKENS - 1) / MUL_TOKENS);
}
static inline int32_t gemm_blocks(int type, const mul_job *j) {
    int32_t rows = gemm_rows(type), tokens = gemm_tokens(type);
    return (j->n_rows + rows - 1) / rows * ((j->n_tokens + tokens - 1) / tokens);
}

/* --- rows; grid (n rows, parts) unless said otherwise ----------------------------------------------------------- */
/* parts, at least 1: blocks that share a row; norm_rows, choose_experts and latents_rows take 1.  The warps of all
 * parts take superblocks (or as many floats, or heads) in turn: for a single row of 4096 floats 2 parts are well. */
typedef struct {               /* y = rms_norm(x) * weight, and its blocks; x and y may be the same */
    const float *x, *weight;
    float *y;
    block_q8 *q;
    size_t x_stride, y_stride, blocks;                        /* floats, floats, blocks of a row */
    int32_t n, width;
    float eps;
    int32_t pad;
} norm_args;
typedef struct { const float *x; block_q8 *q; size_t x_stride, blocks; int32_t n, width; } quantize_args;
typedef struct {               /* hidden = act(gate) * up, as floats (f), as blocks (q), or both; act: SiLU or GELU */
    const float *gate, *up;                                   /* rows of width floats, without gaps */
    float *f;                                                 /* likewise, or NULL */
    block_q8 *q;                                              /* rows of `blocks`, or NULL */
    size_t blocks;
    int32_t n, width, gelu, pad;
} act_args;
typedef struct {               /* b += bias (or NULL), then GELU if asked for, then its blocks */
    float *b;
    const float *bias;
    block_q8 *q;
    size_t stride, blocks;
    int32_t n, width, gelu, pad;
} bias_args;
typedef struct {               /* rows[i] >= i, ascending: to row i of `to`, another place than `from` */
    const float *from;
    float *to;
    const int32_t *rows;
    size_t stride;                                            /* of both, in floats (a block_q8 is 80) */
    int32_t n, width;                                         /* width in floats, too */
} gather_args;
/* h[t] = fma(weight, pairs[row], h[t]) for the k pairs of token t, ascending; row, weight: n x k.  row NULL: pairs lie
 * in that order. */
typedef struct {
    float *h;
    const float *pairs, *weight;
    const int32_t *row;
    size_t stride;                                            /* of h and pairs */
    int32_t n, k, width, pad;
} sum_args;
typedef struct {               /* ops.h, choose: ids, weights: n x k, ascending by id */
    const float *logits;
    int32_t *ids;
    float *weights;
    size_t stride;
    int32_t n, n_expert, k, norm;
    float scale;
    int32_t pad;
} choose_args;
/* The choice for a single row to the host, which sees it at told_*: ids and weights, words x 16 bytes of x, and when
 * that is all there, 1 in flag.  Grid (1). */
typedef struct {
    const int32_t *ids;
    const float *weights;
    const block_q8 *x;
    int32_t *told_ids;
    float *told_weights;
    block_q8 *told_x;
    int32_t *flag, k, words;
} tell_args;

/* --- sampling --------------------------------------------------------------------------------------------------- */
/* Of each part of each row the k highest logits among the ids below `among`, in the order of their places, of equal
 * ones the first; one that is not finite is above all others, whatever its id.  ids: of the logits, or NULL, where they
 * are their places in the row.  to, to_ids: k for each part, part after part and row after row.  Grid
 * (highest_parts(n, k), n_rows). */
typedef struct {
    const float *logits;
    const int32_t *ids;
    float *to;
    int32_t *to_ids;
    size_t stride;                                            /* of logits and ids */
    int32_t n_rows, n, among, k;                              /* k or more of the n logits are among */
} highest_args;
#define HIGHEST_THREADS 512
#define HIGHEST_MOST 8192      /* logits of a part */
#define HIGHEST_K 256          /* k: at most, so that every part has so many */
/* So many that a part is about as long as what all of them keep: the next launch then takes as long as this one. */
static inline int32_t highest_parts(int32_t n, int32_t k) {
    int64_t length = 2048;
    while (length < HIGHEST_MOST && length * length < (int64_t)n * k) length *= 2;
    return (int32_t)((n + length - 1) / length);
}

/* --- attention -------------------------------------------------------------------------------------------------- */
/* Where a row of the step lies in the kv cache: its block (all layers; kv_cache.c has the picture) and its number in
 * it.  In a layer: KV_ROWS rows of rank + d_rope int16_t, then KV_ROWS times three floats. */
#define KV_ROWS 128
#define SEGMENT_GROUP 8        /* as ops.h, where these two are explained */
#define LENGTH_16 44000
typedef struct { uint8_t *block; int32_t at, pad; } kv_place;
typedef struct {               /* kv: latent normalised, rope key rotated, both to the cache as 16-bit integers */
    float *kv;                                                /* stride floats a row; overwritten */
    const float *weight, *rope;                               /* rope: d_rope floats a row: cos, sin of each pair */
    const kv_place *places;
    size_t stride, layer_offset;                              /* bytes into a block */
    int32_t n, rank, d_rope;
    float eps;
} latents_args;
typedef struct {               /* q: rope part of every head rotated, then all of it times the row's factor */
    float *q;
    const float *rope, *scale;
    size_t stride;
    int32_t n, n_head, d_nope, d_rope;
} queries_args;
/* absorbed (row t, head h: rank floats at (t * n_head + h) * rank) and the rope part of q, each to 16-bit integers:
 * rank + d_rope of them and two scales for each row and head.  Grid (n_head, n). */
typedef struct {
    const float *absorbed, *q;
    int16_t *out;
    float *out_d;
    size_t q_stride;
    int32_t n, n_head, rank, d_nope, d_rope, pad;
} query_16_args;
typedef struct { const uint8_t *const *blocks; int32_t first, n, pos, pad; } kv_span;      /* as span, step.h */
/* Every row of the step to one segment: partial[((t * most) + segment) * n_head + h] = { m, l, o[rank] }; segments that
 * a row does not see are left alone.  Grid (most, n, heads / ATTEND_HEADS rounded up).  first: the row of the step that
 * row 0 of q, row_span, partial and x is.  rank: MOST_RANK or less. */
#define ATTEND_HEADS 16
#define MOST_RANK 1024
typedef struct {
    const int16_t *q;
    const float *q_d;
    const kv_span *spans;
    const int32_t *row_span;                                  /* by row: its span */
    float *partial;
    size_t layer_offset;
    int32_t first, n, n_head, rank, d_rope, most;             /* most: segments of the row that sees most */
} segments_args;
/* x[(t * n_head + h) * rank ..] = o / l of the folded segments (ops.h, fold).  Grid (n_head, n). */
typedef struct {
    const float *partial;
    float *x;
    const kv_span *spans;
    const int32_t *row_span;
    int32_t first, n, n_head, rank, most, pad;
} fold_args;
/* Both at once, for many rows: n rows of a span from `first` (a row of the step) on, at most ATTEND_TILE, through all
 * their segments, folded on the way; the result as of fold.  Grid (n_tiles, heads / ATTEND_HEADS rounded up). */
#define ATTEND_TILE 4
typedef struct { int32_t span, first, n; } attend_tile;
typedef struct {
    const int16_t *q;
    const float *q_d;
    const kv_span *spans;
    const attend_tile *tiles;
    float *x;
    size_t layer_offset;
    int32_t n_tiles, n_head, rank, d_rope;
} attend_rows_args;

/* --- the tower -------------------------------------------------------------------------------------------------- */
/* q, k: 2D rope (the first half of a head's pairs by row, the second by column), q scaled first. */
typedef struct {
    float *q, *k;
    const float *rope;                                        /* by row or column: d_head floats */
    size_t stride;
    int32_t n, columns, n_head, d_head;
    float scale;
    int32_t pad;
} rotate_args;
/* x = softmax(q k) v, every patch to all (ops.h, attend).  Grid (n / ATTEND_PATCHES rounded up, n_head). */
#define ATTEND_PATCHES 64
typedef struct { const float *q, *k, *v; float *x; size_t stride; int32_t n, n_head, d_head, pad; } attend_patches_args;
/* Group first + i of merge x merge patches, channel-major, to row i of `to`, and its blocks. */
typedef struct {
    const float *from;
    float *to;
    block_q8 *q;
    size_t from_stride, to_stride, blocks;
    int32_t first, n, columns, merge, width, pad;             /* width: channels of a patch */
} merge_args;

/* X(name, type of its argument, threads of a block) */
#define CUDA_ROW_KERNELS(X) \
    X(norm_rows, norm_args, 256) X(quantize_rows, quantize_args, 256) X(act_rows, act_args, 256) \
    X(bias_rows, bias_args, 256) X(gather_rows, gather_args, 256) X(sum_pairs, sum_args, 256) \
    X(choose_experts, choose_args, 32) X(tell_choice, tell_args, 256) \
    X(highest_rows, highest_args, HIGHEST_THREADS) X(latents_rows, latents_args, 64) \
    X(queries_rows, queries_args, 128) X(query_16_rows, query_16_args, 32) X(attend_segments, segments_args, 256) \
    X(fold_segments, fold_args, 128) X(attend_rows, attend_rows_args, 256) X(rotate_patches, rotate_args, 128) \
    X(attend_patches, attend_patches_args, 128) X(merge_patches, merge_args, 128)

/* Dynamic shared memory of a launch, in bytes; a kernel that is not named takes none.  Whoever writes a kernel keeps
 * its line right (a test compiles every kernel for 99 KB cards). */
#define MUL_SUPERBLOCKS 16     /* of a row, at most, for mul to stage it in shared memory (mul_staged.cuh) */
#ifdef __cplusplus
#define SIZE_FUNCTION static constexpr
#else
#define SIZE_FUNCTION static inline
#endif
/* Superblocks that a warp stages at once, and how often: two blocks fit a multiprocessor of 100 KB, if they can. */
SIZE_FUNCTION size_t mul_chunk(size_t superblock_bytes, int family) {
    return superblock_bytes > 144 || family >= FAMILY_blocks ? 8 : 16;
}
SIZE_FUNCTION size_t mul_stages(size_t chunk_bytes) { return chunk_bytes > 1700 ? 2 : 3; }
/* Bytes of: for each token the values of 32 rows' superblocks, and x; for each warp the sums of a chunk's 32-blocks, by
 * token, after their scales and mins; the code book. */
SIZE_FUNCTION size_t mul_token_bytes(void) { return MUL_ROWS * (MUL_SUPERBLOCKS + 1) * 4 + MUL_SUPERBLOCKS * 292; }
SIZE_FUNCTION size_t mul_block_sums(size_t chunk, int family) {
    return family < FAMILY_blocks ? 0 : (family == FAMILY_blocks_16 ? 16 : 8) * (chunk + 1) * 4;
}
SIZE_FUNCTION size_t mul_grid_bytes(int type) {
    return type == MS4_TYPE_iq2_xxs ? 2048 : type == MS4_TYPE_iq2_xs ? 4096 : type == MS4_TYPE_iq2_s ? 8192
         : type == MS4_TYPE_iq3_xxs ? 1024 : type == MS4_TYPE_iq3_s ? 2048
         : type == MS4_TYPE_iq1_s || type == MS4_TYPE_iq1_m ? 4096 : 0;
}
/* n_tokens: the most of any job. */
SIZE_FUNCTION size_t mul_shared(int type, int32_t n_tokens) {
    const struct { int bytes, family; } of[] = {
#define X(name, id, weights, bytes, family, ...) { bytes * SUPERBLOCK / weights, FAMILY_##family },
        MS4_TYPES(X)
#undef X
    };
    const size_t bytes = (size_t)of[type].bytes, tokens = (size_t)(n_tokens < MUL_TOKENS ? n_tokens : MUL_TOKENS);
    const size_t chunk = mul_chunk(bytes, of[type].family);
    const size_t sums = (2 + tokens) * mul_block_sums(chunk, of[type].family);
    const size_t warp = mul_stages(chunk * bytes) * (chunk * bytes + 16) + sums;      /* a row is read a word too far */
    return type <= MS4_TYPE_bf16 ? 0 : MUL_THREADS / 32 * warp + tokens * mul_token_bytes() + mul_grid_bytes(type);
}
#define GEMM_SHARED 38656
static inline size_t gemm_shared(int type) { return is_float_type(type) ? 0 : GEMM_SHARED; }
#define SEGMENT_ROOM 12800     /* scores, weights and sums of ATTEND_HEADS heads and a segment */
#define TENSOR_RANK 256        /* attention uses tensor cores for this shape */
#define TENSOR_ROPE 64
#define tensor_shape(rank, d_rope) ((rank) == TENSOR_RANK && (d_rope) == TENSOR_ROPE)
#define MMA_SEGMENT_ROOM 97856 /* keys, scales, queries, weights and units of a segment */
static inline size_t segments_shared(int32_t rank, int32_t d_rope) {
    return tensor_shape(rank, d_rope) ? MMA_SEGMENT_ROOM : SEGMENT_ROOM;
}
#define MMA_TILE_ROOM 101376   /* keys, scales, weights and sums of ATTEND_TILE rows */
static inline size_t attend_rows_shared(int32_t rank, int32_t d_rope) {
    return tensor_shape(rank, d_rope) ? MMA_TILE_ROOM
                                      : SEGMENT_ROOM + 512 + sizeof(float) * ATTEND_HEADS * (size_t)rank;
}
#define NORM_STAGED 16384      /* floats of a row that is kept in shared memory */
static inline size_t norm_shared(int32_t width) {
    return sizeof(float) * (64 + (width <= NORM_STAGED ? ((size_t)width + 3) / 4 * 4 : 0));
}
#endif
