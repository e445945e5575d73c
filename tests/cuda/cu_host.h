// The CUDA dialect of kernels/cuda/cu.h for a C++ compiler: every kernel runs on the CPU, one fiber per CUDA thread.
//
// Each macro or function here is the software twin of one instruction or keyword there. The runtime behind it (emu.cc, emu_warp.cc) is
// compiled without sanitizers; the kernels are compiled with whichever the build asks for, so AddressSanitizer sees reads past an array and
// ThreadSanitizer sees two threads of a kernel touch one address with no barrier between them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
typedef void *cudaStream_t;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emu {

struct Place {  // of the running CUDA thread
    uint3 thread, block;
    dim3 threads, blocks;
    unsigned lane, warp;
};
extern Place *now;

struct Site {  // where in the source
    const char *file;
    int line;
    const char *what;
};
enum class Warp { shfl, shfl_up, shfl_down, shfl_xor, ballot, all, any, match, sync, mma_bf16, mma_f16, ldmatrix };

int barrier(const Site &site, int predicate);  // how many threads had a predicate that is not zero
uint64_t warp_operation(const Site &site, Warp operation, unsigned mask, uint64_t value, int argument, int width);
void warp_mma(const Site &site, bool bf16, float *d, const uint32_t *a, const uint32_t *b, const float *c);
void warp_ldmatrix(const Site &site, int matrices, uint32_t *registers, const void *row);
void *dynamic_shared();
void *static_shared(const void *key, size_t size);
void cp_async(const Site &site, void *to, const void *from, int bytes);
void cp_commit();
void cp_wait(int groups);

// How the next launches run. order: 0 threads and blocks in order, 1 reversed, 2 at random by seed. capability: what the device says it is.
struct Options {
    uint64_t seed = 1;
    int order = 2, capability = 90;
};
extern Options options;
// Runs every thread of every block of a kernel. Shared memory starts as NaN. A deadlock or a misuse of a warp operation is printed with its
// place and ends the process with status 77.
void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()> &kernel);
constexpr size_t kSharedBytes = 99 << 10;  // the most that a block may ask for: that of sm_86, sm_89 and sm_120

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
T shuffle(const Site &site, Warp operation, unsigned mask, T value, int argument, int width = 32) {
    return from_bits<T>(warp_operation(site, operation, mask, to_bits(value), argument, width));
}

}  // namespace emu

#define EMU_SITE(what) (::emu::Site{__FILE__, __LINE__, what})
#define threadIdx (::emu::now->thread)
#define blockIdx (::emu::now->block)
#define blockDim (::emu::now->threads)
#define gridDim (::emu::now->blocks)

#define __syncthreads() ((void)::emu::barrier(EMU_SITE("__syncthreads"), 0))
#define __syncthreads_or(p) (::emu::barrier(EMU_SITE("__syncthreads_or"), !!(p)) != 0)
#define __syncwarp() ((void)::emu::warp_operation(EMU_SITE("__syncwarp"), ::emu::Warp::sync, ~0u, 0, 0, 32))
#define __shfl_sync(...) ::emu::shuffle(EMU_SITE("__shfl_sync"), ::emu::Warp::shfl, __VA_ARGS__)
#define __shfl_up_sync(...) ::emu::shuffle(EMU_SITE("__shfl_up_sync"), ::emu::Warp::shfl_up, __VA_ARGS__)
#define __shfl_down_sync(...) ::emu::shuffle(EMU_SITE("__shfl_down_sync"), ::emu::Warp::shfl_down, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emu::shuffle(EMU_SITE("__shfl_xor_sync"), ::emu::Warp::shfl_xor, __VA_ARGS__)
#define __ballot_sync(mask, p) ((unsigned)::emu::warp_operation(EMU_SITE("__ballot_sync"), ::emu::Warp::ballot, mask, !!(p), 0, 32))

#define __match_any_sync(mask, v) \
    ((unsigned)::emu::warp_operation(EMU_SITE("__match_any_sync"), ::emu::Warp::match, mask, ::emu::to_bits(v), 0, 32))
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned long long atomicMin(unsigned long long *at, unsigned long long value) {
    unsigned long long old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

#define CU_DEVICE static inline
#define CU_CONSTANT static const
#define CU_SHARED(T, name, dims)   \
    typedef T name##_shared dims;  \
    static char name##_key;        \
    name##_shared &name = *(name##_shared *)::emu::static_shared(&name##_key, sizeof(name##_shared))
#define CU_DYNAMIC_SHARED(T, name) T *name = (T *)::emu::dynamic_shared()
#define CU_UNROLL
#define CU_NO_UNROLL

#define cu_mma_bf16(d, a, b) ::emu::warp_mma(EMU_SITE("mma.bf16"), true, d, a, b, d)
#define cu_mma_f16(d, a, b) ::emu::warp_mma(EMU_SITE("mma.f16"), false, d, a, b, d)
#define cu_ldmatrix_x4(registers, row) ::emu::warp_ldmatrix(EMU_SITE("ldmatrix.x4"), 4, registers, row)
#define cu_cp_async16(to, from) ::emu::cp_async(EMU_SITE("cp.async"), to, from, 16)
#define cu_cp_commit() ::emu::cp_commit()
#define cu_cp_wait(groups) ::emu::cp_wait(groups)

static inline float cu_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return emu::from_bits<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    const float value = std::ldexp((float)(magnitude < 0x400u ? magnitude : (magnitude & 0x3FFu) | 0x400u),
                                   magnitude < 0x400u ? -24 : (int)(magnitude >> 10) - 25);
    return sign ? -value : value;
}
static inline uint16_t cu_f32_to_f16(float f) {  // to nearest, ties to even
    const uint32_t bits = emu::from_bits<uint32_t>(emu::to_bits(f)), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (magnitude < 0x38800000u)  // subnormal: multiples of 2^-24
        return (uint16_t)(sign | (uint32_t)std::nearbyint(std::ldexp(std::fabs(f), 24)));
    const uint32_t rebased = magnitude - 0x38000000u;
    return (uint16_t)(sign | (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13);
}
static inline uint16_t cu_f32_to_bf16(float f) {
    const uint32_t bits = emu::from_bits<uint32_t>(emu::to_bits(f));
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

static inline uint32_t cu_pack_bf16(float low, float high) { return cu_f32_to_bf16(low) | (uint32_t)cu_f32_to_bf16(high) << 16; }
static inline uint32_t cu_add_bf16x2(uint32_t a, uint32_t b) {
    const auto number = [](uint32_t half) { return emu::from_bits<float>((uint64_t)half << 16); };
    return cu_pack_bf16(number(a & 0xFFFFu) + number(b & 0xFFFFu), number(a >> 16) + number(b >> 16));
}
static inline uint32_t cu_add_f16x2(uint32_t a, uint32_t b) {
    return cu_f32_to_f16(cu_f16_to_f32((uint16_t)a) + cu_f16_to_f32((uint16_t)b)) |
           (uint32_t)cu_f32_to_f16(cu_f16_to_f32((uint16_t)(a >> 16)) + cu_f16_to_f32((uint16_t)(b >> 16))) << 16;
}

// A launcher returns 0 or CUDA's error code.
template <class... Parameters, class... Arguments>
int cu_launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
    if (shared_bytes > emu::kSharedBytes || blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || blocks.y > 65535 || blocks.z > 65535)
        return 1;  // cudaErrorInvalidValue
    emu::launch(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
    return 0;
}
static inline size_t cu_shared_limit() { return emu::kSharedBytes; }
static inline int cu_multiprocessors() { return 4; }
static inline int cu_capability() { return emu::options.capability; }
static inline bool cu_capturing(cudaStream_t) { return false; }
static inline int cu_clear(void *at, size_t bytes, cudaStream_t) {
    std::memset(at, 0, bytes);
    return 0;
}
static inline int cu_copy_to_host(void *to, const void *from, size_t bytes, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return 0;
}
static inline int cu_copy_to_device(void *to, const void *from, size_t bytes, cudaStream_t) {
    return cu_copy_to_host(to, from, bytes, nullptr);
}
