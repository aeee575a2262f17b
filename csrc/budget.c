/* budget.c -- how many bytes slots may have: what the process may use, less what it uses for everything else.
 *
 * What everything else uses is asked from the system, before each step: kv caches grow, buffers grow with the longest
 * step, and Python has memory of its own.  So the slots make room before anybody takes it, and the process as a whole
 * stays within its bytes.  They make room for others, too, when half of what was left free for them is gone.
 */
#include "budget.h"
#include "allowance.h"
#include "error.h"
#include "memory.h"

#define RESERVE ((uint64_t)256 << 20)                         /* and a part of what is free, but not most of it */
#define RESERVE_PART 32
#define RESERVE_MOST_PART 4
#define ENDS 256                                              /* bytes: text_weights_fingerprint */

static int is_streamed(int32_t role) {
    return role == MS4_FFN_GATE_EXPS || role == MS4_FFN_UP_EXPS || role == MS4_FFN_DOWN_EXPS
        || role == MS4_FFN_GATE_UP_EXPS;
}
/* The bytes of an expert tensor by which models are told apart stay in memory: both ends of its first and of its last
 * slice, and where gate and up are one tensor, of both halves of these. */
static size_t keep_ends(const ms4_tensor *t, files_range *out) {
    const uint64_t slice = t->dims[2] > 0 ? t->bytes / (uint64_t)t->dims[2] : 0, middle = slice / 2;
    const uint64_t ends = middle < ENDS ? middle : ENDS, last = t->offset + t->bytes;
    const uint64_t at[] = { t->offset, t->offset + middle, last - middle - ends, last - ends };
    for (int i = 0; i < 4; i++) out[i] = (files_range){ t->file, 0, at[i], ends };
    return 4;
}
int budget_ranges(const ms4_tensor *tensors, size_t n_tensors, files_range **out, size_t *n) {
    files_range *ranges = memory_take(5 * n_tensors, sizeof *ranges);
    FAIL_IF(!ranges, MS4_ENOMEM, "no memory for the ranges of files");
    *n = 0;
    for (const ms4_tensor *t = tensors; t < tensors + n_tensors; t++) {
        ranges[(*n)++] = (files_range){ t->file, is_streamed(t->role), t->offset, t->bytes };
        if (is_streamed(t->role)) *n += keep_ends(t, ranges + *n);
    }
    *out = ranges;
    return MS4_OK;
}
void budget_open(budget *b, uint64_t asked) {
    const uint64_t free = allowance_room(), reserve = RESERVE + free / RESERVE_PART, most = free / RESERVE_MOST_PART;
    *b = (budget){ .most = asked, .reserve = free && reserve > most ? most : reserve };
    const uint64_t there = memory_resident() + free - b->reserve;
    if (free && (!asked || there < asked)) b->most = there;
}
uint64_t budget_room(const budget *b) {
    const uint64_t used = memory_resident();
    return b->most > used ? b->most - used : 0;
}
void budget_fit(const budget *b, slots *s, uint64_t about_to_take) {
    slots_counts now;
    slots_count(s, &now);
    const uint64_t used = memory_resident(), others = used > now.bytes_there ? used - now.bytes_there : used;
    const uint64_t taken = others + about_to_take, free = allowance_room(), spare = b->reserve / 2;
    uint64_t most = b->most;
    if (free && used + free < most + spare) most = used + free > spare ? used + free - spare : 0;
    slots_fit(s, b->fixed ? b->fixed : most > taken ? most - taken : 0);
}
