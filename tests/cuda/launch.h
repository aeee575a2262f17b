/* launch.h -- runs kernels of the emulation by name (emulate.cpp). */
#ifndef MS4_EMULATE_LAUNCH_H
#define MS4_EMULATE_LAUNCH_H
#include "emulate.h"
namespace emu {
struct kernel {
    const char *name;
    size_t bytes;                           /* of its argument */
    int threads;                            /* most of a block */
    void (*run)(const void *argument);      /* one thread of it */
    const void *code;                       /* NULL: in the lists, but not written */
};
extern const kernel kernels[];              /* table.cpp, or what ptx2cpp.py made; ends with a name of NULL */
const kernel *find(const char *name);       /* NULL: there is none */

/* Runs every block of a grid; seed 0: warps and lanes in order, else at random.  n_threads of the CPU share blocks. */
void launch(const kernel &k, dim3 grid, int threads, size_t shared, const void *argument, uint32_t seed);
extern int n_threads;
void watch_faults();                        /* from now on a faulty address gives one line, and ends the process */

/* Set by the emulated driver: whether p lies where device memory is, allocated or not; whether a kernel may touch n
 * bytes there.  NULL: a faulty address shows by itself, or not. */
extern bool (*in_device)(const void *p), (*accessible)(const void *p, size_t n);
}
#endif
