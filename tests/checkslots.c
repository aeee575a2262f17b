/* checkslots.c -- slots and the disk behind them, over files that are made up here: reads that come late, in any order,
 * and fail.  Whatever the budget, the shares and the timing, what is given was wanted, once, in order, holds the bytes
 * of its place in the file, and holds them until the next is asked for; the bytes in use never exceed the budget, but
 * for one expert while others are held.  Beside it a card takes experts that are held, and gives others for them.
 *
 *     checkslots SEED N_SEQUENCES         prints "ok", or the first thing that was wrong
 */
#define _GNU_SOURCE
#include "error.h"
#include "slots.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define N_LAYER 5
#define N_EXPERT 12
#define N_FILES 2
#define FILE_BYTES ((uint64_t)1 << 20)

/* --- the files: every byte follows from its place ------------------------------------------- */
static uint8_t *const base[N_FILES] = { (uint8_t *)0x10000000, (uint8_t *)0x20000000 };   /* nobody looks there */
static atomic_int failing, late;                              /* of 100 reads; longest delay in microseconds */
static _Atomic uint32_t noise;
static long traded, n_gone;

static uint8_t byte_at(int32_t file, uint64_t at) {
    uint64_t h = (at / 8 + 1) * 0x9e3779b97f4a7c15u ^ (uint64_t)file << 60;
    return (uint8_t)((h ^ h >> 29) >> at % 8 * 8);
}
static uint32_t any_number(void) {
    uint32_t x = atomic_fetch_add(&noise, 0x9e3779b9u);
    x = (x ^ x >> 16) * 0x85ebca6bu;
    return (x ^ x >> 13) * 0xc2b2ae35u >> 8;
}
int files_find(const files *f, const uint8_t *at, int32_t *index, uint64_t *offset) {
    (void)f;
    *index = at >= base[1];
    *offset = (uint64_t)(at - base[*index]);
    return 1;
}
const char *files_path(const files *f, int32_t index) {
    (void)f;
    return index ? "b.gguf" : "a.gguf";
}
int files_read(files *f, int32_t index, uint64_t *at, uint64_t end, uint8_t *to) {
    (void)f;
    const int delay = atomic_load(&late);
    if (*at % FILES_ALIGN || (uintptr_t)to % FILES_ALIGN || end > FILE_BYTES) abort();
    if (delay) usleep(any_number() % (uint32_t)delay);
    if ((int)(any_number() % 100) < atomic_load(&failing)) return EIO;
    for (uint64_t stop = (end + FILES_ALIGN - 1) / FILES_ALIGN * FILES_ALIGN; *at < stop; ++*at, to++) {
        *to = byte_at(index, *at);
        if (*at % 1024 == 0) sched_yield();
    }
    return 0;
}
/* --- the layers ------------------------------------------------------------------------------ */
static matrix matrix_at(uint8_t *data, size_t row_bytes, int32_t n_rows) {
    const size_t slice_bytes = row_bytes * (size_t)n_rows;
    return (matrix){ .data = data, .row_bytes = row_bytes, .slice_bytes = slice_bytes, .n_rows = n_rows };
}
/* Experts of three sizes, none of them a multiple of a block; layer 0 has none, and layer 3 gate and up in one. */
static void make_layers(layer_weights *w) {
    uint64_t at[N_FILES] = { 36, 4096 };
    memset(w, 0, N_LAYER * sizeof *w);
    for (int i = 1; i < N_LAYER; i++) {
        matrix *m[] = { &w[i].experts.gate, &w[i].experts.up, &w[i].experts.down };
        w[i].has_experts = 1;
        for (int j = 0; j < 3; j++) {
            const int file = (i + j) % N_FILES;
            *m[j] = matrix_at(base[file] + at[file], i == 2 ? 68 : 34, 40 + 10 * j * (i % 2));
            at[file] += m[j]->slice_bytes * N_EXPERT + 32;
        }
        if (i != 3) continue;
        *m[1] = *m[0];
        m[0]->slice_bytes = m[1]->slice_bytes = 2 * m[0]->slice_bytes;
        m[1]->data += m[0]->slice_bytes / 2;
        at[(i + 1) % N_FILES] += 2 * m[0]->slice_bytes * N_EXPERT;
        at[i % N_FILES] += 2 * m[0]->slice_bytes * N_EXPERT;
    }
}
enum { USED = 1, BACK };                                       /* given, and then in use or not any more */

/* --- the model ------------------------------------------------------------------------------- */
typedef struct {
    slots *s;
    layer_weights w[N_LAYER];
    uint64_t least, all, budget;
    int32_t ids[N_EXPERT], n, n_there, layer;
    uint8_t share[N_EXPERT], given[N_EXPERT];                  /* given: 0, USED, or BACK */
    int32_t held_layer, held;                                  /* an expert; layer 0: none is held */
    struct disk_job *job;                                      /* of what the card brings; NULL: nothing */
    ffn_weights to, from;
    pthread_t card;
} check;

static void wrong(const char *what) {
    printf("%s\n", what);
    exit(1);
}
/* Where a matrix begins; *file: in which. */
static uint64_t begin_of(const matrix *m, int32_t *file) {
    *file = m->data >= base[1];
    return (uint64_t)(m->data - base[*file]);
}
static void check_bytes(const check *c, int32_t layer, int32_t expert) {
    const matrix *m[] = { &c->w[layer].experts.gate, &c->w[layer].experts.up, &c->w[layer].experts.down };
    for (int32_t part = 0; part < 3; part++) {
        const uint8_t *at = slots_at(c->s, layer, expert, part);
        int32_t file;
        const uint64_t from = begin_of(m[part], &file) + (uint64_t)expert * m[part]->slice_bytes;
        if (from % 4 != (uintptr_t)at % 4) wrong("an expert lies at another alignment than in the file");
        for (uint64_t i = 0; i < matrix_bytes(m[part]); i++)
            if (at[i] != byte_at(file, from + i)) wrong("an expert holds other bytes than the file");
    }
}
static void check_count(const check *c) {
    slots_counts n;
    slots_count(c->s, &n);
    if (n.bytes > c->budget + (c->held_layer ? c->least : 0)) wrong("more bytes in use than the budget");
    if (n.bytes_there > n.bytes || n.n_hits > n.n_wanted) wrong("counts that cannot be");
}
/* What one call gave: ascending, wanted, of this share, and for the first time. */
static void check_given(check *c, int32_t share, const int32_t *ids, int32_t n) {
    int32_t place = 0;
    for (int32_t i = 0; i < n; i++) {
        while (place < c->n && c->ids[place] != ids[i]) place++;
        if (place == c->n) wrong("given in another order, or not wanted");
        if (c->share[place] != share) wrong("given to another share");
        if (c->given[place]) wrong("given twice");
        c->given[place] = USED;
    }
}
/* What has been given and not been taken back is still there. */
static void check_used(const check *c) {
    for (int32_t i = 0; i < c->n; i++)
        if (c->given[i] == USED) check_bytes(c, c->layer, c->ids[i]);
}
static void taken_back(check *c, int32_t share) {
    for (int32_t i = 0; i < c->n; i++)
        if (c->given[i] == USED && (share < 0 || c->share[i] == share)) c->given[i] = BACK;
}
static int32_t n_not_given(const check *c) {
    int32_t n = 0;
    for (int32_t i = 0; i < c->n; i++) n += c->given[i] == 0;
    return n;
}
/* Shares in any order, each given what it gets while others still hold theirs; who waits holds nothing. */
static int take_all(check *c, int32_t n_shares) {
    int32_t ids[N_EXPERT], n, left = 1;
    while (left) {
        for (uint32_t turn = 1 + any_number() % 5; turn > 0; turn--) {
            const int32_t share = (int32_t)(any_number() % (uint32_t)n_shares);
            taken_back(c, share);
            int status = slots_next(c->s, share, ids, &n);
            if (status) return status;
            check_given(c, share, ids, n);
            check_count(c);
            if (any_number() % 4 == 0) usleep(any_number() % 50);
            check_used(c);
        }
        taken_back(c, -1);
        int status = slots_wait(c->s, &left);
        if (status) return status;
        if (left != n_not_given(c)) wrong("another number is left than was not given");
    }
    return MS4_OK;
}
static void check_failure(int status) {
    const char *said = ms4_error();
    if (status != MS4_EIO || !strstr(said, ".gguf: layer ") || !strstr(said, ", expert ")
        || !strstr(said, " cannot be read at byte ") || !strstr(said, strerror(EIO))) wrong(said);
}
/* A layer of a step.  Returns whether it failed. */
static int one_layer(check *c, int32_t n_shares) {
    const int dense = any_number() % 3 == 0;                  /* as in a prompt */
    c->layer = 1 + (int32_t)(any_number() % (N_LAYER - 1));
    c->n = 0;
    for (int32_t i = 0; i < N_EXPERT; i++)
        if (any_number() % 8 < (dense ? 7 : 2)) {
            c->share[c->n] = (uint8_t)(any_number() % (uint32_t)n_shares);
            c->given[c->n] = 0;
            c->ids[c->n++] = i;
        }
    slots_want(c->s, c->layer, c->ids, n_shares > 1 || any_number() % 2 ? c->share : NULL, c->n, NULL, &c->n_there);
    if (n_shares == 1) memset(c->share, 0, sizeof c->share);
    if (dense && c->layer + 1 < N_LAYER) {
        static const int32_t every[N_EXPERT] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };
        slots_soon(c->s, c->layer + 1, every, N_EXPERT);
    } else slots_soon(c->s, 0, NULL, 0);
    const int status = take_all(c, n_shares);
    if (status) check_failure(status);
    slots_drop(c->s);
    c->n = 0;
    check_count(c);
    return status != MS4_OK;
}
/* --- the card -------------------------------------------------------------------------------- */
static void *bring(void *context) {
    check *c = context;
    const matrix *from[] = { &c->from.gate, &c->from.up, &c->from.down };
    const matrix *to[] = { &c->to.gate, &c->to.up, &c->to.down };
    const int good = any_number() % 4 > 0;
    usleep(any_number() % 200);
    for (int i = 0; i < 3 && good; i++) {
        int32_t file;
        const uint64_t at = begin_of(from[i], &file);
        uint8_t *out = (uint8_t *)(uintptr_t)to[i]->data;
        for (uint64_t b = 0; b < matrix_bytes(from[i]); b++) out[b] = byte_at(file, at + b);
    }
    slots_landed(c->s, c->job, good);
    return NULL;
}
static void let_land(check *c) {
    if (c->job) pthread_join(c->card, NULL);
    c->job = NULL;
}
/* What is held gets free again, or gives its place to another, which the card brings beside the next layers. */
static void one_trade(check *c) {
    const int32_t layer = 1 + (int32_t)(any_number() % (N_LAYER - 1)), expert = (int32_t)(any_number() % N_EXPERT);
    if (c->held_layer && any_number() % 2) {
        let_land(c);
        if (!slots_there(c->s, c->held_layer, c->held)) wrong("an expert that was held has gone");
        check_bytes(c, c->held_layer, c->held);
        c->to = c->from = ffn_expert(&c->w[layer].experts, expert);
        const int has_one = slots_there(c->s, layer, expert);
        if (any_number() % 3) c->job = slots_trade(c->s, c->held_layer, c->held, layer, expert, &c->to);
        else slots_release(c->s, c->held_layer, c->held);
        if (c->job && (has_one || slots_there(c->s, c->held_layer, c->held))) wrong("an expert has two places");
        if (c->job && pthread_create(&c->card, NULL, bring, c)) wrong("no thread");
        traded += c->job != NULL;
        c->held_layer = 0;
    } else if (!c->held_layer && slots_hold(c->s, layer, expert)) {
        c->held_layer = layer;
        c->held = expert;
    }
}
/* Memory goes back that nobody uses. */
static int leaves(void *context, const uint8_t *at, size_t bytes) {
    const check *c = context;
    for (int32_t i = 0; i < c->n; i++)
        for (int32_t part = 0; part < 3 && c->given[i] == USED; part++) {
            const uint8_t *used = slots_at(c->s, c->layer, c->ids[i], part);
            if (used >= at && used < at + bytes) wrong("memory goes back that is in use");
        }
    if (!bytes || bytes % FILES_ALIGN || (uintptr_t)at % FILES_ALIGN) wrong("other memory goes back than slots");
    n_gone++;
    return any_number() % 8 > 0;                               /* where it stays, it is used all the same */
}
static double any_value(const void *context, int32_t layer, int32_t expert) {
    (void)context; (void)layer; (void)expert;
    return any_number() % 5;
}
static void open_check(check *c) {
    ms4_shape shape = { .n_layer = N_LAYER, .n_expert = N_EXPERT };
    *c = (check){ 0 };
    make_layers(c->w);
    c->least = slots_least(&shape, c->w);
    c->all = slots_all(&shape, c->w);
    c->budget = any_number() % 2 ? c->least : c->all;
    if (any_number() % 4) c->budget = c->least + any_number() % (c->all - c->least + 1);
    if (slots_open(&shape, c->w, NULL, c->least - 1, &c->s) != MS4_ENOMEM) wrong("opened with less than the least");
    if (slots_open(&shape, c->w, NULL, c->budget, &c->s)) wrong(ms4_error());
    if (any_number() % 2) slots_rate(c->s, any_value, NULL);
    slots_watch(c->s, leaves, c);
}
int main(int argc, char **argv) {
    if (argc != 3) return 2;
    atomic_store(&noise, (uint32_t)strtoul(argv[1], NULL, 10));
    const long n = strtol(argv[2], NULL, 10);
    long failed = 0, layers = 0;
    check c;
    for (long done = 0; done < n;) {
        open_check(&c);
        for (int i = 0; i < 200 && done < n; i++, done++) {   /* a sequence is a token: some layers */
            atomic_store(&late, any_number() % 4 ? 0 : (int)(any_number() % 100));
            atomic_store(&failing, any_number() % 8 ? 0 : (int)(any_number() % 30));
            if (any_number() % 16 == 0) {
                c.budget = c.least + any_number() % (c.all - c.least + 1);
                slots_fit(c.s, c.budget);
                slots_counts now;
                slots_count(c.s, &now);                       /* what is being read goes when it is there */
                if (now.bytes > c.budget) c.budget = now.bytes;
            }
            one_trade(&c);
            for (uint32_t layer = any_number() % 4; layer < 4; layer++, layers++)
                failed += one_layer(&c, 1 + (int32_t)(any_number() % 3));
        }
        let_land(&c);
        slots_close(c.s);
    }
    if (traded < n / 100) wrong("hardly anything was traded");
    if (n_gone < n / 10) wrong("hardly any memory went back");
    if (!failed || failed > layers / 2) wrong("no read failed, or most");
    puts("ok");
    return 0;
}
