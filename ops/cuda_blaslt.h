// Dense products on the device by cuBLASLt, which is loaded when it is first needed: no build and no CPU user depends on it.
#ifndef RBE_OPS_CUDA_BLASLT_H
#define RBE_OPS_CUDA_BLASLT_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// A matrix as it lies in memory, row after row; the product sees it transposed where `transposed`.
typedef struct rbe_gemm_operand {
    const void *data;
    int64_t stride;        // between rows, in elements
    int64_t batch_stride;  // between matrices of a batch, in elements; 0: the same one
    bool transposed;
} rbe_gemm_operand;

// Types of a product beside those of rbe_dtype. Of int8 sums are int32, of e4m3 float32; a is not transposed, b is, and every dimension and
// address is a multiple of 16.
enum { RBE_GEMM_INT8 = 16, RBE_GEMM_E4M3, RBE_GEMM_INT32 };

// c[b] = a[b] b[b] (+ c[b]), b < batch: m x n from m x k and k x n; sums in float32, in float64 where out is.
typedef struct rbe_gemm {
    int64_t m, n, k, batch;
    rbe_gemm_operand a, b;
    void *c;
    int64_t c_stride, c_batch_stride;
    int32_t in, out;  // of a and b; of c: rbe_dtype or one of those above
    bool accumulate;
    bool tf32;  // float32 inputs may lose all but 10 bits of fraction
} rbe_gemm;

rbe_status rbe_cuda_gemm(const rbe_gemm *g, const rbe_device *device, rbe_error *err);

#ifdef __cplusplus
}
#endif
#endif
