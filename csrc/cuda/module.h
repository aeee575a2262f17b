/* module.h -- the kernels as this card takes them: from a file made when ms4 was built, or compiled here. */
#ifndef MS4_CUDA_MODULE_H
#define MS4_CUDA_MODULE_H
#include "cuda/driver.h"
/* from: a file with kernels, or the folder of the package, with cuda/kernels.fatbin.  MS4_GPU_CODE names another. */
int module_open(const char *from, CUmodule *out);
#endif
