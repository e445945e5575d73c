// State of the fiber runtime that emu.cc and emu_warp.cc share.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cu_host.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(EMU_TSAN)
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_set_fiber_name(void *fiber, const char *name);
void __tsan_acquire(void *token);
void __tsan_release(void *token);
void __tsan_read_range(void *at, unsigned long bytes);
void __tsan_write_range(void *at, unsigned long bytes);
}
#define TSAN(statement) statement
#else
#define TSAN(statement)
#endif

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
extern "C" {
void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom, size_t *size);
}
#define ASAN(statement) statement
#else
#define ASAN(statement)
#endif

namespace emu {

constexpr unsigned kMaxThreads = 1024, kMaxCopies = 256;
constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {  // a cp.async under way
    void *to;
    const void *from;
    int bytes;
    Site site;
};

struct Fiber {
    Place place;
    void *stack_pointer;
    char *stack;
    State state;
    Site site;
    void *tsan, *fake_stack;
    Copy copies[kMaxCopies];  // a ring: first .. last
    unsigned first, last;
    unsigned short group_size[kMaxCopies];  // of each committed group, a ring; copies beyond their sum are not committed yet
    unsigned first_group, last_group, open;
};

struct Lane {  // what a lane brought to the warp operation under way
    uint64_t value;
    int argument;
    const uint32_t *a, *b;
    const float *c;
    float *d;
    const void *row;
    uint32_t *registers;
};
struct WarpState {
    unsigned arrived, mask;
    Warp operation;
    Site site;
    int width;
    Lane lanes[32];
    uint64_t results[32];
    char token;
};

extern Fiber *fibers;
extern WarpState *warps;
extern int self;

[[noreturn]] void fail(const char *message, const Site &site);
void make_ready(int fiber);
void leave_until_woken(State state, const Site &site);  // switches to another fiber that is ready
void yield_to_any();                                    // so that the last to arrive has no privilege
// Tells the sanitizers that the runtime reads or writes on a kernel's behalf.
void touch(const void *at, size_t bytes, bool writes, const Site &site);

}  // namespace emu
