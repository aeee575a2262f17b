/* checksum.h -- the checksum of what ms4 writes into files: against damage, not against an adversary. */
#ifndef MS4_CHECKSUM_H
#define MS4_CHECKSUM_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
/* FNV-1a over words of 8 bytes, with the length in it; h: 0, or the checksum of what comes before. */
static inline uint64_t checksum(uint64_t h, const uint8_t *p, size_t n) {
    h ^= n;
    while (n) {
        uint64_t word = 0;
        size_t part = n < 8 ? n : 8;
        memcpy(&word, p, part);
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
        p += part;
        n -= part;
    }
    return h;
}
#endif
