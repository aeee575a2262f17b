/* types.c -- the table of tensor types: names, GGUF ids and block sizes. */
#include "ops.h"

const struct ms4_type_info ms4_type_infos[MS4_N_TYPES] = {
#define X(name, id, weights, bytes, family, ...) { #name, id, weights, bytes, FAMILY_##family != FAMILY_floats },
    MS4_TYPES(X)
#undef X
};
