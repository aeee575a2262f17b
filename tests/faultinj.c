/* faultinj.c -- to be preloaded: reads of model files that fail, stop short, or come late.
 *
 *     gcc -shared -fPIC -o faultinj.so faultinj.c -ldl;  LD_PRELOAD=./faultinj.so python ...
 *
 * Nothing happens until fault_set is called (ctypes finds it in the process): from the nth pread of a *.gguf by our
 * extension on, `times` calls in a row are disturbed in the way that `kind` says: an errno value, or one of these.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define SHORT (-1)                             /* half of what was asked for */
#define EMPTY (-2)                             /* nothing, as at the end of a file */
#define LATE (-3)                              /* up to five milliseconds late, each another time */

static atomic_int kind, first, last, calls;

void fault_set(int new_kind, int nth, int times) {
    atomic_store(&last, 0);                    /* nothing while the others change */
    atomic_store(&kind, new_kind);
    atomic_store(&calls, 0);
    atomic_store(&first, nth);
    atomic_store(&last, nth + times - 1);
}
int fault_calls(void) { return atomic_load(&calls); }

static int is_model(int fd) {
    char link[64], path[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path);
    return n > 5 && !memcmp(path + n - 5, ".gguf", 5);
}
static int is_ours(const void *caller) {
    Dl_info info;
    return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "_core");
}
/* EINVAL is what a file system says that cannot do O_DIRECT, so buffered reads do not get it. */
static int concerns(int fd, const void *caller) {
    if (!is_ours(caller) || !is_model(fd)) return 0;
    int n = atomic_fetch_add(&calls, 1) + 1;
    if (n < atomic_load(&first) || n > atomic_load(&last)) return 0;
    return atomic_load(&kind) != EINVAL || fcntl(fd, F_GETFL) & O_DIRECT;
}
typedef ssize_t reader(int, void *, size_t, off_t);
static ssize_t disturbed(reader *real, const void *caller, int fd, void *to, size_t bytes, off_t at) {
    if (!concerns(fd, caller)) return real(fd, to, bytes, at);
    switch (atomic_load(&kind)) {
    case SHORT: return real(fd, to, bytes > 1 ? bytes / 2 : bytes, at);
    case EMPTY: return 0;
    case LATE:
        usleep((unsigned)(atomic_load(&calls) * 2654435761u >> 8) % 5000);
        return real(fd, to, bytes, at);
    default:
        errno = atomic_load(&kind);
        return -1;
    }
}
ssize_t pread(int fd, void *to, size_t bytes, off_t at) {
    static reader *real;
    if (!real) real = (reader *)dlsym(RTLD_NEXT, "pread");
    return disturbed(real, __builtin_return_address(0), fd, to, bytes, at);
}
ssize_t pread64(int fd, void *to, size_t bytes, off64_t at) {
    static reader *real;
    if (!real) real = (reader *)dlsym(RTLD_NEXT, "pread64");
    return disturbed(real, __builtin_return_address(0), fd, to, bytes, at);
}
