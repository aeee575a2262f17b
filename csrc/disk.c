/* disk.c -- threads that read pieces of what is asked for.
 *
 * All threads work on the first job that has pieces left, so that what is waited for first is there first, and the disk
 * has as many requests as there are threads.  Threads and not io_uring: on the disk at hand they were as fast at every
 * depth and size (docs/tried.md), and they run where io_uring is not allowed.
 */
#define _GNU_SOURCE
#include "disk.h"
#include "clock.h"
#include "error.h"
#include "memory.h"
#include <pthread.h>
#include <signal.h>

#define PIECE ((uint64_t)1 << 20)                             /* one read; a multiple of FILES_ALIGN */

typedef struct { disk_job *first, **end; } queue;
struct disk {
    files *files;
    pthread_t *threads;
    int32_t n_threads;
    pthread_mutex_t lock;                                     /* guards everything below, and jobs in a queue */
    pthread_cond_t wanted, ended;
    queue now, ahead;
    int quit, n_reading;
    uint64_t n_ended, bytes, ns;
    int64_t since;                                            /* when the first of those reads began */
};

static void put(queue *q, disk_job *job) {
    job->next = NULL;
    *q->end = job;
    q->end = &job->next;
}
static int take_out(queue *q, disk_job *job) {
    for (disk_job **at = &q->first; *at; at = &(*at)->next) {
        if (*at != job) continue;
        *at = job->next;
        if (!job->next) q->end = at;
        return 1;
    }
    return 0;
}
/* Pieces begin at multiples of PIECE in the file, the first and the last are cut. */
static int32_t pieces_of(const disk_range *r) {
    return (int32_t)((r->offset + r->bytes - 1) / PIECE - r->offset / PIECE + 1);
}
typedef struct { int32_t file; uint64_t at, end; uint8_t *to; } piece;
/* The next piece of a job.  The last one takes the job out of its queue. */
static piece next_piece(disk *d, disk_job *job) {
    const disk_range *r = &job->range[job->range_now];
    const uint64_t end = r->offset + r->bytes, next = (job->at / PIECE + 1) * PIECE;
    piece p = { r->file, job->at, next < end ? next : end, r->to + (job->at - r->offset) };
    job->at = p.end;
    if (p.end < end) return p;
    if (++job->range_now < job->n) job->at = job->range[job->range_now].offset;
    else if (!take_out(&d->now, job)) take_out(&d->ahead, job);
    return p;
}
/* From the beginning of the block that the piece begins in: those bytes are the file's, too. */
static int read_piece(disk *d, const piece *p, uint64_t *at) {
    const uint64_t before = p->at % FILES_ALIGN;
    *at = p->at - before;
    return files_read(d->files, p->file, at, p->end, p->to - before);
}
/* Gives up what is left of a failed job, but for the pieces that are under way. */
static void give_up(disk *d, disk_job *job, int error, int32_t file, uint64_t at) {
    if (job->error) return;
    job->error = error;
    job->error_file = file;
    job->error_at = at;
    if (!take_out(&d->now, job) && !take_out(&d->ahead, job)) return;
    const disk_range *r = &job->range[job->range_now];
    const disk_range rest = { r->file, job->at, r->offset + r->bytes - job->at, NULL };
    job->n_left -= pieces_of(&rest);
    for (int32_t i = job->range_now + 1; i < job->n; i++) job->n_left -= pieces_of(&job->range[i]);
}
static void *work(void *arg) {
    disk *d = arg;
    pthread_mutex_lock(&d->lock);
    for (;;) {
        disk_job *job = d->now.first ? d->now.first : d->ahead.first;
        if (d->quit) break;
        if (!job) {
            pthread_cond_wait(&d->wanted, &d->lock);
            continue;
        }
        const piece p = next_piece(d, job);
        uint64_t at;
        if (!d->n_reading++) d->since = now_ns();
        pthread_mutex_unlock(&d->lock);
        int error = read_piece(d, &p, &at);
        pthread_mutex_lock(&d->lock);
        if (!--d->n_reading) d->ns += (uint64_t)(now_ns() - d->since);
        if (error) give_up(d, job, error, p.file, at);
        else d->bytes += p.end - p.at;
        if (--job->n_left) continue;
        atomic_store_explicit(&job->state, job->error ? DISK_FAILED : DISK_READ, memory_order_release);
        d->n_ended++;
        pthread_cond_broadcast(&d->ended);
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}
void disk_read(disk *d, disk_job *job, int ahead) {
    job->error = 0;
    job->n_left = job->range_now = 0;
    job->at = job->range[0].offset;
    for (int32_t i = 0; i < job->n; i++) job->n_left += pieces_of(&job->range[i]);
    atomic_store_explicit(&job->state, DISK_READING, memory_order_relaxed);
    pthread_mutex_lock(&d->lock);
    put(ahead ? &d->ahead : &d->now, job);
    pthread_cond_broadcast(&d->wanted);
    pthread_mutex_unlock(&d->lock);
}
void disk_hurry(disk *d, disk_job *job) {
    pthread_mutex_lock(&d->lock);
    if (take_out(&d->ahead, job)) put(&d->now, job);
    pthread_mutex_unlock(&d->lock);
}
void disk_landed(disk *d, disk_job *job) {
    pthread_mutex_lock(&d->lock);
    atomic_store_explicit(&job->state, DISK_READ, memory_order_release);
    d->n_ended++;
    pthread_cond_broadcast(&d->ended);
    pthread_mutex_unlock(&d->lock);
}
void disk_wait(disk *d, uint64_t *seen, int32_t most_ms) {
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += most_ms / 1000;
    end.tv_nsec += most_ms % 1000 * 1000000L;
    if (end.tv_nsec >= 1000000000L) {
        end.tv_nsec -= 1000000000L;
        end.tv_sec++;
    }
    pthread_mutex_lock(&d->lock);
    while (d->n_ended == *seen && !pthread_cond_timedwait(&d->ended, &d->lock, &end)) {}
    *seen = d->n_ended;
    pthread_mutex_unlock(&d->lock);
}
void disk_count(disk *d, uint64_t *bytes, uint64_t *ns) {
    pthread_mutex_lock(&d->lock);
    *bytes = d->bytes;
    *ns = d->ns + (d->n_reading ? (uint64_t)(now_ns() - d->since) : 0);
    pthread_mutex_unlock(&d->lock);
}
static void start(disk *d, int32_t n) {
    sigset_t all, before;                                     /* signals belong to the caller's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (d->n_threads < n && !pthread_create(&d->threads[d->n_threads], NULL, work, d)) d->n_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
int disk_open(files *f, int32_t n_threads, disk **out) {
    disk *d = memory_take(1, sizeof *d);
    pthread_t *threads = memory_take((size_t)n_threads, sizeof *threads);
    if (!d || !threads) {
        memory_give(d);
        memory_give(threads);
        return error_set(MS4_ENOMEM, "no memory for threads that read");
    }
    d->files = f;
    d->threads = threads;
    d->now.end = &d->now.first;
    d->ahead.end = &d->ahead.first;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->wanted, NULL);
    pthread_cond_init(&d->ended, &clock);
    pthread_condattr_destroy(&clock);
    start(d, n_threads);
    if (!d->n_threads) {
        disk_close(d);
        return error_set(MS4_ENOMEM, "the system gave no thread that reads");
    }
    *out = d;
    return MS4_OK;
}
void disk_close(disk *d) {
    if (!d) return;
    pthread_mutex_lock(&d->lock);
    d->quit = 1;
    pthread_cond_broadcast(&d->wanted);
    pthread_mutex_unlock(&d->lock);
    for (int32_t i = 0; i < d->n_threads; i++) pthread_join(d->threads[i], NULL);
    pthread_cond_destroy(&d->wanted);
    pthread_cond_destroy(&d->ended);
    pthread_mutex_destroy(&d->lock);
    memory_give(d->threads);
    memory_give(d);
}
