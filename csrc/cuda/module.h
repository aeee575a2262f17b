/* module.h -- the kernels as this card takes them: from a file made when ms4 was built, or compiled here and now. */
#ifndef MS4_CUDA_MODULE_H
#define MS4_CUDA_MODULE_H
#include "cuda/driver.h"
/* folder: of the package, with kernels.fatbin, or with the sources.  MS4_GPU_CODE names another file. */
int module_open(const char *folder, CUdevice id, CUmodule *out);
#endif
