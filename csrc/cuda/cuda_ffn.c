/* cuda_ffn.c -- feed-forward networks: the router's choice, then gate, up and down of dense, shared or routed ones.
 *
 * All jobs of a share go together: gate and up, then the activation, then down.  A shared expert or dense layer is
 * added to H at once; results of routed experts wait a row a pair, in PAIRS where other devices bring some of them,
 * else in memory of our own, and are added by one kernel in ascending order of the experts (device.h).
 */
#include "cpu/cpu_device.h"
#include "cuda/cuda_device.h"
#include "memory.h"
#include <string.h>

/* --- choosing ---------------------------------------------------------------------------------------------------- */
/* Pinned memory for n pairs: ids, then weights, rows and tokens.  Where it is not pinned, kernels do not see it, and
 * the router's choice comes by way of as much memory on the card. */
static int room_chosen(cuda_device *d, size_t n) {
    TRY(gpu_pinned(d->g, &d->chosen, 4 * n * sizeof *d->ids));
    d->ids = d->chosen.at;
    d->pairs_here = (cuda_pairs){ (float *)(d->ids + n), d->ids + 2 * n, d->ids + 3 * n };
    d->sees_pairs = gpu_is_pinned(d->g, d->chosen.at);
    return d->sees_pairs ? MS4_OK : gpu_need(d->g, &d->routing, 4 * n * sizeof *d->ids);
}
/* What kernels read of the choice: where it lies, if it is short, else a copy on the card. */
static int show_pairs(cuda_device *d, const picks *p) {
    enum { SHORT = 64 };
    const size_t n = (size_t)p->n * (size_t)p->k;
    memcpy(d->pairs_here.row, p->row, n * sizeof *p->row);
    memcpy(d->pairs_here.token, p->token, n * sizeof *p->token);
    d->pairs_seen = d->pairs_here;
    if (n <= SHORT && d->sees_pairs) return MS4_OK;
    TRY(gpu_need(d->g, &d->routing, 3 * n * sizeof(int32_t)));
    int32_t *card = d->routing.at;
    d->pairs_seen = (cuda_pairs){ (float *)card, card + n, card + 2 * n };
    return gpu_show(d->g, card, d->pairs_here.weight, 3 * n * sizeof *card);
}
/* X of few rows comes along with the choice: another device may need it, and then nobody has to wait once more. */
static int bring_x(cuda_device *d, int32_t n) {
    enum { FEW = 8 };
    const cuda_rows *x = &d->rows[BUF_X];
    const size_t bytes = (size_t)n * x->blocks * sizeof *x->q;
    d->x_here = NULL;
    if (!d->rows[BUF_PAIRS].width || !x->q || n > FEW) return MS4_OK;
    TRY(gpu_pinned(d->g, &d->x_pinned, bytes));
    TRY(gpu_fetch(d->g, d->x_pinned.at, x->q, bytes));
    d->x_here = d->x_pinned.at;
    return MS4_OK;
}
static int choose(cuda_device *d, const ms4_shape *s, const picks *p, int32_t *ids) {
    const choose_args args = {
        .logits = cuda_row(d, BUF_ROUTER, 0), .ids = ids, .weights = (float *)(ids + (size_t)p->n * (size_t)p->k),
        .stride = d->rows[BUF_ROUTER].width, .n = p->n, .n_expert = s->n_expert, .k = p->k, .norm = s->router_norm,
        .scale = s->router_scale };
    return gpu_launch(d->g, KERNEL_choose_experts, &args, (gpu_grid){ p->n, 1, 1 }, 0);
}
/* What came home: ids that are none would be places outside the host's tables. */
static int take_picks(const ms4_shape *s, const int32_t *ids, const float *weights, picks *p) {
    const size_t n = (size_t)p->n * (size_t)p->k;
    for (size_t i = 0; i < n; i++)
        FAIL_IF(ids[i] < 0 || ids[i] >= s->n_expert, MS4_EDEVICE,
                "the GPU failed: it chose expert %d of %d; --device cpu works without it", ids[i], s->n_expert);
    memcpy(p->expert, ids, n * sizeof *p->expert);
    memcpy(p->weight, weights, n * sizeof *p->weight);
    picks_group(p, s->n_expert);
    return MS4_OK;
}
static int route(cuda_device *d, const ms4_shape *s, picks *p) {
    const size_t n = (size_t)p->n * (size_t)p->k;
    TRY(room_chosen(d, n));
    int32_t *ids = d->sees_pairs ? d->ids : d->routing.at;
    TRY(choose(d, s, p, ids));
    if (!d->sees_pairs) TRY(gpu_fetch(d->g, d->ids, ids, 2 * n * sizeof *ids));
    TRY(bring_x(d, p->n));
    TRY(gpu_wait(d->g));
    TRY(take_picks(s, d->ids, d->pairs_here.weight, p));
    return show_pairs(d, p);
}
/* --- a share ----------------------------------------------------------------------------------------------------- */
/* One FFN and the rows that go through it: those of `tokens` (NULL: x_row and the following). */
typedef struct {
    const ffn_weights *w;
    const int32_t *tokens;
    float *gate, *up, *y;
    uint8_t *hidden;                                          /* floats or blocks, as down wants them */
    size_t hidden_bytes;                                      /* of a row */
    int32_t x_row, n, add;
    const ffn_ahead *ahead;                                   /* not NULL: the card chose it, w says what it is like */
    const int32_t *expert;                                    /* there */
} ffn_job;
static int takes_blocks(const ffn_job *j) { return matrix_quantized(&j->w->down); }
static size_t width_of(const ffn_job *j) { return (size_t)j->w->gate.n_rows; }
/* May their activations be computed in one go? */
static int alike(const ffn_job *a, const ffn_job *b) {
    return width_of(a) == width_of(b) && takes_blocks(a) == takes_blocks(b) && a->w->gelu == b->w->gelu;
}
/* Gives every job its rows, side by side where jobs are alike. */
static int place(cuda_device *d, ffn_job *jobs, int32_t n_jobs) {
    size_t floats = 0, bytes = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass) {
            TRY(gpu_need(d->g, &d->gate, floats * sizeof(float)));
            TRY(gpu_need(d->g, &d->up, floats * sizeof(float)));
            TRY(gpu_need(d->g, &d->hidden, bytes));
        }
        floats = bytes = 0;
        for (ffn_job *j = jobs; j < jobs + n_jobs; j++) {
            const size_t width = width_of(j);
            if (j > jobs && !alike(j - 1, j)) bytes = (bytes + 63) / 64 * 64;
            j->hidden_bytes = takes_blocks(j) ? blocks_of(width) * sizeof(block_q8) : width * sizeof(float);
            j->gate = (float *)d->gate.at + (pass ? floats : 0);
            j->up = (float *)d->up.at + (pass ? floats : 0);
            j->hidden = (uint8_t *)d->hidden.at + (pass ? bytes : 0);
            floats += (size_t)j->n * width;
            bytes += (size_t)j->n * j->hidden_bytes;
        }
    }
    return MS4_OK;
}
/* The matrix is that of an expert which the card chose, so many bytes behind where that begins. */
static void in_slot(gpu_product *p, const ffn_job *j, size_t bytes) {
    if (!j->expert) return;
    p->job.w = NULL;
    p->job.slots = j->ahead->slots;
    p->job.expert = j->expert;
    p->job.in_slot = bytes;
}
static gpu_product from_x(const cuda_device *d, const matrix *m, const ffn_job *j, float *y) {
    const cuda_rows *x = &d->rows[BUF_X];
    const int quantized = matrix_quantized(m);
    gpu_product p = cuda_product(m, quantized ? (const void *)cuda_blocks(d, BUF_X, j->x_row)
                                              : (const void *)cuda_row(d, BUF_X, j->x_row),
                                 quantized ? x->blocks * sizeof *x->q : x->width * sizeof *x->f, y, width_of(j), j->n);
    p.job.x_rows = j->tokens;
    return p;
}
static int gate_and_up(cuda_device *d, const ffn_job *jobs, int32_t n_jobs) {
    TRY(cuda_room_products(d, 2 * n_jobs));
    for (int32_t i = 0; i < n_jobs; i++) {
        d->products[2 * i] = from_x(d, &jobs[i].w->gate, &jobs[i], jobs[i].gate);
        d->products[2 * i + 1] = from_x(d, &jobs[i].w->up, &jobs[i], jobs[i].up);
        in_slot(&d->products[2 * i], &jobs[i], 0);
        in_slot(&d->products[2 * i + 1], &jobs[i], jobs[i].expert ? jobs[i].ahead->up_at : 0);
    }
    return gpu_products(d->g, d->products, 2 * n_jobs);
}
static int activate(cuda_device *d, const ffn_job *jobs, int32_t n_jobs) {
    for (int32_t i = 0, end; i < n_jobs; i = end) {
        const ffn_job *j = &jobs[i];
        int32_t n = 0;
        for (end = i; end < n_jobs && alike(j, &jobs[end]); end++) n += jobs[end].n;
        const act_args args = { .gate = j->gate, .up = j->up, .f = takes_blocks(j) ? NULL : (float *)(void *)j->hidden,
                                .q = takes_blocks(j) ? (block_q8 *)(void *)j->hidden : NULL,
                                .blocks = blocks_of(width_of(j)), .n = n, .width = (int32_t)width_of(j),
                                .gelu = j->w->gelu };
        TRY(gpu_launch(d->g, KERNEL_act_rows, &args, (gpu_grid){ n, 1, 1 }, 0));
    }
    return MS4_OK;
}
static int down(cuda_device *d, const ffn_job *jobs, int32_t n_jobs) {
    for (int32_t i = 0; i < n_jobs; i++) {
        const ffn_job *j = &jobs[i];
        d->products[i] = cuda_product(&j->w->down, j->hidden, j->hidden_bytes, j->y, d->rows[BUF_H].width, j->n);
        d->products[i].job.add = j->add;
        in_slot(&d->products[i], j, j->expert ? j->ahead->down_at : 0);
    }
    return gpu_products(d->g, d->products, n_jobs);
}
static int add_pairs(cuda_device *d, const picks *p, const float *pairs) {
    const sum_args args = { .h = cuda_row(d, BUF_H, 0), .pairs = pairs, .weight = d->pairs_seen.weight,
                            .row = d->pairs_seen.row, .stride = d->rows[BUF_H].width, .n = p->n, .k = p->k,
                            .width = (int32_t)d->rows[BUF_H].width };
    return gpu_launch(d->g, KERNEL_sum_pairs, &args, (gpu_grid){ p->n, 1, 1 }, 0);
}
static int run_jobs(cuda_device *d, ffn_job *jobs, int32_t n_jobs) {
    TRY(place(d, jobs, n_jobs));
    TRY(gate_and_up(d, jobs, n_jobs));
    TRY(activate(d, jobs, n_jobs));
    return down(d, jobs, n_jobs);
}
static ffn_job job_of(const cuda_device *d, const ffn_group *g, const ffn_weights *w, float *pairs) {
    return (ffn_job){ .w = w, .tokens = d->pairs_seen.token + g->first, .n = g->n,
                      .y = pairs + (size_t)g->first * d->rows[BUF_H].width };
}
/* --- a single token: the card goes on while the host hears of the choice ----------------------------------------- */
/* What the card tells: the flag, then ids and weights, then X, if another device may want it; pinned memory. */
typedef struct { atomic_int *flag; int32_t *ids; float *weights; block_q8 *x; } told;
static int room_told(cuda_device *d, size_t k, told *out) {
    const size_t at = (64 + 2 * k * sizeof(int32_t) + 63) / 64 * 64;
    TRY(gpu_pinned(d->g, &d->told, at + d->rows[BUF_X].blocks * sizeof(block_q8)));
    uint8_t *base = d->told.at;
    int32_t *ids = (int32_t *)(void *)(base + 64);
    *out = (told){ (atomic_int *)(void *)base, ids, (float *)(ids + k), (block_q8 *)(void *)(base + at) };
    return MS4_OK;
}
static int tell(cuda_device *d, const picks *p, const int32_t *ids, const told *to) {
    const size_t bytes = d->rows[BUF_PAIRS].width ? d->rows[BUF_X].blocks * sizeof(block_q8) : 0;
    const tell_args args = { .ids = ids, .weights = (const float *)(ids + p->k), .x = d->rows[BUF_X].q,
                             .told_ids = to->ids, .told_weights = to->weights, .told_x = to->x,
                             .flag = (int32_t *)(void *)to->flag, .k = p->k, .words = (int32_t)(bytes / 16) };
    d->x_here = bytes ? to->x : NULL;
    return gpu_launch(d->g, KERNEL_tell_choice, &args, (gpu_grid){ 1, 1, 1 }, 0);
}
/* The shared expert, and those of the chosen that lie here. */
static int begin_ahead(cuda_device *d, const ffn_ahead *a, const picks *p, const int32_t *ids) {
    const size_t width = d->rows[BUF_H].width;
    int32_t n = 0;
    if (!d->rows[BUF_PAIRS].width) TRY(gpu_need(d->g, &d->pairs, (size_t)p->k * width * sizeof(float)));
    float *pairs = d->rows[BUF_PAIRS].width ? cuda_row(d, BUF_PAIRS, 0) : d->pairs.at;
    ffn_job *jobs = memory_take((size_t)p->k + 1, sizeof *jobs);
    FAIL_IF(!jobs, MS4_ENOMEM, "no memory for the products of a step");
    if (a->every) jobs[n++] = (ffn_job){ .w = a->every, .n = 1, .add = 1, .y = cuda_row(d, BUF_H, 0) };
    for (int32_t i = 0; i < p->k; i++)
        jobs[n++] = (ffn_job){ .w = &a->experts, .ahead = a, .expert = ids + i, .n = 1,
                               .y = pairs + (size_t)i * width };
    int status = run_jobs(d, jobs, n);
    memory_give(jobs);
    d->ahead = status ? NULL : pairs;
    return status;
}
static size_t choice_at(int32_t layer, int32_t k) { return 2 * (size_t)layer * (size_t)k; }

/* to NULL: nobody waits to hear of it. */
static int route_ahead(cuda_device *d, const ms4_shape *s, const ffn_ahead *a, picks *p, const told *to) {
    int32_t *ids = (int32_t *)d->choice.at + choice_at(a->layer, p->k);
    if (to) atomic_store(to->flag, 0);
    TRY(choose(d, s, p, ids));
    if (to) TRY(tell(d, p, ids, to));
    TRY(begin_ahead(d, a, p, ids));
    d->pairs_seen = (cuda_pairs){ .weight = (float *)(ids + p->k) };
    if (!to) {
        p->late = d->late = 1;
        return MS4_OK;
    }
    TRY(gpu_poll(d->g, to->flag));
    gpu_stretch(d->g, a->layer + 1);
    return take_picks(s, to->ids, to->weights, p);
}
int cuda_route(device *base, const ms4_shape *s, const ffn_ahead *ahead, picks *p) {
    cuda_device *d = (cuda_device *)base;
    told to;
    d->ahead = NULL;
    p->late = 0;
    if (gpu_is_taping(d->g) && ahead->slots) {
        const size_t bytes = choice_at(s->n_layer, p->k) * sizeof *p->expert;
        TRY(gpu_need(d->g, &d->choice, bytes));
        TRY(gpu_pinned(d->g, &d->choices, bytes));
        if (ahead->all) return route_ahead(d, s, ahead, p, NULL);
        TRY(room_told(d, (size_t)p->k, &to));
        if (gpu_is_pinned(d->g, d->told.at)) return route_ahead(d, s, ahead, p, &to);
    }
    TRY(gpu_tape(d->g, 0));                                   /* what comes now depends on the choice */
    return route(d, s, p);
}
/* All layers at once, behind the last of them. */
int cuda_bring_choices(cuda_device *d) {
    if (!d->late) return MS4_OK;
    d->late = 0;
    return gpu_fetch(d->g, d->choices.at, d->choice.at, d->choice.bytes);
}
int cuda_recall(device *base, const ms4_shape *s, int32_t layer, picks *p) {
    const cuda_device *d = (const cuda_device *)base;
    const int32_t *ids = (const int32_t *)d->choices.at + choice_at(layer, p->k);
    p->n = 1;
    p->late = 0;
    return take_picks(s, ids, (const float *)(ids + p->k), p);
}
/* --- experts that do not stay ------------------------------------------------------------------------------------- */
static size_t aligned(const matrix *m) { return ((size_t)matrix_bytes(m) + 255) / 256 * 256; }
static size_t group_bytes(const ffn_group *g) { return aligned(&g->w.gate) + aligned(&g->w.up) + aligned(&g->w.down); }

/* Two places in turn: while the card computes with what is in one, the next expert is on its way to the other. */
static int stream_one(cuda_device *d, const ffn_group *g, float *pairs) {
    const int32_t at = d->next_place;
    uint8_t *to = (uint8_t *)d->streamed.at + (at ? d->streamed.bytes / 512 * 256 : 0);
    ffn_weights w = g->w;
    matrix *parts[] = { &w.gate, &w.up, &w.down };
    for (int i = 0; i < 3; i++) gpu_pin_there(d->g, parts[i]->data, (size_t)matrix_bytes(parts[i]));
    if (d->was_used[at]) TRY(gpu_hold(d->g, d->used[at]));
    TRY(gpu_brought(d->g, d->begun[at]));
    d->bringing = 1;
    for (int i = 0; i < 3; to += aligned(parts[i]), i++) {
        TRY(gpu_bring(d->g, to, parts[i]->data, (size_t)matrix_bytes(parts[i])));
        parts[i]->data = to;
    }
    TRY(gpu_brought(d->g, d->arrived[at]));
    d->streamed_bytes[at] = group_bytes(g);
    TRY(gpu_await(d->g, d->arrived[at]));
    ffn_job job = job_of(d, g, &w, pairs);
    TRY(run_jobs(d, &job, 1));
    TRY(gpu_worked(d->g, d->used[at]));
    d->was_used[at] = 1;
    d->next_place = !at;
    return MS4_OK;
}
/* How long the last ones took, once they are there: all work of the layer before has been waited for. */
static int time_streamed(cuda_device *d) {
    for (int i = 0; i < 2; i++) {
        int over = 0;
        if (d->streamed_bytes[i]) TRY(gpu_is_over(d->g, d->arrived[i], &over));
        if (over) TRY(gpu_time(d->g, d->begun[i], d->arrived[i], d->streamed_bytes[i]));
        if (over) d->streamed_bytes[i] = 0;
    }
    return MS4_OK;
}
static int stream(cuda_device *d, const ffn_share *share, float *pairs) {
    size_t bytes = 0;
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        if (g->away && group_bytes(g) > bytes) bytes = group_bytes(g);
    if (!bytes) return MS4_OK;
    for (int i = 0; i < 2 && !d->used[i]; i++) {
        TRY(gpu_clock(d->g, &d->begun[i]));
        TRY(gpu_clock(d->g, &d->arrived[i]));
        TRY(gpu_event(d->g, &d->used[i]));
    }
    if (!d->asked) TRY(gpu_event(d->g, &d->asked));
    TRY(time_streamed(d));
    TRY(gpu_need(d->g, &d->streamed, 2 * bytes));
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        if (g->away && !cuda_stopped(d)) TRY(stream_one(d, g, pairs));
    return MS4_OK;
}
/* Events of single copies would not do: where something failed, none may be behind the last one. */
int cuda_brought(device *base) {
    cuda_device *d = (cuda_device *)base;
    if (!d->bringing) return MS4_OK;
    TRY(gpu_brought(d->g, d->asked));
    TRY(gpu_until(d->g, d->asked));
    d->bringing = 0;
    return MS4_OK;
}
/* --- the whole ---------------------------------------------------------------------------------------------------- */
int cuda_ffn(device *base, const ffn_share *share, const picks *p) {
    cuda_device *d = (cuda_device *)base;
    const size_t width = d->rows[BUF_H].width;
    int32_t n_jobs = 0;
    if (cuda_stopped(d)) return MS4_OK;
    if (d->ahead) {                                           /* one row, for which no expert is brought */
        float *pairs = d->ahead;
        d->ahead = NULL;
        return share->whole ? add_pairs(d, p, pairs) : MS4_OK;
    }
    if (share->whole && share->n_groups)
        TRY(gpu_need(d->g, &d->pairs, (size_t)p->n * (size_t)p->k * width * sizeof(float)));
    ffn_job *jobs = memory_take((size_t)share->n_groups + 1, sizeof *jobs);
    FAIL_IF(!jobs, MS4_ENOMEM, "no memory for the products of a step");
    float *pairs = share->whole ? d->pairs.at : cuda_row(d, BUF_PAIRS, 0);
    if (share->every)
        jobs[n_jobs++] = (ffn_job){ .w = share->every, .x_row = share->row, .n = share->n, .add = 1,
                                    .y = cuda_row(d, BUF_H, share->row) };
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        if (!g->away) jobs[n_jobs++] = job_of(d, g, &g->w, pairs);
    int status = run_jobs(d, jobs, n_jobs);
    memory_give(jobs);
    if (!status) status = stream(d, share, pairs);
    if (!status && share->whole && share->n_groups) status = add_pairs(d, p, pairs);
    return status;
}
/* --- with the CPU ------------------------------------------------------------------------------------------------ */
/* The other device is the CPU's: it alone computes what is not on the card. */
int cuda_send(device *base, device *other, const ffn_share *share, const picks *p) {
    cuda_device *d = (cuda_device *)base;
    const cuda_rows *x = &d->rows[BUF_X];
    const cpu_rows *to = &((cpu_device *)other)->rows[BUF_X];
    int floats = 0, blocks = 0;
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++) {
        blocks |= matrix_quantized(&g->w.gate) || matrix_quantized(&g->w.up);
        floats |= !matrix_quantized(&g->w.gate) || !matrix_quantized(&g->w.up);
    }
    const size_t bytes = (size_t)p->n * x->blocks * sizeof *x->q;
    if (blocks && d->x_here) memcpy(to->q, d->x_here, bytes);
    else if (blocks) TRY(gpu_download(d->g, to->q, x->q, bytes));
    return floats ? gpu_download(d->g, to->f, x->f, (size_t)p->n * x->width * sizeof *x->f) : MS4_OK;
}
/* The rows of a single token: nobody writes to `brought` again before the card has told of the choice of a layer to
 * come, and so has read it. */
static int fetch_few(cuda_device *d, const cpu_device *from, const ffn_share *share) {
    const size_t width = d->rows[BUF_PAIRS].width;
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++) {
        float *row = (float *)d->brought.at + (size_t)g->first * width;
        memcpy(row, cpu_row(from, BUF_PAIRS, g->first), width * sizeof *row);
        TRY(gpu_show(d->g, cuda_row(d, BUF_PAIRS, g->first), row, width * sizeof *row));
    }
    return MS4_OK;
}
int cuda_fetch(device *base, device *other, const ffn_share *share) {
    cuda_device *d = (cuda_device *)base;
    const cpu_device *from = (const cpu_device *)other;
    const size_t row_bytes = d->rows[BUF_PAIRS].width * sizeof(float);
    if (gpu_is_taping(d->g)) return fetch_few(d, from, share);
    for (const ffn_group *g = share->groups; g < share->groups + share->n_groups; g++)
        TRY(gpu_upload(d->g, cuda_row(d, BUF_PAIRS, g->first), cpu_row(from, BUF_PAIRS, g->first),
                       (size_t)g->n * row_bytes));
    return MS4_OK;
}
int cuda_sum_pairs(device *base, const picks *p) {
    cuda_device *d = (cuda_device *)base;
    return cuda_stopped(d) ? MS4_OK : add_pairs(d, p, cuda_row(d, BUF_PAIRS, 0));
}
