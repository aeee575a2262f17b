/* kv_cache.c -- counted blocks of positions, lists of them, and their form in a file.
 *
 *   block     layer 0                              layer 1 ...
 *             +----------------------------------+----
 *             | 128 rows of kv_rank + d_rope int16 | 128 x KV_SCALES floats |
 *             +----------------------------------+----
 *
 *   file      header | block, block, ..., the last one cut to the positions in use | each followed by its checksum
 *
 * One mutex guards the numbers of owners and the lists; nobody holds it while computing.
 */
#include "kv_cache.h"
#include "checksum.h"
#include "error.h"
#include "memory.h"
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct kv_block { int32_t owners; uint8_t *data; };
struct kv_store {
    pthread_mutex_t lock;
    kv_memory *memory;
    uint64_t n_blocks;
    size_t layer_bytes, bytes;                                /* of one layer of a block; of a block */
    int32_t n_layer, rank, d_rope;
};

static size_t width(const kv_store *s) { return (size_t)(s->rank + s->d_rope); }
static size_t row_bytes(const kv_store *s) { return width(s) * sizeof(int16_t); }
#define SCALE_BYTES (KV_SCALES * sizeof(float))

/* --- host memory -------------------------------------------------------------------------- */
static uint8_t *host_take(kv_memory *m, size_t bytes) {
    (void)m;
    return memory_take_pages(bytes, 0);                       /* untouched pages cost nothing */
}
static void host_give(kv_memory *m, uint8_t *block, size_t bytes) {
    (void)m;
    memory_give_pages(block, bytes);
}
static int host_copy(kv_memory *m, uint8_t *to, const uint8_t *from, size_t bytes) {
    (void)m;
    memcpy(to, from, bytes);
    return MS4_OK;
}
static int host_read(kv_memory *m, void *to, const uint8_t *from, size_t bytes) {
    return host_copy(m, to, from, bytes);
}
static int host_write(kv_memory *m, uint8_t *to, const void *from, size_t bytes) {
    return host_copy(m, to, from, bytes);
}
static kv_memory host_memory = { host_take, host_give, host_copy, host_read, host_write };

/* --- the store ---------------------------------------------------------------------------- */
int kv_store_open(const ms4_shape *s, kv_memory *memory, kv_store **out) {
    kv_store *store = memory_take(1, sizeof *store);
    FAIL_IF(!store, MS4_ENOMEM, "no memory for the kv cache");
    store->memory = memory ? memory : &host_memory;
    store->n_layer = s->n_layer;
    store->rank = s->kv_rank;
    store->d_rope = s->d_rope;
    store->layer_bytes = SEGMENT_KEYS * (row_bytes(store) + SCALE_BYTES);
    store->bytes = (size_t)s->n_layer * store->layer_bytes;
    pthread_mutex_init(&store->lock, NULL);
    *out = store;
    return MS4_OK;
}
void kv_store_close(kv_store *store) {
    if (!store) return;
    pthread_mutex_destroy(&store->lock);
    memory_give(store);
}
int kv_store_come_home(kv_store *store) {
    pthread_mutex_lock(&store->lock);
    const int empty = !store->n_blocks;
    if (empty) store->memory = &host_memory;
    pthread_mutex_unlock(&store->lock);
    FAIL_IF(!empty, MS4_EARG, "a session still holds positions");
    return MS4_OK;
}
void kv_store_count(kv_store *store, uint64_t *blocks, uint64_t *bytes) {
    pthread_mutex_lock(&store->lock);
    *blocks = store->n_blocks;
    pthread_mutex_unlock(&store->lock);
    *bytes = *blocks * store->bytes;
}
static kv_block *block_take(kv_store *store) {
    kv_block *b = memory_take(1, sizeof *b);
    if (!b) return NULL;
    b->data = store->memory->take(store->memory, store->bytes);
    if (!b->data) {
        memory_give(b);
        return NULL;
    }
    b->owners = 1;
    pthread_mutex_lock(&store->lock);
    store->n_blocks++;
    pthread_mutex_unlock(&store->lock);
    return b;
}
/* One owner less; the last one frees it. */
static void block_give(kv_store *store, kv_block *b) {
    pthread_mutex_lock(&store->lock);
    int last = !--b->owners;
    store->n_blocks -= (uint64_t)last;
    pthread_mutex_unlock(&store->lock);
    if (!last) return;
    store->memory->give(store->memory, b->data, store->bytes);
    memory_give(b);
}
/* The first n positions of every layer. */
static int block_copy(const kv_store *store, kv_block *to, const kv_block *from, size_t n) {
    kv_memory *m = store->memory;
    for (int32_t layer = 0; layer < store->n_layer; layer++) {
        size_t rows = (size_t)layer * store->layer_bytes, scales = rows + SEGMENT_KEYS * row_bytes(store);
        TRY(m->copy(m, to->data + rows, from->data + rows, n * row_bytes(store)));
        TRY(m->copy(m, to->data + scales, from->data + scales, n * SCALE_BYTES));
    }
    return MS4_OK;
}
/* --- the cache of a session ---------------------------------------------------------------- */
static int32_t blocks_for(int32_t n) { return n / SEGMENT_KEYS + (n % SEGMENT_KEYS != 0); }

int kv_cache_open(kv_store *store, int32_t n_ctx, kv_cache *out) {
    *out = (kv_cache){ .store = store, .most = blocks_for(n_ctx) };
    out->blocks = memory_take((size_t)out->most, sizeof *out->blocks);
    FAIL_IF(!out->blocks, MS4_ENOMEM, "no memory for a context of %d tokens; use a smaller one", n_ctx);
    return MS4_OK;
}
void kv_cache_close(kv_cache *kv) {
    kv_cache_cut(kv, 0);
    memory_give(kv->blocks);
    *kv = (kv_cache){ 0 };
}
void kv_cache_cut(kv_cache *kv, int32_t length) {
    for (int32_t keep = blocks_for(length); kv->n_blocks > keep;) {
        pthread_mutex_lock(&kv->store->lock);
        kv_block *last = kv->blocks[--kv->n_blocks];
        pthread_mutex_unlock(&kv->store->lock);
        block_give(kv->store, last);
    }
}
static void put(kv_cache *kv, int32_t at, kv_block *b) {
    pthread_mutex_lock(&kv->store->lock);
    kv->blocks[at] = b;
    if (at == kv->n_blocks) kv->n_blocks++;
    pthread_mutex_unlock(&kv->store->lock);
}
static int is_shared(const kv_cache *kv, const kv_block *b) {
    pthread_mutex_lock(&kv->store->lock);
    int shared = b->owners > 1;
    pthread_mutex_unlock(&kv->store->lock);
    return shared;
}
int kv_cache_room(kv_cache *kv, int32_t length, int32_t n) {
    int32_t last = length / SEGMENT_KEYS, used = length % SEGMENT_KEYS;
    if (used && is_shared(kv, kv->blocks[last])) {
        kv_block *old = kv->blocks[last], *own = block_take(kv->store);
        FAIL_IF(!own, MS4_ENOMEM, "no memory for a copy of the last positions of a shared context");
        int status = block_copy(kv->store, own, old, (size_t)used);
        if (status) {
            block_give(kv->store, own);
            return status;
        }
        put(kv, last, own);
        block_give(kv->store, old);
    }
    while (kv->n_blocks < blocks_for(length + n)) {
        kv_block *b = block_take(kv->store);
        FAIL_IF(!b, MS4_ENOMEM, "no memory for a context of %d tokens; use a smaller one", length + n);
        put(kv, kv->n_blocks, b);
    }
    return MS4_OK;
}
void kv_cache_share(kv_cache *to, const kv_cache *from, int32_t length) {
    kv_cache_cut(to, 0);
    pthread_mutex_lock(&to->store->lock);
    for (; to->n_blocks < blocks_for(length); to->n_blocks++) {
        to->blocks[to->n_blocks] = from->blocks[to->n_blocks];
        to->blocks[to->n_blocks]->owners++;
    }
    pthread_mutex_unlock(&to->store->lock);
}
uint8_t *kv_cache_block(const kv_cache *kv, int32_t i) { return kv->blocks[i]->data; }
size_t kv_cache_layer_offset(const kv_cache *kv, int32_t layer) { return (size_t)layer * kv->store->layer_bytes; }
static uint8_t *layer_at(const kv_cache *kv, int32_t layer, int32_t pos) {
    return kv_cache_block(kv, pos / SEGMENT_KEYS) + kv_cache_layer_offset(kv, layer);
}
int16_t *kv_cache_row(const kv_cache *kv, int32_t layer, int32_t pos) {
    return (int16_t *)(void *)layer_at(kv, layer, pos) + (size_t)(pos % SEGMENT_KEYS) * width(kv->store);
}
float *kv_cache_scales(const kv_cache *kv, int32_t layer, int32_t pos) {
    uint8_t *scales = layer_at(kv, layer, pos) + SEGMENT_KEYS * row_bytes(kv->store);
    return (float *)(void *)scales + (size_t)(pos % SEGMENT_KEYS) * KV_SCALES;
}
/* --- files -------------------------------------------------------------------------------- */
#define KV_FORMAT 1
typedef struct {
    char magic[8];                                            /* "ms4 kv\r\n" */
    uint32_t format, n_layer, rank, d_rope, n_scales, length;
    uint64_t fingerprint, checksum;                           /* of the model; of what stands before */
} kv_header;
_Static_assert(sizeof(kv_header) == 48, "no gaps: these bytes are written as they are");
static const char magic[8] = { 'm', 's', '4', ' ', 'k', 'v', '\r', '\n' };

static int write_all(int fd, const void *data, size_t n) {
    for (const uint8_t *p = data; n;) {
        ssize_t did = write(fd, p, n);
        if (did < 0 && errno == EINTR) continue;
        FAIL_IF(did <= 0, MS4_EIO, "the session cannot be written: %s", did ? strerror(errno) : "nothing was taken");
        p += did;
        n -= (size_t)did;
    }
    return MS4_OK;
}
static int read_all(int fd, void *data, size_t n) {
    for (uint8_t *p = data; n;) {
        ssize_t did = read(fd, p, n);
        if (did < 0 && errno == EINTR) continue;
        FAIL_IF(did < 0, MS4_EIO, "the saved session cannot be read: %s", strerror(errno));
        FAIL_IF(!did, MS4_EMODEL, "the saved session is cut off; it is of no use any more");
        p += did;
        n -= (size_t)did;
    }
    return MS4_OK;
}
static kv_header header_of(const kv_store *s, uint64_t fingerprint, int32_t length) {
    kv_header h = { .format = KV_FORMAT, .n_layer = (uint32_t)s->n_layer, .rank = (uint32_t)s->rank,
                    .d_rope = (uint32_t)s->d_rope, .n_scales = KV_SCALES, .length = (uint32_t)length,
                    .fingerprint = fingerprint };
    memcpy(h.magic, magic, sizeof magic);
    h.checksum = checksum(0, (const uint8_t *)&h, offsetof(kv_header, checksum));
    return h;
}
/* Positions of block i that belong to the first `length`. */
static size_t positions_of(int32_t i, int32_t length) {
    int32_t left = length - i * SEGMENT_KEYS;
    return (size_t)(left < SEGMENT_KEYS ? left : SEGMENT_KEYS);
}
/* The n positions of a layer of a block, on their way to or from a file: rows, then scales.  room: layer_bytes. */
static int save_block(const kv_cache *kv, int32_t i, size_t n, uint64_t sum, int fd, uint8_t *room) {
    const kv_store *s = kv->store;
    const size_t bytes = n * row_bytes(s);
    for (int32_t layer = 0; layer < s->n_layer; layer++) {
        const uint8_t *rows = layer_at(kv, layer, i * SEGMENT_KEYS);
        TRY(s->memory->read(s->memory, room, rows, bytes));
        TRY(s->memory->read(s->memory, room + bytes, rows + SEGMENT_KEYS * row_bytes(s), n * SCALE_BYTES));
        TRY(write_all(fd, room, bytes + n * SCALE_BYTES));
        sum = checksum(checksum(sum, room, bytes), room + bytes, n * SCALE_BYTES);
    }
    return write_all(fd, &sum, sizeof sum);
}
int kv_cache_save(const kv_cache *kv, uint64_t fingerprint, int32_t length, int fd) {
    const kv_store *s = kv->store;
    kv_header h = header_of(s, fingerprint, length);
    uint8_t *room = memory_take(s->layer_bytes, 1);
    FAIL_IF(!room, MS4_ENOMEM, "no memory to save the session");
    int status = write_all(fd, &h, sizeof h);
    for (int32_t i = 0; i < blocks_for(length) && !status; i++)
        status = save_block(kv, i, positions_of(i, length), h.checksum + (uint64_t)i, fd, room);
    memory_give(room);
    return status;
}
/* The largest magnitude, which open_segment takes from the third float of a position. */
static float largest_of(const int16_t *x, size_t n) {
    int largest = 0;
    for (size_t i = 0; i < n; i++) largest = abs(x[i]) > largest ? abs(x[i]) : largest;
    return (float)largest;
}
/* Is a part of a row as long as kernels may take for granted?  (Each rounded number is off by a half at most.) */
static int is_short(const int16_t *x, size_t n) {
    double most = LENGTH_16 + sqrt((double)n), squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    return squares <= most * most;
}
/* A forged file may have right checksums; what the kernels' exactness stands on is looked at itself. */
static int check_positions(const kv_store *s, const int16_t *rows, const float *scales, size_t n) {
    for (size_t j = 0; j < n; j++, rows += width(s), scales += KV_SCALES) {
        int good = is_short(rows, (size_t)s->rank) && is_short(rows + s->rank, (size_t)s->d_rope);
        for (int i = 0; i < KV_SCALES; i++) good &= scales[i] >= 0 && scales[i] < INFINITY;
        good &= scales[2] == largest_of(rows, (size_t)s->rank);
        FAIL_IF(!good, MS4_EMODEL,
                "the saved session holds numbers that this engine cannot have written; it is of no use");
    }
    return MS4_OK;
}
/* Block i of the file into that of the cache.  Its positions are checked before anybody may compute with them. */
static int load_block(kv_cache *kv, int32_t i, size_t n, uint64_t sum, int fd, uint8_t *room) {
    const kv_store *s = kv->store;
    const size_t bytes = n * row_bytes(s);
    int forged = MS4_OK;                                      /* a checksum that is wrong is the better reason */
    uint64_t stored;
    for (int32_t layer = 0; layer < s->n_layer; layer++) {
        uint8_t *rows = layer_at(kv, layer, i * SEGMENT_KEYS);
        TRY(read_all(fd, room, bytes + n * SCALE_BYTES));
        sum = checksum(checksum(sum, room, bytes), room + bytes, n * SCALE_BYTES);
        if (!forged) forged = check_positions(s, (int16_t *)(void *)room, (float *)(void *)(room + bytes), n);
        TRY(s->memory->write(s->memory, rows, room, bytes));
        TRY(s->memory->write(s->memory, rows + SEGMENT_KEYS * row_bytes(s), room + bytes, n * SCALE_BYTES));
    }
    TRY(read_all(fd, &stored, sizeof stored));
    FAIL_IF(stored != sum, MS4_EMODEL, "the saved session is damaged (a checksum is wrong); it is of no use any more");
    return forged;
}
static int load_header(const kv_store *s, uint64_t fingerprint, int32_t n_ctx, int fd, kv_header *h) {
    TRY(read_all(fd, h, sizeof *h));
    FAIL_IF(memcmp(h->magic, magic, sizeof magic), MS4_EMODEL, "this is not a saved session");
    FAIL_IF(h->format != KV_FORMAT, MS4_EMODEL,
            "the saved session has format %u; this version reads %d", h->format, KV_FORMAT);
    FAIL_IF(h->checksum != checksum(0, (const uint8_t *)h, offsetof(kv_header, checksum)), MS4_EMODEL,
            "the saved session is damaged (its header's checksum is wrong); it is of no use any more");
    const kv_header want = header_of(s, fingerprint, (int32_t)h->length);
    FAIL_IF(h->fingerprint != want.fingerprint || h->n_layer != want.n_layer || h->rank != want.rank
                || h->d_rope != want.d_rope || h->n_scales != want.n_scales,
            MS4_EMODEL, "the saved session belongs to another model");
    FAIL_IF(h->length > (uint32_t)n_ctx, MS4_EFULL,
            "the saved session has %u tokens; the context holds %d", h->length, n_ctx);
    return MS4_OK;
}
int kv_cache_load(kv_cache *kv, uint64_t fingerprint, int32_t n_ctx, int fd, int32_t *length) {
    kv_header h;
    TRY(load_header(kv->store, fingerprint, n_ctx, fd, &h));
    int32_t n = (int32_t)h.length;
    uint8_t *room = memory_take(kv->store->layer_bytes, 1);
    FAIL_IF(!room, MS4_ENOMEM, "no memory to load the session");
    int status = kv_cache_room(kv, 0, n);
    for (int32_t i = 0; i < blocks_for(n) && !status; i++)
        status = load_block(kv, i, positions_of(i, n), h.checksum + (uint64_t)i, fd, room);
    memory_give(room);
    if (status) {
        kv_cache_cut(kv, 0);
        return status;
    }
    *length = n;
    return MS4_OK;
}
