/* check_mul.cpp -- mul_<type> and gemm_<type> of every type against the CPU's kernels, and against a witness in plain C
 * that shares no code with either but the definition of the types (unpack.h). */
#include "check.h"
#define restrict
extern "C" {
#include "cpu/plain/plain.h"
}
#undef restrict

static const char *const type_names[] = {
#define X(name, ...) #name,
    MS4_TYPES(X)
#undef X
};
static int type;                                    /* what is being checked */
static bool is_gemm;

static void dot_groups(int32_t *sums, const int8_t *q, const int8_t *x) {
    for (int g = 0; g < 16; g++) {
        sums[g] = 0;
        for (int i = 0; i < 16; i++) sums[g] += q[g * 16 + i] * x[g * 16 + i];
    }
}
static void witness(const struct ms4_mul *m) {
    switch (type) {
#define X(name, id, weights, bytes, family, ...) \
    case MS4_TYPE_##name: \
        mul_opened_plain(m, unpack_##name, SUPERBLOCK_BYTES(name), FAMILY_##family, dot_groups); \
        break;
    MS4_QUANTIZED_TYPES(X)
#undef X
    default: cpu->mul[type](m);
    }
}

/* One matrix and its tokens, with all that they lie in. */
struct product {
    int n_rows, n_cols, n_tokens, n_x, kind, skip;  /* skip: rows before the first, so that it lies anywhere */
    size_t row_bytes, x_stride, y_stride;
    buffer<uint8_t> w, x;
    buffer<int32_t> x_rows;
    buffer<float> y;
    std::vector<float> before;
    bool gathers, scaled, add;
    float scale;
};
static int random_columns() {
    static const int real[] = { 4096, 2048, 1024 };
    const int unit = ms4_type_infos[type].weights, size = rnd() % 4;
    if (!size) return real[rnd() % 3];
    if (unit == SUPERBLOCK) return SUPERBLOCK * between(1, 5);
    if (size == 1) return SUPERBLOCK * between(1, 4);
    return unit == 1 ? between(1, 600) : unit * between(1, 1200 / unit);
}
static void fill_x(product &p) {
    std::vector<float> row((size_t)p.n_cols);
    for (int t = 0; t < p.n_x; t++) {
        uint8_t *to = p.x + (size_t)t * p.x_stride;
        random_floats(row.data(), row.size(), rnd() % 8 ? p.kind : (int)(rnd() % FLOAT_KINDS));
        if (!ms4_type_infos[type].quantized) { memcpy(to, row.data(), row.size() * 4); continue; }
        cpu->quantize((block_q8 *)to, row.data(), row.size());
        block_q8 *some = (block_q8 *)to + rnd() % (uint32_t)((p.n_cols + 255) / 256);
        if (rnd() % 16 == 0) some->d = rnd() & 1 ? NAN : INFINITY;
    }
}
static product random_product() {
    const int cols = random_columns(), big = cols > 1000 ? 40 : 150, gap = between(0, 2);
    const int rows = is_gemm ? between(1, big * 2) : between(1, big), skip = (int)(rnd() % 4);
    const int tokens = is_gemm ? between(1, cols > 1000 ? 70 : 140) : between(1, cols > 1000 ? 5 : 9);
    const int n_x = rnd() & 1 ? tokens : between(1, tokens), quantized = ms4_type_infos[type].quantized;
    const size_t row_bytes = (size_t)cols / (size_t)ms4_type_infos[type].weights * (size_t)ms4_type_infos[type].bytes;
    const size_t x_blocks = (size_t)((cols + 255) / 256 + gap);
    const size_t x_stride = quantized ? x_blocks * sizeof(block_q8) : (size_t)(cols + gap) * 4;
    const size_t y_stride = (size_t)(rows + gap);
    product p = { rows, cols, tokens, n_x, (int)(rnd() % FLOAT_KINDS), skip, row_bytes, x_stride, y_stride,
                  buffer<uint8_t>((size_t)(rows + skip) * row_bytes, 32), buffer<uint8_t>((size_t)n_x * x_stride),
                  buffer<int32_t>((size_t)tokens), buffer<float>((size_t)tokens * y_stride), {},
                  n_x < tokens || rnd() % 2, rnd() % 3 == 0, rnd() % 3 == 0, (float)(uniform() * 4 - 2) };
    random_weights(type, p.w, (size_t)(rows + skip) * (size_t)cols, p.kind);
    fill_x(p);
    for (int t = 0; t < tokens; t++) p.x_rows[t] = n_x == tokens && rnd() % 2 ? t : between(0, n_x - 1);
    for (size_t i = 0; i < (size_t)tokens * y_stride; i++) p.y[i] = (float)(uniform() * 2 - 1);
    p.before.assign(p.y.p, p.y.p + (size_t)tokens * y_stride);
    return p;
}
static mul_job job_of(product &p) {
    mul_job j = {};
    j.w = p.w + (size_t)p.skip * p.row_bytes, j.row_bytes = p.row_bytes;
    j.x = p.x.p, j.x_stride = p.x_stride, j.x_rows = p.gathers ? p.x_rows.p : nullptr;
    j.y = p.y, j.y_stride = p.y_stride;
    j.scale = p.scale, j.scaled = p.scaled, j.add = p.add;
    j.n_rows = p.n_rows, j.n_cols = p.n_cols, j.n_tokens = p.n_tokens;
    return j;
}
/* What y has to be: product, scale, sum, each rounded; what lies between the rows is left alone. */
static std::vector<float> wanted(product &p, void (*mul)(const struct ms4_mul *)) {
    std::vector<float> sum((size_t)p.n_tokens * p.y_stride), y = p.before;
    struct ms4_mul m = {};
    m.w = p.w + (size_t)p.skip * p.row_bytes, m.row_bytes = p.row_bytes;
    m.x = p.x.p, m.x_stride = p.x_stride, m.x_rows = p.gathers ? p.x_rows.p : nullptr;
    m.y = sum.data(), m.y_stride = p.y_stride;
    m.n_rows = p.n_rows, m.n_cols = p.n_cols, m.n_tokens = p.n_tokens;
    mul(&m);
    for (int t = 0; t < p.n_tokens; t++)
        for (int r = 0; r < p.n_rows; r++) {
            const size_t i = (size_t)t * p.y_stride + (size_t)r;
            float v = sum[i];
            if (p.scaled) v = v * p.scale;
            y[i] = p.add ? y[i] + v : v;
        }
    return y;
}
/* The job's matrix as that of an expert which the device has chosen; or the expert is not there. */
struct chosen { const uint8_t *slots[4]; int32_t expert; bool left_out; };
static void choose(mul_job &j, chosen &c) {
    static const uint8_t wrong_place[1] = {};
    for (const uint8_t *&slot : c.slots) slot = wrong_place;
    c.expert = between(0, 3);
    c.left_out = rnd() % 3 == 0;
    j.in_slot = 32 * (size_t)between(0, 9);
    c.slots[c.expert] = c.left_out ? nullptr : j.w - j.in_slot;
    j.slots = c.slots;
    j.expert = &c.expert;
    j.w = nullptr;
}
static void check_products() {
    const std::string kernel = std::string(is_gemm ? "gemm_" : "mul_") + type_names[type];
    for (int round = 0; round < 12 * repeat; round++) {
        std::vector<product> products;
        std::vector<mul_job> jobs;
        int32_t blocks = 0, most = 0;
        const int n_jobs = round % 12 == 7 ? 40 : between(1, 3);
        std::vector<chosen> of_jobs((size_t)n_jobs);
        for (int i = 0; i < n_jobs; i++) {
            products.push_back(random_product());
            jobs.push_back(job_of(products.back()));
            jobs.back().first_block = blocks;
            if (!is_gemm && rnd() % 4 == 0) choose(jobs.back(), of_jobs[(size_t)i]);
            most = std::max(most, jobs.back().n_tokens);
            blocks += is_gemm ? gemm_blocks(type, &jobs.back()) : mul_blocks(type, &jobs.back());
        }
        mul_args a = { jobs.data(), n_jobs, 0 };
        launch(kernel.c_str(), a, dim3((unsigned)blocks), is_gemm ? gemm_shared(type) : mul_shared(type, most));
        for (size_t i = 0; i < products.size(); i++) {
            product &p = products[i];
            now_trying("%s, %d rows from %d on, %d columns, %d tokens of %d, kind %d%s%s%s%s", kernel.c_str(), p.n_rows,
                       p.skip, p.n_cols, p.n_tokens, p.n_x, p.kind, p.gathers ? ", gathers" : "",
                       p.scaled ? ", scaled" : "", p.add ? ", adds" : "", jobs[i].slots ? ", chosen" : "");
            const bool left_out = of_jobs[i].left_out;
            const std::vector<float> of_cpu = left_out ? p.before : wanted(p, cpu->mul[type]);
            const std::vector<float> of_witness = left_out ? p.before : wanted(p, witness);
            same("y", p.y, of_cpu.data(), of_cpu.size());
            same("y, against the witness", p.y, of_witness.data(), of_witness.size());
            expect(p.y.intact() && p.w.intact(), "writes only y");
        }
        if (n_wrong) return;
    }
}
#define X(name, ...) \
    static void check_mul_##name() { type = MS4_TYPE_##name, is_gemm = false; check_products(); } \
    static void check_gemm_##name() { type = MS4_TYPE_##name, is_gemm = true; check_products(); }
MS4_TYPES(X)
#undef X
int main(int argc, char **argv) {
#define X(name, ...) { "mul_" #name, check_mul_##name }, { "gemm_" #name, check_gemm_##name },
    return run_checks(argc, argv, { MS4_TYPES(X) });
#undef X
}
