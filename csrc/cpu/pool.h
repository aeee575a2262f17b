/* pool.h -- persistent worker threads that share out small items of work. */
#ifndef MS4_POOL_H
#define MS4_POOL_H
#include <stdatomic.h>
#include <stdint.h>
typedef struct pool pool;
/* One item of work.  thread is 0 .. pool_size - 1: no two items with the same thread number run at once. */
typedef void pool_fn(void *context, int32_t item, int32_t thread);

#define POOL_MAX_THREADS 512
int pool_open(int32_t n_threads, pool **out);  /* n_threads counts the thread that calls pool_run */
void pool_close(pool *p);
int32_t pool_size(const pool *p);
/* Runs fn(context, 0 .. n_items - 1) and returns when all are done.  Each thread begins with a range of
 * neighbouring items and then helps the others; once *stop (may be NULL) is not 0, the remaining ones are left out. */
void pool_run(pool *p, pool_fn *fn, void *context, int32_t n_items, const atomic_int *stop);
#endif
