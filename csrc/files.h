/* files.h -- the bytes of the model files in memory: mapped in place, or copied into huge pages. */
#ifndef MS4_FILES_H
#define MS4_FILES_H
#include "cpu/pool.h"
#include <stddef.h>
typedef struct files files;
typedef struct {
    int32_t load;                                             /* ms4_load */
    int (*progress)(uint64_t done, uint64_t total, void *user);
    void *user;
} files_options;
/* Opens every path (regular files only).  With copy, reads them through the pool. */
int files_open(const char *const *paths, size_t n_paths, const files_options *options, pool *p, files **out);
void files_close(files *f);
/* Address of `bytes` bytes at `offset` of file `index`, or NULL if the file does not hold them. */
const uint8_t *files_at(const files *f, int32_t index, uint64_t offset, uint64_t bytes);
uint64_t files_bytes(const files *f, int32_t index);          /* of a file; 0: there is no such file */
int32_t files_load(const files *f);                           /* MS4_LOAD_MAP or MS4_LOAD_COPY, as chosen */
/* MS4_OK, or MS4_EIO if a mapped file has shrunk since it was opened (its lost pages read as zero). */
int files_check(const files *f);
#endif
