// The workspace arena of each thread: one block that is bumped, and spills beside it while the block is too small.
//
// When the last buffer is given back, the block grows to the most that was ever in use, up to RETAINED bytes: the next call of that size finds
// its pages mapped. The block goes when the thread ends.
#include "scratch.h"

#include <pthread.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20 };
static const size_t RETAINED = (size_t)64 << 20;

typedef struct spill {
    struct spill *below;
    size_t bytes;
} spill;

typedef struct arena {
    char *block;
    size_t capacity, used, peak;
    spill *spills;  // newest first
    size_t spilled, spilled_bytes;
} arena;

static __thread arena *mine;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void destroy(void *pointer) {
    arena *a = pointer;
    while (a->spills) {
        spill *next = a->spills->below;
        free(a->spills);
        a->spills = next;
    }
    free(a->block);
    free(a);
    mine = NULL;
}

static void make_key(void) { pthread_key_create(&key, destroy); }

static arena *arena_of_thread(void) {
    if (mine) return mine;
    pthread_once(&once, make_key);
    arena *a = calloc(1, sizeof *a);
    if (a && pthread_setspecific(key, a) != 0) {
        free(a);
        a = NULL;
    }
    return mine = a;
}

// Only while nothing is taken: replaces the block by one as large as the peak.
static void grow(arena *a) {
    size_t wanted = a->peak < RETAINED ? a->peak : RETAINED;
    wanted = (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (wanted <= a->capacity) return;
    free(a->block);
    a->block = aligned_alloc(HUGE_PAGE, wanted);
    a->capacity = a->block ? wanted : 0;
#ifdef __linux__
    if (a->block) madvise(a->block, wanted, MADV_HUGEPAGE);  // tables are read at random: fewer TLB misses; a refusal costs nothing
#endif
}

rbe_scratch_mark rbe_scratch_begin(void) {
    const arena *a = arena_of_thread();
    return a ? (rbe_scratch_mark){a->used, a->spilled} : (rbe_scratch_mark){0, 0};
}

void rbe_scratch_end(rbe_scratch_mark mark) {
    arena *a = mine;
    if (!a) return;
    for (; a->spilled > mark.spilled; --a->spilled) {
        spill *newest = a->spills;
        a->spills = newest->below;
        a->spilled_bytes -= newest->bytes;
        free(newest);
    }
    a->used = mark.used;
    if (!a->used && !a->spilled) grow(a);
}

void *rbe_scratch_take(int64_t count, size_t size) {
    size_t bytes;
    arena *a = arena_of_thread();
    if (!a || count < 0 || __builtin_mul_overflow((size_t)count, size, &bytes) || bytes > SIZE_MAX / 2) return NULL;
    bytes = (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;  // at least one line: buffers never share one
    const size_t in_use = a->used + a->spilled_bytes + bytes;
    if (in_use > a->peak) a->peak = in_use;
    if (bytes <= a->capacity - a->used) {
        void *taken = a->block + a->used;
        a->used += bytes;
        return taken;
    }
    spill *s = aligned_alloc(ALIGNMENT, bytes + ALIGNMENT);
    if (!s) return NULL;
    *s = (spill){a->spills, bytes};
    a->spills = s;
    ++a->spilled;
    a->spilled_bytes += bytes;
    return (char *)s + ALIGNMENT;
}
