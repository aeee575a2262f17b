/* errands.c -- a ring of errands: put at one end, sent by the thread in order, looked at by their owner. */
#include "cuda/errands.h"
#include "memory.h"
#include <pthread.h>

typedef enum { FREE, ASKED, SENT, FAILED } stage;
typedef struct { errand what; CUevent begun, done; stage at; } entry;
struct errands {
    gpu *g;
    slots *ram;
    entry ring[MOST_ERRANDS];
    int32_t first, n, next;                                   /* first: the oldest; next: the first that is ASKED */
    pthread_t thread;
    pthread_mutex_t lock;                                     /* of all stages, of next, and of `ends` */
    pthread_cond_t asked;
    int32_t ends, has_thread;
};
/* Host memory to a slot, or back.  The clocks are of the second stream, so they tell what the bus, and what feeds it,
 * needed. */
static int carry(gpu *g, const entry *e) {
    const ffn_weights *from = &e->what.from, *to = &e->what.to;
    const matrix *parts[][2] = { { &from->gate, &to->gate }, { &from->up, &to->up }, { &from->down, &to->down } };
    TRY(gpu_enter(g));
    TRY(gpu_brought(g, e->begun));
    for (int i = 0; i < 3; i++)
        TRY((e->what.landing ? gpu_take_back : gpu_bring)(g, (void *)(uintptr_t)parts[i][1]->data, parts[i][0]->data,
                                                          (size_t)matrix_bytes(parts[i][0])));
    return gpu_brought(g, e->done);
}
static int send(errands *e, const entry *at) {
    const int status = carry(e->g, at);
    if (at->what.landing) slots_landed(e->ram, at->what.landing, !status);
    return status;
}
static void *run(void *context) {
    errands *e = context;
    pthread_mutex_lock(&e->lock);
    while (!e->ends) {
        entry *at = &e->ring[e->next];
        if (at->at != ASKED) {
            pthread_cond_wait(&e->asked, &e->lock);
            continue;
        }
        pthread_mutex_unlock(&e->lock);
        const stage became = send(e, at) ? FAILED : SENT;
        pthread_mutex_lock(&e->lock);
        at->at = became;
        e->next = (e->next + 1) % MOST_ERRANDS;
    }
    pthread_mutex_unlock(&e->lock);
    return NULL;
}
int errands_open(gpu *g, slots *ram, errands **out) {
    errands *e = memory_take(1, sizeof *e);
    FAIL_IF(!e, MS4_ENOMEM, "no memory for experts on their way to the GPU");
    e->g = g;
    e->ram = ram;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->asked, NULL);
    int status = MS4_OK;
    for (int i = 0; i < MOST_ERRANDS && !status; i++) {
        status = gpu_clock(g, &e->ring[i].begun);
        if (!status) status = gpu_clock(g, &e->ring[i].done);
    }
    if (!status) {
        e->has_thread = !pthread_create(&e->thread, NULL, run, e);
        if (!e->has_thread) status = error_set(MS4_ENOMEM, "no thread to bring experts to the GPU");
    }
    if (status) errands_close(e);
    else *out = e;
    return status;
}
void errands_end(errands *e) {
    pthread_mutex_lock(&e->lock);
    e->ends = 1;
    pthread_cond_signal(&e->asked);
    pthread_mutex_unlock(&e->lock);
    if (e->has_thread) pthread_join(e->thread, NULL);
    e->has_thread = 0;
    if (!gpu_enter(e->g)) gpu_settle(e->g);
}
int errands_left(errands *e, errand *out) {
    entry *at = &e->ring[e->first];
    if (!e->n) return 0;
    *out = at->what;
    if (at->at == ASKED && out->landing) slots_landed(e->ram, out->landing, 0);
    at->at = FREE;
    e->first = (e->first + 1) % MOST_ERRANDS;
    e->n--;
    return 1;
}
void errands_close(errands *e) {
    errand left;
    if (!e) return;
    errands_end(e);
    while (errands_left(e, &left)) continue;
    for (int i = 0; i < MOST_ERRANDS; i++) {
        gpu_event_close(e->g, e->ring[i].begun);
        gpu_event_close(e->g, e->ring[i].done);
    }
    pthread_cond_destroy(&e->asked);
    pthread_mutex_destroy(&e->lock);
    memory_give(e);
}
int32_t errands_idle(const errands *e) { return MOST_ERRANDS - e->n; }
uint64_t errands_bytes(const errands *e) {
    uint64_t bytes = 0;
    for (int32_t i = 0; i < e->n; i++) bytes += errand_bytes(&e->ring[(e->first + i) % MOST_ERRANDS].what);
    return bytes;
}
void errands_put(errands *e, const errand *what) {
    entry *at = &e->ring[(e->first + e->n++) % MOST_ERRANDS];
    at->what = *what;
    pthread_mutex_lock(&e->lock);
    at->at = ASKED;
    pthread_cond_signal(&e->asked);
    pthread_mutex_unlock(&e->lock);
}
int errands_next(errands *e, errand *out, int *ended, int *good) {
    entry *at = &e->ring[e->first];
    *ended = 0;
    if (!e->n) return MS4_OK;
    pthread_mutex_lock(&e->lock);
    const stage is = at->at;
    pthread_mutex_unlock(&e->lock);
    if (is == SENT) TRY(gpu_is_over(e->g, at->done, ended));
    else *ended = is == FAILED;
    if (!*ended) return MS4_OK;
    *good = is == SENT;
    if (*good && !at->what.landing) TRY(gpu_time(e->g, at->begun, at->done, (size_t)errand_bytes(&at->what)));
    *out = at->what;
    at->at = FREE;
    e->first = (e->first + 1) % MOST_ERRANDS;
    e->n--;
    return MS4_OK;
}
