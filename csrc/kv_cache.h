/* kv_cache.h -- what sessions remember: latents and rope keys, in counted blocks that sessions may share.
 *
 * A block holds SEGMENT_KEYS positions of all layers; a session's cache is a list of blocks, the last one filled in
 * part.  A block has one or more owners.  Who writes into one that others own, too, gets a copy of its own first (of
 * the positions in use only), so a shared prefix costs its memory once.  The format of a position is known to
 * kv_cache.c and to the kernels that ops->quantize_16 and ops->open_segment stand for.
 *
 * Threads: a session's cache is used by one thread at a time, but for kv_cache_share, which may read from a cache that
 * a step is just appending to: what it takes over lies before the step's positions.
 */
#ifndef MS4_KV_CACHE_H
#define MS4_KV_CACHE_H
#include "ms4.h"
#include "ops.h"

#define KV_SCALES 3            /* floats of a position: scales of its latents and rope key, its largest latent */

/* Where blocks lie: host memory, or that of a device, whose address is then of no use to the host.  May be called from
 * any thread.  copy comes behind what was asked of the device before; read and write wait. */
typedef struct kv_memory kv_memory;
struct kv_memory {
    uint8_t *(*take)(kv_memory *m, size_t bytes);             /* NULL: there is none; what is in it is undefined */
    void (*give)(kv_memory *m, uint8_t *block, size_t bytes);
    int (*copy)(kv_memory *m, uint8_t *to, const uint8_t *from, size_t bytes);     /* from block to block */
    int (*read)(kv_memory *m, void *to, const uint8_t *from, size_t bytes);
    int (*write)(kv_memory *m, uint8_t *to, const void *from, size_t bytes);
};
typedef struct kv_store kv_store;                             /* of an engine: all blocks, and who owns them */
typedef struct kv_block kv_block;
typedef struct {
    kv_store *store;
    kv_block **blocks;                                        /* room for all that n_ctx positions need */
    int32_t n_blocks, most;
} kv_cache;

int kv_store_open(const ms4_shape *s, kv_memory *memory, kv_store **out);     /* memory NULL: the host's */
void kv_store_close(kv_store *store);
int kv_store_come_home(kv_store *store);                      /* host memory from now on; MS4_EARG: blocks are in use */
void kv_store_count(kv_store *store, uint64_t *blocks, uint64_t *bytes);      /* in use, each counted once */

int kv_cache_open(kv_store *store, int32_t n_ctx, kv_cache *out);
void kv_cache_close(kv_cache *kv);
/* Makes positions [length, length + n) writable: takes blocks, and copies the last one where others own it, too. */
int kv_cache_room(kv_cache *kv, int32_t length, int32_t n);
/* Gives back the blocks behind the first `length` positions. */
void kv_cache_cut(kv_cache *kv, int32_t length);
/* `to` holds from's first positions, and only them. */
void kv_cache_share(kv_cache *to, const kv_cache *from, int32_t length);

uint8_t *kv_cache_block(const kv_cache *kv, int32_t i);       /* where block i begins */
size_t kv_cache_layer_offset(const kv_cache *kv, int32_t layer);              /* of a layer in a block, in bytes */
/* Where position pos of a layer lies: kv_rank + d_rope integers, and KV_SCALES floats. */
int16_t *kv_cache_row(const kv_cache *kv, int32_t layer, int32_t pos);
float *kv_cache_scales(const kv_cache *kv, int32_t layer, int32_t pos);

/* The first `length` positions, to a file descriptor, at its place; the caller owns names, headers and atomicity.
 * fingerprint: of the model (text_weights_fingerprint).  MS4_EIO: it could not be written. */
int kv_cache_save(const kv_cache *kv, uint64_t fingerprint, int32_t length, int fd);
/* The reverse, into an empty cache of n_ctx positions.  MS4_EMODEL: these bytes are not what save wrote for this model
 * (of another model or format, cut, damaged, forged); MS4_EFULL: more positions than n_ctx. */
int kv_cache_load(kv_cache *kv, uint64_t fingerprint, int32_t n_ctx, int fd, int32_t *length);
#endif
