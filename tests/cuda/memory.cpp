/* memory.cpp -- memory of the emulated device: every allocation ends at an unreadable page and is full of poison. */
#include "driver.h"
#include <atomic>
#include <sys/mman.h>
#include <unistd.h>

namespace {
const size_t PAGE = 4096, ARENA = (size_t)1 << 36, ALIGN = 256;
const size_t LARGE = (size_t)1 << 20, AT_ONCE = (size_t)2 << 20;       /* what is large takes whole pieces of 2 MiB */
struct area { char *map; size_t length, bytes; };           /* pages, and what was asked for, at their end */
size_t takes(size_t bytes) {
    const size_t unit = bytes < LARGE ? ALIGN : AT_ONCE;
    return (bytes + unit - 1) / unit * unit;
}
struct pinned { size_t bytes; bool own, read_only; };
std::map<uintptr_t, area> &areas() { static auto *all = new std::map<uintptr_t, area>(); return *all; }
std::map<uintptr_t, pinned> &pins() { static auto *all = new std::map<uintptr_t, pinned>(); return *all; }
char *arena;
size_t arena_used, used, most, n_pinned;
bool is_open;
std::mutex lookup;                                          /* kernels look up areas without the driver's lock */
std::atomic<unsigned> changes;                              /* of areas and pins, but for new ones */

bool in_arena(const void *p) { return arena && (const char *)p >= arena && (const char *)p < arena + ARENA; }
template <class M> auto find_in(M &all, const void *p) {
    auto next = all.upper_bound((uintptr_t)p);
    return next == all.begin() ? all.end() : std::prev(next);
}
/* Where p lies, as far as kernels may read; the same place if it is none. */
std::pair<uintptr_t, uintptr_t> range_of(const void *p) {
    std::lock_guard<std::mutex> guard(lookup);
    auto a = find_in(areas(), p);
    uintptr_t end = a == areas().end() ? 0 : (a->first + a->second.bytes + 15) / 16 * 16;
    if ((uintptr_t)p < end) return { a->first, end };
    auto pin = find_in(pins(), p);
    if (pin == pins().end() || !pin->second.own) return { 0, 0 };       /* what was registered has another address */
    return { pin->first, pin->first + pin->second.bytes };
}
/* Kernels ask for each access, mostly for the same few places. */
bool has(const void *p, size_t n) {
    static thread_local struct { uintptr_t from, end; } known[4];
    static thread_local unsigned of_changes, next;
    if (of_changes != changes) {
        memset(known, 0, sizeof known);
        of_changes = changes;
    }
    for (auto &k : known) if ((uintptr_t)p >= k.from && (uintptr_t)p + n <= k.end) return true;
    auto range = range_of(p);
    if ((uintptr_t)p < range.first || (uintptr_t)p + n > range.second) return false;
    known[next++ % 4] = { range.first, range.second };
    return true;
}
[[noreturn]] void stop(const char *what, const void *p, size_t n) {
    fprintf(stderr, "cuda emulation: %s: %zu bytes at %p\n", what, n, p);
    abort();
}
}

int memory_take(uint64_t *at, size_t bytes) {
    if (!bytes) return INVALID_VALUE;
    size_t room = (bytes + ALIGN - 1) / ALIGN * ALIGN, length = (room + PAGE - 1) / PAGE * PAGE;
    if (used + takes(bytes) > state().set.vram) return OUT_OF_MEMORY;
    if (!arena) {
        void *p = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return OUT_OF_MEMORY;
        arena = (char *)p;
        emu::watch_faults();
        emu::in_device = in_arena;
        emu::accessible = has;
    }
    if (arena_used + length + 2 * PAGE > ARENA) stop("the arena is used up", arena, ARENA);
    char *map = arena + arena_used + PAGE, *p = map + length - room;
    arena_used += length + PAGE;
    if (mprotect(map, length, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    memset(map, 0xff, length);
    if (!is_open) mprotect(map, length, PROT_NONE);
    std::lock_guard<std::mutex> guard(lookup);
    areas()[(uintptr_t)p] = { map, length, bytes };
    used += takes(bytes);
    most = std::max(most, used);
    *at = (uint64_t)(uintptr_t)p;
    return OK;
}
/* The caller has waited for all work, or will not mind that the process ends. */
int memory_give(uint64_t at) {
    auto a = areas().find((uintptr_t)at);
    if (a == areas().end()) return INVALID_VALUE;
    area &of = a->second;
    mprotect(of.map, of.length, PROT_READ);
    for (const char *c = of.map; c < of.map + of.length; c++) {
        if ((uintptr_t)c == at) c += of.bytes;
        if (c < of.map + of.length && (unsigned char)*c != 0xff)
            stop("a kernel or copy wrote beside this allocation", (void *)(uintptr_t)at, of.bytes);
    }
    madvise(of.map, of.length, MADV_DONTNEED);
    mprotect(of.map, of.length, PROT_NONE);             /* the address is not given out again */
    used -= takes(of.bytes);
    std::lock_guard<std::mutex> guard(lookup);
    areas().erase(a);
    changes++;
    return OK;
}
size_t memory_used() { return used; }
size_t memory_most() { return most; }
size_t memory_pinned() { return n_pinned; }

/* Whether [at, at + bytes) is mapped, and (writable) may be written. */
static bool mapped(const char *at, size_t bytes, bool writable) {
    FILE *f = fopen("/proc/self/maps", "r");
    char line[1024], mode[8];
    unsigned long low, high;
    const char *reached = at;
    while (f && reached < at + bytes && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx %7s", &low, &high, mode) != 3) continue;
        if ((uintptr_t)reached < low || (uintptr_t)reached >= high) continue;
        if (mode[0] != 'r' || (writable && mode[1] != 'w')) break;
        reached = (const char *)high;
    }
    if (f) fclose(f);
    return reached >= at + bytes;
}
/* Are all of these pages there?  Of memory of the process's own those are not that it has given back. */
static bool resident(char *at, size_t bytes) {
    std::vector<unsigned char> pages((bytes + PAGE - 1) / PAGE);
    if (mincore(at, bytes, pages.data())) return false;
    for (unsigned char page : pages) if (!(page & 1)) return false;
    return true;
}
/* Pinning makes them be there. */
static void touch(const char *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += PAGE) (void)*(const volatile char *)(at + i);
}
int memory_pin(void *at, size_t bytes, bool own, bool read_only) {
    if (!bytes || !at) return INVALID_VALUE;
    if (n_pinned + bytes > state().set.pinned) return OUT_OF_MEMORY;
    if (!own && !mapped((const char *)at, bytes, !read_only)) return INVALID_VALUE;
    auto next = pins().lower_bound((uintptr_t)at), before = find_in(pins(), at);
    if ((next != pins().end() && next->first < (uintptr_t)at + bytes)
        || (before != pins().end() && before->first + before->second.bytes > (uintptr_t)at)) return ALREADY_REGISTERED;
    if (!own && !read_only) touch((const char *)at, bytes);
    std::lock_guard<std::mutex> guard(lookup);
    pins()[(uintptr_t)at] = { bytes, own, read_only };
    n_pinned += bytes;
    return OK;
}
int memory_unpin(void *at, bool own) {
    auto pin = pins().find((uintptr_t)at);
    if (pin == pins().end() || pin->second.own != own) return own ? INVALID_VALUE : NOT_REGISTERED;
    n_pinned -= pin->second.bytes;
    if (!own && !pin->second.read_only && !resident((char *)at, pin->second.bytes))
        stop("memory was given back while it was pinned", at, pin->second.bytes);
    if (!own && work_reads(at, pin->second.bytes))
        stop("memory is unpinned from which a copy is still to be made", at, pin->second.bytes);
    if (own) {
        const size_t length = (pin->second.bytes + PAGE - 1) / PAGE * PAGE;
        madvise(at, length, MADV_DONTNEED);
        mprotect(at, length, PROT_NONE);                /* the address is not given out again */
    }
    std::lock_guard<std::mutex> guard(lookup);
    pins().erase(pin);
    changes++;
    return OK;
}
place memory_place(const void *p, size_t n) {
    auto a = find_in(areas(), p);
    if (a != areas().end() && (uintptr_t)p < a->first + a->second.bytes) {
        if ((uintptr_t)p + n > a->first + a->second.bytes) stop("a copy leaves its allocation", p, n);
        return DEVICE;
    }
    if (in_arena(p)) stop("a copy of what is not allocated", p, n);
    auto pin = find_in(pins(), p);
    if (pin == pins().end() || (uintptr_t)p >= pin->first + pin->second.bytes) return PAGEABLE;
    return (uintptr_t)p + n <= pin->first + pin->second.bytes ? PINNED : STRADDLES;
}
void memory_open(bool open) {
    if (open == is_open) return;
    is_open = open;
    for (auto &a : areas()) mprotect(a.second.map, a.second.length, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}
