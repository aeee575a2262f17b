/* driver.h -- the emulated CUDA driver: what its parts say to each other.
 *
 * memory.cpp has allocations and pinned ranges, work.cpp streams, events and the thread that does their work in some
 * legal order, calls.cpp and calls_streams.cpp the driver's entry points.  Everything below but kernels and copies runs
 * under one lock, state().lock; functions here expect it to be held unless they say otherwise.
 *
 * Environment, read once:
 *   MS4_EMU_SEED=n      0: every stream in order and at once; else random order, late on purpose (1)
 *   MS4_EMU_VRAM=bytes  memory of the device (1 GiB); MS4_EMU_PINNED=bytes  most memory that can be pinned (no limit)
 *   MS4_EMU_CC=86       compute capability; MS4_EMU_DEVICES=n (1); MS4_EMU_THREADS=n  CPU threads of a kernel (2)
 *   MS4_EMU_LATE=ms     copies to the device take so long, in streams beside the one that runs kernels (0)
 *   MS4_EMU_COPIES_FIRST=1  and as long as such a stream has anything to do, nothing else is done
 *   MS4_EMU_FREE=0      cuMemFree, cuMemFreeHost and cuMemHostUnregister wait for all work, as real drivers mostly do,
 *                       and do not promise to; otherwise work that comes to that memory later ends the process, and so
 *                       does cuMemHostUnregister of what a copy still is to be made from
 *   MS4_EMU_FAIL=call:n, call:n:code or n, n:code   the n-th call (of that name, or of all; *: every one) fails with
 *                       this error (2 where memory is asked for, 999 else); call `kernel`: the n-th kernel that runs
 *                       faults; code `lost`: that call and all later ones fail, and what was queued is never done;
 *                       kernel:n:hang: that kernel never ends, and nothing behind it begins
 *   MS4_EMU_FORGET=call:n  a mutant: what the n-th place of the program does that calls this (cuStreamSynchronize,
 *                       cuEventSynchronize, cuStreamWaitEvent or cuEventRecord), in order of first calls, has no
 *                       effect; cuStreamQuery and cuEventQuery say that it is over
 *   MS4_EMU_REPORT=file at exit: calls by name, kernels by name, places that wait, bytes copied, most memory in use,
 *                       how often a context was made, memory that was not given back
 */
#ifndef MS4_EMULATED_DRIVER_H
#define MS4_EMULATED_DRIVER_H
#include "launch.h"
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

enum : int {                            /* CUresult */
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
    ILLEGAL_ADDRESS = 700, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905,
    UNKNOWN = 999
};

/* A place in the work of a stream: done once all before it is. */
struct mark {
    bool done = false;
    std::chrono::steady_clock::time_point when;
};
struct graph_run;
struct op {
    enum { KERNEL, COPY, FILL, RECORD, WAIT, WRITE_VALUE, WAIT_VALUE, GRAPH, HOST } kind;
    const emu::kernel *kernel = nullptr;
    dim3 grid;
    int threads = 0;
    size_t shared = 0;
    std::vector<char> bytes;            /* a kernel's argument; the source of a copy that was staged */
    char *to = nullptr;
    const char *from = nullptr;         /* NULL: bytes */
    size_t n = 0;                       /* bytes; of FILL: elements of `width` bytes */
    uint32_t value = 0, width = 0, flags = 0;
    std::shared_ptr<struct mark> at;    /* RECORD, WAIT */
    std::shared_ptr<graph_run> run;
    void (*call)(void *) = nullptr;
    void *data = nullptr;
    std::chrono::steady_clock::time_point not_before;
};
struct node { op what; std::vector<size_t> after; };
struct graph { std::vector<std::unique_ptr<node>> nodes; };
struct graph_run {
    std::vector<op> ops;
    std::vector<std::vector<size_t>> after;
    std::vector<char> done;
    size_t n_done = 0;
};
struct capture { struct graph *into; struct stream *origin; };
struct stream {
    std::deque<std::pair<uint64_t, op>> queue;      /* with numbers in the order of calls */
    uint64_t last = 0;                              /* number of what was queued last */
    bool running = false, runs_kernels = false, blocking = true;    /* blocking: waits for stream 0, and that for it */
    int priority = 0;
    std::chrono::steady_clock::time_point held_until;
    std::shared_ptr<struct capture> capture;        /* while it is captured */
    std::vector<size_t> captured_last;              /* nodes that the next one comes after */
};
struct event {
    std::shared_ptr<struct mark> at;                /* NULL: never recorded */
    bool timing = true;
    std::shared_ptr<struct capture> capture;        /* recorded in one, after these nodes */
    std::vector<size_t> captured_last;
};

struct settings {
    uint32_t seed, late;
    size_t vram, pinned;
    int capability, n_devices;
    std::string fail_call, forget_call, report;
    size_t forget_place;
    uint64_t fail_at;
    int fail_code;
    bool fail_always, fail_lost, fail_hangs, frees_early, copies_first;
};
struct driver_state {
    std::mutex lock;
    std::condition_variable changed;
    settings set;
    bool initialised = false, module_loaded = false;
    int lost = 0;                                   /* the error that all calls give from now on */
    bool hung = false;                              /* nothing is done any more */
    int context_users = 0, n_contexts = 0;          /* of the primary context; how often it was made */
    int n_waiting = 0;                              /* threads of the host that wait */
    uint64_t numbers = 0;
    stream zero;                                    /* stream 0 */
    std::vector<stream *> streams;                  /* all, stream 0 first */
    std::mt19937 random;
    std::map<std::string, uint64_t> calls, kernels_run;
    std::map<std::string, std::vector<const void *>> places;        /* return addresses, by call */
    uint64_t n_calls = 0, n_kernels = 0, copied = 0;
    std::map<const emu::kernel *, int> shared_allowed;
};
driver_state &state();

/* --- memory.cpp ------------------------------------------------------------------------------------------------- */
enum place { PAGEABLE, PINNED, DEVICE, STRADDLES };     /* STRADDLES: begins in pinned memory and leaves it */
int memory_take(uint64_t *at, size_t bytes);
int memory_give(uint64_t at);
size_t memory_used();
size_t memory_most();
size_t memory_pinned();
int memory_pin(void *at, size_t bytes, bool own, bool read_only);      /* own: cuMemHostAlloc */
int memory_unpin(void *at, bool own);
place memory_place(const void *p, size_t n);        /* ends the process for what is only partly in device memory */
void memory_open(bool open);                        /* the host may not touch device memory but while work is done */

/* --- work.cpp --------------------------------------------------------------------------------------------------- */
void work_add(stream *s, op &&what);
bool work_done(stream *s, uint64_t number);         /* all up to it, or the device is lost */
/* Waits until done() or the device is lost; gives up the lock meanwhile. */
void work_wait(std::unique_lock<std::mutex> &lock, const std::function<bool()> &done);
void work_wait_all(std::unique_lock<std::mutex> &lock);
bool work_reads(const void *at, size_t n);                  /* a copy that is not done yet, from there */
void work_lose(int code);

/* --- calls.cpp -------------------------------------------------------------------------------------------------- */
/* The head of an entry point: takes the lock, counts, and says whether this call is to fail. */
struct entry {
    std::unique_lock<std::mutex> lock;
    int error;
    explicit entry(const char *name, bool needs_context = true, bool takes_memory = false);
};
/* Whether the place of the program that an entry point returns to is the one that MS4_EMU_FORGET names. */
bool forgotten(const char *name, const void *place);
/* Looks over a launch; fills what. */
stream *stream_of(void *handle);                    /* NULL: no such stream */
int submit(stream *s, op &&what);                   /* to the stream's work, or to the graph that captures it */
int launch_op(const void *function, dim3 grid, dim3 size, unsigned shared, void **parameters, op *what);
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
