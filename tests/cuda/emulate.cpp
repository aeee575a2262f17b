/* emulate.cpp -- the scheduler of emulate.h: fibres, warps, blocks, and what ends a faulty kernel. */
#include "launch.h"
#include <atomic>
#include <csignal>
#include <mutex>
#include <random>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>
#ifndef __x86_64__
#error "the fibres of the emulation are written for x86-64"
#endif

extern "C" void emu_switch(void **save, void *to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");

namespace emu {
__thread block *at;
int n_threads = 1;
bool (*in_device)(const void *p), (*accessible)(const void *p, size_t n);
void (*touched)(const void *p, size_t n, bool writes);

namespace {
const int MOST_THREADS = 1024, WARPS = MOST_THREADS / 32;
const size_t STACK = 256 << 10, PAGE = 4096, RED = 64, FIXED = 48 << 10;
const size_t MOST_SHARED = 99 << 10;        /* of a block on sm_86, 89, 120: what all kernels must do with */
const unsigned char POISON = 0xff;

struct copy { void *to; const void *from; int n, of; };
struct fibre {
    void *stack_pointer;
    dim3 index;
    bool at_barrier, done;
    std::vector<copy> copies;               /* begun and not arrived */
    std::vector<size_t> closed;             /* how many copies the groups end with */
};
struct fixed { const void *key; char *at; size_t bytes; };
/* What one thread of the CPU needs to run a block. */
struct machine : block {
    fibre fibres[MOST_THREADS];
    warp warp_of[WARPS];
    char *stacks;
    std::vector<char> memory;               /* shared */
    std::vector<fixed> fixed_parts;
    size_t fixed_used;
    void *scheduler;
    const kernel *running;
    const void *argument;
    int n, n_done, n_at_barrier;
    bool fuzz;
    std::minstd_rand random;
    char signal_stack[64 << 10];
};
machine *here() { return static_cast<machine *>(at); }

void say_where(const char *why) {
    machine *m = here();
    char line[512];
    int n = snprintf(line, sizeof line, "cuda emulation: kernel %s, block (%u, %u, %u), thread %d: %s\n",
                     m->running->name, m->index.x, m->index.y, m->index.z, m->linear, why);
    if (write(2, line, (size_t)n) < 0) _exit(3);
}
struct sigaction before;
void on_fault(int sig, siginfo_t *info, void *context) {
    char why[128];
    if (!at && in_device && in_device(info->si_addr)) {
        int n = snprintf(why, sizeof why, "cuda emulation: the host touches memory of the device, or a copy what is "
                         "not allocated: %p\n", info->si_addr);
        if (write(2, why, (size_t)n) < 0) _exit(3);
    } else if (!at) {
        sigaction(SIGSEGV, &before, nullptr);       /* not ours: happens again, and goes where it went before */
        return;
    }
    signal(SIGABRT, SIG_DFL);
    if (!at) abort();
    machine *m = here();
    const char *address = (const char *)info->si_addr;
    bool in_stack = address >= m->stacks && address < m->stacks + STACK * MOST_THREADS;
    snprintf(why, sizeof why, in_stack ? "its stack is full (%p)" : "touches %p, which is no memory of the device",
             info->si_addr);
    say_where(why);
    abort();
    (void)sig, (void)context;
}

std::atomic<uint32_t> n_runs;
std::mutex machines_lock;
std::vector<machine *> machines;            /* idle ones */
machine *take_machine() {
    watch_faults();
    std::lock_guard<std::mutex> guard(machines_lock);
    if (!machines.empty()) {
        machine *m = machines.back();
        machines.pop_back();
        return m;
    }
    machine *m = new machine();
    void *stacks = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) { perror("cuda emulation: stacks"); abort(); }
    m->stacks = (char *)stacks;
    for (int i = 0; i < MOST_THREADS; i++) mprotect(m->stacks + STACK * (size_t)i, PAGE, PROT_NONE);
    m->warps = m->warp_of;
    return m;
}
void give_machine(machine *m) {
    std::lock_guard<std::mutex> guard(machines_lock);
    machines.push_back(m);
}

void leave(fibre &f) { emu_switch(&f.stack_pointer, here()->scheduler); }
/* Lets go on who waits in warp w for nobody any more. */
void release_warp(warp &w) {
    uint32_t waits = w.waits;
    while (waits) {
        int l = __builtin_ctz(waits);
        uint32_t need = w.mask[l] & ~w.gone;
        waits &= ~need & ~(1u << l);
        if ((w.waits & need) != need) continue;
        for (int i = 0; i < 32; i++)
            if (need >> i & 1) {
                if (w.mask[i] != w.mask[l]) die("lanes that meet name different masks");
                w.met[i] = need;
            }
        w.waits &= ~need;
        w.may_run |= need;
    }
}
void release_block(machine *m) {
    if (!m->n_at_barrier || m->n_at_barrier < m->n - m->n_done) return;
    for (int i = 0; i < m->n; i++)
        if (m->fibres[i].at_barrier) {
            m->fibres[i].at_barrier = false;
            m->warp_of[i / 32].may_run |= 1u << i % 32;
        }
    m->n_at_barrier = 0;
}
void thread_entry() {
    here()->running->run(here()->argument);
    machine *m = here();
    fibre &f = m->fibres[m->linear];
    if (!f.copies.empty()) die("exits before its cp.async have arrived");
    warp &w = mine();
    uint32_t bit = 1u << lane();
    f.done = true;
    w.may_run &= ~bit;
    w.gone |= bit;
    m->n_done++;
    release_warp(w);
    release_block(m);
    leave(f);
    abort();
}
#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void *p, size_t n);
/* A fibre never returns, so the sanitizer takes its frames for alive. */
void forget_frames(char *stack) { __asan_unpoison_memory_region(stack + STACK * 3 / 4, STACK / 4); }
#else
void forget_frames(char *) {}
#endif
void prepare(machine *m) {
    memset(m->memory.data(), POISON, m->memory.size());
    m->fixed_parts.clear();
    m->fixed_used = 0;
    m->n_run = ++n_runs;
    memset(m->barriers, 0, sizeof m->barriers);
    memset(m->warp_barriers, 0, sizeof m->warp_barriers);
    m->n_done = m->n_at_barrier = 0;
    for (int w = 0; w < (m->n + 31) / 32; w++) {
        int lanes = std::min(32, m->n - 32 * w);
        uint32_t all = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        m->warp_of[w].may_run = all;
        m->warp_of[w].gone = ~all;
        m->warp_of[w].waits = 0;
        memset(m->warp_of[w].shown, POISON, sizeof m->warp_of[w].shown);
    }
    for (int i = 0; i < m->n; i++) {
        fibre &f = m->fibres[i];
        forget_frames(m->stacks + STACK * (size_t)i);
        f.at_barrier = f.done = false;
        unsigned u = (unsigned)i;
        f.index = dim3(u % m->size.x, u / m->size.x % m->size.y, u / (m->size.x * m->size.y));
        /* stacks begin at different places of a cache */
        void **top = (void **)(m->stacks + STACK * (size_t)(i + 1) - 192 * (size_t)(i % 61) - 64);
        *--top = nullptr;
        *--top = (void *)thread_entry;
        for (int k = 0; k < 6; k++) *--top = nullptr;
        f.stack_pointer = top;
    }
}
/* Runs the lanes of a warp that may, each until it waits; at random: in another order. */
void run_warp(machine *m, int w) {
    uint32_t may = m->warp_of[w].may_run;
    int turn = m->fuzz ? (int)(m->random() >> 8 & 31) : 0, back = m->fuzz ? (int)(m->random() >> 9 & 31) : 0;
    for (int k = 0; k < 32; k++) {
        int l = ((k ^ back) + turn) & 31, i = 32 * w + l;
        if (!(may >> l & 1)) continue;
        m->linear = i;
        m->thread = m->fibres[i].index;
        emu_switch(&m->scheduler, m->fibres[i].stack_pointer);
    }
}
void run_block(machine *m) {
    static const unsigned speeds[] = { 100, 60, 10, 3 };    /* of 100 rounds, in how many a warp takes part */
    int n_warps = (m->n + 31) / 32, order[WARPS];
    unsigned speed[WARPS];
    prepare(m);
    for (int w = 0; w < n_warps; w++) order[w] = w, speed[w] = m->fuzz ? speeds[(m->random() >> 10) % 4] : 100;
    while (m->n_done < m->n) {
        bool lives = false;
        if (m->fuzz) std::shuffle(order, order + n_warps, m->random);
        for (int k = 0; k < n_warps; k++) {
            int w = order[k];
            if (!m->warp_of[w].may_run) continue;
            lives = true;
            if (speed[w] == 100 || (m->random() >> 8) % 100 < speed[w]) run_warp(m, w);
        }
        if (!lives) die("waits for ever: not all threads come to the barrier, or not all lanes that a mask names");
    }
    for (size_t i = 0; i < RED; i++)
        if ((unsigned char)m->shared[m->shared_bytes + i] != POISON) die("this block wrote beyond its shared memory");
    for (auto &part : m->fixed_parts)
        for (size_t i = 0; i < RED; i++)
            if ((unsigned char)part.at[part.bytes + i] != POISON) die("this block wrote beyond a SHARED array");
}
/* Takes blocks until there are none. */
void run_blocks(const kernel &k, dim3 grid, int threads, size_t shared, const void *argument, uint32_t seed,
                std::atomic<uint64_t> *next) {
    machine *m = take_machine();
    stack_t alternative = {}, old;
    alternative.ss_sp = m->signal_stack;
    alternative.ss_size = sizeof m->signal_stack;
    sigaltstack(&alternative, &old);
    uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    m->running = &k;
    m->argument = argument;
    m->n = threads;
    m->size = dim3((unsigned)threads);
    m->grid = grid;
    m->fuzz = seed != 0;
    m->memory.resize(shared + FIXED + 256);
    m->shared = (char *)(((uintptr_t)m->memory.data() + 127) & ~(uintptr_t)127);
    m->shared_bytes = shared;
    m->shared_end = m->memory.data() + m->memory.size();
    at = m;
    for (uint64_t i; (i = (*next)++) < n_blocks;) {
        if (seed) i = (i + seed) % n_blocks;
        m->index = dim3((unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y));
        m->random.seed(seed + (uint32_t)i * 7919u);
        m->shared_bytes = shared;
        run_block(m);
    }
    at = nullptr;
    sigaltstack(&old, nullptr);
    give_machine(m);
}
}

void watch_faults() {
    std::lock_guard<std::mutex> guard(machines_lock);
    static bool watches = false;
    if (watches) return;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
    watches = true;
}
void die(const char *why) {
    say_where(why);
    signal(SIGABRT, SIG_DFL);
    abort();
}
void (*released)(const void *p);
void store_release(void *p, uint32_t value) {
    __atomic_store_n((uint32_t *)p, value, __ATOMIC_RELEASE);
    if (released) released(p);
}
void wait_block() {
    machine *m = here();
    fibre &f = m->fibres[m->linear];
    mine().may_run &= ~(1u << lane());
    f.at_barrier = true;
    m->n_at_barrier++;
    release_block(m);
    leave(f);
    m->barriers[m->linear]++;
}
void wait_warp(uint32_t mask) {
    machine *m = here();
    warp &w = mine();
    int l = lane();
    if (!(mask >> l & 1)) die("a lane takes part that the mask does not name");
    w.mask[l] = mask;
    w.may_run &= ~(1u << l);
    w.waits |= 1u << l;
    release_warp(w);
    /* who comes last may go on at once, or not */
    if ((w.may_run >> l & 1) && !(m->fuzz && (m->random() & 64))) return;
    leave(m->fibres[m->linear]);
}
void copy_begin(void *to, const void *from, int n, int of) {
    if ((uintptr_t)to % (unsigned)of || (uintptr_t)from % (unsigned)of || n < 0 || n > of) die("cp.async: alignment");
    if (!in_shared(to, (size_t)of)) die("cp.async: not to shared memory");
    if (touched) touched(to, (size_t)of, true);
    memset(to, POISON, (size_t)of);
    here()->fibres[at->linear].copies.push_back({ to, from, n, of });
}
void copy_close() {
    fibre &f = here()->fibres[at->linear];
    f.closed.push_back(f.copies.size());
}
void copy_finish(int but_last) {
    fibre &f = here()->fibres[at->linear];
    if ((int)f.closed.size() <= but_last) return;
    size_t groups = f.closed.size() - (size_t)but_last, n = f.closed[groups - 1];
    for (size_t i = 0; i < n; i++) {
        copy &c = f.copies[i];
        if (touched) touched(c.to, (size_t)c.of, true);
        memcpy(c.to, c.from, (size_t)c.n);
        memset((char *)c.to + c.n, 0, (size_t)(c.of - c.n));
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + (ptrdiff_t)n);
    f.closed.erase(f.closed.begin(), f.closed.begin() + (ptrdiff_t)groups);
    for (auto &end : f.closed) end -= n;
}
/* Behind the dynamic part, each with a red zone; poisoned with the rest. */
void *fixed_shared(const void *key, size_t bytes) {
    machine *m = here();
    for (auto &part : m->fixed_parts)
        if (part.key == key) return part.at;
    size_t begin = (size_t)(m->shared - m->memory.data());
    size_t from = m->fixed_parts.empty() ? (m->shared_bytes + RED + 127) / 128 * 128 : m->fixed_used;
    if (begin + from + bytes + RED > m->memory.size() || from + bytes > MOST_SHARED)
        die("more shared memory than 99 KB");
    m->fixed_parts.push_back({ key, m->shared + from, bytes });
    m->fixed_used = (from + bytes + RED + 127) / 128 * 128;
    return m->shared + from;
}
bool in_shared(const void *p, size_t n) {
    machine *m = here();
    const char *from = (const char *)p;
    if (from >= m->shared && from + n <= m->shared + m->shared_bytes) return true;
    for (auto &part : m->fixed_parts)
        if (from >= part.at && from + n <= part.at + part.bytes) return true;
    return false;
}
bool in_own(const void *p, size_t n) {
    machine *m = here();
    const char *from = (const char *)p, *argument = (const char *)m->argument;
    const char *stack = m->stacks + STACK * (size_t)m->linear;
    return (from >= argument && from + n <= argument + m->running->bytes)
        || (from >= stack && from + n <= stack + STACK);
}
const kernel *find(const char *name) {
    for (const kernel *k = kernels; k->name; k++)
        if (!strcmp(k->name, name)) return k->code ? k : nullptr;
    return nullptr;
}
void launch(const kernel &k, dim3 grid, int threads, size_t shared, const void *argument, uint32_t seed) {
    uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (threads < 1 || threads > k.threads || shared > MOST_SHARED || !n_blocks || grid.x > 0x7fffffffu
        || grid.y > 65535 || grid.z > 65535) {
        fprintf(stderr, "cuda emulation: kernel %s: no launch of (%u, %u, %u) blocks, %d threads, %zu bytes\n", k.name,
                grid.x, grid.y, grid.z, threads, shared);
        abort();
    }
    std::vector<char> copy((const char *)argument, (const char *)argument + k.bytes);
    std::atomic<uint64_t> next(0);
    std::vector<std::thread> helpers;
    for (int i = 1; i < n_threads && (uint64_t)i * 4 < n_blocks; i++)
        helpers.emplace_back([&] { run_blocks(k, grid, threads, shared, copy.data(), seed, &next); });
    run_blocks(k, grid, threads, shared, copy.data(), seed, &next);
    for (auto &t : helpers) t.join();
}
}
