/* budget.h -- what of a model has to lie in memory, and how much memory there is for the rest of it. */
#ifndef MS4_BUDGET_H
#define MS4_BUDGET_H
#include "files.h"
#include "ms4.h"
#include "slots.h"

/* What tensors use of their files: the weights of experts may be streamed.  *out is the caller's. */
int budget_ranges(const ms4_tensor *tensors, size_t n_tensors, files_range **out, size_t *n);

typedef struct {
    uint64_t most;                                            /* bytes of this process, all in all; 0: nobody knows */
    uint64_t reserve;                                         /* of what is free: for others */
    uint64_t fixed;                                           /* bytes of the slots, as tests want them; 0: what fits */
} budget;
/* asked: bytes that the user wants to be used at most; 0: what is free, less the reserve, and never more than that. */
void budget_open(budget *b, uint64_t asked);
uint64_t budget_room(const budget *b);                        /* bytes that are left of it, by what is used now */
/* Gives slots what nobody else uses, when so many bytes are about to be taken besides. */
void budget_fit(const budget *b, slots *s, uint64_t about_to_take);
#endif
