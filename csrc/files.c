/* files.c -- opens the model files and keeps their bytes.
 *
 * Mapped: the page cache is the memory, so a warm file starts at once however large it is, and ten processes share
 * one copy.  Copied: anonymous huge pages, read in parallel; slower to start, immune to page reclaim.  Streamed: what
 * every token needs is copied, the rest is read when it is needed (slots.c), past the page cache where the file system
 * can do that.  `auto` maps a file whose pages are in the page cache already (a sample decides), copies one that fits
 * well, maps one that just fits, and streams what does not.
 *
 * With stream every byte of a file still has an address of its own, so that nobody who binds tensors has to know: the
 * addresses of what is not in memory are reserved, and cannot be read.
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
#include "ms4.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PIECE ((uint64_t)8 << 20)              /* one read */
#define MAX_MAPPINGS 2048                      /* over all engines of the process */
#define HUGE_PAGE ((uint64_t)2 << 20)
#define N_TRIES 3                              /* more, after an error */
#define FIRST_PAUSE_MS 10                      /* before the first; four times as long before each other */

typedef struct {
    char *path;
    uint8_t *data;                             /* all of the file's addresses */
    uint64_t bytes;
    struct timespec changed;
    int slot, fd, direct;                      /* fds: -1 unless streamed, direct: past the page cache */
} one_file;
typedef struct { const uint8_t *data; uint64_t bytes; } run;
struct files {
    size_t n, n_runs;
    int32_t load;
    one_file *file;
    run *runs;                                 /* what lies in memory */
    atomic_int indirect;                       /* reading past the page cache was refused */
};

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

/* --- reading ------------------------------------------------------------------------------ */
/* One read, past the page cache if that is possible here. */
static ssize_t read_some(files *f, const one_file *file, uint64_t at, uint64_t end, uint8_t *to) {
    const uint64_t whole = (end - at + FILES_ALIGN - 1) / FILES_ALIGN * FILES_ALIGN;
    const int direct = file->direct >= 0 && at % FILES_ALIGN == 0 && (uintptr_t)to % FILES_ALIGN == 0
                    && !atomic_load_explicit(&f->indirect, memory_order_relaxed);
    ssize_t got = pread(direct ? file->direct : file->fd, to, direct ? whole : end - at, (off_t)at);
    if (got < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {
        atomic_store(&f->indirect, 1);
        got = pread(file->fd, to, end - at, (off_t)at);
    }
    return got > (ssize_t)(end - at) ? (ssize_t)(end - at) : got;
}
int files_read(files *f, int32_t index, uint64_t *at, uint64_t end, uint8_t *to) {
    int tries = 0;
    while (*at < end) {
        ssize_t got = read_some(f, &f->file[index], *at, end, to);
        if (got > 0) {
            *at += (uint64_t)got;
            to += got;
            continue;
        }
        if (!got) return ENODATA;
        if (errno == EINTR) continue;
        if (tries == N_TRIES) return errno;
        const long ms = (long)FIRST_PAUSE_MS << 2 * tries++;
        nanosleep(&(struct timespec){ ms / 1000, ms % 1000 * 1000000 }, NULL);
    }
    return 0;
}
typedef struct { files *f; int32_t index; uint64_t from, end; atomic_int error; } copy_job;

static void copy_piece(void *context, int32_t item, int32_t thread) {
    copy_job *job = context;
    uint64_t at = job->from + (uint64_t)item * PIECE;
    uint64_t end = at + PIECE < job->end ? at + PIECE : job->end;
    (void)thread;
    int error = files_read(job->f, job->index, &at, end, job->f->file[job->index].data + at);
    if (error) atomic_store(&job->error, error);
}
typedef struct { uint64_t done, total; } tally;
/* Bytes [from, end) of a file into their places, through the page cache: who opens the file again finds them there. */
static int copy_in(files *f, size_t index, uint64_t from, uint64_t end, tally *t, const files_options *o, pool *p) {
    int32_t batch = 4 * pool_size(p);
    copy_job job = { .f = f, .index = (int32_t)index, .from = from, .end = end };
    for (; job.from < end; job.from += (uint64_t)batch * PIECE) {
        uint64_t left = (end - job.from + PIECE - 1) / PIECE;
        if (o->progress && o->progress(t->done + job.from - from, t->total, o->user))
            return error_set(MS4_ECANCELED, "loading was canceled");
        pool_run(p, copy_piece, &job, left < (uint64_t)batch ? (int32_t)left : batch, NULL);
        int e = atomic_load(&job.error);
        FAIL_IF(e, MS4_EIO, "%s: cannot be read: %s", f->file[index].path,
                e == ENODATA ? "it has shrunk" : strerror(e));
    }
    t->done += end - from;
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
int32_t ms4_choose_load(const ms4_need *n) {
    const uint64_t spare = (uint64_t)1 << 30, aside = n->besides + n->reserve;
    const int fits = n->weights + aside <= n->room;
    /* What lies in the page cache need not be this group's: a limit of its own does not count those pages again. */
    const int others = !n->limited && aside <= n->room && n->weights + aside <= n->available;
    if (n->cached >= 0.95 && (fits || others)) return MS4_LOAD_MAP;
    if (n->weights + n->weights / 8 + n->besides + spare < n->room) return MS4_LOAD_COPY;
    return fits || !n->room || !n->streamed ? MS4_LOAD_MAP : MS4_LOAD_STREAM;
}
/* By the files alone.  Nobody has said what will be needed besides: in a room that was asked for, as much as the
 * reserve. */
static int32_t choose_load(const files *f, const files_options *o) {
    ms4_need need = { .room = o->room, .available = o->available, .reserve = o->reserve, .limited = o->limited };
    for (size_t i = 0; i < f->n; i++) {
        need.weights += f->file[i].bytes;
        need.cached += share_cached(f->file[i].fd, f->file[i].bytes) * (double)f->file[i].bytes;
    }
    need.cached /= (double)need.weights;
    for (size_t i = 0; i < o->n_ranges; i++) need.streamed += o->ranges[i].streamed ? o->ranges[i].bytes : 0;
    return ms4_choose_load(&need);
}

/* --- opening ------------------------------------------------------------------------------ */
static int open_one(const char *path, one_file *file) {
    struct stat st;
    file->path = memory_take(strlen(path) + 1, 1);
    FAIL_IF(!file->path, MS4_ENOMEM, "no memory for a path");
    strcpy(file->path, path);
    file->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FAIL_IF(file->fd < 0, MS4_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    FAIL_IF(fstat(file->fd, &st) || !S_ISREG(st.st_mode) || st.st_size < 1, MS4_EIO, "%s: not a regular file", path);
    file->bytes = (uint64_t)st.st_size;
    file->changed = st.st_mtim;
    return MS4_OK;
}
/* The same file once more, to be read past the page cache; -1 if that is not possible here, or the name has passed to
 * another file. */
static int open_direct(const one_file *file) {
    struct stat one, other;
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
    if (fd < 0) return -1;
    if (!fstat(file->fd, &one) && !fstat(fd, &other) && one.st_dev == other.st_dev && one.st_ino == other.st_ino)
        return fd;
    close(fd);
    return -1;
}
static int map_one(one_file *file) {
    void *m = mmap(NULL, file->bytes, PROT_READ, MAP_SHARED, file->fd, 0);
    FAIL_IF(m == MAP_FAILED, MS4_EIO, "%s: cannot be mapped: %s", file->path, strerror(errno));
    file->data = m;
    file->slot = guard_add(file->data, file->bytes);
    FAIL_IF(file->slot < 0, MS4_ENOMEM, "more than %d mapped files in one process", MAX_MAPPINGS);
    return MS4_OK;
}
/* Bytes [from, end) of a file become memory, and are read. */
static int keep(files *f, size_t index, uint64_t from, uint64_t end, tally *t, const files_options *o, pool *p) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    one_file *file = &f->file[index];
    uint8_t *first = file->data + from / page * page, *last = file->data + end;
    FAIL_IF(mprotect(first, (size_t)(last - first), PROT_READ | PROT_WRITE), MS4_ENOMEM,
            "%s: no room for %llu bytes", file->path, (unsigned long long)(end - from));
    uint8_t *huge = (uint8_t *)(((uintptr_t)first + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (huge < last) madvise(huge, (size_t)(last - huge) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    f->runs[f->n_runs++] = (run){ file->data + from, end - from };
    return copy_in(f, index, from, end, t, o, p);
}
/* Reserves the addresses of all files, and reads what is not streamed. */
static int keep_all(files *f, const files_options *o, pool *p) {
    tally t = { 0 };
    f->runs = memory_take(o->n_ranges, sizeof *f->runs);
    FAIL_IF(!f->runs, MS4_ENOMEM, "no memory for the ranges of files");
    for (size_t i = 0; i < o->n_ranges; i++) t.total += o->ranges[i].streamed ? 0 : o->ranges[i].bytes;
    FAIL_IF(o->limited && t.total > o->room, MS4_ENOMEM,
            "%.1f GB of memory are not enough: all but the experts are %.1f GB", 1e-9 * (double)o->room,
            1e-9 * (double)t.total);
    for (size_t i = 0; i < f->n; i++) {
        one_file *file = &f->file[i];
        void *m = mmap(NULL, file->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        FAIL_IF(m == MAP_FAILED, MS4_ENOMEM, "%s: no room for %llu addresses", file->path,
                (unsigned long long)file->bytes);
        file->data = m;
    }
    for (size_t i = 0; i < o->n_ranges; i++) {
        const files_range *r = &o->ranges[i];
        const uint64_t bytes = files_bytes(f, r->file);        /* what lies outside is refused by who binds it */
        if (r->streamed || !r->bytes || r->offset > bytes || r->bytes > bytes - r->offset) continue;
        TRY(keep(f, (size_t)r->file, r->offset, r->offset + r->bytes, &t, o, p));
    }
    for (one_file *file = f->file; file < f->file + f->n; file++) {
        file->direct = open_direct(file);
        if (file->direct < 0) atomic_store(&f->indirect, 1);
    }
    return MS4_OK;
}
static int open_all(files *f, const char *const *paths, const files_options *o, pool *p) {
    tally t = { 0 };
    for (size_t i = 0; i < f->n; i++) {
        TRY(open_one(paths[i], &f->file[i]));
        t.total += f->file[i].bytes;
    }
    f->load = o->load == MS4_LOAD_AUTO ? choose_load(f, o) : o->load;
    if (f->load == MS4_LOAD_STREAM) return keep_all(f, o, p);
    f->runs = memory_take(f->n, sizeof *f->runs);
    FAIL_IF(!f->runs, MS4_ENOMEM, "no memory for the ranges of files");
    for (size_t i = 0; i < f->n; i++) {
        one_file *file = &f->file[i];
        if (f->load == MS4_LOAD_COPY) {
            file->data = memory_take_pages(file->bytes, 1);
            FAIL_IF(!file->data, MS4_ENOMEM, "%s: no room for a copy of %llu bytes; use --load map", file->path,
                    (unsigned long long)file->bytes);
            TRY(copy_in(f, i, 0, file->bytes, &t, o, p));
        } else TRY(map_one(file));
        f->runs[f->n_runs++] = (run){ file->data, file->bytes };
    }
    return MS4_OK;
}
static void close_fds(one_file *file) {
    if (file->fd >= 0) close(file->fd);
    if (file->direct >= 0) close(file->direct);
    file->fd = file->direct = -1;
}
int files_open(const char *const *paths, size_t n_paths, const files_options *options, pool *p, files **out) {
    files *f = memory_take(1, sizeof *f);
    one_file *file = memory_take(n_paths, sizeof *file);
    if (!f || !file) {
        memory_give(f);
        memory_give(file);
        return error_set(MS4_ENOMEM, "no memory for %zu files", n_paths);
    }
    f->n = n_paths;
    f->file = file;
    for (size_t i = 0; i < n_paths; i++) file[i].slot = file[i].fd = file[i].direct = -1;
    int status = open_all(f, paths, options, p);
    for (size_t i = 0; i < n_paths && f->load != MS4_LOAD_STREAM; i++) close_fds(&file[i]);
    if (status) files_close(f);
    else *out = f;
    return status;
}
void files_close(files *f) {
    if (!f) return;
    for (size_t i = 0; i < f->n; i++) {
        one_file *file = &f->file[i];
        if (file->slot >= 0) guard_remove(file->slot);
        memory_give_pages(file->data, file->bytes);
        memory_give(file->path);
        close_fds(file);
    }
    memory_give(f->runs);
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
int files_find(const files *f, const uint8_t *at, int32_t *index, uint64_t *offset) {
    for (size_t i = 0; i < f->n; i++) {
        const one_file *file = &f->file[i];
        if (at < file->data || at >= file->data + file->bytes) continue;
        *index = (int32_t)i;
        *offset = (uint64_t)(at - file->data);
        return 1;
    }
    return 0;
}
const uint8_t *files_resident(const files *f, size_t i, uint64_t *bytes) {
    *bytes = i < f->n_runs ? f->runs[i].bytes : 0;
    return i < f->n_runs ? f->runs[i].data : NULL;
}
uint64_t files_resident_bytes(const files *f) {
    uint64_t sum = 0;
    for (size_t i = 0; i < f->n_runs; i++) sum += f->runs[i].bytes;
    return sum;
}
int32_t files_load(const files *f) { return f->load; }
const char *files_path(const files *f, int32_t index) { return f->file[index].path; }
int files_direct(const files *f) { return f->load == MS4_LOAD_STREAM && !atomic_load(&((files *)f)->indirect); }

/* Has a streamed file been written to, or cut?  Who replaces it by another one leaves ours as it is. */
static int check_streamed(const one_file *file) {
    struct stat st;
    FAIL_IF(fstat(file->fd, &st), MS4_EIO, "%s: cannot be looked at: %s", file->path, strerror(errno));
    FAIL_IF((uint64_t)st.st_size < file->bytes, MS4_EIO,
            "%s: the file became shorter while it was in use; load it again", file->path);
    FAIL_IF(st.st_mtim.tv_sec != file->changed.tv_sec || st.st_mtim.tv_nsec != file->changed.tv_nsec, MS4_EIO,
            "%s: the file was written to while it was in use; load it again", file->path);
    return MS4_OK;
}
int files_check(const files *f) {
    for (size_t i = 0; i < f->n; i++) {
        const one_file *file = &f->file[i];
        FAIL_IF(file->slot >= 0 && atomic_load(&guard[file->slot].lost), MS4_EIO,
                "%s: the file became shorter while it was in use; load it again", file->path);
        if (f->load == MS4_LOAD_STREAM) TRY(check_streamed(file));
    }
    return MS4_OK;
}
