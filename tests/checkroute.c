/* checkroute.c -- the router's choice: of every token, or of no more once the stop flag is raised; what the picks hold
 * then is a choice all the same, as the rest of the layer still goes through them.  Prints "ok" or what went wrong. */
#include "../csrc/cpu/run_ffn.c"
#include "../csrc/picks.c"
#include <stdio.h>

#define N_TOKENS 1000
#define N_EXPERT 8
#define N_USED 3
#define N_THREADS 2

static atomic_int stop, calls, late;           /* late: calls that began when the flag was up */
static int32_t stop_at;                        /* the call that raises the flag; 0: none */

static void choose(const float *logits, int32_t n, int32_t k, float scale, int32_t norm, int32_t *ids, float *weights) {
    (void)logits, (void)n, (void)scale, (void)norm;
    if (atomic_load(&stop)) atomic_fetch_add(&late, 1);
    if (atomic_fetch_add(&calls, 1) + 1 == stop_at) atomic_store(&stop, 1);
    for (int32_t i = 0; i < k; i++) {
        ids[i] = N_EXPERT - k + i;
        weights[i] = 1;
    }
}
static const char *fault(cpu_device *d, picks *p) {
    static const ms4_shape shape = { .n_expert = N_EXPERT, .n_expert_used = N_USED };
    atomic_store(&stop, 0);
    atomic_store(&calls, 0);
    atomic_store(&late, 0);
    for (int32_t i = 0; i < N_TOKENS * N_USED; i++) p->expert[i] = 1 << 30;    /* no expert */
    cpu_route(&d->base, &shape, NULL, p);
    const int32_t n = atomic_load(&calls);
    if (!stop_at && n != N_TOKENS) return "a token without a choice";
    if (atomic_load(&late) > N_THREADS * CHOOSE_TOKENS) return "choosing went on";      /* an item of each at most */
    for (int32_t i = 0; i < N_TOKENS * N_USED; i++) {
        if (p->expert[i] < 0 || p->expert[i] >= N_EXPERT) return "an expert that there is not";
        if (i % N_USED && p->expert[i] <= p->expert[i - 1]) return "an expert twice, or out of order";
    }
    return p->first[N_EXPERT] == N_TOKENS * N_USED ? NULL : "pairs are lost";
}
int main(void) {
    static int32_t ids[4][N_TOKENS * N_USED], first[N_EXPERT + 1], used[N_EXPERT];
    static float weights[2][N_TOKENS * N_USED], logits[N_TOKENS * N_EXPERT];
    const struct ms4_ops ops = { .choose = choose };
    cpu_device d = { .ops = &ops, .stop = &stop, .rows[BUF_ROUTER] = { .f = logits, .width = N_EXPERT } };
    picks p = { ids[0], weights[0], ids[1], ids[2], weights[1], first, used, N_TOKENS, N_USED, 0, 0 };
    if (pool_open(N_THREADS, &d.pool)) return 2;
    const char *wrong = NULL;
    for (stop_at = 0; stop_at < 200 && !wrong; stop_at++) wrong = fault(&d, &p);
    pool_close(d.pool);
    puts(wrong ? wrong : "ok");
    return wrong != NULL;
}
