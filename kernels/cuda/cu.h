// The dialect of CUDA that kernels/cuda is written in: macros for what only nvcc parses, and wrappers of one instruction each.
//
// tests/cuda/cu_host.h has the software twin of every name, so that a C++ compiler builds the same kernels and they run on a CPU, under
// sanitizers. Kernels therefore hold no `__shared__`, no `<<< >>>` and no inline assembly but here, and include no CUDA header: bfloat16
// and float16 travel as uint16_t. The build turns contraction off (-fmad=false): a fused multiply-add is written fmaf, as in the C kernels.
#pragma once

#include "../format.h"

#ifndef __CUDACC__
#include "cu_host.h"
#else

#include <cuda_runtime.h>
#include <stdint.h>

#define CU_DEVICE static __device__ __forceinline__
#define CU_CONSTANT static __device__ const
#define CU_SHARED(T, name, dims) __shared__ __align__(16) T name dims
#define CU_DYNAMIC_SHARED(T, name)                                  \
    extern __shared__ __align__(16) unsigned char cu_dynamic[];     \
    T *name = reinterpret_cast<T *>(cu_dynamic)
#define CU_UNROLL _Pragma("unroll")
#define CU_NO_UNROLL _Pragma("unroll 1")

#ifdef __CUDA_ARCH__
CU_DEVICE unsigned cu_shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d += a b on the tensor cores, 16 x 8 x 16, float32 sums
CU_DEVICE void cu_mma_bf16(float *d, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CU_DEVICE void cu_mma_f16(float *d, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// four 8 x 8 matrices of 16-bit numbers from shared memory; lanes 8k .. 8k+7 give the rows of matrix k
CU_DEVICE void cu_ldmatrix_x4(uint32_t *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(cu_shared_address(row))
                 : "memory");
}
// 16 bytes from global to shared memory, not waited for; both aligned to 16 bytes
CU_DEVICE void cu_cp_async16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cu_shared_address(to)), "l"(from) : "memory");
}
CU_DEVICE void cu_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#define cu_cp_wait(groups) asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory")

CU_DEVICE float cu_f16_to_f32(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
CU_DEVICE uint16_t cu_f32_to_f16(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
CU_DEVICE uint16_t cu_f32_to_bf16(float f) {
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
CU_DEVICE uint32_t cu_pack_bf16(float low, float high) {  // two bfloat16 in a word
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// a + b of two numbers in a word, rounded once; sm_80 has no addition of bfloat16, so it multiplies by 1 too
CU_DEVICE uint32_t cu_add_bf16x2(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return sum;
}
CU_DEVICE uint32_t cu_add_f16x2(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
#else  // the host pass of nvcc parses kernels and compiles none
__device__ void cu_mma_bf16(float *, const uint32_t *, const uint32_t *);
__device__ void cu_mma_f16(float *, const uint32_t *, const uint32_t *);
__device__ void cu_ldmatrix_x4(uint32_t *, const void *);
__device__ void cu_cp_async16(void *, const void *);
__device__ void cu_cp_commit();
#define cu_cp_wait(groups) ((void)(groups))
__device__ float cu_f16_to_f32(uint16_t);
__device__ uint16_t cu_f32_to_f16(float);
__device__ uint16_t cu_f32_to_bf16(float);
__device__ uint32_t cu_pack_bf16(float, float);
__device__ uint32_t cu_add_bf16x2(uint32_t, uint32_t);
__device__ uint32_t cu_add_f16x2(uint32_t, uint32_t);
#endif

// The launch's own error, 0 where there is none. More than 48 KiB of shared memory must be asked for kernel by kernel.
template <class... Parameters, class... Arguments>
static int cu_launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                     Arguments... arguments) {
    if (shared_bytes > (48 << 10)) {
        const cudaError_t refused =
            cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (refused != cudaSuccess) return (int)refused;
    }
    kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return (int)cudaGetLastError();
}

// Of the current device: the most shared memory that a block may ask for, and how many multiprocessors there are.
static inline int cu_attribute(cudaDeviceAttr attribute, int otherwise) {
    int device = 0, value = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    return known ? value : otherwise;
}
static inline size_t cu_shared_limit() { return (size_t)cu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10); }
static inline int cu_multiprocessors() { return cu_attribute(cudaDevAttrMultiProcessorCount, 1); }
static inline int cu_capability() {
    return 10 * cu_attribute(cudaDevAttrComputeCapabilityMajor, 0) + cu_attribute(cudaDevAttrComputeCapabilityMinor, 0);
}
static inline int cu_clear(void *at, size_t bytes, cudaStream_t stream) { return (int)cudaMemsetAsync(at, 0, bytes, stream); }
// Whether calls are being captured in a graph, so that nothing may wait.
static inline bool cu_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}
// Waits for the stream: for checks alone.
static inline int cu_copy_to_host(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    const cudaError_t failed = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
    return (int)(failed != cudaSuccess ? failed : cudaStreamSynchronize(stream));
}
static inline int cu_copy_to_device(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    const cudaError_t failed = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
    return (int)(failed != cudaSuccess ? failed : cudaStreamSynchronize(stream));
}
#endif

struct alignas(16) cu_vector16 {  // what one thread moves in one 16-byte access
    uint32_t word[4];
};
struct alignas(8) cu_vector8 {
    uint32_t word[2];
};

CU_DEVICE float cu_bits_to_f32(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } u;
    u.bits = bits;
    return u.value;
}
CU_DEVICE uint32_t cu_f32_to_bits(float value) {
    union {
        float value;
        uint32_t bits;
    } u;
    u.value = value;
    return u.bits;
}
CU_DEVICE float cu_bf16_to_f32(uint16_t h) { return cu_bits_to_f32((uint32_t)h << 16); }

// float8 e4m3fn: its exponent and fraction are those of a float16 eight binades of 2 up, but for NaN (all ones)
CU_DEVICE float cu_e4m3_to_f32(uint8_t b) {
    if ((b & 0x7Fu) == 0x7Fu) return cu_bits_to_f32(0x7FC00000u);
    return 256.0f * cu_f16_to_f32((uint16_t)((b & 0x80u) << 8 | (b & 0x7Fu) << 7));
}

// To nearest, ties to even; beyond 448 to 448. The instruction for it exists from sm_89 on.
CU_DEVICE uint8_t cu_f32_to_e4m3(float f) {
    const uint32_t bits = cu_f32_to_bits(f), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return 0x7F;
    if (magnitude >= 0x43E00000u) return (uint8_t)(sign | 0x7Eu);
    if (magnitude < 0x3C800000u)  // subnormal: multiples of 2^-9
        return (uint8_t)(sign | (uint32_t)rintf(cu_bits_to_f32(magnitude) * 512.0f));
    const uint32_t rebased = magnitude - 0x3C000000u;  // exponent 7 instead of 127
    return (uint8_t)(sign | (rebased + 0x7FFFFu + (rebased >> 20 & 1u)) >> 20);
}

// Activations of a type: bf16 and f16 are told apart by these, since both are uint16_t.
struct cu_bf16 {
    typedef uint16_t stored;
    static __device__ __forceinline__ float load(uint16_t h) { return cu_bf16_to_f32(h); }
    static __device__ __forceinline__ uint16_t store(float f) { return cu_f32_to_bf16(f); }
    static __device__ __forceinline__ void mma(float *d, const uint32_t *a, const uint32_t *b) { cu_mma_bf16(d, a, b); }
    static __device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) { return cu_add_bf16x2(a, b); }
};
struct cu_f16 {
    typedef uint16_t stored;
    static __device__ __forceinline__ float load(uint16_t h) { return cu_f16_to_f32(h); }
    static __device__ __forceinline__ uint16_t store(float f) { return cu_f32_to_f16(f); }
    static __device__ __forceinline__ void mma(float *d, const uint32_t *a, const uint32_t *b) { cu_mma_f16(d, a, b); }
    static __device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) { return cu_add_f16x2(a, b); }
};
struct cu_f32 {
    typedef float stored;
    static __device__ __forceinline__ float load(float f) { return f; }
    static __device__ __forceinline__ float store(float f) { return f; }
};
struct cu_f64 {
    typedef double stored;
    static __device__ __forceinline__ double load(double f) { return f; }
    static __device__ __forceinline__ double store(double f) { return f; }
};

template <class T>
CU_DEVICE T cu_warp_sum(T value) {
    CU_UNROLL
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
}
