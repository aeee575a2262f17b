/* allowance.h -- what the system lets this process have, for those inside; ms4_allowed says it all. */
#ifndef MS4_ALLOWANCE_H
#define MS4_ALLOWANCE_H
#include "ms4.h"
int32_t allowance_threads(void);    /* at least 1 */
uint64_t allowance_room(void);      /* bytes of memory, the pages of files counted as free */
uint64_t allowance_available(void); /* the same of the whole machine */
#endif
