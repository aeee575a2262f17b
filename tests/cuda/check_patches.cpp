/* check_patches.cpp -- the vision tower's kernels (patches.cuh) against the CPU's, in the order of
 * csrc/cpu/run_patches.c. */
#include "check.h"

struct grid { int columns, rows, n_head, d_head; };
static const grid grids[] = { { 8, 6, 2, 64 }, { 1, 1, 1, 8 }, { 4, 8, 3, 16 }, { 5, 13, 1, 64 }, { 10, 7, 2, 24 },
                              { 2, 2, 4, 64 }, { 11, 9, 1, 72 }, { 3, 43, 2, 64 }, { 33, 1, 2, 40 } };
#define N_GRIDS 9
/* By kinds: 0 ordinary; 1 sharp; 2 all alike; 3 some NaN; 4 some infinite; 5 huge; 6 tiny. */
#define PATCH_KINDS 7
static void random_patches(float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        const float u = (float)(uniform() * 2 - 1);
        x[i] = kind == 1 ? u * 8 : kind == 2 ? 0.5f : kind == 5 ? u * 1e20f : kind == 6 ? u * 1e-30f : u;
        if (kind == 3 && rnd() % 400 == 0) x[i] = NAN;
        if (kind == 4 && rnd() % 400 == 0) x[i] = rnd() & 1 ? INFINITY : -INFINITY;
    }
}
static void check_rotate() {
    for (int round = 0; round < 36 * repeat; round++) {
        const grid g = grids[round % N_GRIDS];
        const int n = g.columns * g.rows, d = g.d_head;
        const size_t stride = (size_t)(g.n_head * d) + rnd() % 2 * 4;
        const float scale = 1 / sqrtf((float)d);
        buffer<float> q((size_t)n * stride), k((size_t)n * stride), want_q(q.count), want_k(k.count);
        buffer<float> rope((size_t)(std::max(g.columns, g.rows) * d));
        now_trying("%d x %d heads %d d_head %d", g.columns, g.rows, g.n_head, d);
        random_patches(q, q.count, round / 9 % 2);
        random_patches(k, k.count, round / 9 % 2);
        random_patches(rope, rope.count, 0);
        memcpy(want_q.p, q.p, q.bytes);
        memcpy(want_k.p, k.p, k.bytes);
        for (int t = 0; t < n; t++)
            for (int i = 0; i < g.n_head * d; i += 2) {
                const float *turn = rope + (i % d < d / 2 ? t / g.columns : t % g.columns) * d + i % d;
                float *to_q = want_q + (size_t)t * stride + i, *to_k = want_k + (size_t)t * stride + i;
                const float q0 = to_q[0] * scale, q1 = to_q[1] * scale, k0 = to_k[0], k1 = to_k[1];
                to_q[0] = q0 * turn[0] - q1 * turn[1];
                to_q[1] = q0 * turn[1] + q1 * turn[0];
                to_k[0] = k0 * turn[0] - k1 * turn[1];
                to_k[1] = k0 * turn[1] + k1 * turn[0];
            }
        rotate_args a = { q, k, rope, stride, n, g.columns, g.n_head, d, scale, 0 };
        launch("rotate_patches", a, dim3((unsigned)n, round % 3 ? 1 + rnd() % 5 : 1));
        same("q", q, want_q, q.count);
        same("k", k, want_k, k.count);
        expect(q.intact() && k.intact(), "writes only its rows");
    }
}
/* All patches' queries of a head with all keys; x: rows of d_head. */
static void cpu_attend(const attend_patches_args &a, int head, float *x) {
    const size_t d = (size_t)a.d_head, at = (size_t)head * d;
    const int padded = (a.n + ATTEND_KEYS - 1) / ATTEND_KEYS * ATTEND_KEYS;
    buffer<float> kt(ATTEND_KEYS * d), v((size_t)padded * d), m((size_t)a.n), l((size_t)a.n);
    memset(v.p, 0, v.bytes);
    memset(x, 0, (size_t)a.n * d * sizeof *x);
    for (int t = 0; t < a.n; t++) {
        memcpy(v + (size_t)t * d, a.v + (size_t)t * a.stride + at, d * sizeof *x);
        m[t] = -INFINITY;
        l[t] = 0;
    }
    for (int key = 0; key < a.n; key += ATTEND_KEYS) {
        int32_t n_keys[ATTEND_ROWS];
        for (int i = 0; i < ATTEND_ROWS; i++) n_keys[i] = std::min(ATTEND_KEYS, a.n - key);
        cpu->transpose_keys(kt, a.k + (size_t)key * a.stride + at, a.stride, n_keys[0], a.d_head);
        for (int t = 0; t < a.n; t += ATTEND_ROWS) {
            ms4_attend c = {};
            c.q = a.q + (size_t)t * a.stride + at, c.q_stride = a.stride, c.kt = kt;
            c.v = v + (size_t)key * d, c.v_stride = d, c.o = x + (size_t)t * d, c.o_stride = d;
            c.m = m + t, c.l = l + t, c.n_keys = n_keys;
            c.n_q = std::min(ATTEND_ROWS, a.n - t), c.d_k = c.d_v = a.d_head;
            cpu->attend(&c);
        }
    }
    for (int t = 0; t < a.n; t++)
        for (size_t i = 0; i < d; i++) x[(size_t)t * d + i] /= l[t];
}
static void check_attend() {
    for (int round = 0; round < 42 * repeat; round++) {
        const grid g = grids[round % N_GRIDS];
        const int n = g.columns * g.rows, kind = round % PATCH_KINDS;
        const size_t d = (size_t)g.d_head, stride = (size_t)g.n_head * d + rnd() % 2 * 4;
        buffer<float> q((size_t)n * stride), k(q.count), v(q.count), x(q.count), want((size_t)n * d);
        now_trying("%d patches heads %d d_head %zu kind %d", n, g.n_head, d, kind);
        random_patches(q, q.count, round % 2 ? kind : 0);
        random_patches(k, k.count, round % 2 ? 0 : kind);
        random_patches(v, v.count, round % 5 == 4 ? kind : 0);
        for (size_t i = 0; i < v.count; i += 3) v[i] = -0.0f;
        attend_patches_args a = { q, k, v, x, stride, n, g.n_head, g.d_head, 0 };
        launch("attend_patches", a, dim3((unsigned)(n + ATTEND_PATCHES - 1) / ATTEND_PATCHES, (unsigned)g.n_head));
        for (int h = 0; h < g.n_head; h++) {
            cpu_attend(a, h, want);
            for (int t = 0; t < n; t++)
                same("x", x + (size_t)t * stride + (size_t)h * d, want + (size_t)t * d, d);
        }
        expect(x.intact(), "writes only its rows");
    }
}
static void check_merge() {
    for (int round = 0; round < 36 * repeat; round++) {
        const int merge = 1 + round % 3, across = between(1, 5), down = between(1, 4), width = 32 * between(1, 9);
        const int columns = across * merge, first = between(0, across * down - 1);
        const int n = between(1, across * down - first);
        const size_t d = (size_t)(width * merge * merge), stride = (size_t)width + rnd() % 2 * 4;
        const size_t to_stride = d + rnd() % 2 * 4, blocks = (d + SUPERBLOCK - 1) / SUPERBLOCK;
        const bool has_blocks = round % 4;
        buffer<float> from((size_t)(columns * down * merge) * stride), to((size_t)n * to_stride), want(d);
        buffer<block_q8> q((size_t)n * blocks), want_q(blocks);
        now_trying("%d x %d of %d, from %d on %d; width %d", across, down, merge, first, n, width);
        random_patches(from, from.count, round % PATCH_KINDS);
        merge_args a = { from, to, has_blocks ? q.p : nullptr, stride, to_stride, blocks, first, n, columns, merge,
                         width, 0 };
        launch("merge_patches", a, dim3((unsigned)n, round % 3 ? 1 + rnd() % 9 : 1));
        for (int i = 0; i < n; i++) {
            const int y = (first + i) / across * merge, x = (first + i) % across * merge;
            for (int c = 0; c < width; c++)
                for (int dy = 0; dy < merge; dy++)
                    for (int dx = 0; dx < merge; dx++)
                        want[c * merge * merge + dy * merge + dx]
                            = from[(size_t)((y + dy) * columns + x + dx) * stride + (size_t)c];
            cpu->quantize(want_q, want, d);
            same("merged", to + (size_t)i * to_stride, want, d);
            if (has_blocks) same_blocks("block", q + (size_t)i * blocks, want_q, blocks);
        }
        expect(to.intact() && q.intact(), "writes only its rows");
    }
}
int main(int argc, char **argv) {
    return run_checks(argc, argv, { { "rotate_patches", check_rotate }, { "attend_patches", check_attend },
                                    { "merge_patches", check_merge } });
}
