/* check.h -- what the comparisons of kernels with the CPU's (tests/cuda/check_*.cpp) stand on: memory that ends at an
 * unreadable page, numbers, launches by name, and the count of outputs that had the same bits.
 *
 * A file is made of functions  static void check_X(void)  that launch() kernels and compare with same(); its last lines
 * are  int main(int argc, char **argv) { return run_checks(argc, argv, { { "kernel", check_X }, .. }); }.  Linked
 * twice, with the kernels as g++ compiles them and as nvcc does.  Arguments: how often (1), and what the names of the
 * kernels begin with.
 * MS4_TEST_SEED repeats a run.  Ends at the first check that fails: status 1; with MS4_CHECK_FIRST at the first output.
 */
#ifndef MS4_CUDA_CHECK_H
#define MS4_CUDA_CHECK_H
#include "launch.h"
#include <cstdarg>
#include <initializer_list>
#include <random>
#include <string>
#include <sys/mman.h>
#include <vector>
#define restrict
extern "C" {
#include "ops.h"
#include "cpu/plain/grids.h"
const struct ms4_ops *ms4_ops_for(const char *isa);
}
#undef restrict

static const struct ms4_ops *cpu;                   /* the CPU's kernels: the best table that runs here */
static int repeat = 1;                              /* checks draw this many times as many cases */
static uint64_t check_seed;
static uint32_t launch_seed;                        /* 0: threads in order */
static std::mt19937_64 rng;
static long n_equal, n_nan, n_wrong;
static std::string first_wrong, where;              /* where: the case, for the message */

static uint32_t rnd() { return (uint32_t)(rng() >> 32); }
static int between(int low, int high) { return low + (int)(rnd() % (uint32_t)(high - low + 1)); }
static double uniform() { return (double)(rng() >> 11) * 0x1p-53; }
/* Says what is being tried: printed with the first difference. */
__attribute__((format(printf, 1, 2))) static void now_trying(const char *format, ...) {
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    where = text;
}
static void wrong(const char *what, size_t i, const char *got, const char *want) {
    char text[300];
    if (!n_wrong++) {
        snprintf(text, sizeof text, "%s [%zu]: %s, not %s; case: ", what, i, got, want);
        first_wrong = text + where;
        if (getenv("MS4_CHECK_FIRST")) {
            printf("%s\n", first_wrong.c_str());
            exit(1);
        }
    }
}
/* Floats of the same bits, or NaN both. */
static void same(const char *what, const float *got, const float *want, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char a[40], b[40];
        if (got[i] != got[i] && want[i] != want[i]) n_nan++;
        else if (!memcmp(got + i, want + i, 4)) n_equal++;
        else {
            snprintf(a, sizeof a, "%a", got[i]), snprintf(b, sizeof b, "%a", want[i]);
            wrong(what, i, a, b);
        }
    }
}
template <class T> static inline void same_ints(const char *what, const T *got, const T *want, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (got[i] == want[i]) n_equal++;
        else wrong(what, i, std::to_string((long)got[i]).c_str(), std::to_string((long)want[i]).c_str());
}
static inline void same_blocks(const char *what, const block_q8 *got, const block_q8 *want, size_t n) {
    for (size_t i = 0; i < n; i++) {
        same_ints(what, got[i].qs, want[i].qs, SUPERBLOCK);
        same_ints(what, got[i].sums, want[i].sums, SUPERBLOCK / 16);
        same(what, &got[i].d, &want[i].d, 1);
    }
}
static void expect(bool good, const char *what) {
    if (good) n_equal++;
    else wrong(what, 0, "no", "yes");
}

/* n of T, aligned to 64 bytes (or a smaller `align`), filled with 0xaa; behind it comes poison to the next 16 bytes and
 * then an unreadable page: kernels may read that poison, and write nothing. */
template <class T> struct buffer {
    char *map;
    size_t length, bytes, count;
    T *p;
    explicit buffer(size_t n, size_t align = 64) : bytes(n * sizeof(T)), count(n) {
        size_t page = 4096, room = (bytes + align - 1) / align * align;
        room = room < bytes + (16 - bytes % 16) % 16 ? (bytes + 15) / 16 * 16 : room;
        length = (room + page - 1) / page * page + page;
        map = (char *)mmap(nullptr, length + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(map + length, page, PROT_NONE)) { perror("buffer"); exit(2); }
        memset(map, 0xaa, length);
        p = (T *)(map + (length - room) / align * align);
    }
    buffer(const buffer &) = delete;
    buffer(buffer &&from) : map(from.map), length(from.length), bytes(from.bytes), count(from.count), p(from.p) {
        from.map = nullptr;
    }
    ~buffer() { if (map) munmap(map, length + 4096); }
    operator T *() { return p; }
    T *data() { return p; }
    /* Nothing was written before and behind it. */
    bool intact() const {
        for (const char *c = map; c < (const char *)p; c++) if ((unsigned char)*c != 0xaa) return false;
        for (const char *c = (const char *)p + bytes; c < map + length; c++)
            if ((unsigned char)*c != 0xaa) return false;
        return true;
    }
};

/* Runs a kernel; a is its struct. */
template <class A> static void launch(const char *name, const A &a, dim3 grid, size_t shared = 0, int threads = 0) {
    const emu::kernel *k = emu::find(name);
    if (!k) { printf("no kernel %s\n", name); exit(2); }
    if (k->bytes != sizeof(A)) { printf("%s takes another struct: %zu bytes\n", name, k->bytes); exit(2); }
    emu::launch(*k, grid, threads ? threads : k->threads, shared, &a, launch_seed ? launch_seed++ : 0);
}

/* Floats by kinds: 0 ordinary; 1 any bits below 2; 2 all of one size, one superblock huge; 3 near the smallest; 4 zeros
 * and one large number among tiny ones. */
#define FLOAT_KINDS 5
static inline void random_floats(float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        double u = uniform() * 2 - 1, v = uniform() * 2 - 1;
        uint32_t bits = rnd() & 0xbfffffffu;
        if (kind == 0) x[i] = (float)(u * v * 3);
        else if (kind == 1) memcpy(x + i, &bits, 4);
        else if (kind == 2) x[i] = (u < 0 ? -1.0f : 1.0f) * (i / SUPERBLOCK == 5 ? 3e38f : 1.0f);
        else if (kind == 3) x[i] = (float)(u * 1e-38);
        else x[i] = i / SUPERBLOCK % 4 == 1 ? 0.0f : (float)(u * 1e-20 * (i % SUPERBLOCK == 7 ? 1e20 : 1));
    }
}
/* Halves by kinds: 0 ordinary scales; 1 any bits, seldom not finite; 2 the largest; 3 denormal; 4 edges. */
#define HALF_KINDS 5
static inline uint16_t random_half(int kind) {
    static const uint16_t edges[] = { 0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00 };
    uint32_t sign = (rnd() & 1) << 15;
    if (kind == 0) return (uint16_t)(0x1400 + rnd() % 0x1000 + sign);
    if (kind == 1) return (uint16_t)(rnd() % 400 ? rnd() & 0xbfff : rnd());
    if (kind == 2) return 0x7bff;
    if (kind == 3) return (uint16_t)(rnd() % 0x400 + sign);
    return edges[rnd() % 200 ? rnd() % 8 : rnd() % 11];
}
/* n weights (whole blocks) of a type: random bytes, or all ones for kind 2, with scales by random_half(kind). */
static inline void random_weights(int type, uint8_t *w, size_t n, int kind) {
    static const struct { int d, m, weights, bytes; } info[] = {
#define X(name, id, weights, bytes, family, d, m) { d, m, weights, bytes },
        MS4_TYPES(X)
#undef X
    };
    size_t bytes = n / (size_t)info[type].weights * (size_t)info[type].bytes;
    if (type == MS4_TYPE_f32) return random_floats((float *)w, n, kind == 2 ? 0 : kind);
    for (size_t i = 0; i < bytes; i++) w[i] = kind == 2 ? 0xff : (uint8_t)rnd();
    for (size_t i = 0; i < bytes; i += (size_t)info[type].bytes) {
        uint16_t d = random_half(kind), m = random_half(kind);
        if (type == MS4_TYPE_f16) memcpy(w + i, &d, 2);
        else if (type == MS4_TYPE_bf16 && kind != 1) w[i + 1] = (uint8_t)(0x3c + rnd() % 4 + (rnd() & 128));
        else if (type == MS4_TYPE_mxfp4 && kind < 2) w[i] = (uint8_t)(110 + rnd() % 20);
        if (info[type].d >= 0) memcpy(w + i + info[type].d, &d, 2);
        if (info[type].m >= 0) memcpy(w + i + info[type].m, &m, 2);
    }
}

struct check { const char *name; void (*run)(); };
static int run_checks(int argc, char **argv, std::initializer_list<check> checks) {
    const char *given = getenv("MS4_TEST_SEED"), *only = argc > 2 ? argv[2] : "";
    repeat = argc > 1 ? std::max(1, atoi(argv[1])) : 1;
    check_seed = given ? strtoull(given, nullptr, 10) : std::random_device()();
    cpu = ms4_ops_for(nullptr);
    int n_run = 0;
    for (auto &c : checks) {
        if (strncmp(c.name, only, strlen(only))) continue;
        n_run++;
        rng.seed(check_seed);
        launch_seed = 1 + (uint32_t)(check_seed & 0xffff);
        n_equal = n_nan = n_wrong = 0;
        first_wrong = "";
        c.run();
        if (!n_equal) wrong("nothing was compared", 0, "no", "yes");
        printf("%-24s %10ld equal, %8ld NaN on both sides, %ld wrong\n", c.name, n_equal, n_nan, n_wrong);
        if (n_wrong) {
            printf("  %s\n  again: MS4_TEST_SEED=%llu\n", first_wrong.c_str(), (unsigned long long)check_seed);
            return 1;
        }
        fflush(stdout);
    }
    if (!n_run) printf("no check begins with %s\n", only);
    return n_run ? 0 : 2;
}
#endif
