// Runs a CUDA kernel on the CPU: one fiber per thread, blocks one after the other, in an order drawn at random.
//
// Built without sanitizers. ThreadSanitizer is told of each fiber; a switch between fibers creates no order between them
// (flag 1 of __tsan_switch_to_fiber), so only barriers do and a race of the kernel is a race to it. Three rules follow:
//   - no malloc and no libc mem* on a fiber of a kernel: ThreadSanitizer intercepts them and would see the runtime race with itself;
//   - one stack for one ThreadSanitizer fiber, for ever;
//   - two sets of fibers that blocks use in turn, so that neighbouring blocks stay unordered.
#include <sys/mman.h>

#include <vector>

#include "emu_internal.h"

namespace emu {

Place *now;
Options options;
Fiber *fibers;
WarpState *warps;
int self = -1;

namespace {

int count, alive, waiting, predicates, last_predicates;
Site barrier_site;
int phase;
[[maybe_unused]] char launched, finished, allocated, barrier_token[2];  // tokens of the orders that ThreadSanitizer knows of
void *main_stack_pointer;
// what the sanitizers want to know of the context that launches
[[maybe_unused]] void *main_tsan, *main_fake_stack, *allocator_tsan, *deallocator_tsan;
[[maybe_unused]] const void *main_stack;
[[maybe_unused]] size_t main_stack_bytes;
const std::function<void()> *body;
void *dynamic_memory;
struct Static {
    const void *key;
    void *memory;
} statics[64];
int static_count;
uint64_t random_state;
std::vector<char *> stacks;
std::vector<void *> tsan_fibers;

int ready[kMaxThreads];  // fibers that can run
int ready_count;

uint64_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

int pick() {
    if (ready_count == 0) return -1;
    const int at = options.order == 0 ? 0 : options.order == 1 ? ready_count - 1 : (int)(draw() % (uint64_t)ready_count);
    const int fiber = ready[at];
    --ready_count;
    if (options.order == 2) {
        ready[at] = ready[ready_count];
    } else {
        for (int i = at; i < ready_count; ++i) ready[i] = ready[i + 1];
    }
    return fiber;
}

extern "C" void emu_switch(void **save, void *to);
#if defined(__x86_64__)
asm(".text\n.globl emu_switch\nemu_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
#else
#error "the switch between fibers is written for x86-64"
#endif

// From the running context (a fiber, or main when self < 0) to fiber `to`, or to main when to < 0.
void go(int to) {
    const int from = self;
    void **save = from < 0 ? &main_stack_pointer : &fibers[from].stack_pointer;
    void *target = to < 0 ? main_stack_pointer : fibers[to].stack_pointer;
    self = to;
    now = to < 0 ? nullptr : &fibers[to].place;
    TSAN(__tsan_switch_to_fiber(to < 0 ? main_tsan : fibers[to].tsan, 1);)
    ASAN(void **fake = from < 0 ? &main_fake_stack : fibers[from].state == State::done ? nullptr : &fibers[from].fake_stack;
         if (to < 0) __sanitizer_start_switch_fiber(fake, main_stack, main_stack_bytes);
         else __sanitizer_start_switch_fiber(fake, fibers[to].stack, kStackBytes);)
    emu_switch(save, target);
    ASAN(__sanitizer_finish_switch_fiber(from < 0 ? main_fake_stack : fibers[from].fake_stack, nullptr, nullptr);)
}

void release_barrier() {
    if (alive != count) fail("part of the block has left the kernel without reaching this barrier", barrier_site);
    last_predicates = predicates;
    waiting = predicates = 0;
    phase ^= 1;
    for (int t = 0; t < count; ++t)
        if (fibers[t].state == State::at_barrier) make_ready(t);
}

// Shared memory belongs to a context of its own for ThreadSanitizer, ordered before every user.
void *allocate(size_t bytes) {
    TSAN(void *me = __tsan_get_current_fiber(); __tsan_switch_to_fiber(allocator_tsan, 1);)
    void *memory = malloc(bytes);
    memset(memory, 0xFF, bytes);  // NaN, whatever the type
    TSAN(__tsan_release(&allocated); __tsan_switch_to_fiber(me, 1);)
    return memory;
}
void deallocate(void *memory) {
    TSAN(void *me = __tsan_get_current_fiber(); __tsan_switch_to_fiber(deallocator_tsan, 1); __tsan_acquire(&finished);)
    free(memory);
    TSAN(__tsan_switch_to_fiber(me, 1);)
}

void run_thread() {
    ASAN(__sanitizer_finish_switch_fiber(nullptr, main_stack ? nullptr : &main_stack, main_stack ? nullptr : &main_stack_bytes);)
    TSAN(__tsan_acquire(&launched);)
    (*body)();
    TSAN(__tsan_release(&finished);)
    Fiber &f = fibers[self];
    if (f.first != f.last) fail("the thread ends with a cp.async that it never waited for", f.copies[f.first % kMaxCopies].site);
    f.state = State::done;
    --alive;
    if (alive && waiting == alive) release_barrier();
    go(pick());
    abort();
}

void prepare(unsigned block, dim3 blocks, dim3 threads, int set) {
    ready_count = 0;
    alive = count;
    waiting = predicates = 0;
    self = -1;
    for (int w = 0; w < (count + 31) / 32; ++w) warps[w].arrived = 0;
    const unsigned turn = (unsigned)(draw() % (uint64_t)count);
    for (unsigned t = 0; t < (unsigned)count; ++t) {
        Fiber &f = fibers[t];
        f.place.thread = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
        f.place.block = {block % blocks.x, block / blocks.x % blocks.y, block / (blocks.x * blocks.y)};
        f.place.threads = threads;
        f.place.blocks = blocks;
        f.place.lane = t & 31;
        f.place.warp = t >> 5;
        const size_t slot = 2 * ((t + turn) % (unsigned)count) + (unsigned)set;
        f.stack = stacks[slot];
        f.first = f.last = f.first_group = f.last_group = f.open = 0;
        f.fake_stack = nullptr;
        ASAN(__asan_unpoison_memory_region(f.stack, kStackBytes);)
        void **top = (void **)(f.stack + kStackBytes - 16);
        *--top = nullptr;
        *--top = (void *)run_thread;
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        f.stack_pointer = top;
        make_ready((int)t);
        TSAN(f.tsan = tsan_fibers[slot]; char name[80];
             snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", f.place.block.x, f.place.block.y, f.place.block.z,
                      f.place.thread.x, f.place.thread.y, f.place.thread.z);
             __tsan_set_fiber_name(f.tsan, name);)
    }
}

void report_deadlock() {
    Site site{};
    for (int t = 0; t < count; ++t)
        if (fibers[t].state == State::at_barrier) site = fibers[t].site;
    for (int t = 0; t < count; ++t)
        if (fibers[t].state == State::in_warp) site = fibers[t].site;
    fail("deadlock: not every thread reaches this barrier or warp operation", site);
}

}  // namespace

void fail(const char *message, const Site &site) {
    fprintf(stderr, "emu: %s at %s:%d (%s)", message, site.file, site.line, site.what);
    if (now)
        fprintf(stderr, " block (%u,%u,%u) thread (%u,%u,%u)", now->block.x, now->block.y, now->block.z, now->thread.x, now->thread.y,
                now->thread.z);
    fprintf(stderr, "\n");
    fflush(stderr);
    _Exit(77);
}

void make_ready(int fiber) {
    fibers[fiber].state = State::ready;
    ready[ready_count++] = fiber;
}

void leave_until_woken(State state, const Site &site) {
    fibers[self].state = state;
    fibers[self].site = site;
    go(pick());
}

void yield_to_any() {
    make_ready(self);
    const int next = pick();
    if (next != self) go(next);
}

void touch(const void *at, size_t bytes, bool writes, const Site &site) {
    (void)at, (void)bytes, (void)writes, (void)site;
    TSAN(if (writes) __tsan_write_range((void *)at, bytes); else __tsan_read_range((void *)at, bytes);)
    ASAN(if (__asan_region_is_poisoned((void *)at, bytes)) fail(writes ? "write out of bounds" : "read out of bounds", site);)
}

int barrier(const Site &site, int predicate) {
    if (waiting == 0) barrier_site = site;
    if (barrier_site.line != site.line || barrier_site.file != site.file) fail("threads of one block meet at different barriers", site);
    void *token = &barrier_token[phase];
    (void)token;
    TSAN(__tsan_release(token);)
    ++waiting;
    predicates += predicate;
    fibers[self].state = State::at_barrier;
    fibers[self].site = site;
    if (waiting == alive) release_barrier();
    const int next = pick();
    if (next != self) go(next);
    TSAN(__tsan_acquire(token);)
    return last_predicates;
}

void *dynamic_shared() {
    TSAN(__tsan_acquire(&allocated);)
    return dynamic_memory;
}

void *static_shared(const void *key, size_t bytes) {
    int at = 0;
    while (at < static_count && statics[at].key != key) ++at;
    if (at == 64) fail("more than 64 shared arrays", fibers[self].site);
    if (at == static_count) statics[static_count++] = {key, allocate(bytes)};
    TSAN(__tsan_acquire(&allocated);)
    return statics[at].memory;
}

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()> &kernel) {
    count = (int)(threads.x * threads.y * threads.z);
    if (count < 1 || count > (int)kMaxThreads) fail("a block has more than 1024 threads, or none", Site{"launch", 0, "launch"});
    random_state = options.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
    body = &kernel;
    if (!fibers) {
        fibers = new Fiber[kMaxThreads]();
        warps = new WarpState[kMaxThreads / 32]();
        TSAN(allocator_tsan = __tsan_create_fiber(0); deallocator_tsan = __tsan_create_fiber(0);)
    }
    TSAN(main_tsan = __tsan_get_current_fiber(); __tsan_release(&launched);)
    while ((int)stacks.size() < 2 * count) {
        stacks.push_back((char *)mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        TSAN(tsan_fibers.push_back(__tsan_create_fiber(0));)
    }
    const unsigned total = blocks.x * blocks.y * blocks.z;
    std::vector<unsigned> order(total);
    for (unsigned i = 0; i < total; ++i) order[i] = options.order == 1 ? total - 1 - i : i;
    for (unsigned i = total; options.order == 2 && i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
    int set = 0;
    for (unsigned block : order) {
        dynamic_memory = shared_bytes ? allocate(shared_bytes) : nullptr;
        prepare(block, blocks, threads, set ^= 1);
        go(pick());
        if (alive) report_deadlock();
        if (dynamic_memory) deallocate(dynamic_memory);
        while (static_count) deallocate(statics[--static_count].memory);
    }
    TSAN(__tsan_acquire(&finished);)
}

}  // namespace emu
