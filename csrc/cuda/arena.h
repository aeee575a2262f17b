/* arena.h -- host memory that copies to a card come from, pinned where it lies, a chunk at a time.
 *
 * The experts of a file that is mapped or was copied stay where they are.  A chunk of them is pinned when a prompt
 * wants something of it; from then on it goes to the card by itself, and no processor copies it first.  One thread pins
 * (the engine's turn); any may ask what is pinned.
 */
#ifndef MS4_CUDA_ARENA_H
#define MS4_CUDA_ARENA_H
#include <stddef.h>
#include <stdint.h>
typedef struct arena arena;

/* chunk 0: as large as is usual, and whole pages around it; else whole pages, which it begins and ends with. */
typedef struct { const uint8_t *at; size_t bytes, chunk; } arena_range;
/* ranges: n, in any order; they may touch.  read_only: the system maps them so.  most: bytes to pin at most. */
int arena_open(const arena_range *ranges, size_t n, int read_only, uint64_t most, arena **out);
/* Nothing is on its way from there.  lost: the card is not asked for anything any more. */
void arena_close(arena *a, int lost);
/* All chunks that these bytes touch, unless it has been refused once. */
void arena_pin(arena *a, const void *at, size_t bytes);
/* All chunks that these bytes touch are pinned no more.  Nothing is on its way from there. */
void arena_unpin(arena *a, const void *at, size_t bytes);
/* How many of these bytes, from the first on, may be copied in one go; 0: the first is not pinned. */
size_t arena_pinned(const arena *a, const void *at, size_t bytes);
/* Bytes pinned, and bytes that were to be and are not. */
void arena_count(const arena *a, uint64_t *pinned, uint64_t *refused);
#endif
