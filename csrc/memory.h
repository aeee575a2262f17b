/* memory.h -- all memory that the engine owns comes from here, so that tests can make the Nth request fail. */
#ifndef MS4_MEMORY_H
#define MS4_MEMORY_H
#include <stddef.h>
#include <stdint.h>
/* Zeroed, aligned to 64 bytes; NULL if there is none.  n * size is checked for overflow. */
void *memory_take(size_t n, size_t size);
void memory_give(void *p);
/* Zeroed pages that cost nothing until touched; huge != 0 asks for huge pages.  NULL if there are none. */
void *memory_take_pages(size_t bytes, int huge);
void memory_give_pages(void *p, size_t bytes);
void memory_drop_pages(void *p, size_t bytes);                /* zeroed again, and cost nothing until touched */
uint64_t memory_resident(void);                               /* bytes of this process that are in RAM; 0: unknown */
#endif
