/* driver.h -- the CUDA driver, opened at run time: nothing links against it, so the same build runs with and without.
 *
 * Every call is made through CU, which turns what the driver answers into a status and one sentence.
 */
#ifndef MS4_CUDA_DRIVER_H
#define MS4_CUDA_DRIVER_H
#include "error.h"
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphNode_st *CUgraphNode;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct {                                              /* CUDA_KERNEL_NODE_PARAMS_v2 */
    CUfunction f;
    unsigned grid[3], block[3], shared;
    void **parameters, **extra;
    void *kernel, *context;
} cuda_kernel_node;

enum { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_STUB_LIBRARY = 34,
       CUDA_ERROR_NO_DEVICE = 100, CUDA_ERROR_INVALID_IMAGE = 200, CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
       CUDA_ERROR_INVALID_PTX = 218, CUDA_ERROR_JIT_COMPILER_NOT_FOUND = 221, CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
       CUDA_ERROR_JIT_COMPILATION_DISABLED = 223, CUDA_ERROR_INVALID_SOURCE = 300, CUDA_ERROR_NOT_FOUND = 500,
       CUDA_ERROR_NOT_READY = 600, CUDA_ERROR_SYSTEM_NOT_READY = 802,
       CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803, CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE = 804 };
enum { CU_MEMHOSTALLOC_PORTABLE = 1, CU_MEMHOSTALLOC_DEVICEMAP = 2, CU_MEMHOSTREGISTER_PORTABLE = 1,
       CU_MEMHOSTREGISTER_READ_ONLY = 8, CU_STREAM_NON_BLOCKING = 1, CU_EVENT_DISABLE_TIMING = 2, CU_EVENT_DEFAULT = 0,
       CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
       CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41,
       CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76 };

/* X(name, exported name, parameters); tests/cuda/prototypes.py compares all of this with NVIDIA's cuda.h */
#define CUDA_DRIVER(X) \
    X(cuInit, cuInit, (unsigned)) \
    X(cuGetErrorString, cuGetErrorString, (CUresult, const char **)) \
    X(cuDriverGetVersion, cuDriverGetVersion, (int *)) \
    X(cuDeviceGetCount, cuDeviceGetCount, (int *)) \
    X(cuDeviceGet, cuDeviceGet, (CUdevice *, int)) \
    X(cuDeviceGetName, cuDeviceGetName, (char *, int, CUdevice)) \
    X(cuDeviceGetAttribute, cuDeviceGetAttribute, (int *, int, CUdevice)) \
    X(cuDeviceGetPCIBusId, cuDeviceGetPCIBusId, (char *, int, CUdevice)) \
    X(cuDeviceTotalMem, cuDeviceTotalMem_v2, (size_t *, CUdevice)) \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice)) \
    X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, (CUdevice)) \
    X(cuCtxSetCurrent, cuCtxSetCurrent, (CUcontext)) \
    X(cuModuleLoadData, cuModuleLoadData, (CUmodule *, const void *)) \
    X(cuModuleUnload, cuModuleUnload, (CUmodule)) \
    X(cuModuleGetFunction, cuModuleGetFunction, (CUfunction *, CUmodule, const char *)) \
    X(cuFuncSetAttribute, cuFuncSetAttribute, (CUfunction, int, int)) \
    X(cuMemGetInfo, cuMemGetInfo_v2, (size_t *, size_t *)) \
    X(cuMemAlloc, cuMemAlloc_v2, (CUdeviceptr *, size_t)) \
    X(cuMemFree, cuMemFree_v2, (CUdeviceptr)) \
    X(cuMemHostAlloc, cuMemHostAlloc, (void **, size_t, unsigned)) \
    X(cuMemFreeHost, cuMemFreeHost, (void *)) \
    X(cuMemHostRegister, cuMemHostRegister_v2, (void *, size_t, unsigned)) \
    X(cuMemHostUnregister, cuMemHostUnregister, (void *)) \
    X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream)) \
    X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream)) \
    X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, size_t, CUstream)) \
    X(cuStreamCreate, cuStreamCreate, (CUstream *, unsigned)) \
    X(cuStreamDestroy, cuStreamDestroy_v2, (CUstream)) \
    X(cuStreamQuery, cuStreamQuery, (CUstream)) \
    X(cuStreamWaitEvent, cuStreamWaitEvent, (CUstream, CUevent, unsigned)) \
    X(cuEventCreate, cuEventCreate, (CUevent *, unsigned)) \
    X(cuEventDestroy, cuEventDestroy_v2, (CUevent)) \
    X(cuEventRecord, cuEventRecord, (CUevent, CUstream)) \
    X(cuEventQuery, cuEventQuery, (CUevent)) \
    X(cuEventElapsedTime, cuEventElapsedTime, (float *, CUevent, CUevent)) \
    X(cuLaunchKernel, cuLaunchKernel, (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
                                       unsigned, CUstream, void **, void **)) \
    X(cuGraphCreate, cuGraphCreate, (CUgraph *, unsigned)) \
    X(cuGraphDestroy, cuGraphDestroy, (CUgraph)) \
    X(cuGraphAddKernelNode, cuGraphAddKernelNode_v2, (CUgraphNode *, CUgraph, const CUgraphNode *, size_t, \
                                                      const cuda_kernel_node *)) \
    X(cuGraphInstantiate, cuGraphInstantiateWithFlags, (CUgraphExec *, CUgraph, unsigned long long)) \
    X(cuGraphExecKernelNodeSetParams, cuGraphExecKernelNodeSetParams_v2, (CUgraphExec, CUgraphNode, \
                                                                          const cuda_kernel_node *)) \
    X(cuGraphLaunch, cuGraphLaunch, (CUgraphExec, CUstream)) \
    X(cuGraphExecDestroy, cuGraphExecDestroy, (CUgraphExec))

#define DECLARE(name, symbol, parameters) CUresult (*name) parameters;
struct cuda_driver { CUDA_DRIVER(DECLARE) };
#undef DECLARE
extern struct cuda_driver cuda;

/* Opens MS4_LIBCUDA, or the driver of this machine, once, and looks for a card.  MS4_EDEVICE says why there is none. */
int cuda_driver_open(void);
int cuda_is_absent(void);                       /* that failed because there is no driver, or it has no card to show */
/* MS4_OK, or what became of this call: MS4_ENOMEM or MS4_EDEVICE. */
int cuda_check(const char *call, CUresult result);
#define CU(name, ...) cuda_check(#name, cuda.name(__VA_ARGS__))
#endif
