/* error.c -- keeps the sentence that ms4_error() returns, one per thread. */
#include "error.h"
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char text[512];

const char *ms4_error(void) { return text; }

int error_set(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return status;
}
