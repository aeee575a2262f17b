/* check_attend.cpp -- attention's kernels (latents.cuh, attend.cuh) against the CPU's kernels, in the order of
 * csrc/cpu/run_attend.c and run_tokens.c. */
#include "check.h"

struct shape { int n_head, rank, d_nope, d_rope; };
static const shape shapes[] = { { 32, 256, 64, 64 }, { 4, 32, 16, 8 }, { 3, 40, 8, 16 }, { 17, 256, 64, 64 },
                                { 33, 8, 24, 24 }, { 2, 1024, 16, 32 }, { 1, 512, 128, 64 }, { 5, 264, 32, 72 } };
#define N_SHAPES 8
static size_t width_of(const shape &s) { return (size_t)(s.rank + s.d_rope); }
/* Numbers as latents and queries have them, by kinds: 0 ordinary; 1 far apart; 2 few large ones; 3 all alike; 4 as good
 * as zero; 5 a huge one; 6 some NaN or infinity; 7 zeros. */
#define KEY_KINDS 8
static void random_part(float *x, int n, int kind, bool odd_one) {
    for (int i = 0; i < n; i++) {
        const float u = (float)(uniform() * 2 - 1);
        x[i] = kind == 1 ? u * 30 : kind == 2 ? (rnd() % 64 ? 0 : u * 3) : kind == 3 ? 1.0f : u;
        if (kind == 4) x[i] *= 1e-35f;
        if (kind == 7) x[i] = 0;
    }
    if (kind == 5 && odd_one) for (int i = 0; i < n; i++) x[i] *= 1e30f;
    if (kind == 6 && odd_one) x[rnd() % (uint32_t)n] = rnd() & 1 ? NAN : INFINITY;
}
static void random_rope(float *rope, size_t n) {
    for (size_t i = 0; i < n; i += 2) {
        const double angle = uniform() * 6.3;
        rope[i] = (float)cos(angle);
        rope[i + 1] = (float)sin(angle);
    }
}
static void rotate(float *x, const float *rope, int d_rope) {
    for (int i = 0; i < d_rope; i += 2) {
        const float a = x[i], b = x[i + 1];
        x[i] = a * rope[i] - b * rope[i + 1];
        x[i + 1] = a * rope[i + 1] + b * rope[i];
    }
}
static void check_latents() {
    for (int round = 0; round < 80 * repeat; round++) {
        const shape s = shapes[round / 2 % N_SHAPES];
        const int n = between(1, 5), kind = round / 3 % KEY_KINDS;
        const size_t stride = width_of(s) + rnd() % 2 * 8, offset = (size_t)between(0, 2) * 64;
        const size_t layer = KV_ROWS * (width_of(s) * 2 + 12);
        buffer<uint8_t> got(offset + layer), want(offset + layer);
        buffer<float> kv((size_t)n * stride), weight((size_t)s.rank), rope((size_t)(n * s.d_rope));
        std::vector<kv_place> places;
        now_trying("n %d rank %d rope %d kind %d", n, s.rank, s.d_rope, kind);
        for (int t = 0; t < n; t++) {
            places.push_back({ got.p, t * 31 % KV_ROWS, 0 });
            random_part(kv + (size_t)t * stride, (int)stride, kind, t == n / 2);
        }
        random_part(weight, s.rank, 0, false);
        random_rope(rope, rope.count);
        std::vector<float> row(width_of(s));
        for (int t = 0; t < n; t++) {                              /* first, as the kernel overwrites kv */
            int16_t *rows = (int16_t *)(want + offset), *to = rows + (size_t)places[(size_t)t].at * width_of(s);
            float *d = (float *)(rows + KV_ROWS * width_of(s)) + 3 * places[(size_t)t].at;
            memcpy(row.data(), kv + (size_t)t * stride, width_of(s) * sizeof(float));
            cpu->rms_norm(row.data(), row.data(), weight, (size_t)s.rank, 1e-6f);
            rotate(row.data() + s.rank, rope + t * s.d_rope, s.d_rope);
            d[0] = cpu->quantize_16(to, row.data(), (size_t)s.rank, d + 2);
            d[1] = cpu->quantize_16(to + s.rank, row.data() + s.rank, (size_t)s.d_rope, nullptr);
        }
        latents_args a = { kv, weight, rope, places.data(), stride, offset, n, s.rank, s.d_rope, 1e-6f };
        launch("latents_rows", a, dim3((unsigned)n));
        const size_t n_rows = KV_ROWS * width_of(s);
        same_ints("integer", (const int16_t *)(got + offset), (const int16_t *)(want + offset), n_rows);
        same("scale", (const float *)(got + offset + n_rows * 2), (const float *)(want + offset + n_rows * 2),
             3 * KV_ROWS);
        expect(got.intact() && kv.intact(), "writes only its places");
    }
}
static void check_queries() {
    for (int round = 0; round < 32 * repeat; round++) {
        const shape s = shapes[round % N_SHAPES];
        const int n = between(1, 3), d_head = s.d_nope + s.d_rope;
        const size_t stride = (size_t)(s.n_head * d_head);
        buffer<float> q((size_t)n * stride), want((size_t)n * stride), rope((size_t)(n * s.d_rope)), scale((size_t)n);
        now_trying("n %d heads %d nope %d rope %d", n, s.n_head, s.d_nope, s.d_rope);
        random_part(q, (int)q.count, round / 8 % KEY_KINDS, true);
        random_part(scale, n, 0, false);
        random_rope(rope, rope.count);
        memcpy(want.p, q.p, q.bytes);
        for (int t = 0; t < n; t++)
            for (int h = 0; h < s.n_head; h++) {
                float *row = want + (size_t)t * stride + h * d_head;
                rotate(row + s.d_nope, rope + t * s.d_rope, s.d_rope);
                for (int i = 0; i < d_head; i++) row[i] *= scale[t];
            }
        queries_args a = { q, rope, scale, stride, n, s.n_head, s.d_nope, s.d_rope };
        launch("queries_rows", a, dim3((unsigned)n, round % 3 ? 1 + rnd() % 9 : 1));
        same("query", q, want, q.count);
        expect(q.intact(), "writes only its rows");
    }
}
static void check_query_16() {
    for (int round = 0; round < 64 * repeat; round++) {
        const shape s = shapes[round % N_SHAPES];
        const int n = between(1, 2), d_head = s.d_nope + s.d_rope, kind = round / 8 % KEY_KINDS;
        const size_t pairs = (size_t)(n * s.n_head), stride = (size_t)(s.n_head * d_head) + rnd() % 2 * 4;
        buffer<float> absorbed(pairs * (size_t)s.rank), q((size_t)n * stride), d(2 * pairs), want_d(2 * pairs);
        buffer<int16_t> out(pairs * width_of(s)), want(pairs * width_of(s));
        now_trying("n %d heads %d rank %d rope %d kind %d", n, s.n_head, s.rank, s.d_rope, kind);
        for (size_t i = 0; i < pairs; i++) random_part(absorbed + i * (size_t)s.rank, s.rank, kind, i % 3 == 0);
        for (int t = 0; t < n; t++) random_part(q + (size_t)t * stride, (int)stride, kind, t == 0);
        for (size_t i = 0; i < pairs; i++) {
            const float *of_rope = q + i / (size_t)s.n_head * stride + i % (size_t)s.n_head * (size_t)d_head + s.d_nope;
            int16_t *to = want + i * width_of(s);
            want_d[2 * i] = cpu->quantize_16(to, absorbed + i * (size_t)s.rank, (size_t)s.rank, nullptr);
            want_d[2 * i + 1] = cpu->quantize_16(to + s.rank, of_rope, (size_t)s.d_rope, nullptr);
        }
        query_16_args a = { absorbed, q, out, d, stride, n, s.n_head, s.rank, s.d_nope, s.d_rope, 0 };
        launch("query_16_rows", a, dim3((unsigned)s.n_head, (unsigned)n));
        same_ints("integer", out.p, want.p, out.count);
        same("scale", d, want_d, d.count);
        expect(out.intact() && d.intact(), "writes only its rows");
    }
}

/* --- a step: spans over their own caches, and queries ------------------------------------------------------------ */
struct cache {                                  /* of one span: blocks of one layer, at an offset */
    std::vector<buffer<uint8_t>> blocks;
    std::vector<const uint8_t *> list;
};
struct step_case {
    shape s;
    int n, most;                                /* rows; segments of the row that sees most */
    size_t offset;
    std::vector<cache> caches;
    std::vector<kv_span> spans;
    std::vector<int32_t> row_span;
    buffer<int16_t> q;
    buffer<float> q_d;
};
static void fill_key(const step_case &c, cache &to, int position, int kind) {
    const size_t width = width_of(c.s);
    std::vector<float> x(width);
    int16_t *rows = (int16_t *)(to.blocks[(size_t)(position / KV_ROWS)].p + c.offset);
    int16_t *row = rows + (size_t)(position % KV_ROWS) * width;
    float *d = (float *)(rows + KV_ROWS * width) + 3 * (position % KV_ROWS);
    random_part(x.data(), (int)width, kind, position % 50 == 3);
    d[0] = cpu->quantize_16(row, x.data(), (size_t)c.s.rank, d + 2);
    d[1] = cpu->quantize_16(row + c.s.rank, x.data() + c.s.rank, (size_t)c.s.d_rope, nullptr);
}
/* Spans of n[i] rows from pos[i] on; kind: of the keys; sharp: how much the scores differ. */
static step_case make_step(const shape &s, const std::vector<int> &n, const std::vector<int> &pos, int kind,
                           float sharp) {
    int rows = 0, most = 0;
    for (size_t i = 0; i < n.size(); i++) {
        rows += n[i];
        most = std::max(most, (pos[i] + n[i] - 1) / KV_ROWS + 1);
    }
    const size_t pairs = (size_t)(rows * s.n_head);
    step_case c = { s, rows, most, (size_t)between(0, 1) * 192, {}, {}, {}, buffer<int16_t>(pairs * width_of(s)),
                    buffer<float>(2 * pairs) };
    int first = 0;
    for (size_t i = 0; i < n.size(); first += n[i++]) {
        c.caches.emplace_back();
        cache &to = c.caches.back();
        const int keys = pos[i] + n[i];
        for (int b = 0; b * KV_ROWS < keys; b++) {
            to.blocks.emplace_back(c.offset + KV_ROWS * (width_of(s) * 2 + 12));
            to.list.push_back(to.blocks.back().p);
        }
        for (int k = 0; k < keys; k++) fill_key(c, to, k, kind);
        c.spans.push_back({ nullptr, first, n[i], pos[i], 0 });
        for (int t = 0; t < n[i]; t++) c.row_span.push_back((int32_t)i);
    }
    for (size_t i = 0; i < c.spans.size(); i++) c.spans[i].blocks = c.caches[i].list.data();
    std::vector<float> x(width_of(s));
    for (size_t i = 0; i < pairs; i++) {
        int16_t *row = c.q + i * width_of(s);
        random_part(x.data(), (int)width_of(s), kind == 3 ? 3 : kind == 6 && i % 7 == 2 ? 6 : 0, true);
        for (auto &v : x) v *= sharp;
        c.q_d[2 * i] = cpu->quantize_16(row, x.data(), (size_t)s.rank, nullptr);
        c.q_d[2 * i + 1] = cpu->quantize_16(row + s.rank, x.data() + s.rank, (size_t)s.d_rope, nullptr);
    }
    return c;
}
/* The CPU's results of row t and a segment: n_head times { m, l, o }. */
static void cpu_segment(step_case &c, int t, int segment, int n_keys, float *out) {
    const cache &from = c.caches[(size_t)c.row_span[(size_t)t]];
    const int16_t *rows = (const int16_t *)(from.list[(size_t)segment] + c.offset);
    buffer<int16_t> keys(segment_keys_size(c.s.rank, c.s.d_rope)), values(segment_values_size(c.s.rank));
    buffer<float> d(3 * SEGMENT_KEYS);
    ms4_segment opened = {};
    opened.rank = c.s.rank, opened.d_rope = c.s.d_rope, opened.keys = keys, opened.values = values, opened.d = d;
    cpu->open_segment(&opened, rows, (const float *)(rows + KV_ROWS * width_of(c.s)), n_keys);
    ms4_attend_segment a = {};
    a.segment = &opened, a.out = out, a.n_keys = n_keys, a.n_q = c.s.n_head;
    a.q = c.q + (size_t)(t * c.s.n_head) * width_of(c.s);
    a.q_d = c.q_d + 2 * (size_t)(t * c.s.n_head);
    cpu->attend_segment(&a);
}
/* And of all its segments, folded: x = o / l, by head. */
static void cpu_row(step_case &c, int t, float *x, float *partial) {
    const size_t rank = (size_t)c.s.rank, width = rank + 2, heads = (size_t)c.s.n_head;
    const kv_span &span = c.spans[(size_t)c.row_span[(size_t)t]];
    const int position = span.pos + t - span.first, last = position / KV_ROWS;
    std::vector<float> all(heads * width, 0.0f), group(heads * width);
    for (size_t h = 0; h < heads; h++) all[h * width] = -INFINITY;
    for (int segment = 0; segment <= last; segment++) {
        float *result = partial + (size_t)segment * heads * width;
        cpu_segment(c, t, segment, std::min(position + 1 - segment * KV_ROWS, KV_ROWS), result);
        for (size_t h = 0; h < heads; h++) {
            float *own = group.data() + h * width;
            if (segment % SEGMENT_GROUP == 0) {
                memset(own, 0, width * sizeof *own);
                own[0] = -INFINITY;
            }
            cpu->fold(own, result + h * width, rank);
            if (segment == last || segment % SEGMENT_GROUP == SEGMENT_GROUP - 1) cpu->fold(&all[h * width], own, rank);
        }
    }
    for (size_t h = 0; h < heads; h++)
        for (size_t i = 0; i < rank; i++) x[h * rank + i] = all[h * width + 2 + i] / all[h * width + 1];
}
/* { m, l, o } of n results: where l is NaN, m is left open. */
static void same_results(const float *got, const float *want, size_t n, size_t width) {
    for (size_t i = 0; i < n; i++, got += width, want += width) {
        if (want[1] == want[1] && !(got[0] == 0 && want[0] == 0)) same("m", got, want, 1);
        same("l", got + 1, want + 1, 1);
        same("o", got + 2, want + 2, width - 2);
    }
}
/* Segments and folding, for the rows of spans [first_span, end). */
static void try_segments(step_case &c, size_t first_span, size_t end) {
    const int first = c.spans[first_span].first, n = c.spans[end - 1].first + c.spans[end - 1].n - first;
    const size_t heads = (size_t)c.s.n_head, rank = (size_t)c.s.rank, width = rank + 2, at = (size_t)first * heads;
    const size_t row = (size_t)c.most * heads * width;
    buffer<float> partial((size_t)n * row), want(row), x((size_t)n * heads * rank), want_x(heads * rank);
    segments_args a = { c.q + at * width_of(c.s), c.q_d + 2 * at, c.spans.data(), c.row_span.data() + first, partial,
                        c.offset, first, n, c.s.n_head, c.s.rank, c.s.d_rope, c.most };
    const unsigned head_groups = ((unsigned)heads + ATTEND_HEADS - 1) / ATTEND_HEADS;
    launch("attend_segments", a, dim3((unsigned)c.most, (unsigned)n, head_groups),
           segments_shared(c.s.rank, c.s.d_rope));
    fold_args f = { partial, x, c.spans.data(), c.row_span.data() + first, first, n, c.s.n_head, c.s.rank, c.most, 0 };
    launch("fold_segments", f, dim3((unsigned)heads, (unsigned)n));
    for (int t = 0; t < n; t++) {
        const kv_span &span = c.spans[(size_t)c.row_span[(size_t)(first + t)]];
        const int segments = (span.pos + first + t - span.first) / KV_ROWS + 1;
        cpu_row(c, first + t, want_x, want);
        same_results(partial + (size_t)t * row, want, (size_t)segments * heads, width);
        same("folded", x + (size_t)t * heads * rank, want_x, heads * rank);
    }
    expect(partial.intact() && x.intact(), "writes only its results");
}
static void try_rows(step_case &c) {
    const size_t heads = (size_t)c.s.n_head, rank = (size_t)c.s.rank;
    buffer<float> x((size_t)c.n * heads * rank), want(heads * rank), partial((size_t)c.most * heads * (rank + 2));
    std::vector<attend_tile> tiles;
    for (size_t i = 0; i < c.spans.size(); i++)
        for (int t = 0, n; t < c.spans[i].n; t += n) {
            n = std::min(between(1, ATTEND_TILE), c.spans[i].n - t);
            tiles.push_back({ (int32_t)i, c.spans[i].first + t, n });
        }
    attend_rows_args a = { c.q, c.q_d, c.spans.data(), tiles.data(), x, c.offset, (int32_t)tiles.size(), c.s.n_head,
                           c.s.rank, c.s.d_rope };
    launch("attend_rows", a, dim3((unsigned)tiles.size(), ((unsigned)heads + ATTEND_HEADS - 1) / ATTEND_HEADS),
           attend_rows_shared(c.s.rank, c.s.d_rope));
    for (int t = 0; t < c.n; t++) {
        cpu_row(c, t, want, partial);
        same("x", x + (size_t)t * heads * rank, want, heads * rank);
    }
    expect(x.intact(), "writes only its rows");
}
static const int positions[] = { 0, 31, 32, 127, 128, 5, 300, 255, 126, 95 };
/* Small shapes take longer contexts, so that groups of segments are folded, too. */
static int a_position(const shape &s, int round) {
    if (round % 6 != 5) return positions[round % 10];
    if (round % 24 == 5) return between(4150, 4800);          /* more groups than fold_segments has warps */
    return s.rank * s.n_head < 200 ? between(1020, 4800) : between(900, 1300);
}
static void check_segments() {
    for (int round = 0; round < 48 * repeat; round++) {
        const shape s = shapes[round % 3 ? round / 3 % N_SHAPES : 0];
        const int kind = round % KEY_KINDS;
        step_case c = make_step(s, { between(1, 2), 1, between(1, 3) },
                                { positions[round * 7 % 10], a_position(s, round), between(0, 200) }, kind,
                                round % 5 == 1 ? 60.0f : round % 5 == 2 ? 0.01f : 2.0f);
        now_trying("heads %d rank %d rope %d kind %d pos %d %d %d", s.n_head, s.rank, s.d_rope, kind, c.spans[0].pos,
                   c.spans[1].pos, c.spans[2].pos);
        try_segments(c, 0, 2);
        try_segments(c, 2, 3);
    }
}
static void check_attend_rows() {
    for (int round = 0; round < 24 * repeat; round++) {
        const shape s = shapes[round % 3 ? round / 3 % N_SHAPES : 0];
        const int kind = round % KEY_KINDS;
        step_case c = make_step(s, { between(4, 9), between(1, 6) },
                                { a_position(s, round), positions[round * 7 % 10] }, kind,
                                round % 5 == 1 ? 60.0f : 2.0f);
        now_trying("heads %d rank %d rope %d kind %d rows %d + %d pos %d %d", s.n_head, s.rank, s.d_rope, kind,
                   c.spans[0].n, c.spans[1].n, c.spans[0].pos, c.spans[1].pos);
        try_rows(c);
    }
}
int main(int argc, char **argv) {
    return run_checks(argc, argv, { { "latents_rows", check_latents }, { "queries_rows", check_queries },
                                    { "query_16_rows", check_query_16 }, { "attend_segments", check_segments },
                                    { "attend_rows", check_attend_rows } });
}
