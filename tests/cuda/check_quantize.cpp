/* check_quantize.cpp -- quantize_rows against the CPU's quantize. */
#include "check.h"

/* Just beside the middle between two integers: there a product that is not rounded before the sum goes another way. */
static void next_to_ties(float *x) {
    float top = (float)(uniform() + 0.01), factor = 127.0f / top;
    for (int i = 0; i < SUPERBLOCK; i++) {
        float v = (float)((between(0, 126) + 0.5) / factor);
        uint32_t u;
        memcpy(&u, &v, 4);
        u += (uint32_t)between(-2, 2);
        memcpy(&v, &u, 4);
        x[i] = i == 7 ? top : v < top ? v : top / 2;
    }
}
static void check_quantize() {
    for (int round = 0; round < 40 * repeat; round++) {
        int n = between(1, 3), width = round % 4 ? 32 * between(1, 40) : 4096, kind = round % 9;
        size_t stride = (size_t)width + 4 * (rnd() % 3);
        size_t blocks = (size_t)(width + SUPERBLOCK - 1) / SUPERBLOCK + rnd() % 2;
        buffer<float> x((size_t)n * stride);
        buffer<block_q8> got((size_t)n * blocks), want((size_t)n * blocks);
        now_trying("n %d width %d kind %d", n, width, kind);
        random_floats(x, (size_t)n * stride, kind % FLOAT_KINDS);
        if (kind == 5) x[rnd() % (uint32_t)width] = NAN;
        if (kind == 6) x[rnd() % (uint32_t)width] = -INFINITY;
        if (kind == 7) for (size_t i = 0; i < (size_t)n * stride; i++) x[i] = (float)((int)(i % 256) - 128) * 0.5f;
        if (kind == 8) for (size_t i = 0; i + SUPERBLOCK <= (size_t)n * stride; i += SUPERBLOCK) next_to_ties(x + i);
        quantize_args a = { x, got, stride, blocks, n, width };
        launch("quantize_rows", a, dim3((unsigned)n));
        for (int t = 0; t < n; t++) {
            size_t used = (size_t)(width + SUPERBLOCK - 1) / SUPERBLOCK;
            cpu->quantize(want + (size_t)t * blocks, x + (size_t)t * stride, (size_t)width);
            same_blocks("block", got + (size_t)t * blocks, want + (size_t)t * blocks, used);
        }
        expect(got.intact(), "writes only its blocks");
    }
}
int main(int argc, char **argv) { return run_checks(argc, argv, { { "quantize_rows", check_quantize } }); }
