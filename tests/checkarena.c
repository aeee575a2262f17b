/* checkarena.c -- memory that is pinned where it lies, before a driver that is made up here and refuses at times.
 *
 * Whatever the ranges, in whatever order they are wanted: what is registered are whole pages of the ranges, no byte of
 * it twice, and never more than was allowed; what is called pinned lies in one registration; where a range says how
 * large its chunks are, each registration is one of these; what is given back is not registered, nor is anything at the
 * end; and after a refusal nobody is asked again.
 *
 *     checkarena SEED N_ROUNDS            prints "ok", or the first thing that was wrong
 */
#include <cuda/arena.h>                                        /* there is a tests/cuda, too */
#include <cuda/driver.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGE ((uintptr_t)4096)
#define BASE ((uintptr_t)1 << 32)                             /* nobody looks there */
#define MOST_REGIONS 4096

struct cuda_driver cuda;
static struct { uintptr_t at, end; } region[MOST_REGIONS];
static int n_regions, n_asked, n_refused, n_given;
static uint32_t noise, fails;
static uint64_t total;
static arena_range range[12];
static size_t n_ranges;

static void wrong(const char *what) {
    printf("%s\n", what);
    exit(1);
}
static uint32_t any_number(void) {
    uint32_t x = noise += 0x9e3779b9u;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    return (x ^ x >> 13) * 0xc2b2ae35u >> 8;
}
static CUresult add(void *p, size_t bytes, unsigned how) {
    const uintptr_t at = (uintptr_t)p, end = at + bytes;
    n_asked++;
    if (how != (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_READ_ONLY)) wrong("registered as something else");
    if (at % PAGE || bytes % PAGE || !bytes) wrong("registered something else than pages");
    for (int i = 0; i < n_regions; i++)
        if (at < region[i].end && region[i].at < end) wrong("registered twice");
    for (uintptr_t page = at; page < end; page += PAGE) {
        int is_ours = 0;
        for (size_t i = 0; i < n_ranges; i++)
            is_ours |= (uintptr_t)range[i].at < page + PAGE && page < (uintptr_t)range[i].at + range[i].bytes;
        if (!is_ours) wrong("registered what is none of ours");
    }
    for (size_t i = 0; i < n_ranges; i++) {
        const uintptr_t from = (uintptr_t)range[i].at;
        if (!range[i].chunk || at < from || at >= from + range[i].bytes) continue;
        if ((at - from) % range[i].chunk || bytes != range[i].chunk) wrong("registered something else than a chunk");
    }
    if (fails && any_number() % fails == 0) return n_refused++, CUDA_ERROR_OUT_OF_MEMORY;
    region[n_regions].at = at;
    region[n_regions++].end = end;
    total += bytes;
    return CUDA_SUCCESS;
}
static CUresult take_out(void *p) {
    for (int i = 0; i < n_regions; i++) {
        if (region[i].at != (uintptr_t)p) continue;
        total -= region[i].end - region[i].at;
        region[i] = region[--n_regions];
        return CUDA_SUCCESS;
    }
    wrong("unregistered what is not");
    return CUDA_ERROR_OUT_OF_MEMORY;
}
/* Ranges with gaps of less than a page, of none, and of many; some of them nothing but a byte. */
static void make_ranges(arena_range *out) {
    const size_t n = n_ranges = 1 + any_number() % 12;
    uintptr_t at = BASE + any_number() % PAGE;
    for (size_t i = 0; i < n; i++) {
        size_t bytes = any_number() % 4 ? 1 + any_number() % (40 * PAGE) : 1;
        if (any_number() % 3 == 0) bytes += PAGE - (at + bytes) % PAGE;        /* to the end of a page */
        const size_t chunk = any_number() % 3 ? 0 : PAGE * (1 + any_number() % 5);
        if (chunk) {
            at = (at + PAGE - 1) / PAGE * PAGE;
            bytes = chunk * (1 + any_number() % 8);
        }
        out[i] = (arena_range){ (const uint8_t *)at, bytes, chunk };
        at += bytes + (any_number() % 3 ? any_number() % PAGE : any_number() % (9 * PAGE));
    }
    for (size_t i = n; i > 1; i--) {
        const size_t j = any_number() % i;
        const arena_range one = out[i - 1];
        out[i - 1] = out[j];
        out[j] = one;
    }
}
/* All chunks that some bytes of a range touch. */
static void give_back(arena *a, const arena_range *r, size_t from, size_t n) {
    const uint64_t before = total;
    arena_unpin(a, r->at + from, n);
    for (size_t done = 0; done < n; done += 1000)
        if (arena_pinned(a, r->at + from + done, 1)) wrong("pinned, and was given back");
    n_given += before > total;
}
/* Some bytes of a range: pinned, in parts of one registration each, or not. */
static void want(arena *a, const arena_range *r, uint64_t most, size_t *n_there) {
    const size_t from = any_number() % r->bytes, n = 1 + any_number() % (r->bytes - from);
    uint64_t pinned, refused;
    if (any_number() % 4) arena_pin(a, r->at + from, n);
    else if (any_number() % 2) give_back(a, r, from, n);
    for (size_t done = 0, part; done < n; done += part) {
        const uintptr_t at = (uintptr_t)r->at + from + done;
        int there = 0;
        part = arena_pinned(a, (void *)at, n - done);
        for (int i = 0; i < n_regions; i++) there |= region[i].at <= at && at + (part ? part : 1) <= region[i].end;
        if (part > n - done || (part > 0) != there) wrong("another thing is pinned than is registered");
        *n_there += part > 0;
        if (!part) part = 1 + any_number() % 5000;
    }
    arena_count(a, &pinned, &refused);
    if (pinned != total || pinned > most) wrong("counts other bytes, or more than it may");
    if ((refused > 0) > (n_refused > 0)) wrong("refused without a refusal");
    if (n_refused > 1) wrong("asked again after a refusal");
}
int main(int argc, char **argv) {
    if (argc != 3) return 2;
    noise = (uint32_t)strtoul(argv[1], NULL, 10);
    size_t n_there = 0;
    cuda.cuMemHostRegister = add;
    cuda.cuMemHostUnregister = take_out;
    for (long round = strtol(argv[2], NULL, 10); round > 0; round--) {
        arena *a;
        make_ranges(range);
        const uint64_t most = any_number() % 3 ? UINT64_MAX : any_number() % (100 * PAGE);
        fails = any_number() % 2 ? 0 : 1 + any_number() % 9;
        n_refused = 0;
        if (arena_open(range, n_ranges, 1, most, &a)) wrong("no memory");
        for (int i = 0; i < 40; i++) want(a, &range[any_number() % n_ranges], most, &n_there);
        if (arena_pinned(a, (void *)(BASE - PAGE), 1)) wrong("what is none of ours is pinned");
        arena_close(a, 0);
        if (n_regions || total) wrong("something stays registered");
    }
    if (!n_there || !n_asked || !n_given) wrong("nothing was pinned");
    puts("ok");
    return 0;
}
