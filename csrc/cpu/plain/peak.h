/* peak.h -- loops that only multiply and add in registers: the rates that other kernels are measured against.
 * Each ISA file includes it below its target pragma and gets the loops of that target.  They return how many
 * multiply-adds `rounds` rounds were; the sums go to a volatile so that nothing is left out. */
#ifndef MS4_PEAK_H
#define MS4_PEAK_H
#include <stdint.h>

#define PEAK_CHAINS 12                         /* independent sums: enough to hide the latency of one */
#if defined(__AVX512VNNI__)
#include <immintrin.h>
static uint64_t int8_peak(uint64_t rounds) {
    __m512i sum[PEAK_CHAINS], a = _mm512_set1_epi8((char)rounds), b = _mm512_set1_epi8(3);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm512_set1_epi32(j);    /* or they would be one chain */
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
    volatile int keep = _mm512_cvtsi512_si32(sum[0]);
    (void)keep;
    return rounds * PEAK_CHAINS * 64;
}
static uint64_t float_peak(uint64_t rounds) {
    __m512 sum[PEAK_CHAINS], a = _mm512_set1_ps((float)rounds * 1e-30f), b = _mm512_set1_ps(1e-3f);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm512_set1_ps((float)j);
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm512_fmadd_ps(sum[j], b, a);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = _mm512_add_ps(sum[0], sum[j]);
    volatile float keep = _mm512_reduce_add_ps(sum[0]);
    (void)keep;
    return rounds * PEAK_CHAINS * 16;
}
#elif defined(__AVX2__)
#include <immintrin.h>
#if defined(__AVXVNNI__)
static uint64_t int8_peak(uint64_t rounds) {
    __m256i sum[PEAK_CHAINS], a = _mm256_set1_epi8((char)rounds), b = _mm256_set1_epi8(3);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm256_set1_epi32(j);
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm256_dpbusd_avx_epi32(sum[j], a, b);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
    volatile int keep = _mm256_extract_epi32(sum[0], 0);
    (void)keep;
    return rounds * PEAK_CHAINS * 32;
}
#else
static uint64_t int8_peak(uint64_t rounds) {
    __m256i sum[PEAK_CHAINS], a = _mm256_set1_epi8((char)(rounds & 7)), b = _mm256_set1_epi8(3);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm256_set1_epi8((char)j);
    for (uint64_t i = 0; i < rounds; i++)      /* the sum goes in as a factor, or the product would be hoisted */
        for (int j = 0; j < PEAK_CHAINS; j++)
            sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(_mm256_xor_si256(a, sum[j]), b));
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
    volatile int keep = _mm256_extract_epi32(sum[0], 0);
    (void)keep;
    return rounds * PEAK_CHAINS * 32;
}
#endif
static uint64_t float_peak(uint64_t rounds) {
    __m256 sum[PEAK_CHAINS], a = _mm256_set1_ps((float)rounds * 1e-30f), b = _mm256_set1_ps(1e-3f);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm256_set1_ps((float)j);
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = _mm256_fmadd_ps(sum[j], b, a);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = _mm256_add_ps(sum[0], sum[j]);
    volatile float keep = _mm_cvtss_f32(_mm256_castps256_ps128(sum[0]));
    (void)keep;
    return rounds * PEAK_CHAINS * 8;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
static uint64_t int8_peak(uint64_t rounds) {
    int32x4_t sum[PEAK_CHAINS];
    int8x16_t a = vdupq_n_s8((int8_t)rounds), b = vdupq_n_s8(3);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = vdupq_n_s32(j);
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = vdotq_s32(sum[j], a, b);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = vaddq_s32(sum[0], sum[j]);
    volatile int keep = vaddvq_s32(sum[0]);
    (void)keep;
    return rounds * PEAK_CHAINS * 16;
}
static uint64_t float_peak(uint64_t rounds) {
    float32x4_t sum[PEAK_CHAINS], a = vdupq_n_f32((float)rounds * 1e-30f), b = vdupq_n_f32(1e-3f);
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = vdupq_n_f32((float)j);
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = vfmaq_f32(a, sum[j], b);
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = vaddq_f32(sum[0], sum[j]);
    volatile float keep = vaddvq_f32(sum[0]);
    (void)keep;
    return rounds * PEAK_CHAINS * 4;
}
#else
static uint64_t int8_peak(uint64_t rounds) {
    uint32_t sum[PEAK_CHAINS] = { 0 };
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] += (uint32_t)((int8_t)(i + (uint64_t)j) * (int8_t)sum[j]);
    volatile uint32_t keep = sum[0];
    (void)keep;
    return rounds * PEAK_CHAINS;
}
static uint64_t float_peak(uint64_t rounds) {
    float sum[PEAK_CHAINS], a = (float)rounds * 1e-30f;
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = (float)j;
    for (uint64_t i = 0; i < rounds; i++)
        for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = sum[j] * 1e-3f + a;
    volatile float keep = sum[0];
    (void)keep;
    return rounds * PEAK_CHAINS;
}
#endif
#endif
