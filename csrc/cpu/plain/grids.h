/* grids.h -- the code books of the IQ types (SPEC appendix A).  The arrays are generated from quant/grids.py. */
#ifndef MS4_GRIDS_H
#define MS4_GRIDS_H
#include <stdint.h>
extern const int8_t grid_iq2xxs[256][8];
extern const int8_t grid_iq2xs[512][8];
extern const int8_t grid_iq2s[1024][8];
extern const int8_t grid_iq3xxs[256][4];
extern const int8_t grid_iq3s[512][4];
extern const int8_t grid_iq1[2048][8];         /* IQ1_S and IQ1_M */
#endif
