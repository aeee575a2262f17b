/* disk.h -- reads from the model files in the background, many at a time: what a disk needs to show its speed.
 *
 * A job is up to DISK_RANGES ranges of the files; it belongs to the caller and stays where it is while it is read.  Its
 * state says how far it is, and is the only thing of a job that may be looked at meanwhile.  One thread asks; the
 * threads of the disk read.
 */
#ifndef MS4_DISK_H
#define MS4_DISK_H
#include "files.h"
#include <stdatomic.h>
typedef struct disk disk;

#define DISK_RANGES 3
typedef enum { DISK_IDLE, DISK_READING, DISK_READ, DISK_FAILED } disk_state;
/* `to` lies as far behind a multiple of FILES_ALIGN as `offset` does, and all of the FILES_ALIGN bytes that the range
 * touches may be written. */
typedef struct { int32_t file; uint64_t offset, bytes; uint8_t *to; } disk_range;
typedef struct disk_job {
    disk_range range[DISK_RANGES];
    int32_t n;                                                /* ranges, none of them empty */
    atomic_int state;                                         /* disk_state */
    int error;                                                /* of a failed job: errno, and where in which file */
    int32_t error_file;
    uint64_t error_at;
    struct disk_job *next;                                    /* these belong to the disk */
    int32_t n_left, range_now;
    uint64_t at;
} disk_job;

int disk_open(files *f, int32_t n_threads, disk **out);
/* Waits for the reads that are under way; jobs that have not begun never will. */
void disk_close(disk *d);
/* Puts a job behind those that were asked for before.  ahead: nobody waits for it yet, so the others come first. */
void disk_read(disk *d, disk_job *job, int ahead);
void disk_hurry(disk *d, disk_job *job);                      /* somebody waits for it now */
void disk_landed(disk *d, disk_job *job);                     /* marked DISK_READING, it has come from elsewhere */
/* Waits until a job ended since *seen, at most so long, and brings *seen up to date. */
void disk_wait(disk *d, uint64_t *seen, int32_t most_ms);
/* Since it was opened: bytes read, and for how long at least one read was under way. */
void disk_count(disk *d, uint64_t *bytes, uint64_t *ns);
#endif
