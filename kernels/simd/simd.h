// A vector of V_WIDTH floats and the few operations the kernels need, for AVX-512, AVX2, NEON and plain C (width 1).
//
// The kernels beside this file are written once against these names and compiled once per ISA; the build defines exactly one of
// RBE_SIMD_AVX512, RBE_SIMD_AVX2, RBE_SIMD_NEON, RBE_SIMD_SCALAR. RBE_KERNEL(gemm) is then gemm__avx512 and so on.
//
//     vf, vi             V_WIDTH floats, V_WIDTH int32
//     v_load_n(p, n)     the first n lanes from memory, the rest zero; v_store_n writes the first n lanes and touches nothing else
//     v_fma(a, b, c)     a*b + c; one rounding where the machine has it, two in plain C (a software fma would be 50 times slower)
//     vi_gather(p, o)    int32 at byte offsets o from p, unaligned
#ifndef RBE_SIMD_H
#define RBE_SIMD_H

#include <stdint.h>
#include <string.h>

#define V_INLINE static inline __attribute__((always_inline, unused))
#define RBE_JOIN2(a, b) a##__##b
#define RBE_JOIN(a, b) RBE_JOIN2(a, b)
#define RBE_KERNEL(name) RBE_JOIN(rbe_##name, RBE_ISA_NAME)

#if defined(RBE_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(RBE_SIMD_AVX2)
#include "simd_avx2.h"
#elif defined(RBE_SIMD_NEON)
#include "simd_neon.h"
#elif defined(RBE_SIMD_SCALAR)
#include "simd_scalar.h"
#else
#error "define one of RBE_SIMD_AVX512, RBE_SIMD_AVX2, RBE_SIMD_NEON, RBE_SIMD_SCALAR"
#endif

#endif
