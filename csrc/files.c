/* files.c -- opens the model files and keeps their bytes.
 *
 * Mapped: the page cache is the memory, so a warm file starts at once however large it is, and ten processes share
 * one copy.  Copied: anonymous huge pages, read in parallel; slower to start, immune to page reclaim.  `auto` maps a
 * file whose pages are in the page cache already (a sample decides), or that would not fit as a copy.
 *
 * A mapped file that somebody cuts makes its readers fault with SIGBUS.  The handler below recognises addresses of
 * our mappings, puts a page of zeros there and marks the file; the call that was running then ends with MS4_EIO
 * instead of killing the process.  Faults elsewhere go to whatever handler was there before.
 */
#define _GNU_SOURCE
#include "files.h"
#include "error.h"
#include "allowance.h"
#include "memory.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE ((uint64_t)8 << 20)              /* one read */
#define MAX_MAPPINGS 2048                      /* over all engines of the process */

typedef struct { char *path; uint8_t *data; uint64_t bytes; int slot; } one_file;
struct files { size_t n; int32_t load; one_file *file; };

/* --- the SIGBUS guard --------------------------------------------------------------------- */
static struct { _Atomic(uint8_t *) data; _Atomic uint64_t bytes; atomic_int lost; } guard[MAX_MAPPINGS];
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_bus_error(int sig, siginfo_t *info, void *context) {
    uint8_t *at = info->si_addr;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < MAX_MAPPINGS; i++) {
        uint8_t *data = atomic_load(&guard[i].data);
        if (!data || at < data || at >= data + atomic_load(&guard[i].bytes)) continue;
        atomic_store(&guard[i].lost, 1);
        uint8_t *start = (uint8_t *)((uintptr_t)at & ~(page - 1));
        if (mmap(start, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) return;
    }
    if (before.sa_flags & SA_SIGINFO && before.sa_sigaction) { before.sa_sigaction(sig, info, context); return; }
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) { before.sa_handler(sig); return; }
    signal(SIGBUS, SIG_DFL);                   /* the access repeats and ends the process, as it would have */
}
static void install_guard(void) {
    struct sigaction act = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO };
    sigemptyset(&act.sa_mask);
    sigaction(SIGBUS, &act, &before);
}
static int guard_add(uint8_t *data, uint64_t bytes) {
    pthread_once(&once, install_guard);
    for (int i = 0; i < MAX_MAPPINGS; i++) {
        uint64_t free_slot = 0;
        if (!atomic_compare_exchange_strong(&guard[i].bytes, &free_slot, bytes)) continue;
        atomic_store(&guard[i].lost, 0);
        atomic_store(&guard[i].data, data);
        return i;
    }
    return -1;
}
static void guard_remove(int slot) {
    atomic_store(&guard[slot].data, NULL);
    atomic_store(&guard[slot].bytes, 0);
}

/* --- copying ------------------------------------------------------------------------------ */
typedef struct { int fd; uint8_t *to; uint64_t bytes, from; atomic_int error; } copy_job;

static void copy_piece(void *context, int32_t item, int32_t thread) {
    copy_job *job = context;
    uint64_t at = job->from + (uint64_t)item * PIECE;
    uint64_t end = at + PIECE < job->bytes ? at + PIECE : job->bytes;
    (void)thread;
    while (at < end) {
        ssize_t got = pread(job->fd, job->to + at, end - at, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) { atomic_store(&job->error, got ? errno : ENODATA); return; }
        at += (uint64_t)got;
    }
}
static int copy_in(one_file *file, int fd, uint64_t done, uint64_t total, const files_options *o, pool *p) {
    int32_t batch = 4 * pool_size(p);
    copy_job job = { .fd = fd, .to = file->data, .bytes = file->bytes };
    for (; job.from < job.bytes; job.from += (uint64_t)batch * PIECE) {
        uint64_t left = (job.bytes - job.from + PIECE - 1) / PIECE;
        if (o->progress && o->progress(done + job.from, total, o->user))
            return error_set(MS4_ECANCELED, "loading was canceled");
        pool_run(p, copy_piece, &job, left < (uint64_t)batch ? (int32_t)left : batch, NULL);
        int e = atomic_load(&job.error);
        FAIL_IF(e, MS4_EIO, "%s: cannot be read: %s", file->path, e == ENODATA ? "it has shrunk" : strerror(e));
    }
    return MS4_OK;
}

/* --- choosing ----------------------------------------------------------------------------- */
/* Share of the file's pages that are in the page cache, from 256 samples. */
static double share_cached(int fd, uint64_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *m = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (m == MAP_FAILED) return 0;
    uint64_t pages = (bytes + page - 1) / page, n = pages < 256 ? pages : 256, hits = 0;
    for (uint64_t i = 0; i < n; i++) {
        unsigned char in = 0;
        if (!mincore((uint8_t *)m + pages * i / n * page, page, &in)) hits += in & 1;
    }
    munmap(m, bytes);
    return (double)hits / (double)n;
}
static int32_t choose_load(const int *fds, const files *f) {
    uint64_t total = 0;
    double cached = 0;
    for (size_t i = 0; i < f->n; i++) {
        total += f->file[i].bytes;
        cached += share_cached(fds[i], f->file[i].bytes) * (double)f->file[i].bytes;
    }
    if (cached >= 0.95 * (double)total) return MS4_LOAD_MAP;
    return total + total / 8 + ((uint64_t)1 << 30) < allowance_room() ? MS4_LOAD_COPY : MS4_LOAD_MAP;
}

/* --- opening ------------------------------------------------------------------------------ */
static int open_one(const char *path, one_file *file, int *fd) {
    struct stat st;
    file->slot = -1;
    file->path = memory_take(strlen(path) + 1, 1);
    FAIL_IF(!file->path, MS4_ENOMEM, "no memory for a path");
    strcpy(file->path, path);
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FAIL_IF(*fd < 0, MS4_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    FAIL_IF(fstat(*fd, &st) || !S_ISREG(st.st_mode) || st.st_size < 1, MS4_EIO, "%s: not a regular file", path);
    file->bytes = (uint64_t)st.st_size;
    return MS4_OK;
}
static int fill_one(one_file *file, int fd, int32_t load, uint64_t done, uint64_t total, const files_options *o,
                    pool *p) {
    if (load == MS4_LOAD_COPY) {
        file->data = memory_take_pages(file->bytes, 1);
        FAIL_IF(!file->data, MS4_ENOMEM, "%s: no room for a copy of %llu bytes; use --load map", file->path,
                (unsigned long long)file->bytes);
        return copy_in(file, fd, done, total, o, p);
    }
    void *m = mmap(NULL, file->bytes, PROT_READ, MAP_SHARED, fd, 0);
    FAIL_IF(m == MAP_FAILED, MS4_EIO, "%s: cannot be mapped: %s", file->path, strerror(errno));
    file->data = m;
    file->slot = guard_add(file->data, file->bytes);
    FAIL_IF(file->slot < 0, MS4_ENOMEM, "more than %d mapped files in one process", MAX_MAPPINGS);
    return MS4_OK;
}
static int open_all(files *f, int *fds, const char *const *paths, const files_options *o, pool *p) {
    uint64_t total = 0, done = 0;
    for (size_t i = 0; i < f->n; i++) {
        TRY(open_one(paths[i], &f->file[i], &fds[i]));
        total += f->file[i].bytes;
    }
    f->load = o->load == MS4_LOAD_AUTO ? choose_load(fds, f) : o->load;
    for (size_t i = 0; i < f->n; i++) {
        TRY(fill_one(&f->file[i], fds[i], f->load, done, total, o, p));
        done += f->file[i].bytes;
    }
    return MS4_OK;
}
int files_open(const char *const *paths, size_t n_paths, const files_options *options, pool *p, files **out) {
    files *f = memory_take(1, sizeof *f);
    one_file *file = memory_take(n_paths, sizeof *file);
    int *fds = memory_take(n_paths, sizeof *fds);
    int status = MS4_OK;
    if (!f || !file || !fds) status = error_set(MS4_ENOMEM, "no memory for %zu files", n_paths);
    else {
        f->n = n_paths;
        f->file = file;
        for (size_t i = 0; i < n_paths; i++) { fds[i] = -1; file[i].slot = -1; }
        status = open_all(f, fds, paths, options, p);
        for (size_t i = 0; i < n_paths; i++)
            if (fds[i] >= 0) close(fds[i]);
    }
    memory_give(fds);
    if (status) {
        if (f && f->file) files_close(f);
        else { memory_give(f); memory_give(file); }
        return status;
    }
    *out = f;
    return MS4_OK;
}
void files_close(files *f) {
    if (!f) return;
    for (size_t i = 0; i < f->n; i++) {
        one_file *file = &f->file[i];
        if (file->slot >= 0) guard_remove(file->slot);
        memory_give_pages(file->data, file->bytes);
        memory_give(file->path);
    }
    memory_give(f->file);
    memory_give(f);
}
uint64_t files_bytes(const files *f, int32_t index) {
    return index >= 0 && (size_t)index < f->n ? f->file[index].bytes : 0;
}
const uint8_t *files_at(const files *f, int32_t index, uint64_t offset, uint64_t bytes) {
    if (index < 0 || (size_t)index >= f->n) return NULL;
    const one_file *file = &f->file[index];
    return offset <= file->bytes && bytes <= file->bytes - offset ? file->data + offset : NULL;
}
int32_t files_load(const files *f) { return f->load; }
int files_check(const files *f) {
    for (size_t i = 0; i < f->n; i++)
        FAIL_IF(f->file[i].slot >= 0 && atomic_load(&guard[f->file[i].slot].lost), MS4_EIO,
                "%s: the file became shorter while it was in use; load it again", f->file[i].path);
    return MS4_OK;
}
