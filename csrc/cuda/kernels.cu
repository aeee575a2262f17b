/* kernels.cu -- every kernel; one translation unit, compiled by nvcc or, for the emulation, by g++. */
#include "dev.cuh"
#include "quantize.cuh"
