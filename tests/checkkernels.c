/* checkkernels.c -- every fast kernel against csrc/cpu/plain/ref.c on random and extreme input; --bench times them.
 *
 * Besides the numbers: nothing is read or written outside the operands (guard pages, strides with marked gaps), a
 * product has the same bits however tokens and rows are split into calls, and the same on every fast kernel table.
 * Usage: checkkernels [--bench] [--seed=N] [--isa=NAME] [--only=TEXT] [--slack=BYTES].  Last line: "N passed, N
 * failed".  --slack=16 is for qemu 7, which reads 16 bytes where a scalar fused multiply-add has 4 in memory.
 */
#include "checkproducts.h"

/* --- dequantize -------------------------------------------------------------------------------- */
static void check_dequantize(void) {
    const struct ms4_type_info *info = &ms4_type_infos[mul_type];
    for (int i = 0; i < 20; i++) {
        size_t n = (size_t)(info->weights * between(1, 700 / info->weights));
        uint8_t *w = guarded(n / (size_t)info->weights * (size_t)info->bytes);
        float *got = guarded_floats(n), *want = guarded_floats(n);
        fill_weights(mul_type, w, n, i % 4 == 3);
        fast->dequantize[mul_type](got, w, n);
        ref->dequantize[mul_type](want, w, n);
        expect(same_bits(got, want, n), "not the value of the formula");
        release_all();
    }
}

/* --- elements ------------------------------------------------------------------------------------ */
/* Any of them, with any sign and payload. */
static float some_nan(void) {
    uint32_t bits = 0x7f800001u + rnd() % 0x7fffff;
    float x;
    bits |= rnd() << 31;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static void fill_floats(float *x, size_t n, int kind) {
    float size = ldexpf(1, between(-20, 20));
    for (size_t i = 0; i < n; i++) x[i] = uniform() * size;
    if (kind == 1) memset(x, 0, n * sizeof *x);
    if (kind == 2) for (size_t i = 0; i < n; i++) x[i] *= 0x1p-120f;
    if (kind == 3) for (size_t i = 0; i < n; i++) x[i] = uniform() * 3.4e38f;
    if (kind == 4) for (size_t i = 0; i < n; i++) x[i] = (float)between(-254, 254) / 2 * size;       /* halfway cases */
    if (kind == 4) x[between(0, (int)n - 1)] = 127 * size;
    if (kind == 5) x[between(0, (int)n - 1)] = some_nan();
    if (kind == 6) x[between(0, (int)n - 1)] = rnd() & 1 ? INFINITY : -INFINITY;
}
static void compare_blocks(const block_q8 *got, const block_q8 *want, const float *x, size_t n) {
    float largest = 0;
    for (size_t k = 0; k < n; k++) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
    expect(isnan(want->d) ? isnan(got->d) : fabsf(got->d - want->d) <= 2e-7f * want->d, "wrong d");
    for (size_t g = 0; g < SUPERBLOCK / 16; g++) {
        int sum = 0;
        for (size_t k = g * 16; k < g * 16 + 16; k++) {
            double exact = k < n && want->d > 0 ? (double)x[k] * 127 / largest : 0;
            expect(fabs(got->qs[k] - exact) <= 0.5 + 3e-5, "not the nearest quant");
            sum += got->qs[k];
        }
        expect(sum == got->sums[g], "wrong sum");
    }
}
static void check_quantize(void) {
    for (int i = 0; i < 200; i++) {
        size_t n = 32 * (size_t)between(1, 40), n_blocks = (n + SUPERBLOCK - 1) / SUPERBLOCK;
        float *x = guarded_floats(n);
        block_q8 *got = guarded(n_blocks * sizeof *got), *want = guarded(n_blocks * sizeof *want);
        fill_floats(x, n, i % 8);
        memset(got, 1, n_blocks * sizeof *got);
        fast->quantize(got, x, n);
        ref->quantize(want, x, n);
        for (size_t b = 0; b < n_blocks; b++) hash_floats(&got[b].d, 1), hash_bytes(got[b].qs, sizeof got[b].qs);
        for (size_t b = 0; b < n_blocks; b++)
            compare_blocks(got + b, want + b, x + b * SUPERBLOCK,
                           n - b * SUPERBLOCK < SUPERBLOCK ? n - b * SUPERBLOCK : SUPERBLOCK);
        release_all();
    }
}
static void check_rms_norm(void) {
    for (int i = 0; i < 150; i++) {
        size_t n = (size_t)(i < 70 ? i + 1 : between(1, 5000));
        float *x = guarded_floats(n), *weight = guarded_floats(n), *got = guarded_floats(n), *want = guarded_floats(n);
        fill_floats(x, n, i % 2 ? 0 : 1 - (i % 3 != 0));
        fill_floats(weight, n, 0);
        fast->rms_norm(got, x, weight, n, 1e-6f);
        ref->rms_norm(want, x, weight, n, 1e-6f);
        hash_floats(got, n);
        for (size_t j = 0; j < n; j++) expect(fabsf(got[j] - want[j]) <= 2e-6f * fabsf(want[j]) + 1e-30f, "wrong norm");
        release_all();
    }
}
static void check_silu_mul(void) {
    static const float special[] = {
        0, -0.0f, 1, -1, 20, -20, 87, -87, 88.8f, -88.8f, 100, -100, 1e30f, -1e30f, NAN, INFINITY
    };
    for (int i = 0; i < 150; i++) {
        size_t n = (size_t)(i < 70 ? i + 1 : between(1, 3000));
        float *gate = guarded_floats(n), *up = guarded_floats(n), *got = guarded_floats(n), *want = guarded_floats(n);
        fill_floats(up, n, 0);
        for (size_t j = 0; j < n; j++) gate[j] = rnd() % 16 ? uniform() * 30 : special[rnd() % 16];
        fast->silu_mul(got, gate, up, n);
        ref->silu_mul(want, gate, up, n);
        hash_floats(got, n);
        for (size_t j = 0; j < n; j++)
            expect(isnan(want[j]) ? isnan(got[j])
                                  : got[j] == want[j] || fabsf(got[j] - want[j]) <= 6e-7f * fabsf(want[j]) + 1e-30f,
                   "wrong silu");
        release_all();
    }
}
/* Everywhere, and where the two polynomials of erf meet.  For negative x, 1 + erf is the difference of like numbers. */
static void check_gelu(void) {
    static const float special[] = { 0, -0.0f, 1.3037281f, -1.3037281f, 5.65f, -5.65f, 40, -40, 1e30f, -1e30f, 1e-40f,
                                     -1e-40f, 3.4e38f, -3.4e38f, NAN, INFINITY };
    for (int i = 0; i < 150; i++) {
        size_t n = (size_t)(i < 70 ? i + 1 : between(1, 3000));
        float *gate = guarded_floats(n), *up = guarded_floats(n), *got = guarded_floats(n), *want = guarded_floats(n);
        float *alone = guarded_floats(n);
        fill_floats(up, n, 0);
        for (size_t j = 0; j < n; j++) {
            gate[j] = rnd() % 16 ? uniform() * 8 : special[rnd() % 16];
            if (rnd() % 4 == 0) gate[j] = 1.3037281f + uniform() * 1e-5f;
            if (rnd() & 1) gate[j] = -gate[j];
        }
        memcpy(alone, gate, n * sizeof *alone);
        fast->gelu(alone, n);
        fast->gelu_mul(got, gate, up, n);
        ref->gelu_mul(want, gate, up, n);
        hash_floats(got, n);
        for (size_t j = 0; j < n; j++) {
            double unit = (1.2e-7 + 2e-7 * (gate[j] > 0)) * fabs((double)gate[j]) * fabs((double)up[j]);
            expect(isnan(want[j]) ? isnan(got[j])
                                  : got[j] == want[j] || fabs((double)got[j] - want[j]) <= unit, "wrong gelu");
            alone[j] *= up[j];
        }
        expect(same_bits(alone, got, n), "gelu and gelu_mul differ");
        release_all();
    }
}
static void check_add_scaled(void) {
    for (int i = 0; i < 100; i++) {
        size_t n = (size_t)between(1, i < 70 ? 70 : 3000);
        float *x = guarded_floats(n), *got = guarded_floats(n), *want = guarded_floats(n), scale = uniform();
        fill_floats(x, n, 0);
        fill_floats(want, n, 0);
        memcpy(got, want, n * sizeof *got);
        for (size_t j = 0; j < n; j++) want[j] = (float)((double)scale * x[j] + want[j]);
        fast->add_scaled(got, x, scale, n);
        hash_floats(got, n);
        for (size_t j = 0; j < n; j++)
            expect(fabsf(got[j] - want[j]) <= 1.2e-7f * fabsf(want[j]) + 1e-38f, "wrong sum");
        release_all();
    }
}
/* Logits with ties, infinities and NaN. */
static void fill_logits(float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) x[i] = kind == 1 ? (float)between(-2, 2) : 20 * uniform();
    if (kind == 2) for (size_t i = 0; i < n; i++) x[i] = (float)i;                 /* each pushes one out */
    if (kind == 3) for (size_t i = 0; i < n; i++) x[i] = rnd() & 1 ? 0 : -0.0f;
    if (kind == 4) x[between(0, (int)n - 1)] = NAN;
    if (kind == 5) for (size_t i = 0; i < n; i++) x[i] = rnd() % 4 ? NAN : uniform();
    if (kind == 6) for (size_t i = 0; i < n; i++) x[i] = rnd() % 3 ? -INFINITY : uniform();
    if (kind == 7) x[between(0, (int)n - 1)] = INFINITY;
    if (kind == 8) for (size_t i = 0; i < n; i++) x[i] = uniform() * 3.4e38f;
    if (kind == 9) for (size_t i = 0; i < n; i++) x[i] = -INFINITY;
}
static void check_choose(void) {
    for (int i = 0; i < 300; i++) {
        int32_t n = i < 20 ? i + 1 : between(1, 300), k = between(1, i % 7 && n > 12 ? 12 : n), norm = i % 2;
        float *x = guarded_floats((size_t)n), scale = 1 + uniform();
        float *got = guarded_floats((size_t)k), *want = guarded_floats((size_t)k);
        int32_t *ids = guarded((size_t)k * sizeof *ids), *want_ids = guarded((size_t)k * sizeof *ids);
        double max = -INFINITY;
        fill_logits(x, (size_t)n, i % 11);
        for (int32_t j = 0; j < n; j++) max = fmax(max, x[j]);
        fast->choose(x, n, k, scale, norm, ids, got);
        ref->choose(x, n, k, scale, norm, want_ids, want);
        expect(!memcmp(ids, want_ids, (size_t)k * sizeof *ids), "wrong choice");
        for (int32_t j = 0; j < k; j++) {
            expect(ids[j] >= 0 && ids[j] < n && (!j || ids[j] > ids[j - 1]), "ids out of order");
            /* l - max is rounded, and each addition */
            double roundings = 12 + fmin(104, max - x[ids[j]]) + (norm ? k : 4 + n / 16);
            double slack = 6e-8 * roundings * want[j] + 1e-44;
            expect(isnan(want[j]) ? isnan(got[j]) : fabs((double)got[j] - want[j]) <= slack, "wrong weight");
        }
        hash_bytes(ids, (size_t)k * sizeof *ids);
        hash_floats(got, (size_t)k);
        release_all();
    }
    /* As many as a file may have, in the order that costs most: n log k and not n k. */
    enum { N = 65536, K = 256 };
    float *x = guarded_floats(N), weights[K];
    int32_t ids[K];
    fill_logits(x, N, 2);
    for (int i = 0; i < 20; i++) fast->choose(x, N, K, 1, 0, ids, weights);
    expect(ids[0] == N - K && ids[K - 1] == N - 1, "not the largest");
}
static void check_quantize_16(void) {
    for (int i = 0; i < 200; i++) {
        size_t n = 8 * (size_t)between(1, 60);
        float *x = guarded_floats(n);
        int16_t *got = guarded(n * sizeof *got), *want = guarded(n * sizeof *want);
        fill_floats(x, n, i % 8);
        if (i % 3 == 0) x[between(0, (int)n - 1)] *= 300;       /* the largest number decides, not the length */
        float largest = -1, d = fast->quantize_16(got, x, n, &largest), want_d = ref->quantize_16(want, x, n, NULL);
        double squares = 0;
        int most = 0;
        hash_floats(&d, 1);
        hash_bytes(got, n * sizeof *got);
        expect(isnan(want_d) ? isnan(d) : fabsf(d - want_d) <= 1e-6f * want_d, "wrong d");
        for (size_t j = 0; j < n; j++) {
            double exact = want_d > 0 ? (double)x[j] / want_d : 0;
            expect(fabs(got[j] - exact) <= 0.5 + 0.04, "not the nearest integer");     /* 32767 * 1e-6 */
            squares += (double)got[j] * got[j];
            most = abs(got[j]) > most ? abs(got[j]) : most;
        }
        expect(largest == (float)most, "wrong largest integer");
        expect(sqrt(squares) <= LENGTH_16 + 0.5 * sqrt((double)n) + 1, "too long");
        release_all();
    }
}

/* --- attention ------------------------------------------------------------------------------------- */
#define TILES 3
struct attention { struct ms4_attend a; size_t n_o; };

static struct attention random_attention(float size) {
    struct attention t;
    struct ms4_attend *a = &t.a;
    a->n_q = between(1, ATTEND_ROWS);
    a->d_k = 8 * between(1, 40);
    a->d_v = 8 * between(1, 40);
    a->q_stride = (size_t)a->d_k + (size_t)between(0, 9);
    a->v_stride = (size_t)a->d_v + (size_t)between(0, 9);
    a->o_stride = (size_t)a->d_v + (size_t)between(0, 9);
    t.n_o = (size_t)(a->n_q - 1) * a->o_stride + (size_t)a->d_v;
    size_t n_q = (size_t)(a->n_q - 1) * a->q_stride + (size_t)a->d_k;
    float *q = guarded_floats(n_q);
    for (size_t i = 0; i < n_q; i++) q[i] = uniform() * size;
    a->q = q;
    a->o = guarded_floats(t.n_o);
    a->m = guarded_floats((size_t)a->n_q);
    a->l = guarded_floats((size_t)a->n_q);
    return t;
}
static void start_attention(struct attention *t) {
    for (size_t i = 0; i < t->n_o; i++) t->a.o[i] = (i % t->a.o_stride) < (size_t)t->a.d_v ? 0 : MARK;
    for (int r = 0; r < t->a.n_q; r++) { t->a.m[r] = -INFINITY; t->a.l[r] = 0; }
}
/* How much the scores' rounding may show in the results: relative, for the row of q at q. */
static double attend_slack(const struct ms4_attend *a, int row) {
    double worst = 0;
    for (int j = 0; j < ATTEND_KEYS; j++) {
        double sum = 0;
        for (int i = 0; i < a->d_k; i++)
            sum += fabs((double)a->q[(size_t)row * a->q_stride + (size_t)i] * a->kt[i * ATTEND_KEYS + j]);
        worst = sum > worst ? sum : worst;
    }
    return 2e-6 + 2e-7 * worst;
}
static void compare_attention(const struct attention *got, const struct attention *want, double largest_v) {
    for (int r = 0; r < want->a.n_q; r++) {
        double slack = attend_slack(&want->a, r) * TILES, l = want->a.l[r];
        expect(want->a.m[r] == got->a.m[r] || fabs((double)want->a.m[r] - got->a.m[r]) <= slack, "wrong maximum");
        /* l and o are relative to e^m */
        expect(fabs(got->a.l[r] - l) <= slack * l * 2, "wrong sum of weights");
        for (size_t i = (size_t)r * want->a.o_stride; i < (size_t)r * want->a.o_stride + (size_t)want->a.d_v; i++)
            expect(fabs((double)got->a.o[i] - want->a.o[i]) <= slack * l * largest_v * 2, "wrong output");
    }
    for (size_t i = 0; i < want->n_o; i++)
        if (want->a.o[i] == MARK) expect(got->a.o[i] == MARK, "wrote between rows of o");
}
static void check_attend(void) {
    for (int i = 0; i < 60; i++) {
        struct attention one = random_attention(i % 3 == 2 ? 8 : 0.5f), together = one, apart = one, want = one;
        struct attention *all[3] = { &together, &apart, &want };
        for (int k = 0; k < 3; k++) {
            all[k]->a.o = guarded_floats(one.n_o);
            all[k]->a.m = guarded_floats((size_t)one.a.n_q);
            all[k]->a.l = guarded_floats((size_t)one.a.n_q);
            start_attention(all[k]);
        }
        size_t n_v = (ATTEND_KEYS - 1) * one.a.v_stride + (size_t)one.a.d_v;
        float *kt = guarded_floats((size_t)one.a.d_k * ATTEND_KEYS), *v = guarded_floats(n_v);
        int32_t *n_keys = guarded((size_t)one.a.n_q * sizeof *n_keys);
        for (int tile = 0; tile < TILES; tile++) {
            for (int j = 0; j < one.a.d_k * ATTEND_KEYS; j++) kt[j] = uniform();
            for (size_t j = 0; j < n_v; j++) v[j] = uniform();
            for (int r = 0; r < one.a.n_q; r++) n_keys[r] = rnd() & 1 ? ATTEND_KEYS : between(0, ATTEND_KEYS);
            for (int k = 0; k < 3; k++) { all[k]->a.kt = kt; all[k]->a.v = v; all[k]->a.n_keys = n_keys; }
            fast->attend(&together.a);
            ref->attend(&want.a);
            for (int r = 0; r < one.a.n_q; r++) {
                struct ms4_attend a = apart.a;
                a.q += (size_t)r * a.q_stride;
                a.o += (size_t)r * a.o_stride;
                a.m += r, a.l += r, a.n_keys += r, a.n_q = 1;
                fast->attend(&a);
            }
        }
        compare_attention(&together, &want, 1);
        for (int r = 0; r < one.a.n_q; r++) hash_floats(together.a.o + (size_t)r * one.a.o_stride, (size_t)one.a.d_v);
        hash_floats(together.a.l, (size_t)one.a.n_q);
        expect(same_bits(together.a.o, apart.a.o, one.n_o) && same_bits(together.a.l, apart.a.l, (size_t)one.a.n_q)
               && same_bits(together.a.m, apart.a.m, (size_t)one.a.n_q), "one row at a time gives other bits");
        release_all();
    }
}
/* Rows of 16-bit numbers: as long as they may be, at random or with most of the length in one number.  n_scales: 3 for
 * keys, 2 for queries. */
static void fill_rows(int16_t *rows, float *d, size_t n_scales, size_t n_rows, size_t rank, size_t d_rope, int kind) {
    for (size_t r = 0; r < n_rows; r++, rows += rank + d_rope)
        for (size_t part = 0; part < 2; part++) {
            size_t n = part ? d_rope : rank;
            float x[512];
            for (size_t i = 0; i < n; i++) x[i] = kind == 1 ? 1 : uniform();
            if (kind == 2) x[between(0, (int)n - 1)] = rnd() & 1 ? 100 : -100;
            float *largest = n_scales == 3 && !part ? d + n_scales * r + 2 : NULL;
            d[n_scales * r + part] = ref->quantize_16(rows + part * rank, x, n, largest) * (kind == 3 ? 4 : 1);
        }
}
static struct ms4_segment make_segment(int32_t rank, int32_t d_rope) {
    size_t n_keys = segment_keys_size(rank, d_rope), n_values = segment_values_size(rank);
    struct ms4_segment s = { .rank = rank, .d_rope = d_rope, .keys = guarded(n_keys * 2),
                             .values = guarded(n_values * 2), .d = guarded_floats(3 * SEGMENT_KEYS) };
    memset(s.keys, 1, n_keys * 2);
    memset(s.values, 1, n_values * 2);
    return s;
}
static int same_segment(const struct ms4_segment *a, const struct ms4_segment *b) {
    size_t block = (size_t)SEGMENT_BLOCK * 2, width = (size_t)(a->rank + a->d_rope);
    size_t n = ((size_t)a->n_keys + SEGMENT_BLOCK - 1) / SEGMENT_BLOCK;
    if (a->n_keys != b->n_keys || !same_bits(a->d, b->d, 3 * SEGMENT_KEYS)) return 0;
    if (memcmp(a->keys, b->keys, n * width * SEGMENT_BLOCK * 2)) return 0;
    for (size_t i = 0; i < segment_values_size(a->rank); i += block * SEGMENT_KEYS / 2)
        if (memcmp(a->values + i, b->values + i, n * SEGMENT_BLOCK / 2 * block * 2)) return 0;
    return 1;
}
/* Against sums in double; the weights' rounding shows by at most half a unit for each key. */
static void compare_segment(const struct ms4_attend_segment *a, const float *want) {
    const struct ms4_segment *s = a->segment;
    size_t row = (size_t)s->rank + 2;
    for (size_t r = 0; r < (size_t)a->n_q; r++) {
        const float *got = a->out + r * row, *exact = want + r * row;
        /* a score is a sum of two parts of at most d d LENGTH_16^2 each, rounded a few times */
        double most = 0, slack = 2e-6, sum = 0, weighted = 0, tops = 0;
        for (int j = 0; j < a->n_keys; j++) {
            double size = fabs((double)a->q_d[2 * r] * s->d[j])
                + fabs((double)a->q_d[2 * r + 1] * s->d[SEGMENT_KEYS + j]);
            most = size > most ? size : most;
            sum += s->d[j];
            weighted += s->d[j] * s->d[2 * SEGMENT_KEYS + j];
            tops += s->d[2 * SEGMENT_KEYS + j];
        }
        slack += 2e-7 * most * LENGTH_16 * (double)LENGTH_16;
        expect(exact[0] == got[0] || fabs((double)exact[0] - got[0]) <= slack, "wrong maximum");
        expect(fabs((double)exact[1] - got[1]) <= 3 * slack * exact[1], "wrong sum of weights");
        double unit = fmax(sum / 32767, weighted / 0x1.fp+30);         /* of the weights: the real one is smaller */
        for (size_t i = 2; i < row; i++)
            expect(fabs((double)exact[i] - got[i]) <= 3 * slack * weighted + 0.51 * unit * tops, "wrong output");
    }
}
static void check_segment(void) {
    for (int i = 0; i < 80; i++) {
        int32_t rank = 8 * between(1, 40), d_rope = 8 * between(1, 12);
        int32_t n_keys = i % 4 ? between(1, SEGMENT_KEYS) : SEGMENT_KEYS, n_q = between(1, 34);
        size_t width = (size_t)(rank + d_rope), row = (size_t)rank + 2, n_out = (size_t)n_q * row;
        int16_t *rows = guarded((size_t)n_keys * width * 2), *q = guarded((size_t)n_q * width * 2);
        float *d = guarded_floats((size_t)n_keys * 3), *q_d = guarded_floats((size_t)n_q * 2);
        fill_rows(rows, d, 3, (size_t)n_keys, (size_t)rank, (size_t)d_rope, i % 4);
        fill_rows(q, q_d, 2, (size_t)n_q, (size_t)rank, (size_t)d_rope, i % 5);
        struct ms4_segment got = make_segment(rank, d_rope), want = make_segment(rank, d_rope);
        fast->open_segment(&got, rows, d, n_keys);
        ref->open_segment(&want, rows, d, n_keys);
        expect(same_segment(&got, &want), "opened in another way");
        int32_t n_seen = rnd() & 1 ? n_keys : between(1, n_keys);
        struct ms4_attend_segment a = { &got, q, q_d, guarded_floats(n_out), n_seen, n_q, NULL, 0 }, b = a, one = a;
        b.out = guarded_floats(n_out);
        fast->attend_segment(&a);
        ref->attend_segment(&b);
        compare_segment(&a, b.out);
        one.n_q = 1;
        for (int r = 0; r < n_q; r++, one.q += width, one.q_d += 2, one.out = b.out + (size_t)r * row) {
            one.out = b.out + (size_t)r * row;
            fast->attend_segment(&one);
        }
        expect(same_bits(a.out, b.out, n_out), "one row at a time gives other bits");
        hash_floats(a.out, n_out);
        release_all();
    }
}
/* What is not a number in a query, or in a key that a row sees, comes out as NaN. */
static void check_segment_nan(void) {
    for (int i = 0; i < 20; i++) {
        int16_t rows[40 * 48], q[3 * 48];
        float d[120], q_d[6], out[3 * 42];
        fill_rows(rows, d, 3, 40, 40, 8, 0);
        fill_rows(q, q_d, 2, 3, 40, 8, 0);
        if (i < 10) d[3 * 30 + i % 2] = some_nan();
        else q_d[2 * 1 + i % 2] = some_nan();
        struct ms4_segment s = make_segment(40, 8);
        fast->open_segment(&s, rows, d, 40);
        for (int n_keys = 20; n_keys <= 40; n_keys += 20) {
            struct ms4_attend_segment a = { &s, q, q_d, out, n_keys, 3, NULL, 0 };
            fast->attend_segment(&a);
            for (int r = 0; r < 3; r++)
                for (int j = 1; j < 42; j++)
                    expect((isnan(out[r * 42 + j]) != 0) == (i < 10 ? n_keys == 40 : r == 1), "NaN went astray");
        }
        release_all();
    }
}
static void check_segments(void) {
    check_segment();
    check_segment_nan();
}
/* Results of segments, of which some saw no key, one after the other; i % 4 == 1: maxima far apart, 2: NaN, 3: inf. */
static void check_fold(void) {
    for (int i = 0; i < 200; i++) {
        size_t n = (size_t)(i < 70 ? i : between(1, 700));
        float *got = guarded_floats(n + 2), *want = guarded_floats(n + 2), *from = guarded_floats(n + 2);
        memset(got, 0, (n + 2) * sizeof *got);
        got[0] = -INFINITY;
        memcpy(want, got, (n + 2) * sizeof *got);
        for (int step = 0; step < 6; step++) {
            double unit = 0;
            fill_floats(from, n + 2, 0);
            from[0] = uniform() * (i % 4 == 1 ? 200 : 4);
            from[1] = 1 + fabsf(from[1]);
            if (rnd() % 4 == 0) { memset(from, 0, (n + 2) * sizeof *from); from[0] = -INFINITY; }
            else if (i % 4 == 2 && rnd() % 4 == 0) from[between(0, (int)n + 1)] = NAN;
            else if (i % 4 == 3 && rnd() % 4 == 0) from[0] = rnd() & 1 ? INFINITY : -INFINITY;
            for (size_t j = 1; j < n + 2; j++) unit = fmax(unit, fmax(fabs((double)want[j]), fabs((double)from[j])));
            memcpy(got, want, (n + 2) * sizeof *got);
            fast->fold(got, from, n);
            ref->fold(want, from, n);
            for (size_t j = 0; j < n + 2; j++)
                expect(isnan(want[j]) ? isnan(got[j])
                                      : got[j] == want[j] || fabs((double)got[j] - want[j]) <= 6e-6 * unit,
                   "wrong fold");
            hash_floats(got, n + 2);
        }
        release_all();
    }
}
/* Only that they run and count: what they measure is speed. */
static void check_peaks(void) {
    expect(fast->int8_peak(2000) == 2 * fast->int8_peak(1000) && fast->int8_peak(1) >= 16, "int8 peak miscounts");
    expect(fast->float_peak(2000) == 2 * fast->float_peak(1000) && fast->float_peak(1) >= 4, "float peak miscounts");
}
static void check_transpose_keys(void) {
    for (int i = 0; i < 60; i++) {
        int d = 8 * between(1, 40), n_keys = i < 33 ? i : between(0, ATTEND_KEYS);
        size_t stride = (size_t)(d + between(0, 9)), n = (size_t)d * ATTEND_KEYS;
        size_t n_k = n_keys ? (size_t)(n_keys - 1) * stride + (size_t)d : 1;
        float *k = guarded_floats(n_k), *got = guarded_floats(n), *want = guarded_floats(n);
        fill_floats(k, n_k, 0);
        fast->transpose_keys(got, k, stride, n_keys, d);
        ref->transpose_keys(want, k, stride, n_keys, d);
        expect(same_bits(got, want, n), "wrong place");
        release_all();
    }
}

/* Choosing a token has the same bits in all tables; the exponentials are held to those of the C library. */
static void check_weigh(void) {
    for (int i = 0; i < 300; i++) {
        size_t n = (size_t)(i < 129 ? i % WEIGH_BLOCK + 1 : between(1, WEIGH_BLOCK));
        float *x = guarded_floats(n), scale = (float[]){ 0, 0.01f, 1, 30, 1000 }[i % 5];
        double *got = guarded(WEIGH_BLOCK * sizeof *got), *want = guarded(WEIGH_BLOCK * sizeof *want);
        double got_sums[2], want_sums[2], likely = 0, others = 0;
        struct ms4_weighing how = { scale + between(0, 1), i % 7 ? 0.7 : 1e-300, i % 3 ? 1e-3 : 0.5 };
        for (size_t j = 0; j < n; j++) x[j] = uniform() * scale;
        fast->weigh(got, x, n, &how, got_sums);
        ref->weigh(want, x, n, &how, want_sums);
        expect(!memcmp(got, want, WEIGH_BLOCK * sizeof *got) && !memcmp(got_sums, want_sums, sizeof got_sums),
               "other bits than ref");
        for (size_t j = 0; j < WEIGH_BLOCK; j++) {
            double exact = j < n ? exp((x[j] - how.highest) / how.temperature) : 0;
            expect(fabs(got[j] - exact) <= 5e-16 * exact + 1e-300, "wrong exponential");
            *(got[j] >= how.least ? &likely : &others) += got[j];
        }
        expect(fabs(got_sums[0] - likely) <= 1e-13 * likely && fabs(got_sums[1] - others) <= 1e-13 * others,
               "wrong sums");
        release_all();
    }
}
static void check_block_tops(void) {
    static const float bad[] = { NAN, -NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 300; i++) {
        size_t n = (size_t)(i < 140 ? i + 1 : between(1, 2000)), n_blocks = (n + WEIGH_BLOCK - 1) / WEIGH_BLOCK;
        float *x = guarded_floats(n), *got = guarded_floats(n_blocks), scale = (float[]){ 0, 1e-40f, 1, 4e37f }[i % 4];
        for (size_t j = 0; j < n; j++) x[j] = (uniform() - (float)(i % 3)) * scale;
        expect(fast->block_tops(got, x, n), "finite logits refused");
        for (size_t b = 0; b < n_blocks; b++) {
            float want = x[b * WEIGH_BLOCK];
            for (size_t j = b * WEIGH_BLOCK; j < n && j < (b + 1) * WEIGH_BLOCK; j++) want = x[j] > want ? x[j] : want;
            expect(got[b] == want, "not the highest");
        }
        x[between(0, (int)n - 1)] = bad[i % 4];
        expect(!fast->block_tops(got, x, n), "a logit that is not finite, unseen");
        release_all();
    }
}

/* --- timing of the rest ------------------------------------------------------------------------------- */
#define N_TIMED 4096
static float *t_x, *t_y, *t_z;
static block_q8 *t_blocks;
static int16_t *t_16;
static struct ms4_attend t_attend;
static int32_t t_keys[ATTEND_ROWS];

static void run_quantize(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->quantize(t_blocks, t_x, N_TIMED); }
static void run_rms_norm(const struct ms4_ops *o) {
    for (int i = 0; i < 50; i++) o->rms_norm(t_y, t_x, t_z, N_TIMED, 1e-6f);
}
static void run_silu_mul(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->silu_mul(t_y, t_x, t_z, N_TIMED); }
static void run_gelu_mul(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->gelu_mul(t_y, t_x, t_z, N_TIMED); }
static void run_add_scaled(const struct ms4_ops *o) {
    for (int i = 0; i < 50; i++) o->add_scaled(t_y, t_x, 0.5f, N_TIMED);
}
static void run_choose(const struct ms4_ops *o) {
    static int32_t ids[4];
    for (int i = 0; i < 50 * N_TIMED / 128; i++) o->choose(t_x + i % 96 * 128, 128, 4, 1, 1, ids, t_y);
}
static void run_quantize_16(const struct ms4_ops *o) {
    for (int i = 0; i < 50; i++) t_y[i] = o->quantize_16(t_16, t_x, N_TIMED, t_y + 50);
}
static void run_transpose_keys(const struct ms4_ops *o) {
    for (int i = 0; i < 50; i++) o->transpose_keys(t_y, t_x, 128, ATTEND_KEYS, 128);
}
static void run_fold(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->fold(t_y, t_x, N_TIMED); }
static void run_weigh(const struct ms4_ops *o) {
    static double w[WEIGH_BLOCK], sums[2];
    static const struct ms4_weighing how = { 1, 0.7, 1e-3 };
    for (int i = 0; i < 50; i++)
        for (size_t j = 0; j < N_TIMED; j += WEIGH_BLOCK) o->weigh(w, t_x + j, WEIGH_BLOCK, &how, sums);
}
static void run_block_tops(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->block_tops(t_y, t_x, N_TIMED); }
static void run_attend(const struct ms4_ops *o) { for (int i = 0; i < 50; i++) o->attend(&t_attend); }

static void make_timed(void) {
    t_x = guarded_floats(N_TIMED * 4);
    t_y = guarded_floats(N_TIMED * 4);
    t_z = guarded_floats(N_TIMED * 4);
    t_16 = guarded(N_TIMED * 2);
    t_blocks = guarded(N_TIMED / SUPERBLOCK * sizeof *t_blocks);
    for (int i = 0; i < N_TIMED * 4; i++) { t_x[i] = uniform(); t_z[i] = uniform(); t_y[i] = 0; }
}
static void time_floats(void (*run)(const struct ms4_ops *)) {
    make_timed();
    double t = best_time(run, fast), slow = best_time(run, ref);
    printf("  %5.2f ns per float (%5.1fx ref)", t / 50 / N_TIMED * 1e9, slow / t);
}
static void time_quantize(void) { time_floats(run_quantize); }
static void time_rms_norm(void) { time_floats(run_rms_norm); }
static void time_silu_mul(void) { time_floats(run_silu_mul); }
static void time_gelu_mul(void) { time_floats(run_gelu_mul); }
static void time_add_scaled(void) { time_floats(run_add_scaled); }
static void time_choose(void) { time_floats(run_choose); }
static void time_quantize_16(void) { time_floats(run_quantize_16); }
static void time_fold(void) { time_floats(run_fold); }
static void time_transpose_keys(void) { time_floats(run_transpose_keys); }
static void time_weigh(void) { time_floats(run_weigh); }
static void time_block_tops(void) { time_floats(run_block_tops); }
/* As wide as the heads of the vision tower. */
static void time_attend(void) {
    enum { D = 64 };
    static float m[ATTEND_ROWS], l[ATTEND_ROWS];
    make_timed();
    for (int i = 0; i < ATTEND_ROWS; i++) { t_keys[i] = ATTEND_KEYS; m[i] = 0; l[i] = 1; }
    t_attend = (struct ms4_attend){ t_x, t_x + 4000, t_z, t_y, m, l, t_keys, D, D, D, ATTEND_ROWS, D, D };
    double t = best_time(run_attend, fast), slow = best_time(run_attend, ref);
    printf("  %5.1f GFLOP/s (%4.1fx ref)", 50 * 2.0 * ATTEND_ROWS * ATTEND_KEYS * 2 * D / t * 1e-9, slow / t);
}
/* All heads of the model over a segment of its cache: opening it, attending to it. */
static struct ms4_segment t_segment;
static struct ms4_attend_segment t_attend_segment;
static int16_t *t_rows;
static float *t_d;
static void run_open_segment(const struct ms4_ops *o) { o->open_segment(&t_segment, t_rows, t_d, SEGMENT_KEYS); }
static void run_attend_segment(const struct ms4_ops *o) { o->attend_segment(&t_attend_segment); }
static void time_segment(void) {
    enum { RANK = 256, ROPE = 64, HEADS = 32 };
    int16_t *q = guarded(HEADS * (RANK + ROPE) * 2);
    float *q_d = guarded_floats(HEADS * 2);
    t_rows = guarded(SEGMENT_KEYS * (RANK + ROPE) * 2);
    t_d = guarded_floats(SEGMENT_KEYS * 3);
    t_segment = make_segment(RANK, ROPE);
    fill_rows(t_rows, t_d, 3, SEGMENT_KEYS, RANK, ROPE, 0);
    fill_rows(q, q_d, 2, HEADS, RANK, ROPE, 0);
    float *out = guarded_floats(HEADS * (RANK + 2));
    t_attend_segment = (struct ms4_attend_segment){ &t_segment, q, q_d, out, SEGMENT_KEYS, HEADS, NULL, 0 };
    double open = best_time(run_open_segment, fast), t = best_time(run_attend_segment, fast);
    double slow = best_time(run_attend_segment, ref), n_macs_here = HEADS * (double)SEGMENT_KEYS * (2 * RANK + ROPE);
    printf("  %5.1f GMAC/s (%4.1fx ref), opening %4.1f %% of the time", n_macs_here / t * 1e-9, slow / t,
           100 * open / (t + open));
}

static uint64_t n_macs;
static void run_int8_peak(const struct ms4_ops *o) { n_macs = o->int8_peak(20000); }
static void run_float_peak(const struct ms4_ops *o) { n_macs = o->float_peak(20000); }
static void time_peaks(void) {
    double t = best_time(run_int8_peak, fast);
    printf("  int8 %5.1f GMAC/s", (double)n_macs / t * 1e-9);
    t = best_time(run_float_peak, fast);
    printf("  float %5.1f GMAC/s", (double)n_macs / t * 1e-9);
}

static void check_table(void) {
    for (mul_type = 0; mul_type < MS4_N_TYPES; mul_type++) {
        char name[32];
        snprintf(name, sizeof name, "mul_%s", ms4_type_infos[mul_type].name);
        run_check(name, check_mul, time_mul);
    }
    for (mul_type = 0; mul_type < MS4_N_TYPES; mul_type++) {
        char name[32];
        snprintf(name, sizeof name, "deq_%s", ms4_type_infos[mul_type].name);
        run_check(name, check_dequantize, NULL);
    }
    run_check("quantize", check_quantize, time_quantize);
    run_check("rms_norm", check_rms_norm, time_rms_norm);
    run_check("silu_mul", check_silu_mul, time_silu_mul);
    run_check("gelu", check_gelu, time_gelu_mul);
    run_check("add_scaled", check_add_scaled, time_add_scaled);
    run_check("choose", check_choose, time_choose);
    run_check("quantize_16", check_quantize_16, time_quantize_16);
    run_check("segment", check_segments, time_segment);
    run_check("fold", check_fold, time_fold);
    run_check("attend", check_attend, time_attend);
    run_check("transpose_keys", check_transpose_keys, time_transpose_keys);
    run_check("weigh", check_weigh, time_weigh);
    run_check("block_tops", check_block_tops, time_block_tops);
    run_check("peaks", check_peaks, time_peaks);
}
int main(int argc, char **argv) {
    static const char *const isas[] = { "avx2", "avxvnni", "avx512", "neon" };
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    seed = getenv("MS4_TEST_SEED") ? strtoull(getenv("MS4_TEST_SEED"), NULL, 10) : (uint64_t)t.tv_nsec;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--bench")) bench = 1;
        else if (!strncmp(argv[i], "--seed=", 7)) seed = strtoull(argv[i] + 7, NULL, 10);
        else if (!strncmp(argv[i], "--only=", 7)) only = argv[i] + 7;
        else if (!strncmp(argv[i], "--isa=", 6)) only_isa = argv[i] + 6;
        else if (!strncmp(argv[i], "--slack=", 8)) slack = strtoull(argv[i] + 8, NULL, 10);
        else { fprintf(stderr, "unknown option %s\n", argv[i]); return 2; }
    }
    printf("seed %llu\n", (unsigned long long)seed);
    struct sigaction act = { .sa_handler = on_crash };
    sigaction(SIGSEGV, &act, NULL);
    sigaction(SIGBUS, &act, NULL);
    sigaction(SIGILL, &act, NULL);
    ref = ms4_ops_for("ref");
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (*only_isa && strcmp(only_isa, isas[i])) continue;
        if (!(fast = ms4_ops_for(isas[i]))) { printf("%-23s skipped: not on this CPU\n", isas[i]); continue; }
        n_checks = 0;
        check_table();
        isa_before = fast->isa;
        hash = 0;
        hash_bytes(hashes, sizeof hashes);
        printf("%-23s bits %016llx: of one seed the same on every machine\n", fast->isa, (unsigned long long)hash);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || (*only_isa && !passed);       /* a table that is asked for by name has to be there */
}
