/* dispatch.c -- picks the best kernel table this CPU (and its OS) can run. */
#include "ms4.h"
#include "ops.h"
#include "cpu/plain/prefetch.h"
#include <string.h>
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static const struct ms4_ops *const tables[] = {     /* best first; ref always runs */
#if defined(__x86_64__)
    &ops_avx512, &ops_avxvnni, &ops_avx2,
#elif defined(__aarch64__)
    &ops_neon,
#endif
    &ops_ref,
};
static int cpu_can_run(const struct ms4_ops *t) {
#if defined(__x86_64__)
    __builtin_cpu_init();       /* libgcc also asks XGETBV whether the OS saves the registers */
    if (t == &ops_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (t == &ops_avxvnni) return avx2 && __builtin_cpu_supports("avxvnni");
    if (t == &ops_avx2) return avx2;
#elif defined(__aarch64__)
    if (t == &ops_neon) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return t == &ops_ref;
}
/* On Zen 4 8 kB give 0.96 of the read bandwidth and 45 kB 0.90; on an Intel server 45 kB are as good as 16 to 90. */
size_t prefetch_ahead = 45056;
#if defined(__x86_64__)
__attribute__((constructor)) static void set_prefetch_ahead(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) prefetch_ahead = 8192;
}
#endif
/* The table named isa, or the best one if isa is NULL.  NULL if there is none that runs here. */
const struct ms4_ops *ms4_ops_for(const char *isa) {
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (cpu_can_run(tables[i]) && (!isa || !strcmp(isa, tables[i]->isa))) return tables[i];
    return NULL;
}
