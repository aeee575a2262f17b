/* files.h -- the bytes of the model files: mapped in place, copied into huge pages, or left on the disk in part. */
#ifndef MS4_FILES_H
#define MS4_FILES_H
#include "cpu/pool.h"
#include "ms4.h"
#include <stddef.h>
typedef struct files files;

#define FILES_ALIGN 4096                                      /* of reads that go past the page cache */
/* Some bytes of a file.  streamed: they may stay on the disk, to be read when they are needed. */
typedef struct { int32_t file, streamed; uint64_t offset, bytes; } files_range;
typedef struct {
    int32_t load;                                             /* ms4_load */
    int32_t limited;                                          /* room was asked for: more is not to be used */
    uint64_t room;                                            /* bytes that there are for weights; 0: nobody knows */
    uint64_t reserve;                                         /* of these, what should stay free of them */
    uint64_t available;                                       /* bytes of the machine, without this group's limits */
    const files_range *ranges;                                /* what is used of the files */
    size_t n_ranges;
    int (*progress)(uint64_t done, uint64_t total, void *user);
    void *user;
} files_options;

/* Opens every path (regular files only).  With copy, reads them through the pool; with stream, the ranges that are not
 * streamed. */
int files_open(const char *const *paths, size_t n_paths, const files_options *options, pool *p, files **out);
void files_close(files *f);
/* Address of `bytes` bytes at `offset` of file `index`, or NULL if the file does not hold them.  What is streamed has
 * an address, too, and to look there is a fault. */
const uint8_t *files_at(const files *f, int32_t index, uint64_t offset, uint64_t bytes);
/* The reverse: which byte of which file that is.  0: of none. */
int files_find(const files *f, const uint8_t *at, int32_t *index, uint64_t *offset);
uint64_t files_bytes(const files *f, int32_t index);          /* of a file; 0: there is no such file */
/* The i-th run of bytes that lies in memory; NULL: there are not so many. */
const uint8_t *files_resident(const files *f, size_t i, uint64_t *bytes);
uint64_t files_resident_bytes(const files *f);
int32_t files_load(const files *f);                           /* MS4_LOAD_MAP, _COPY or _STREAM, as chosen */
const char *files_path(const files *f, int32_t index);
int files_direct(const files *f);                             /* reads go past the page cache */

/* With stream: bytes [*at, end) of a file to `to`, in the calling thread.  Short reads and interruptions go on, errors
 * are tried again a few times.  If *at is a multiple of FILES_ALIGN and so is the address `to`, everything up to the
 * next multiple after `end` may be written.  0, or an errno value and where in *at; ENODATA: the file ends there. */
int files_read(files *f, int32_t index, uint64_t *at, uint64_t end, uint8_t *to);
/* MS4_OK, or MS4_EIO if a file has shrunk since it was opened (mapped: its lost pages read as zero) or, with stream,
 * was written to. */
int files_check(const files *f);
#endif
