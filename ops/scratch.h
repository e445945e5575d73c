// Workspace of the calling thread: grows, is used as a stack, and stays with the thread so that big buffers are not paged in on every call.
#ifndef RBE_SCRATCH_H
#define RBE_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

typedef struct rbe_scratch_mark {
    size_t used, spilled;
} rbe_scratch_mark;

rbe_scratch_mark rbe_scratch_begin(void);
void rbe_scratch_end(rbe_scratch_mark mark);  // gives back everything taken since

// count * size bytes, aligned to 64, not cleared; NULL when out of memory (or the size is not one). Never NULL for zero bytes.
void *rbe_scratch_take(int64_t count, size_t size);

#endif
