/* error.h -- the last failure of each thread, as a sentence. */
#ifndef MS4_ERROR_H
#define MS4_ERROR_H
#include "ms4.h"
/* Records the sentence and returns status. */
int error_set(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define FAIL_IF(condition, status, ...) \
    do { if (condition) return error_set(status, __VA_ARGS__); } while (0)
/* Of a step, and of any logits that a token is to be chosen from. */
#define LOGITS_NOT_FINITE \
    "the model gave a logit that is not a finite number; the file is damaged (compare its checksum)"
#define TRY(call) \
    do { int status_ = (call); if (status_) return status_; } while (0)
#endif
