/* cuda_attend.c -- latents into the kv cache, queries, and attention over the cache (SPEC 2.2, 2.3).
 *
 * Absorbed form, as on the CPU (run_attend.c): W_uk folds queries into the space of the latents, W_uv brings back what
 * they collect.  On the card both are matrices of floats, a slice a head (cuda_weights.c).  Spans of few rows attend
 * segment by segment, folded afterwards, so that one row has blocks enough; those of many in tiles of rows that fold on
 * the way.  The numbers are the same.
 */
#include "cuda/cuda_device.h"
#include "memory.h"
#include <string.h>

#define FEW 8                                                 /* rows from which a span goes in tiles */

/* --- what the rows of a step need -------------------------------------------------------------------------------- */
static int32_t segments_of(int32_t n_keys) { return (n_keys + SEGMENT_KEYS - 1) / SEGMENT_KEYS; }

/* The parts of the tables in one piece of memory: where they begin, at `at` on the card and in host memory. */
typedef struct {
    float *rope, *scale;
    kv_place *places;
    kv_span *spans;
    const uint8_t **blocks;
    int32_t *row_span;
    attend_tile *tiles;
} tables_at;
static size_t lay_out(const step *st, const void *at, tables_at *out) {
    const size_t n = (size_t)st->n;
    size_t n_blocks = 0, used = 0;
    for (int32_t i = 0; i < st->n_spans; i++) n_blocks += (size_t)segments_of(st->spans[i].pos + st->spans[i].n);
#define PART(name, count) \
    out->name = (void *)((uintptr_t)at + used); \
    used += ((count) * sizeof *out->name + 15) / 16 * 16
    PART(places, n);
    PART(blocks, n_blocks);
    PART(spans, (size_t)st->n_spans);
    PART(tiles, n);
    PART(row_span, n);
    PART(scale, n);
    PART(rope, n * (size_t)st->shape->d_rope);
#undef PART
    return used;
}
/* Cuts a span of many rows into tiles. */
static void tile(const span *sp, int32_t index, attend_tile *tiles, int32_t *n_tiles) {
    for (int32_t t = 0; t < sp->n; t += ATTEND_TILE)
        tiles[(*n_tiles)++] = (attend_tile){ index, sp->first + t, int_min(ATTEND_TILE, sp->n - t) };
}
/* Adds a span of few rows to the run of such spans before it, unless their results would take too much room. */
static void add_short(cuda_device *d, const step *st, const span *sp) {
    const int32_t most = segments_of(sp->pos + sp->n);
    const size_t of_segment = (size_t)st->shape->n_head * ((size_t)st->shape->kv_rank + 2) * sizeof(float);
    cuda_short *last = d->n_shorts ? &d->shorts[d->n_shorts - 1] : NULL;
    if (last && last->first + last->n == sp->first) {
        const int32_t both = most > last->most ? most : last->most;
        if ((size_t)(last->n + sp->n) * (size_t)both * of_segment <= d->partial_bytes) {
            last->n += sp->n;
            last->most = both;
            return;
        }
    }
    d->shorts[d->n_shorts++] = (cuda_short){ sp->first, sp->n, most };
}
static void fill_span(cuda_device *d, const step *st, int32_t index, const tables_at *host,
                      const uint8_t *const *blocks, size_t *n_blocks) {
    const span *sp = &st->spans[index];
    const int32_t n_segments = sp->n ? segments_of(sp->pos + sp->n) : 0;
    host->spans[index] = (kv_span){ blocks + *n_blocks, sp->first, sp->n, sp->pos, 0 };
    for (int32_t i = 0; i < n_segments; i++) host->blocks[(*n_blocks)++] = kv_cache_block(sp->kv, i);
    for (int32_t t = 0; t < sp->n; t++) {
        const int32_t pos = sp->pos + t;
        host->row_span[sp->first + t] = index;
        host->places[sp->first + t] = (kv_place){ kv_cache_block(sp->kv, pos / SEGMENT_KEYS), pos % SEGMENT_KEYS, 0 };
    }
    if (sp->n >= FEW) tile(sp, index, host->tiles, &d->tables.n_tiles);
    else if (sp->n) add_short(d, st, sp);
}
static int room_shorts(cuda_device *d, int32_t n) {
    if (n <= d->room_shorts) return MS4_OK;
    memory_give(d->shorts);
    d->room_shorts = 0;
    d->shorts = memory_take((size_t)n, sizeof *d->shorts);
    FAIL_IF(!d->shorts, MS4_ENOMEM, "no memory for a step");
    d->room_shorts = n;
    return MS4_OK;
}
static int tables(cuda_device *d, const step *st) {
    cuda_tables *t = &d->tables;
    tables_at host, card;
    size_t n_blocks = 0;
    if (t->ready) return MS4_OK;
    const size_t bytes = lay_out(st, NULL, &card);
    TRY(room_shorts(d, st->n_spans));
    TRY(gpu_need(d->g, &t->room, (bytes + 4095) / 4096 * 4096));      /* a token more is not to move it */
    uint8_t *built = memory_take(bytes, 1);
    FAIL_IF(!built, MS4_ENOMEM, "no memory for a step; use a smaller batch");
    lay_out(st, built, &host);
    lay_out(st, t->room.at, &card);
    t->n_tiles = d->n_shorts = 0;
    for (int32_t i = 0; i < st->n_spans; i++) fill_span(d, st, i, &host, card.blocks, &n_blocks);
    memcpy(host.scale, st->scale, (size_t)st->n * sizeof *st->scale);
    memcpy(host.rope, st->rope, (size_t)st->n * (size_t)st->shape->d_rope * sizeof *st->rope);
    int status = gpu_upload_first(d->g, t->room.at, built, bytes);
    memory_give(built);
    t->rope = card.rope;
    t->scale = card.scale;
    t->places = card.places;
    t->spans = card.spans;
    t->row_span = card.row_span;
    t->tiles = card.tiles;
    t->ready = !status;
    return status;
}
/* --- rows -------------------------------------------------------------------------------------------------------- */
static size_t layer_offset(const step *st, int32_t layer) { return kv_cache_layer_offset(st->spans[0].kv, layer); }

int cuda_latents(device *base, const step *st, int32_t layer, const vector *norm, float eps) {
    cuda_device *d = (cuda_device *)base;
    TRY(tables(d, st));
    const latents_args args = { cuda_row(d, BUF_KV, 0), norm->data, d->tables.rope, d->tables.places,
                                d->rows[BUF_KV].width, layer_offset(st, layer), st->n, st->shape->kv_rank,
                                st->shape->d_rope, eps };
    return gpu_launch(d->g, KERNEL_latents_rows, &args, (gpu_grid){ st->n, 1, 1 }, 0);
}
int cuda_queries(device *base, const step *st) {
    cuda_device *d = (cuda_device *)base;
    TRY(tables(d, st));
    const queries_args args = { cuda_row(d, BUF_Q, 0), d->tables.rope, d->tables.scale, d->rows[BUF_Q].width, st->n,
                                st->shape->n_head, st->shape->d_nope, st->shape->d_rope };
    return gpu_launch(d->g, KERNEL_queries_rows, &args, (gpu_grid){ st->n, 1, 1 }, 0);
}
/* --- attention --------------------------------------------------------------------------------------------------- */
typedef struct { const float *x; size_t x_stride, x_step; float *y; size_t y_stride, y_step; } by_head;
/* One product a head: its slice of m, of x and of y; strides from row to row, steps from head to head, in floats. */
static int mul_heads(cuda_device *d, const matrix *m, int32_t n_head, const by_head *at, int32_t n) {
    TRY(cuda_room_products(d, n_head));
    for (int32_t h = 0; h < n_head; h++) {
        const matrix slice = matrix_rows(m, h, 0, m->n_rows);
        d->products[h] = cuda_product(&slice, at->x + (size_t)h * at->x_step, at->x_stride * sizeof(float),
                                      at->y + (size_t)h * at->y_step, at->y_stride, n);
    }
    return gpu_products(d->g, d->products, n_head);
}
/* Runs of spans of few rows: their results by segment, then folded, to x. */
static int attend_short(cuda_device *d, const step *st, int32_t layer, const cuda_short *run, float *x) {
    const ms4_shape *s = st->shape;
    const size_t heads = (size_t)s->n_head, rank = (size_t)s->kv_rank, first = (size_t)run->first * heads;
    const cuda_tables *t = &d->tables;
    const size_t most = ((size_t)run->most + 7) / 8 * 8;      /* nor is a segment more to move this */
    TRY(gpu_need(d->g, &d->partial, (size_t)run->n * most * heads * (rank + 2) * sizeof(float)));
    const segments_args args = {
        .q = (int16_t *)d->queries.at + first * (rank + (size_t)s->d_rope), .q_d = (float *)d->queries_d.at + 2 * first,
        .spans = t->spans, .row_span = t->row_span + run->first, .partial = d->partial.at,
        .layer_offset = layer_offset(st, layer), .first = run->first, .n = run->n, .n_head = s->n_head,
        .rank = s->kv_rank, .d_rope = s->d_rope, .most = run->most };
    const fold_args fold = { .partial = d->partial.at, .x = x + first * rank, .spans = t->spans,
                             .row_span = t->row_span + run->first, .first = run->first, .n = run->n,
                             .n_head = s->n_head, .rank = s->kv_rank, .most = run->most };
    TRY(gpu_launch(d->g, KERNEL_attend_segments, &args,
                   (gpu_grid){ run->most, run->n, (s->n_head + ATTEND_HEADS - 1) / ATTEND_HEADS },
                   segments_shared(s->kv_rank, s->d_rope)));
    return gpu_launch(d->g, KERNEL_fold_segments, &fold, (gpu_grid){ s->n_head, run->n, 1 }, 0);
}
static int attend_tiles(cuda_device *d, const step *st, int32_t layer, float *x) {
    const ms4_shape *s = st->shape;
    const attend_rows_args args = {
        .q = d->queries.at, .q_d = d->queries_d.at, .spans = d->tables.spans, .tiles = d->tables.tiles, .x = x,
        .layer_offset = layer_offset(st, layer), .n_tiles = d->tables.n_tiles, .n_head = s->n_head, .rank = s->kv_rank,
        .d_rope = s->d_rope };
    return gpu_launch(d->g, KERNEL_attend_rows, &args,
                      (gpu_grid){ args.n_tiles, (s->n_head + ATTEND_HEADS - 1) / ATTEND_HEADS, 1 },
                      attend_rows_shared(s->kv_rank, s->d_rope));
}
/* `latent` holds the absorbed queries until they are integers, and then what was collected. */
int cuda_attend(device *base, const step *st, int32_t layer, const matrix *k_b, const matrix *v_b) {
    cuda_device *d = (cuda_device *)base;
    const ms4_shape *s = st->shape;
    const size_t heads = (size_t)s->n_head, rank = (size_t)s->kv_rank, pairs = (size_t)st->n * heads;
    const size_t d_head = (size_t)(s->d_nope + s->d_rope), d_value = (size_t)s->d_value;
    if (cuda_stopped(d)) return MS4_OK;
    TRY(tables(d, st));
    TRY(gpu_need(d->g, &d->latent, pairs * rank * sizeof(float)));
    TRY(gpu_need(d->g, &d->queries, pairs * (rank + (size_t)s->d_rope) * sizeof(int16_t)));
    TRY(gpu_need(d->g, &d->queries_d, pairs * 2 * sizeof(float)));
    float *latent = d->latent.at;
    const by_head absorb = { cuda_row(d, BUF_Q, 0), heads * d_head, d_head, latent, heads * rank, rank };
    const by_head collect = { latent, heads * rank, rank, cuda_row(d, BUF_O, 0), heads * d_value, d_value };
    const query_16_args args = { latent, cuda_row(d, BUF_Q, 0), d->queries.at, d->queries_d.at, d->rows[BUF_Q].width,
                                 st->n, s->n_head, s->kv_rank, s->d_nope, s->d_rope, 0 };
    TRY(mul_heads(d, k_b, s->n_head, &absorb, st->n));
    TRY(gpu_launch(d->g, KERNEL_query_16_rows, &args, (gpu_grid){ s->n_head, st->n, 1 }, 0));
    for (int32_t i = 0; i < d->n_shorts; i++) TRY(attend_short(d, st, layer, &d->shorts[i], latent));
    TRY(attend_tiles(d, st, layer, latent));
    TRY(mul_heads(d, v_b, s->n_head, &collect, st->n));
    return cuda_quantize(d, BUF_O, 0, st->n);
}
