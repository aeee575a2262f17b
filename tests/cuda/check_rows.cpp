/* check_rows.cpp -- kernels that take each row on its own (rows.cuh, route.cuh, highest.cuh) against the CPU's. */
#include "check.h"

static const int widths[] = { 4096, 1024, 256, 32, 64, 96, 288, 2048, 1000, 37, 4128 };
static int a_width(int round) { return widths[round % (int)(sizeof widths / sizeof *widths)]; }
static size_t blocks_of(int width) { return ((size_t)width + SUPERBLOCK - 1) / SUPERBLOCK; }
static int up_32(int width) { return (width + 31) / 32 * 32; }
/* Rows by kinds: those of random_floats, then ordinary ones with a NaN or an infinity, then all zeros. */
#define ROW_KINDS (FLOAT_KINDS + 3)
static void random_row(float *x, int n, int kind) {
    random_floats(x, (size_t)n, kind < FLOAT_KINDS ? kind : 0);
    if (kind == FLOAT_KINDS) x[rnd() % (uint32_t)n] = NAN;
    if (kind == FLOAT_KINDS + 1) x[rnd() % (uint32_t)n] = rnd() & 1 ? INFINITY : -INFINITY;
    if (kind == FLOAT_KINDS + 2) memset(x, 0, (size_t)n * sizeof *x);
}
static void random_rows(float *x, int rows, size_t stride, int kind) {
    for (int t = 0; t < rows; t++) random_row(x + (size_t)t * stride, (int)stride, kind);
}
/* The CPU's blocks of a row that has a multiple of 32 floats, as the engine's rows with blocks do. */
static void same_as_quantized(const block_q8 *got, const float *row, int width) {
    buffer<block_q8> want(blocks_of(width));
    cpu->quantize(want, row, (size_t)width);
    same_blocks("block", got, want, blocks_of(width));
}
static dim3 rows_and_parts(int n, int round) { return dim3((unsigned)n, round % 3 ? 1 + rnd() % 9 : 1); }

static void check_norm() {
    for (int round = 0; round < 100 * repeat; round++) {
        const bool staged = round / 2 != 20 && round % 100 < 88;
        const int width = staged ? a_width(round) : NORM_STAGED + 32 * between(1, 40);
        const int n = between(1, 3), kind = round % 100 < 88 ? round % ROW_KINDS : 0;   /* 40, 41: any bits, too */
        const bool in_place = round % 5 == 0, has_blocks = round % 4 && width % 32 == 0;
        const size_t stride = (size_t)width + rnd() % 2 * 3, blocks = blocks_of(width) + rnd() % 2;
        buffer<float> x((size_t)n * stride, 16), y((size_t)n * stride, 16), weight((size_t)width), want((size_t)width);
        buffer<block_q8> q((size_t)n * blocks);
        now_trying("n %d width %d kind %d in place %d", n, width, kind, in_place);
        random_rows(x, n, stride, kind);
        random_floats(weight, (size_t)width, 0);
        buffer<float> before((size_t)n * stride);
        memcpy(before.p, x.p, x.bytes);
        const float eps = round % 7 == 3 ? 0 : 1e-6f;
        block_q8 *to = has_blocks ? q.p : nullptr;
        norm_args a = { x, weight, in_place ? x : y, to, stride, stride, blocks, n, width, eps, 0 };
        launch("norm_rows", a, dim3((unsigned)n), norm_shared(width));
        for (int t = 0; t < n; t++) {
            cpu->rms_norm(want, before + (size_t)t * stride, weight, (size_t)width, eps);
            same("norm", (in_place ? x : y) + (size_t)t * stride, want, (size_t)width);
            if (has_blocks) same_as_quantized(q + (size_t)t * blocks, want, width);
        }
        expect(x.intact() && y.intact() && q.intact(), "writes only its rows");
    }
}
static void check_act() {
    for (int round = 0; round < 88 * repeat; round++) {
        const int n = between(1, 3), width = up_32(a_width(round)), kind = round % ROW_KINDS;
        const int gelu = between(0, 1), which = round % 3;
        const size_t count = (size_t)n * (size_t)width, blocks = blocks_of(width) + rnd() % 2;
        buffer<float> gate(count), up(count), f(count), want(count);
        buffer<block_q8> q((size_t)n * blocks);
        now_trying("n %d width %d kind %d gelu %d", n, width, kind, gelu);
        random_rows(gate, n, (size_t)width, kind);
        random_rows(up, n, (size_t)width, round % 5 ? 0 : between(0, FLOAT_KINDS - 1));
        for (size_t i = 0; i < count; i += 3) gate[i] *= 30;
        act_args a = { gate, up, which ? f.p : nullptr, which < 2 ? q.p : nullptr, blocks, n, width, gelu, 0 };
        launch("act_rows", a, rows_and_parts(n, round));
        (gelu ? cpu->gelu_mul : cpu->silu_mul)(want, gate, up, count);
        if (which) same("act", f, want, count);
        for (int t = 0; t < n && which < 2; t++)
            same_as_quantized(q + (size_t)t * blocks, want + (size_t)t * (size_t)width, width);
        expect(f.intact() && q.intact(), "writes only its rows");
    }
}
static void check_bias() {
    for (int round = 0; round < 88 * repeat; round++) {
        const int n = between(1, 3), width = up_32(a_width(round)), kind = round % ROW_KINDS, gelu = between(0, 1);
        const bool has_bias = round % 4 != 2, has_blocks = round % 3 != 1;
        const size_t stride = (size_t)width + rnd() % 2 * 4, blocks = blocks_of(width);
        buffer<float> b((size_t)n * stride), bias((size_t)width), want((size_t)n * stride);
        buffer<block_q8> q((size_t)n * blocks);
        now_trying("n %d width %d kind %d gelu %d bias %d", n, width, kind, gelu, has_bias);
        random_rows(b, n, stride, kind);
        random_floats(bias, (size_t)width, 0);
        memcpy(want.p, b.p, b.bytes);
        bias_args a = { b, has_bias ? bias.p : nullptr, has_blocks ? q.p : nullptr, stride, blocks, n, width, gelu, 0 };
        launch("bias_rows", a, rows_and_parts(n, round));
        for (int t = 0; t < n; t++) {
            float *row = want + (size_t)t * stride;
            for (int i = 0; has_bias && i < width; i++) row[i] += bias[i];
            if (gelu) cpu->gelu(row, (size_t)width);
            same("bias", b + (size_t)t * stride, row, (size_t)width);
            if (has_blocks) same_as_quantized(q + (size_t)t * blocks, row, width);
        }
        expect(b.intact() && q.intact(), "writes only its rows");
    }
}
static void check_gather() {
    for (int round = 0; round < 20 * repeat; round++) {
        const int n = between(1, 4), width = a_width(round);
        const size_t stride = (size_t)width + rnd() % 2 * 4;
        std::vector<int32_t> rows;
        for (int i = 0, row = 0; i < n; i++, row++) rows.push_back(row += between(0, 2));
        buffer<float> from((size_t)(rows.back() + 1) * stride, 16), to((size_t)n * stride, 16);
        now_trying("n %d width %d", n, width);
        random_floats(from, from.count, 1);
        gather_args a = { from, to, rows.data(), stride, n, width };
        launch("gather_rows", a, rows_and_parts(n, round));
        for (int i = 0; i < n; i++)
            same_ints("row", (const int32_t *)(to + (size_t)i * stride),
                      (const int32_t *)(from + (size_t)rows[(size_t)i] * stride), (size_t)width);
        expect(to.intact(), "writes only its rows");
    }
}
static void check_sum_pairs() {
    for (int round = 0; round < 40 * repeat; round++) {
        const int n = between(1, 3), k = round % 4 ? between(1, 9) : 4, width = a_width(round);
        const int kind = round % ROW_KINDS;
        const size_t stride = (size_t)width + rnd() % 2 * 4, n_pairs = (size_t)(n * k);
        buffer<float> h((size_t)n * stride, 16), pairs(n_pairs * stride, 16), weight(n_pairs), want((size_t)n * stride);
        std::vector<int32_t> row;
        for (size_t i = 0; i < n_pairs; i++) row.push_back((int32_t)i);
        std::shuffle(row.begin(), row.end(), rng);
        now_trying("n %d k %d width %d kind %d", n, k, width, kind);
        random_rows(h, n, stride, 0);
        random_rows(pairs, (int)n_pairs, stride, kind);
        random_floats(weight, n_pairs, 0);
        memcpy(want.p, h.p, h.bytes);
        const bool in_order = round % 5 == 3;
        if (in_order) std::sort(row.begin(), row.end());
        sum_args a = { h, pairs, weight, in_order ? nullptr : row.data(), stride, n, k, width, 0 };
        launch("sum_pairs", a, rows_and_parts(n, round));
        for (int t = 0; t < n; t++) {
            for (int i = t * k; i < (t + 1) * k; i++)
                cpu->add_scaled(want + (size_t)t * stride, pairs + (size_t)row[(size_t)i] * stride, weight[(size_t)i],
                                (size_t)width);
            same("sum", h + (size_t)t * stride, want + (size_t)t * stride, (size_t)width);
        }
        expect(h.intact(), "writes only its rows");
    }
}
/* Logits by kinds: ordinary; few different ones, so that many are equal; with zeros of both signs; some NaN; all NaN;
 * some infinite; all -infinity; so far apart that all but one weight are 0. */
static float a_logit(int kind) {
    const float edges[] = { 0.0f, -0.0f, 1e-45f, -1e-45f };
    if (kind == 1) return (float)between(-2, 2);
    if (kind == 2) return edges[rnd() % 4];
    if (kind == 3 && rnd() % 9 == 0) return NAN;
    if (kind == 4) return rnd() & 1 ? NAN : -NAN;
    if (kind == 5 && rnd() % 9 == 0) return rnd() % 3 ? -INFINITY : INFINITY;
    if (kind == 6) return -INFINITY;
    return (float)((uniform() * 2 - 1) * (kind == 7 ? 1e4 : 5));
}
static void check_choose() {
    static const int experts[] = { 128, 4, 1, 64, 127, 129, 256, 33, 8, 1000 };
    for (int round = 0; round < 90 * repeat; round++) {
        const bool huge = round == 88 || round == 89;
        const int n = between(1, 3), n_expert = huge ? 65536 - (round & 1) : experts[round % 10];
        const int k = huge ? 256 : between(1, std::min(n_expert, round % 3 ? 8 : 256));
        const int kind = round / 10 % 8, norm = round % 4 != 3;
        const size_t stride = (size_t)n_expert + rnd() % 3, count = (size_t)(n * k);
        buffer<float> logits((size_t)n * stride, 4), weights(count), want(count);
        buffer<int32_t> ids(count), want_ids(count);
        now_trying("n %d of %d experts k %d kind %d norm %d", n, n_expert, k, kind, norm);
        for (size_t i = 0; i < logits.count; i++) logits[i] = a_logit(kind);
        const float scale = round & 1 ? 1 : 2.5f;
        choose_args a = { logits, ids, weights, stride, n, n_expert, k, norm, scale, 0 };
        launch("choose_experts", a, dim3((unsigned)n));
        for (int t = 0; t < n; t++)
            cpu->choose(logits + (size_t)t * stride, n_expert, k, scale, norm, want_ids + t * k, want + t * k);
        same_ints("id", ids.p, want_ids.p, count);
        same("weight", weights, want, count);
        expect(ids.intact() && weights.intact(), "writes only its choice");
    }
}
/* When the flag is raised, all that was to be told is there. */
static tell_args told;
static int n_told;
static void look(const void *flag) {
    same_ints("told id", told.told_ids, told.ids, (size_t)told.k);
    same_ints("told weight", (const int32_t *)told.told_weights, (const int32_t *)told.weights, (size_t)told.k);
    same_ints("told x", (const int32_t *)told.told_x, (const int32_t *)told.x, 4 * (size_t)told.words);
    expect(flag == told.flag && *told.flag == 1, "the flag is raised");
    n_told++;
}
static void check_tell() {
    emu::released = look;
    for (int round = 0; round < 30 * repeat; round++) {
        const int k = round % 3 ? between(1, 9) : between(1, 600), blocks = round % 4 ? between(0, 30) : 0;
        const size_t n = (size_t)k, n_blocks = (size_t)blocks;
        buffer<int32_t> ids(n), told_ids(n), flag(1);
        buffer<float> weights(n), told_weights(n);
        buffer<block_q8> x(n_blocks + 1), told_x(n_blocks + 1);
        now_trying("k %d, %d blocks", k, blocks);
        for (int i = 0; i < k; i++) ids[i] = between(0, 1000);
        random_floats(weights, n, 1);
        for (size_t i = 0; i < n_blocks * sizeof(block_q8) / 4; i++) ((uint32_t *)x.p)[i] = rnd();
        *flag.p = 0;
        n_told = 0;
        told = { ids, weights, x, told_ids, told_weights, told_x, flag, k, blocks * (int)(sizeof(block_q8) / 16) };
        launch("tell_choice", told, dim3(1));
        expect(n_told == 1, "once");
        expect(told_ids.intact() && told_weights.intact() && flag.intact(), "writes only what it tells");
        expect(((uint8_t *)(told_x + n_blocks))[0] == 0xaa, "as many words as it was told");
    }
    emu::released = nullptr;
}
/* What sampling may choose from, in the order of ids: the k highest of those below `among`, of equal ones the first. */
static void highest_of(const float *logits, int among, int k, int32_t *ids, float *out) {
    std::vector<int32_t> order;
    for (int i = 0; i < among; i++) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    std::sort(order.begin(), order.begin() + k);
    for (int i = 0; i < k; i++) out[i] = logits[ids[i] = order[(size_t)i]];
}
/* Launch after launch, the first one of so many parts, until one part is left. */
struct ranking { buffer<float> logits; buffer<int32_t> ids; };
static ranking rank_rows(const highest_args &first, int parts) {
    highest_args a = first;
    std::vector<ranking> kept;
    for (;; parts = highest_parts(a.n, a.k)) {
        const size_t count = (size_t)(a.n_rows * parts * a.k);
        kept.push_back({ buffer<float>(count, 4), buffer<int32_t>(count, 4) });
        a.to = kept.back().logits;
        a.to_ids = kept.back().ids;
        launch("highest_rows", a, dim3((unsigned)parts, (unsigned)a.n_rows));
        expect(kept.back().logits.intact() && kept.back().ids.intact(), "writes only what it keeps");
        if (parts == 1) return std::move(kept.back());
        a.logits = a.to;
        a.ids = a.to_ids;
        a.n = parts * a.k;
        a.stride = (size_t)a.n;
    }
}
/* Numbers that are not finite by kinds: none; some anywhere; one alone, be it among those that may be chosen or not. */
static bool spoil(float *row, int n, int kind) {
    if (kind == 1) for (int i = 0; i < n; i++) if (rnd() % 50 == 0) row[i] = rnd() & 1 ? NAN : -INFINITY;
    if (kind) row[rnd() % (uint32_t)n] = rnd() % 3 ? rnd() & 1 ? NAN : -NAN : rnd() & 1 ? INFINITY : -INFINITY;
    return kind != 0;
}
static void check_highest() {
    static const int lengths[] = { 1, 31, 32, 33, 511, 512, 513, 1400, 2048, 2049, 5000, HIGHEST_MOST, 20000 };
    const int n_lengths = (int)(sizeof lengths / sizeof *lengths);
    for (int round = 0; round < 6 * n_lengths * repeat; round++) {
        const bool whole = round == 40 || round == 50;                     /* the vocabulary of the real model */
        const int n = whole ? 131072 : lengths[round % n_lengths], rows = whole ? 1 : between(1, 3);
        const int k = std::min(n, whole ? round == 40 ? 1 : HIGHEST_K : round % 3 ? between(1, 50) : HIGHEST_K);
        const int among = round % 4 ? n : between(k, n), bad = round % 5 == 4 ? between(1, 2) : 0;
        const int kind = round / n_lengths % 3;
        int parts = round % 2 || whole ? highest_parts(n, k) : between(highest_parts(n, k), std::min(n / k, 30));
        const size_t stride = (size_t)n + rnd() % 3;
        now_trying("%d rows of %d logits, %d among, k %d, parts %d, kind %d, bad %d", rows, n, among, k, parts, kind,
                   bad);
        buffer<float> logits((size_t)rows * stride, 4), want((size_t)k);
        buffer<int32_t> want_ids((size_t)k);
        for (size_t i = 0; i < logits.count; i++) logits[i] = a_logit(kind);
        std::vector<bool> spoilt;
        for (int t = 0; t < rows; t++) spoilt.push_back(spoil(logits + (size_t)t * stride, n, rnd() & 1 ? bad : 0));
        ranking got = rank_rows({ logits, nullptr, nullptr, nullptr, stride, rows, n, among, k }, parts);
        for (int t = 0; t < rows; t++) {
            const float *found = got.logits + t * k;
            bool finite = true;
            for (int i = 0; i < k; i++) finite &= std::isfinite(found[i]);
            expect(finite != spoilt[(size_t)t], "a number that is not finite shows, and no other");
            if (spoilt[(size_t)t]) continue;
            highest_of(logits + (size_t)t * stride, among, k, want_ids, want);
            same_ints("id", got.ids + t * k, want_ids.p, (size_t)k);
            same("logit", found, want, (size_t)k);
        }
    }
}
int main(int argc, char **argv) {
    return run_checks(argc, argv, { { "norm_rows", check_norm }, { "act_rows", check_act }, { "bias_rows", check_bias },
                                    { "gather_rows", check_gather }, { "sum_pairs", check_sum_pairs },
                                    { "choose_experts", check_choose }, { "tell_choice", check_tell },
                                    { "highest_rows", check_highest } });
}
